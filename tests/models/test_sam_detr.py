"""SAM-DETR as a module: sizes, padding, initial values, and what a compiler needs of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdetr.models import EncoderDecoder, build_model
from samdetr.models.layers import MapGroupNorm, inverse_sigmoid
from samdetr.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = (
    "model.num_classes=5",
    "model.num_queries=9",
    "model.width=64",
    "model.heads=4",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.ffn=32",
)
TINY_BACKBONE = ('model.backbone.name="resnet18"', 'model.backbone.weights="none"', "model.backbone.width=16")


def small(recipe: str = "r50_smca_12ep", *overrides: str, seed: int = 0) -> EncoderDecoder:
    """A narrow model of a recipe with random weights."""
    torch.manual_seed(seed)
    return build_model(load_recipe(RECIPES / f"{recipe}.toml", [*SMALL, *overrides]).model)


def images_of(*sizes: tuple[int, int], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Noise pictures of the given sizes, zero-padded to height x width."""
    batch = torch.zeros(len(sizes), 3, height, width, dtype=torch.float64)
    for row, (h, w) in enumerate(sizes):
        generator = torch.Generator().manual_seed(h * 1000 + w)
        batch[row, :, :h, :w] = torch.randn(3, h, w, generator=generator, dtype=torch.float64)
    return batch, torch.tensor(sizes)


