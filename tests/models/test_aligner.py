"""The aligner and what the paper compares it with, against torchvision's RoIAlign and torch's grid_sample."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

import samdetr_kernels
from samdetr.models import EncoderDecoder
from samdetr.models.aligner import AlignedQueries, PooledAligner, SemanticAligner, rois_from_boxes
from samdetr.models.position import MapGeometry, sine_points, valid_mask
from samdetr.models.sam_detr import CrossAttention
from samdetr.recipe import load_recipe
from tests.models.test_sam_detr import RECIPES, images_of, small

WIDTH, QUERIES, VALID = 32, 5, torch.tensor([[9, 7], [6, 12]])


class Inputs:
    """A map of 9 x 12 cells, two images with other valid sizes, boxes inside and across the border."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, QUERIES, WIDTH, generator=generator, dtype=torch.float64)
        self.boxes = torch.rand(2, QUERIES, 4, generator=generator, dtype=torch.float64) * 0.6 + 0.2
        self.memory = torch.randn(2, 9, 12, WIDTH, generator=generator, dtype=torch.float64)
        self.geometry = MapGeometry(VALID, valid_mask(VALID, 9, 12), None)

    def align(self, aligner: nn.Module) -> AlignedQueries:
        return aligner(self.x, self.boxes, self.memory, self.geometry)

    def bins(self, boxes: Tensor, features: Tensor) -> Tensor:
        """torchvision's RoIAlign of (cx, cy, w, h) in [0, 1] of the valid image: [B, Q, C, 7, 7]."""
        cells = VALID.flip(-1)[:, None].repeat(1, 1, 2)
        corners = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), dim=-1) * cells
        pooled = roi_align(features.permute(0, 3, 1, 2), list(corners), 7, sampling_ratio=-1, aligned=True)
        return pooled.unflatten(0, (2, QUERIES))


