"""DETR, Conditional-DETR and SMCA-DETR as modules: padding, initial values, recipe keys, one graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from samdetr.errors import SamdetrError
from samdetr.models import Detector, EncoderDecoder
from tests.models.test_sam_detr import TINY_BACKBONE, images_of, livened, small

SYSTEMS = ("detr_focal_r50_12ep", "conditional_detr_r50_12ep", "smca_detr_r50_12ep")
SMCA_MS = ("smca_detr_r50_ms_50ep", "smca_detr_r50_ms_attention_50ep")
DEFORMABLE = ("deformable_detr_r50_12ep", "deformable_detr_r50_ms_50ep", "deformable_detr_r50_ms_two_stage_50ep")


@pytest.mark.parametrize("recipe", [*SYSTEMS, "smca_detr_r50_dc5_12ep", *SMCA_MS, *DEFORMABLE])
def test_masked_padding_makes_an_image_independent_of_its_batch(recipe: str) -> None:
    model = livened(small(recipe, 'model.padding="masked"', 'model.backbone.weights="none"'))
    alone = model(*images_of((70, 101), height=70, width=101))
    together = model(*images_of((128, 96), (70, 101), height=128, width=101))
    bucket = model(*images_of((70, 101), height=192, width=160))
    for other in (together.boxes[:, 1:], bucket.boxes):
        torch.testing.assert_close(other, alone.boxes, rtol=0, atol=1e-9)
    for other in (together.logits[:, 1:], bucket.logits):
        torch.testing.assert_close(other, alone.logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_what_lies_in_masked_cells_is_not_attended(recipe: str) -> None:
    """Published padding reaches the valid cells through convolutions alone: attention leaves it out."""
    model = livened(small(recipe, *TINY_BACKBONE))
    images, sizes = images_of((64, 64), height=128, width=96)
    plain = model(images, sizes)

    def disturb(_: object, __: object, maps: tuple[Tensor]) -> tuple[Tensor]:
        features = maps[0].clone()
        features[:, :, 2:] += 3
        features[:, :, :, 2:] -= 5
        return (features,)

    handle = model.backbone.register_forward_hook(disturb)
    disturbed = model(images, sizes)
    handle.remove()
    torch.testing.assert_close(disturbed.boxes, plain.boxes, rtol=0, atol=1e-9)
    torch.testing.assert_close(disturbed.logits, plain.logits, rtol=0, atol=1e-8)
    assert (model(images, torch.tensor([[128, 96]])).boxes - plain.boxes).abs().max() > 1e-4


def outputs_at_the_start(model: Detector) -> tuple[Tensor, Tensor]:
    images, sizes = images_of((64, 96), height=64, width=96)
    outputs = model.eval()(images.float(), sizes)
    return outputs.logits, outputs.boxes


@pytest.mark.parametrize("recipe", [*SYSTEMS, *SMCA_MS, *DEFORMABLE])
def test_classes_begin_at_their_prior(recipe: str) -> None:
    logits, _ = outputs_at_the_start(small(recipe, *TINY_BACKBONE))
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.01)


def test_classes_of_a_softmax_begin_alike() -> None:
    logits, _ = outputs_at_the_start(small("detr_r50_500ep", *TINY_BACKBONE))
    assert logits.mean().abs().item() < 0.5


def test_boxes_of_conditional_detr_begin_at_their_reference_points() -> None:
    model = small("conditional_detr_r50_12ep", *TINY_BACKBONE)
    _, boxes = outputs_at_the_start(model)
    centre, _ = model.decoder.reference_points(model.decoder.query_positions, torch.float32)
    torch.testing.assert_close(boxes[..., :2], centre.sigmoid().expand(2, 1, -1, -1), rtol=0, atol=1e-5)
    assert (boxes[..., 2:] == 0.5).all()


@pytest.mark.parametrize("refine", ["", "_refine"])
def test_boxes_of_deformable_detr_begin_small_at_their_reference_points(refine: str) -> None:
    model = small(f"deformable_detr_r50_ms{refine}_50ep", *TINY_BACKBONE)
    _, boxes = outputs_at_the_start(model)
    _, _, reference = model.decoder.queries()
    torch.testing.assert_close(boxes[..., :2], reference.expand(2, 1, -1, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes[0, ..., 2:].logit(), torch.full((1, 9, 2), -2.0), rtol=0, atol=1e-5)


def test_boxes_of_the_first_stage_begin_where_it_proposes() -> None:
    """Cells of stride 8 propose a twentieth of the image, each level twice as much; those at the border nothing."""
    model = small("deformable_detr_r50_ms_two_stage_50ep", *TINY_BACKBONE)
    images, sizes = images_of((64, 128), height=64, width=128)
    outputs = model.eval()(images.float(), sizes)
    assert outputs.proposals is not None
    boxes = outputs.proposals.boxes[0]
    assert boxes.shape == (8 * 16 + 4 * 8 + 2 * 4 + 1 * 2, 4)
    expected = torch.tensor([[2.5 / 16, 1.5 / 8, 0.05, 0.05], [0.5 / 8, 3.5 / 4, 0.1, 0.1], [0.25, 0.5, 0.4, 0.4]])
    torch.testing.assert_close(boxes[[16 + 2, 128 + 24, 168]], expected, rtol=0, atol=1e-5)
    assert outputs.boxes[:, 0].flatten(1).shape == (2, 9 * 4)
    torch.testing.assert_close(outputs.boxes[0], outputs.boxes[1], rtol=0, atol=1e-4)
    wide = images_of((64, 6400), height=64, width=6400)  # 0.5 of 800 columns is less than a hundredth
    boxes = model(wide[0].float(), wide[1]).proposals.boxes[0]
    assert (boxes[[0, 7]] == 1).all()
    assert boxes[8, 0].item() == pytest.approx(8.5 / 800)


def test_a_first_stage_needs_as_many_cells_as_queries() -> None:
    model = small("deformable_detr_r50_ms_two_stage_50ep", *TINY_BACKBONE, "model.num_queries=200")
    images, sizes = images_of((64, 64), height=64, width=64)
    with pytest.raises(SamdetrError, match=r"have 85 cells, fewer than model.num_queries = 200, .* larger images"):
        model(images.float(), sizes)


def test_reference_points_learn_through_the_place_that_is_looked_at() -> None:
    """The sine code is differentiated (in SAM-DETR it is not)."""
    model = livened(small("conditional_detr_r50_12ep", *TINY_BACKBONE))
    outputs = model(*images_of((64, 96), height=64, width=96))
    outputs.boxes[..., 2:].sum().backward()  # sizes: not through the centre that is added
    gradient = model.decoder.reference_points.reference_head.last.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def gaussian_of(model: EncoderDecoder, extent: Tensor) -> Tensor:
    """The first layer's bias on an 8 x 12 map: [B, heads, Q, 8, 12]."""
    mask = torch.ones(1, 8, 12, dtype=torch.bool)
    positioned = model.decoder.query_positions[None]
    return model.decoder.layers[0].gaussian(positioned, None, extent, mask)[0].unflatten(-1, (8, 12))


