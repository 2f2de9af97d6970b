"""salient_points: RoIAlign then grid_sample (the published composition) against ours, which writes no RoI features."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from perf.bench_roi_align import SIZE, published
from perf.gate import Args, Case, Variant, Work, published_variants, total
from perf.harness import BOTH, FORWARD, Options, main
from perf.inputs import (
    HEADS,
    SHAPES,
    WIDTH,
    Shape,
    boxes_in_cells,
    covered,
    element_bytes,
    generator,
    normal,
    points_in_boxes,
)
from samdetr_kernels.salient_points import salient_points, salient_points_reference


def published_points(features: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """Compute [B, H, W, C] and [B, N, P, 2] -> [B, N, P, C] as published."""
    return sample(published(features, boxes), points)


def sample(rois: Tensor, points: Tensor) -> Tensor:
    """Sample RoI features [B, N, 7, 7, C] at [B, N, P, 2] -> [B, N, P, C] by grid_sample."""
    nchw = rois.flatten(0, 1).permute(0, 3, 1, 2).to(points.dtype)  # the wider of the two, as under autocast
    grid = points.flatten(0, 1)[:, :, None]
    out = grid_sample(nchw, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.squeeze(-1).transpose(1, 2).reshape(*points.shape[:3], -1).to(rois.dtype)


def forward_work(shape: Shape, boxes: Tensor, points: int, channels: int, dtype: torch.dtype) -> Work:
    """Count the map read and the points' features written once; a point reads what two bins of each axis cover."""
    cells, places = shape.batch * shape.height * shape.width, boxes.shape[0] * boxes.shape[1] * points
    rows, columns = (side * 2 / SIZE + 1 for side in covered(boxes, shape))
    operations = 2 * channels * points * (rows * columns).sum().item()
    return Work((cells + places) * channels * element_bytes(dtype) + 4 * (boxes.numel() + 2 * places), operations)


def backward_work(shape: Shape, boxes: Tensor, points: int, channels: int, dtype: torch.dtype) -> Work:
    """Count map, points and upstream gradient read, the gradients of map and points written; a product for each."""
    forward, places = forward_work(shape, boxes, points, channels, dtype), boxes.shape[0] * boxes.shape[1] * points
    cells = shape.batch * shape.height * shape.width
    return Work(forward.bytes + cells * channels * element_bytes(dtype) + 8 * places, 2 * forward.operations)


def cases(options: Options) -> Iterator[Case]:
    """Yield cases of eight points in every box of a 256-channel map."""
    channels = 16 if options.shapes == "small" else WIDTH
    for dtype in options.dtypes:
        for shape in SHAPES[options.shapes]:

            def make(seed: int, shape: Shape = shape, dtype: torch.dtype = dtype) -> Args:
                random = generator(seed, options.device)
                features = normal(random, shape.batch, shape.height, shape.width, channels, dtype=dtype)
                return features, boxes_in_cells(random, shape), points_in_boxes(random, shape, HEADS, SIZE)

            sizes = (shape, make(0)[1], HEADS, channels, dtype)
            work = forward_work(*sizes)
            yield Case(
                name=f"{shape} channels {channels}",
                dtype=dtype,
                make=make,
                variants=(
                    *published_variants(dtype, published_points),
                    Variant("reference eager", salient_points_reference),
                    Variant("reference torch.compile", salient_points_reference, compile=True),
                    Variant("ours", salient_points, ours=True),
                ),
                reference=salient_points_reference,
                eager=published_points,
                work={FORWARD: work, BOTH: total(work, backward_work(*sizes))},
                wanted=(0, 2),
                images=(0, shape.batch - 1),
                compiled=shape == SHAPES[options.shapes][0],
            )


if __name__ == "__main__":
    sys.exit(main("salient_points", cases))
