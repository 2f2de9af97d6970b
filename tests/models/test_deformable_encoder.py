"""The image encoder of several maps: sampled places, padding, what becomes of the levels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from samdetr.models.backbone import Backbone
from samdetr.models.deformable_encoder import (
    POINTS,
    DeformableAttention,
    DeformableEncoderLayer,
    Pyramid,
    PyramidEncoder,
    PyramidImageEncoder,
)
from samdetr.models.layers import LayerSizes
from samdetr.models.position import MapGeometry, sine_map, valid_mask
from tests.models.test_sam_detr import images_of

WIDTH, HEADS = 64, 4


def image_encoder(*, levels: int = 4, mask_padding: bool, dilation: bool = False) -> PyramidImageEncoder:
    """An image encoder on resnet50's last stages, narrow, in float64, with weights for which every part matters."""
    torch.manual_seed(0)
    own = min(levels, 3)
    backbone = Backbone(width=8, dilation=dilation, levels=own, mask_padding=mask_padding)
    projections: list[nn.Module] = [nn.Linear(channels, WIDTH) for channels in backbone.channels]
    if levels == 4:
        projections.append(nn.Conv2d(backbone.channels[-1], WIDTH, kernel_size=3, stride=2, padding=1))
    sizes = LayerSizes(width=WIDTH, heads=HEADS, ffn=32, dropout=0.0)
    transformer = PyramidEncoder(DeformableEncoderLayer(sizes, levels=levels) for _ in range(2))
    model = PyramidImageEncoder(
        backbone,
        nn.ModuleList(projections),
        transformer,
        layers=transformer.layers,
        width=WIDTH,
        group_norm=True,
        mask_padding=mask_padding,
    )
    model.reset_parameters()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_mean" in name or (".bn" in name and name.endswith("bias")):
                value.copy_(torch.randn(value.shape) * 0.3)
            if name.endswith(("offsets.weight", "weights.weight")):
                value.copy_(torch.randn(value.shape) * 0.2)
    return model.double().eval()


def valid_part(memory: Tensor, pyramid: Pyramid, image: int) -> Tensor:
    return memory[image][pyramid.mask[image]]


@pytest.mark.parametrize(("levels", "dilation"), [(4, False), (1, True)])
def test_masked_padding_makes_an_image_independent_of_its_batch(levels: int, dilation: bool) -> None:
    model = image_encoder(levels=levels, dilation=dilation, mask_padding=True)
    size = (70, 101)
    memory, _, pyramid, _ = model(*images_of(size, height=70, width=101))
    assert pyramid.mask.all()
    together, _, other, _ = model(*images_of((128, 96), size, height=128, width=101))
    torch.testing.assert_close(valid_part(together, other, 1), memory[0], rtol=0, atol=1e-9)
    bucket, _, other, _ = model(*images_of(size, height=192, width=160))
    torch.testing.assert_close(valid_part(bucket, other, 0), memory[0], rtol=0, atol=1e-9)
    assert (bucket[~other.mask] == 0).all()


def test_published_padding_leaks() -> None:
    model = image_encoder(mask_padding=False)
    memory, *_ = model(*images_of((64, 96), height=64, width=96))
    bucket, _, pyramid, _ = model(*images_of((64, 96), height=128, width=160))
    assert (valid_part(bucket, pyramid, 0) - memory[0]).abs().max() > 1e-3


def test_what_lies_in_masked_cells_is_not_read() -> None:
    model = image_encoder(mask_padding=False)
    images, sizes = images_of((64, 96), height=128, width=160)
    x, position, pyramid = model.embed(*maps_of(model, images, sizes))
    plain = model.transformer(x, position, pyramid)
    x = torch.where(pyramid.mask[..., None], x, x + 3)
    disturbed = model.transformer(x, position, pyramid)
    assert torch.equal(disturbed[pyramid.mask], plain[pyramid.mask])
    assert (disturbed - plain).abs().max() > 1e-2


def maps_of(
    model: PyramidImageEncoder, images: Tensor, sizes: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, tuple[int, int]]:
    maps = model.backbone(images, sizes)
    return (*maps, model.embed.projections[-1](maps[-1])), sizes, (images.shape[2], images.shape[3])


