"""deformable_attention: Deformable DETR's composition, grid_sample of every level, against ours, both of its modes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from perf.gate import Args, Case, Variant, Work, published_variants, total
from perf.harness import BOTH, FORWARD, Options, main
from perf.inputs import HEADS, QUERIES, WIDTH, between_kinks, element_bytes, generator, normal, uniform
from samdetr_kernels.deformable_attention import deformable_attention, deformable_attention_reference

POINTS = 4
LARGE = ((100, 152), (50, 76), (25, 38), (13, 19))  # strides 8 to 64 of an 800 x 1216 image
# name, levels, batch, queries (None: one a cell, as in the encoder)
Pyramid = tuple[str, Sequence[tuple[int, int]], int, int | None]
PYRAMIDS: dict[str, tuple[Pyramid, ...]] = {
    "gpu": (
        ("decoder", LARGE, 16, QUERIES),
        ("encoder", LARGE[:3], 4, None),
        ("decoder", LARGE, 4, QUERIES),
        ("decoder one level", LARGE[2:3], 16, QUERIES),
        ("decoder one level", LARGE[1:2], 4, QUERIES),
    ),
    "cpu": (("decoder", LARGE, 2, QUERIES),),
    "small": (("decoder", ((7, 5), (4, 3)), 2, 6),),
}


def published(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample [B, S, M, D], [B, Q, M, L, P, 2], [B, Q, M, L, P] -> [B, Q, M D]; all levels' samples are written first.

    The samples are in the wider dtype of value and locations, as under autocast.
    """
    batch, _, heads, width = value.shape
    queries = weights.shape[1]
    grids = 2 * locations - 1
    samples = []
    levels = value.split([height * columns for height, columns in shapes], dim=1)
    for level, (part, (height, columns)) in enumerate(zip(levels, shapes, strict=True)):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, width, height, columns).to(grids.dtype)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * by_head).sum(-1)
    return out.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def forward_work(args: Args, dtype: torch.dtype) -> Work:
    """Count value, locations and weights read, the result written."""
    inputs, result, operations = _sizes(args, dtype)
    return Work(inputs + result, operations, vector=True)


def backward_work(args: Args, dtype: torch.dtype) -> Work:
    """Count the same read again, and the result's gradient; the gradients of value, locations and weights written."""
    inputs, result, operations = _sizes(args, dtype)
    return Work(2 * inputs + result, 3 * operations, vector=True)


def _sizes(args: Args, dtype: torch.dtype) -> tuple[int, int, float]:
    """Return bytes of the inputs and of the result, operations of the forward."""
    value, _, _, weights = args
    batch, _, heads, width = value.shape
    inputs = value.numel() * element_bytes(dtype) + 12 * weights.numel()
    result = batch * weights.shape[1] * heads * width * element_bytes(dtype)
    return inputs, result, 8.0 * weights.numel() * width


def cases(options: Options) -> Iterator[Case]:
    """Yield cases: object queries on a pyramid and on one level, and the encoder, where every cell is a query."""
    width = 4 if options.shapes == "small" else WIDTH // HEADS
    for dtype in options.dtypes:
        for number, (name, levels, batch, queries) in enumerate(PYRAMIDS[options.shapes]):
            cells = sum(height * columns for height, columns in levels)

            def make(
                seed: int,
                dtype: torch.dtype = dtype,
                levels: Sequence[tuple[int, int]] = levels,
                batch: int = batch,
                rows: int = queries or cells,
                cells: int = cells,
            ) -> Args:
                random = generator(seed, options.device)
                shape = (batch, rows, HEADS, len(levels), POINTS)
                centre = uniform(random, batch, rows, 1, 1, 1, 2)
                logits = normal(random, *shape[:3], len(levels) * POINTS)
                sizes = torch.tensor([(columns, height) for height, columns in levels], device=options.device)[:, None]
                locations = centre + normal(random, *shape, 2) * 0.05
                return (
                    normal(random, batch, cells, HEADS, width, dtype=dtype),
                    levels,
                    (between_kinks(locations * sizes - 0.5) + 0.5) / sizes,
                    logits.softmax(-1).view(shape),
                )

            work = forward_work(make(0), dtype)
            yield Case(
                name=f"{name} {len(levels)} levels of {cells} cells batch {batch} queries {queries or cells}",
                dtype=dtype,
                make=make,
                variants=(
                    *published_variants(dtype, published),
                    Variant("reference eager", deformable_attention_reference),
                    Variant("reference torch.compile", deformable_attention_reference, compile=True),
                    Variant("ours", partial(deformable_attention, deterministic=False), ours=True),
                    Variant("ours deterministic", partial(deformable_attention, deterministic=True), ours=True),
                ),
                reference=deformable_attention_reference,
                eager=published,
                work={FORWARD: work, BOTH: total(work, backward_work(make(0), dtype))},
                wanted=(0, 2, 3),
                images=(0, batch - 1),
                compiled=number == 0,
            )


if __name__ == "__main__":
    sys.exit(main("deformable_attention", cases))