def test_gaussians_begin_as_wide_as_published() -> None:
    """-(squared distance) / 8 in cells, from the same point in all rows and columns."""
    model = small("smca_detr_r50_12ep", *TINY_BACKBONE)
    bias = gaussian_of(model, torch.tensor([[12.0, 8.0]]))
    second = bias[..., 2:, :] - 2 * bias[..., 1:-1, :] + bias[..., :-2, :]
    torch.testing.assert_close(second, torch.full_like(second, -2 / 8), rtol=0, atol=1e-4)
    second = bias[..., 2:] - 2 * bias[..., 1:-1] + bias[..., :-2]
    torch.testing.assert_close(second, torch.full_like(second, -2 / 8), rtol=0, atol=1e-4)


def test_gaussian_by_hand() -> None:
    """One head at (3, 2) + (1, -1) = (4, 1) with scales (1, 2)."""
    model = small("smca_detr_r50_12ep", *TINY_BACKBONE, "model.heads=1", "model.num_queries=1")
    gaussian = model.decoder.layers[0].gaussian
    with torch.no_grad():
        for part in (gaussian.heads.centre.last, gaussian.heads.offset, gaussian.heads.scale):
            part.weight.zero_()
        gaussian.heads.centre.last.bias.copy_(torch.tensor([math.log(0.25 / 0.75), 0.0]))
        gaussian.heads.offset.bias.copy_(torch.tensor([1.0, -1.0]))
        gaussian.heads.scale.bias.copy_(torch.tensor([1.0, -2.0]))
    bias = gaussian_of(model, torch.tensor([[12.0, 4.0]]))[0, 0, 0]
    assert bias[1, 4].item() == pytest.approx(0, abs=1e-5)
    assert bias[1, 6].item() == pytest.approx(-4 / 8, abs=1e-5)
    assert bias[3, 4].item() == pytest.approx(-4 * 4 / 8, abs=1e-5)
    assert bias[0, 5].item() == pytest.approx(-(1 + 4) / 8, abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "key", "unit"),
    [
        ("smca_detr_r50_12ep", "published", 32),
        ("smca_detr_r50_12ep", "feature", 32),
        ("smca_detr_r50_dc5_12ep", "published", 32),
        ("smca_detr_r50_dc5_12ep", "feature", 16),
    ],
)
def test_unit_of_the_gaussians(recipe: str, key: str, unit: int) -> None:
    model = small(recipe, 'model.backbone.weights="none"', f'model.smca_stride="{key}"')
    extents: list[Tensor] = []
    handle = model.decoder.layers[1].gaussian.register_forward_pre_hook(lambda _, args: extents.append(args[2]))
    outputs_at_the_start(model)
    handle.remove()
    assert extents[0].tolist() == [[96 / unit, 64 / unit]]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["detr_r50_500ep", *SYSTEMS[1:], *SMCA_MS, *DEFORMABLE])
def test_forward_has_no_graph_break(recipe: str) -> None:
    model = small(recipe, *TINY_BACKBONE).eval()
    images, sizes = images_of((64, 96), (50, 70), height=64, width=96)
    torch.compiler.reset()  # all systems share the outermost forward, whose graphs are limited
    captured = torch.compile(model, fullgraph=True, backend="eager")(images.float(), sizes)
    plain = model(images.float(), sizes)
    assert torch.equal(captured.boxes, plain.boxes)
    assert torch.equal(captured.logits, plain.logits)
