"""roi_align: torchvision's op on an NCHW copy of the map (the published composition) against ours on the map itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from perf.gate import Args, Case, Variant, Work, published_variants, total
from perf.harness import BOTH, FORWARD, Options, main
from perf.inputs import SHAPES, Shape, boxes_in_cells, covered, element_bytes, generator, normal
from samdetr_kernels.roi_align import roi_align, roi_align_reference

SIZE = 7
REDUCED = 64  # channels that the decoder aligns


def published(features: Tensor, boxes: Tensor) -> Tensor:
    """Compute [B, N, 7, 7, C], a view of torchvision's [B N, C, 7, 7], in fp32 inside as under autocast."""
    nchw = features.permute(0, 3, 1, 2).contiguous().float()
    out = torchvision_roi_align(nchw, list(boxes), SIZE, aligned=True, sampling_ratio=-1).to(features.dtype)
    return out.view(*boxes.shape[:2], -1, SIZE, SIZE).permute(0, 1, 3, 4, 2)


def forward_work(shape: Shape, boxes: Tensor, channels: int, dtype: torch.dtype) -> Work:
    """Count the map read and the bins written once; every covered cell weighed once along each axis."""
    size = element_bytes(dtype)
    cells = shape.batch * shape.height * shape.width
    bins = boxes.shape[0] * boxes.shape[1] * SIZE * SIZE
    rows, columns = covered(boxes, shape)
    operations = 2 * channels * (rows * columns + SIZE * columns).sum().item()
    return Work((cells + bins) * channels * size + boxes.numel() * 4, operations)


def backward_work(shape: Shape, boxes: Tensor, channels: int, dtype: torch.dtype) -> Work:
    """Count the bins' gradient read, the map's written: as much as forward; the boxes get none."""
    return forward_work(shape, boxes, channels, dtype)


def cases(options: Options) -> Iterator[Case]:
    """Yield maps of 64 channels, which the decoder aligns, and one of 256, as published."""
    shapes = [(shape, REDUCED) for shape in SHAPES[options.shapes]]
    shapes.append((SHAPES[options.shapes][0], 4 * REDUCED))
    if options.shapes == "small":
        shapes = [(shape, 16) for shape, _ in shapes[:1]]
    for dtype in options.dtypes:
        for shape, channels in shapes:

            def make(seed: int, shape: Shape = shape, channels: int = channels, dtype: torch.dtype = dtype) -> Args:
                random = generator(seed, options.device)
                features = normal(random, shape.batch, shape.height, shape.width, channels, dtype=dtype)
                return features, boxes_in_cells(random, shape)

            sizes = (shape, make(0)[1], channels, dtype)
            work = forward_work(*sizes)
            yield Case(
                name=f"{shape} channels {channels}",
                dtype=dtype,
                make=make,
                variants=(
                    *published_variants(dtype, published),
                    Variant("reference eager", roi_align_reference),
                    Variant("reference torch.compile", roi_align_reference, compile=True),
                    Variant("ours", roi_align, ours=True),
                ),
                reference=roi_align_reference,
                eager=published,
                work={FORWARD: work, BOTH: total(work, backward_work(*sizes))},
                wanted=(0,),
                images=(0, shape.batch - 1),
                compiled=(shape, channels) == shapes[0],
            )


if __name__ == "__main__":
    sys.exit(main("roi_align", cases))