def livened(model: EncoderDecoder) -> EncoderDecoder:
    """Weights for which every part matters: BatchNorm shifts that make padding visible, boxes that spread."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_mean" in name or (".bn" in name and name.endswith("bias")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
            if name.endswith(("offsets.weight", "attention.weights.weight")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
            if ".box_head" in name and name.endswith("4.weight"):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.double().eval()


@pytest.mark.parametrize(
    ("recipe", "parameters", "trainable"),
    [
        ("r50_12ep", 58_296_458, 58_074_058),
        ("r50_50ep", 58_295_946, 58_073_546),
        ("r50_smca_12ep", 58_345_706, 58_123_306),
        ("r50_smca_50ep", 58_345_194, 58_122_794),
        ("r50_dc5_12ep", 58_296_458, 58_074_058),
        ("r50_dc5_50ep", 58_295_946, 58_073_546),
        ("r50_dc5_smca_12ep", 58_345_706, 58_123_306),
        ("r50_dc5_smca_50ep", 58_345_194, 58_122_794),
    ],
)
def test_parameter_counts_of_every_recipe(recipe: str, parameters: int, trainable: int) -> None:
    with torch.device("meta"):
        model = build_model(load_recipe(RECIPES / f"{recipe}.toml").model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("recipe", ["r50_smca_12ep", "r50_dc5_50ep"])
def test_masked_padding_makes_an_image_independent_of_its_batch(recipe: str) -> None:
    model = livened(small(recipe, 'model.padding="masked"', 'model.backbone.weights="none"'))
    alone = model(*images_of((70, 101), height=70, width=101))
    together = model(*images_of((128, 96), (70, 101), height=128, width=101))
    bucket = model(*images_of((70, 101), height=192, width=160))
    for other in (together.boxes[:, 1:], bucket.boxes):
        torch.testing.assert_close(other, alone.boxes, rtol=0, atol=1e-9)
    torch.testing.assert_close(bucket.logits, alone.logits, rtol=0, atol=1e-8)
    torch.testing.assert_close(together.logits[:, 1:], alone.logits, rtol=0, atol=1e-8)


def test_published_padding_leaks_and_an_unpadded_image_is_the_same_either_way() -> None:
    published, masked = (
        livened(small("r50_smca_12ep", f'model.padding="{padding}"', *TINY_BACKBONE))
        for padding in ("published", "masked")
    )
    exact = images_of((96, 128), height=96, width=128)
    torch.testing.assert_close(published(*exact).boxes, masked(*exact).boxes, rtol=0, atol=1e-9)
    padded = images_of((96, 128), height=160, width=160)
    assert (published(*padded).boxes - published(*exact).boxes).abs().max() > 1e-4


def test_initial_predictions() -> None:
    model = small("r50_smca_12ep", *TINY_BACKBONE).eval()
    outputs = model(
        *(part.float() if part.is_floating_point() else part for part in images_of((64, 64), height=64, width=64))
    )
    # class prior 0.01, box offsets zero: every layer predicts its references, which stay where they began
    assert outputs.logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.01)
    expected = model.decoder.reference_boxes.sigmoid().clamp(1e-5, 1 - 1e-5)
    torch.testing.assert_close(outputs.boxes[-1, 0], expected, rtol=0, atol=1e-5)
    assert model.decoder.layers[0].aligner.point_mlp.last.weight.abs().max() > 0.01  # Xavier overwrites the zero start
    assert model.decoder.layers[0].aligner.point_mlp.last.bias.abs().max() == 0


def test_initial_scale_of_the_gaussian() -> None:
    bias = (
        small("r50_smca_12ep", *TINY_BACKBONE, "model.smca_initial_scale=3")
        .decoder.layers[1]
        .aligner.point_mlp.last.bias
    )
    assert bias.tolist() == [0.0] * 8 + [3.0] * 8


def test_references_of_later_layers_carry_no_gradient() -> None:
    model = livened(small("r50_smca_12ep", *TINY_BACKBONE))
    images = images_of((64, 96), height=64, width=96)
    outputs = model(*images)
    (last,) = torch.autograd.grad(outputs.boxes[-1].sum(), model.decoder.reference_boxes, retain_graph=True)
    (first,) = torch.autograd.grad(outputs.boxes[0].sum(), model.decoder.reference_boxes)
    assert first.abs().max() > 0
    # through the content of layer 0 (SMCA term) only: far less than the direct path
    assert last.abs().max() < 0.2 * first.abs().max()


@pytest.mark.parametrize(("stages", "stride"), [(2, 8), (3, 16), (4, 32)])
def test_backbone_depth_and_width_are_values(stages: int, stride: int) -> None:
    model = small(
        "r50_12ep",
        *TINY_BACKBONE,
        f"model.backbone.stages={stages}",
        'model.backbone.norm="batch"',
        "model.backbone.frozen_stages=0",
    )
    (features,) = model.backbone(torch.zeros(1, 3, 67, 95), torch.tensor([[67, 95]]))
    assert model.backbone.strides == (stride,)
    assert features.shape == (1, 16 * 2 ** (stages - 1), -(-67 // stride), -(-95 // stride))
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


def test_masked_group_norm_is_group_norm_of_the_valid_cells() -> None:
    torch.manual_seed(0)
    norm = MapGroupNorm(4, 16).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0], mask[1, :3, :4] = True, True
    out = norm(x, mask)
    torch.testing.assert_close(out[0], norm(x)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[1, :3, :4], norm(x[1:, :3, :4])[0], rtol=0, atol=1e-12)


def test_inverse_sigmoid_clamps_both_sides() -> None:
    x = torch.tensor([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0], dtype=torch.float64)
    low = torch.log(torch.tensor(1e-5, dtype=torch.float64)).item()
    expected = [low, low, -1.0986122886681098, 0.0, -low, -low]
    assert inverse_sigmoid(x).tolist() == pytest.approx(expected)


def test_forward_has_no_graph_break() -> None:
    """No data-dependent Python and no opaque call: one graph for the whole model."""
    model = small("r50_smca_12ep", *TINY_BACKBONE).eval()
    images, sizes = images_of((64, 96), (50, 70), height=64, width=96)
    captured = torch.compile(model, fullgraph=True, backend="eager")(images.float(), sizes)
    plain = model(images.float(), sizes)
    assert torch.equal(captured.boxes, plain.boxes)
    assert torch.equal(captured.logits, plain.logits)