def test_levels_are_told_apart_and_placed() -> None:
    model = image_encoder(mask_padding=False)
    images, sizes = images_of((100, 120), height=128, width=160)
    _, position, pyramid = model.embed(*maps_of(model, images, sizes))
    assert pyramid.spatial_shapes == ((16, 20), (8, 10), (4, 5), (2, 3))
    assert pyramid.sizes.tolist() == [[20, 16], [10, 8], [5, 4], [3, 2]]
    assert [geometry.valid.tolist() for geometry in pyramid.maps] == [[[13, 15]], [[7, 8]], [[4, 4]], [[2, 3]]]
    assert pyramid.ratios[0].tolist() == [[15 / 20, 13 / 16], [8 / 10, 7 / 8], [4 / 5, 1], [1, 1]]
    third = slice(16 * 20 + 8 * 10, 16 * 20 + 8 * 10 + 4 * 5)
    code = sine_map(pyramid.maps[2].valid, 4, 5, WIDTH).double() + model.embed.level_embed[2]
    assert torch.equal(position[:, third], code.flatten(1, 2))
    assert pyramid.points[0, third][5 * 2 + 1].tolist() == [1.5 / 4, 2.5 / 4]
    assert pyramid.mask[0, third].view(4, 5)[:, 4].tolist() == [False] * 4


def flat_pyramid(height: int, width: int, valid: tuple[int, int]) -> Pyramid:
    """One level, one image."""
    cells = torch.tensor([valid])
    mask = valid_mask(cells, height, width)
    ratio = torch.tensor([[[valid[1] / width, valid[0] / height]]], dtype=torch.float64)
    sizes = torch.tensor([[width, height]], dtype=torch.float64)
    centres = torch.zeros(1, height * width, 2, dtype=torch.float64)
    return Pyramid(((height, width),), (MapGeometry(cells, mask, None),), mask.flatten(1), centres, sizes, ratio)


def test_attention_reads_where_its_offsets_point() -> None:
    """One head; its points begin 1, 2, 3, 4 cells to the right of the reference, each a quarter of the sum."""
    attention = DeformableAttention(width=2, heads=1, levels=1).double()
    with torch.no_grad():
        attention.value.weight.copy_(torch.eye(2))
        attention.out.weight.copy_(torch.eye(2))
    pyramid = flat_pyramid(4, 10, (4, 8))
    memory = torch.randn(1, 4, 10, 2, dtype=torch.float64)
    query, reference = torch.zeros(1, 1, 2).double(), torch.tensor([[[2.5 / 8, 1.5 / 4]]], dtype=torch.float64)
    found = attention(query, reference, memory.flatten(1, 2), pyramid)
    torch.testing.assert_close(found[0, 0], memory[0, 1, 3:7].mean(0), rtol=0, atol=1e-12)
    reference = torch.tensor([[[6.5 / 8, 1.5 / 4]]], dtype=torch.float64)
    found = attention(query, reference, memory.flatten(1, 2), pyramid)
    torch.testing.assert_close(found[0, 0], memory[0, 1, 7] / 4, rtol=0, atol=1e-12)  # the rest is padding and nothing


def test_offsets_of_a_box_are_parts_of_its_size() -> None:
    """The fourth point lies on the border of the box, the second half as far from its centre."""
    attention = DeformableAttention(width=2, heads=1, levels=1).double()
    with torch.no_grad():
        attention.value.weight.copy_(torch.eye(2))
        attention.out.weight.copy_(torch.eye(2))
        attention.weights.bias.copy_(torch.tensor([-math.inf, 0.0, -math.inf, 0.0]))
    pyramid = flat_pyramid(4, 10, (4, 8))
    memory = torch.randn(1, 4, 10, 2, dtype=torch.float64)
    box = torch.tensor([[[1.5 / 8, 2.5 / 4, 8 / 8, 0.3]]], dtype=torch.float64)  # half of its width is four cells
    found = attention(torch.zeros(1, 1, 2).double(), box, memory.flatten(1, 2), pyramid)
    torch.testing.assert_close(found[0, 0], (memory[0, 2, 3] + memory[0, 2, 5]) / 2, rtol=0, atol=1e-12)


def test_heads_begin_in_directions_of_a_compass() -> None:
    attention = DeformableAttention(width=64, heads=8, levels=3)
    offsets = attention.offsets.bias.view(8, 3, POINTS, 2)
    torch.testing.assert_close(offsets[2, :, 2], torch.tensor([0.0, 3.0]).expand(3, 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(offsets[1, :, 3], torch.tensor([4.0, 4.0]).expand(3, 2), rtol=0, atol=1e-5)
    model = image_encoder(mask_padding=False)
    assert model.transformer.layers[1].attention.offsets.bias.abs().max() == POINTS  # Xavier's start comes before
