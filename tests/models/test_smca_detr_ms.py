"""The parts of multi-scale SMCA-DETR by themselves, and the recipe keys that choose its form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from samdetr.errors import CheckpointError
from samdetr.models.layers import Attention
from samdetr.models.official import to_official
from samdetr.models.position import MapGeometry, valid_mask
from samdetr.models.smca_detr_ms import Gaussians, ScaleAttention, ScaleModulation, upsample
from tests.models.test_sam_detr import TINY_BACKBONE, images_of, small

RELEASED, PAPER = "smca_detr_r50_ms_50ep", "smca_detr_r50_ms_attention_50ep"


def geometry(valid: tuple[int, int], height: int, width: int, *, masked: bool) -> MapGeometry:
    cells = torch.tensor([valid])
    return MapGeometry(cells, valid_mask(cells, height, width), cells if masked else None)


def test_published_enlarging_puts_corners_on_corners() -> None:
    features = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = (geometry((3, 4), 4, 5, masked=False), geometry((5, 7), 7, 9, masked=False))
    expected = functional.interpolate(features, size=(7, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(upsample(features, *maps), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (1, 2), (1, 1)])
def test_masked_enlarging_is_that_of_the_valid_cells(size: tuple[int, int]) -> None:
    features = torch.randn(1, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    height, width = size
    fine = (2 * height - 1, 2 * width)
    maps = (geometry(size, 4, 5, masked=True), geometry(fine, 8, 9, masked=True))
    expected = functional.interpolate(features[..., :height, :width], size=fine, mode="bilinear", align_corners=True)
    found = upsample(features, *maps)
    assert found.shape == (1, 3, 8, 9)
    torch.testing.assert_close(found[..., : fine[0], : fine[1]], expected, rtol=0, atol=1e-12)


def test_places_are_not_rounded_with_the_features() -> None:
    """A ramp over 150 cells in bfloat16, as autocast gives it, keeps its slope."""
    ramp = torch.arange(75.0).expand(1, 1, 4, 75)
    maps = (geometry((4, 75), 4, 75, masked=False), geometry((8, 150), 8, 150, masked=False))
    found = upsample(ramp.bfloat16(), *maps)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, upsample(ramp, *maps).bfloat16(), rtol=0.004, atol=1e-4)


def test_gaussians_by_hand() -> None:
    """One head, centre at (96, 64) pixels, offsets (1, -1) cells, scales (1, 2), on maps of stride 16 and 64."""
    gaussians = Gaussians(width=32, heads=1, strides=(16, 64), first=True)
    assert gaussians.heads.centre is not None
    with torch.no_grad():
        for part in (gaussians.heads.centre.last, gaussians.heads.offset, gaussians.heads.scale, gaussians.weigh):
            part.weight.zero_()
        gaussians.heads.centre.last.bias.zero_()
        gaussians.heads.offset.bias.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        gaussians.heads.scale.bias.copy_(torch.tensor([1.0, -2.0, 1.0, -2.0]))
        gaussians.weigh.bias.copy_(torch.tensor([0.0, 3.0]).log1p())
    masks = [torch.ones(1, 8, 12, dtype=torch.bool), torch.ones(1, 2, 3, dtype=torch.bool)]
    masks[1][:, :, 2] = False
    biases, weights, *_ = gaussians(torch.zeros(1, 1, 32), None, torch.tensor([[192.0, 128.0]]), masks)
    assert weights.flatten().tolist() == pytest.approx([0.2, 0.8])
    fine, coarse = biases[0].view(8, 12), biases[1].view(2, 3)
    assert fine[3, 7].item() == pytest.approx(0, abs=1e-5)
    assert fine[5, 8].item() == pytest.approx(-(1 + 4 * 4) / 16, abs=1e-5)
    assert coarse[1, 1].item() == pytest.approx(-(1.5**2 + 4 * 1) / 4, abs=1e-5)
    assert (coarse[:, 2] == -torch.inf).all()


def test_a_query_adds_what_it_finds_in_each_map() -> None:
    torch.manual_seed(0)
    plain = Attention(width=32, heads=4, dropout=0.0)
    torch.nn.init.normal_(plain.out_proj.bias)
    several = ScaleAttention(width=32, heads=4, dropout=0.0)
    several.attention.load_state_dict(plain.state_dict())
    query, key, value = torch.randn(2, 3, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    biases = [torch.randn(2, 4, 3, 6), torch.randn(2, 4, 3, 3)]
    first = plain(query, key[:, :6], value[:, :6], biases[0])
    second = plain(query, key[:, 6:], value[:, 6:], biases[1])
    share = torch.rand(2, 3, 1)
    found = several(query, key, value, ScaleModulation(biases, torch.cat((share, 1 - share), dim=-1)))
    torch.testing.assert_close(found, share * first + (1 - share) * second, rtol=0, atol=1e-5)


def test_only_the_middle_layer_of_the_paper_s_encoder_crosses_maps() -> None:
    model = small(PAPER, *TINY_BACKBONE, "model.encoder_layers=3").eval()
    images, sizes = images_of((64, 96), height=64, width=96)
    seen: list[list[int]] = [[], [], []]
    for cells, layer in zip(seen, model.encoder.transformer.layers, strict=True):
        layer.register_forward_pre_hook(lambda _, args, cells=cells: cells.append(args[0].shape[1]))
    model(images.float(), sizes)
    assert seen == [[24, 6, 2], [32], [24, 6, 2]]


def test_the_decoder_sees_the_finest_released_map_at_half_its_size() -> None:
    model = small(RELEASED, *TINY_BACKBONE).eval()
    images, sizes = images_of((64, 96), height=64, width=96)
    masks: list[list[tuple[int, ...]]] = []
    model.decoder.layers[1].gaussian.register_forward_pre_hook(
        lambda _, args: masks.append([tuple(mask.shape[1:]) for mask in args[3]])
    )
    model(images.float(), sizes)
    assert masks == [[(4, 6), (4, 6), (2, 3), (1, 2)]]
    assert model.decoder.layers[0].gaussian.strides == (16, 16, 32, 64)


def test_each_image_has_weights_of_its_own() -> None:
    """The released code gives all images those of the first."""
    model = small(RELEASED, *TINY_BACKBONE).double().eval()
    images, sizes = images_of((64, 96), (64, 96), height=64, width=96)
    images[1] = images[1].flip(0)
    alone = model(images[1:], sizes[1:])
    torch.testing.assert_close(model(images, sizes).boxes[:, 1:], alone.boxes, rtol=0, atol=1e-10)


def test_the_paper_s_form_has_no_published_layout() -> None:
    with pytest.raises(
        CheckpointError, match=r'"attention" has no published layout: set model\.scale_encoder = "convolution"'
    ):
        to_official(small(PAPER, *TINY_BACKBONE))


def test_every_weight_gets_a_gradient() -> None:
    for recipe in (RELEASED, PAPER):
        model = small(recipe, *TINY_BACKBONE, "model.encoder_layers=3")
        images, sizes = images_of((64, 96), (128, 70), height=128, width=96)
        outputs = model(images.float(), sizes)
        total: Tensor = outputs.boxes.square().sum() + outputs.logits.square().sum()
        total.backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
