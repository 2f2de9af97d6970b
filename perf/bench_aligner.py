"""The whole resampling of one decoder layer: features of 7x7 bins for the point branch, and of 8 salient points.

Published: RoIAlign of 256 channels twice, a 1x1 convolution of the bins and ReLU, grid_sample at the points. Ours: the
map is projected to 64 channels and aligned, the points are sampled on the map. Same weights, same results. The point
branch's MLP between the two is the same in both and left out: ``source`` is what its last layer would give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear, relu

from perf.bench_roi_align import SIZE
from perf.bench_roi_align import backward_work as align_backward_work
from perf.bench_roi_align import forward_work as align_work
from perf.bench_roi_align import published as published_roi_align
from perf.bench_salient_points import backward_work as points_backward_work
from perf.bench_salient_points import forward_work as points_work
from perf.bench_salient_points import sample
from perf.gate import Args, Case, Variant, Work, published_variants, total
from perf.harness import BOTH, FORWARD, Options, main
from perf.inputs import (
    HEADS,
    SHAPES,
    WIDTH,
    Shape,
    boxes_in_cells,
    element_bytes,
    generator,
    normal,
    points_in_boxes,
)
from samdetr_kernels.roi_align import roi_align, roi_align_reference
from samdetr_kernels.salient_points import salient_points, salient_points_reference

Pair = tuple[Tensor, Tensor]  # regions [B, N, 7, 7, 64] after ReLU, content [B, N, 8, 256]
BIAS = 4.0  # of alternating sign: no region near the kink of ReLU, where rounding decides the gradient
TF32_LOSS = 0.01  # cuDNN's default for the published convolution on a GPU


def _published(memory: Tensor, boxes: Tensor, source: Tensor, weight: Tensor, bias: Tensor, times: int) -> Pair:
    first = published_roi_align(memory, boxes)
    second = published_roi_align(memory, boxes) if times == 2 else first
    regions = conv2d(first.flatten(0, 1).permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    regions = relu(regions).view(*boxes.shape[:2], -1, SIZE, SIZE).permute(0, 1, 3, 4, 2)
    return regions, sample(second, source.tanh())


def published(memory: Tensor, boxes: Tensor, source: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """Resample as published: the same RoIAlign is computed for each of its two uses."""
    return _published(memory, boxes, source, weight, bias, 2)


def published_once(memory: Tensor, boxes: Tensor, source: Tensor, weight: Tensor, bias: Tensor) -> Pair:
    """Resample by the published composition with the repeated RoIAlign removed."""
    return _published(memory, boxes, source, weight, bias, 1)


def _composed(align: Callable[..., Tensor], points: Callable[..., Tensor]) -> Callable[..., Pair]:
    def aligner(memory: Tensor, boxes: Tensor, source: Tensor, weight: Tensor, bias: Tensor) -> Pair:
        regions = relu(align(linear(memory, weight), boxes, SIZE) + bias)
        return regions, points(memory, boxes, source.tanh(), SIZE)

    return aligner


ours = _composed(roi_align, salient_points)
reference = _composed(roi_align_reference, salient_points_reference)


def forward_work(shape: Shape, boxes: Tensor, channels: int, dtype: torch.dtype) -> Work:
    """Count the map read once for both ops, regions and content written once; the projected map stays on the chip."""
    align = align_work(shape, boxes, channels // 4, dtype)
    points = points_work(shape, boxes, HEADS, channels, dtype)
    operations = align.operations + points.operations + _projection(shape, channels)
    return Work(points.bytes + _region_bytes(boxes, channels, dtype), operations)


def backward_work(shape: Shape, boxes: Tensor, channels: int, dtype: torch.dtype) -> Work:
    """Count that of the points; the regions, for ReLU, and their gradient read; two products of the projection."""
    align = align_backward_work(shape, boxes, channels // 4, dtype)
    points = points_backward_work(shape, boxes, HEADS, channels, dtype)
    operations = align.operations + points.operations + 2 * _projection(shape, channels)
    return Work(points.bytes + 2 * _region_bytes(boxes, channels, dtype), operations)


def _region_bytes(boxes: Tensor, channels: int, dtype: torch.dtype) -> int:
    return boxes.shape[0] * boxes.shape[1] * SIZE * SIZE * (channels // 4) * element_bytes(dtype)


def _projection(shape: Shape, channels: int) -> float:
    return shape.batch * shape.height * shape.width * channels * channels / 2


def cases(options: Options) -> Iterator[Case]:
    """Yield cases of SAM-DETR's decoder: 256 channels, 64 for the point branch, 8 points."""
    channels = 16 if options.shapes == "small" else WIDTH
    for dtype in options.dtypes:
        for shape in SHAPES[options.shapes]:

            def make(seed: int, shape: Shape = shape, dtype: torch.dtype = dtype) -> Args:
                random = generator(seed, options.device)
                return (
                    normal(random, shape.batch, shape.height, shape.width, channels, dtype=dtype),
                    boxes_in_cells(random, shape),
                    points_in_boxes(random, shape, HEADS, SIZE).atanh(),
                    (normal(random, channels // 4, channels) * channels**-0.5).to(dtype),
                    torch.tensor([BIAS, -BIAS], dtype=dtype, device=options.device).repeat(channels // 8),
                )

            sizes = (shape, make(0)[1], channels, dtype)
            work = forward_work(*sizes)
            yield Case(
                name=f"{shape} channels {channels}",
                dtype=dtype,
                make=make,
                variants=(
                    *published_variants(dtype, published, tolerance=TF32_LOSS),
                    *published_variants(dtype, published_once, "published, RoIAlign once", tolerance=TF32_LOSS),
                    Variant("reference eager", reference),
                    Variant("reference torch.compile", reference, compile=True),
                    Variant("ours", ours, ours=True),
                ),
                reference=reference,
                eager=reference if dtype == torch.float32 else published,  # whose convolution may be in TF32
                work={FORWARD: work, BOTH: total(work, backward_work(*sizes))},
                wanted=(0, 2, 3, 4),
                shared=(3, 4),
                images=(0, shape.batch - 1),
                compiled=shape == SHAPES[options.shapes][0],
            )


if __name__ == "__main__":
    sys.exit(main("aligner", cases))