def aligner_of(*, points: int, reweighting: bool = False, whole_image: bool = False) -> SemanticAligner:
    torch.manual_seed(0)
    return SemanticAligner(width=WIDTH, points=points, reweighting=reweighting, whole_image=whole_image).double()


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_pooled_queries(mode: Literal["mean", "max"]) -> None:
    inputs = Inputs()
    memory = inputs.memory.requires_grad_()
    found, bins = inputs.align(PooledAligner(mode)), inputs.bins(inputs.boxes, memory)
    expected = bins.mean((-2, -1)) if mode == "mean" else bins.amax((-2, -1))
    torch.testing.assert_close(found.content[:, :, 0], expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(out, memory, upstream)[0] for out in (found.content[:, :, 0], expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    centres = inputs.boxes[..., :2]
    torch.testing.assert_close(found.position[:, :, 0], sine_points(centres, WIDTH).double(), rtol=0, atol=0)
    assert torch.equal(found.locations[:, :, 0], centres)


def test_the_first_of_equal_bins_has_the_gradient_of_the_maximum() -> None:
    inputs = Inputs()
    inputs.memory = torch.zeros_like(inputs.memory).requires_grad_()
    rois = rois_from_boxes(inputs.boxes, inputs.geometry)
    content = inputs.align(PooledAligner("max")).content
    (found,) = torch.autograd.grad(content.sum(), inputs.memory)
    (expected,) = torch.autograd.grad(
        samdetr_kernels.roi_align(inputs.memory, rois, 7, VALID)[:, :, 0, 0].sum(), inputs.memory
    )
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_nan_shows_in_pooled_queries(mode: Literal["mean", "max"]) -> None:
    inputs = Inputs()
    rois = rois_from_boxes(inputs.boxes, inputs.geometry)
    inputs.memory[0, 3, 2, 5] = torch.nan
    hit = samdetr_kernels.roi_align(inputs.memory, rois, 7, VALID).isnan().any(2).any(2)  # [B, Q, C]
    assert hit[0, :, 5].any() and not hit[1].any()
    assert torch.equal(inputs.align(PooledAligner(mode)).content[:, :, 0].isnan(), hit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_pooled_queries_are_rounded_once_compiled_and_under_autocast_too(
    mode: Literal["mean", "max"], dtype: torch.dtype
) -> None:
    inputs = Inputs()
    inputs.x, inputs.boxes = inputs.x.float(), inputs.boxes.float()
    inputs.memory = inputs.memory.to(dtype).requires_grad_()
    aligner = PooledAligner(mode)
    rounded = [inputs.align(aligner).content]
    compiled = torch.compile(aligner, fullgraph=True, backend="aot_eager")
    rounded.append(inputs.align(compiled).content)
    with torch.autocast("cpu", torch.bfloat16):
        rounded.append(inputs.align(aligner).content)
    inputs.memory, memory = inputs.memory.float(), inputs.memory
    exact = inputs.align(aligner).content
    grads = [torch.autograd.grad(out.float().square().sum(), memory, retain_graph=True)[0] for out in rounded]
    for found, grad in zip(rounded, grads, strict=True):
        assert torch.equal(found, exact.to(dtype)) and torch.equal(grad, grads[0])


@pytest.mark.parametrize("points", [1, 4])
@pytest.mark.parametrize("whole_image", [False, True])
def test_points_are_predicted_from_the_box_and_sampled_in_their_range(points: int, whole_image: bool) -> None:
    inputs, aligner = Inputs(), aligner_of(points=points, whole_image=whole_image)
    found = inputs.align(aligner)
    reduced = functional.linear(inputs.memory, aligner.reduce.weight)
    bins = functional.relu(inputs.bins(inputs.boxes, reduced) + aligner.reduce.bias[:, None, None])
    numbers = aligner.point_mlp(bins.permute(0, 1, 3, 4, 2).flatten(2)).unflatten(-1, (points, 2)).tanh()
    searched = torch.tensor([0.5, 0.5, 1, 1]).double().expand_as(inputs.boxes) if whole_image else inputs.boxes
    sampled = functional.grid_sample(
        inputs.bins(searched, inputs.memory).flatten(0, 1), numbers.flatten(0, 1)[:, None], align_corners=False
    )
    expected = sampled[:, :, 0].transpose(1, 2).unflatten(0, (2, QUERIES))
    torch.testing.assert_close(found.content, expected, rtol=1e-10, atol=1e-10)
    locations = searched[:, :, None, :2] + searched[:, :, None, 2:] * numbers / 2
    torch.testing.assert_close(found.locations, locations, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.position, sine_points(locations, WIDTH).double(), rtol=0, atol=1e-6)


def test_reweighting_multiplies_by_the_gates_of_the_previous_query() -> None:
    inputs, aligner = Inputs(), aligner_of(points=4, reweighting=True)
    plain = aligner_of(points=4)
    plain.load_state_dict({key: value for key, value in aligner.state_dict().items() if "gate" not in key})
    weighted, bare = inputs.align(aligner), inputs.align(plain)
    assert aligner.content_gate is not None
    assert aligner.position_gate is not None
    for name, gate in (("content", aligner.content_gate), ("position", aligner.position_gate)):
        factor = gate(inputs.x).sigmoid().unflatten(-1, (4, WIDTH))
        torch.testing.assert_close(getattr(weighted, name), getattr(bare, name) * factor, rtol=1e-12, atol=0)


def test_one_query_for_all_heads_is_attention_with_split_channels() -> None:
    inputs = Inputs()
    torch.manual_seed(0)
    attention = CrossAttention(width=WIDTH, heads=4, dropout=0.0).double()
    aligned = inputs.align(PooledAligner("mean"))
    position = torch.randn(inputs.memory.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = attention(aligned, inputs.memory, position, inputs.geometry)
    query = attention.query_content(aligned.content) + attention.query_position(aligned.position)
    key = attention.key_content(inputs.memory) + attention.key_position(position)
    value = attention.value(inputs.memory)
    expected = torch.zeros_like(found)
    for image, (height, width) in enumerate(VALID.tolist()):
        for head in range(4):
            own = slice(head * 8, head * 8 + 8)
            cells = [part[image, :height, :width, own].reshape(-1, 8) for part in (key, value)]
            scores = query[image, :, 0, own] @ cells[0].T / 8**0.5
            expected[image, :, own] = scores.softmax(-1) @ cells[1]
    torch.testing.assert_close(found, attention.out(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["average", "max", "1point", "1point_reweighted", "8points", "whole_image"])
def test_an_ablation_differs_from_its_recipe_in_the_aligner_alone(name: str) -> None:
    """The recipes say what they mean: the model, and that every parameter of it learns."""
    full, ablated = (load_recipe(RECIPES / f"{one}.toml") for one in ("r50_12ep", f"r50_12ep_{name}"))
    keys = ("resampling", "reweighting", "search_range")
    before, after = (recipe.model.model_dump() for recipe in (full, ablated))
    assert {key for key in before if before[key] != after[key]} <= set(keys)
    rows = {
        "average": ("average", True, "box"),
        "max": ("max", True, "box"),
        "1point": ("point", False, "box"),
        "1point_reweighted": ("point", True, "box"),
        "8points": ("points", False, "box"),
        "whole_image": ("points", True, "image"),
    }
    assert tuple(after[key] for key in keys) == rows[name]
    model = small(f"r50_12ep_{name}")
    assert isinstance(model, EncoderDecoder)
    pooled = name in ("average", "max")
    for layer in model.decoder.layers:
        assert isinstance(layer.aligner, PooledAligner if pooled else SemanticAligner)
        assert pooled or layer.aligner.points == (1 if name.startswith("1") else 4)
        assert pooled or (layer.aligner.content_gate is None) == (name in ("1point", "8points"))
        assert pooled or layer.aligner.whole_image == (name == "whole_image")
    images, sizes = images_of((64, 96), (50, 60), height=64, width=96)
    outputs = model.double()(images, sizes)
    (outputs.boxes.square().sum() + outputs.logits.square().sum()).backward()
    without = {key for key, value in model.named_parameters() if value.requires_grad and value.grad is None}
    assert not without
