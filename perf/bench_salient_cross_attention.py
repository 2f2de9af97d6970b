"""salient_cross_attention: the published composition and SDPA against ours, at dropout 0.1 as in training and without.

Published: the key is expanded to the 8 heads, scores, mask, SMCA's Gaussian, softmax and dropout are written to memory,
and the weights' mean over the heads is formed and thrown away. Its dropout draws from torch's generator; the gate
gives it the op's own dropout mask instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import dropout as torch_dropout
from torch.nn.functional import scaled_dot_product_attention

from perf.gate import Args, Case, Run, Variant, Work, published_variants, total
from perf.harness import BOTH, FORWARD, Options, main
from perf.inputs import (
    HEADS,
    SHAPES,
    WIDTH,
    Shape,
    element_bytes,
    generator,
    normal,
    uniform,
    valid_sizes,
)
from samdetr_kernels.attention_dropout import dropout_mask
from samdetr_kernels.salient_cross_attention import salient_cross_attention, salient_cross_attention_reference

DROPOUT = 0.1
SMCA_SMOOTH = 8


def _cells(key: Tensor, map_width: int) -> tuple[Tensor, Tensor]:
    """Return column and row of every cell, [S] each."""
    cell = torch.arange(key.shape[1], device=key.device)
    return cell % map_width, cell // map_width


def _padding(key: Tensor, sizes: Tensor, map_width: int) -> Tensor:
    """Mark cells that an image lacks, [B, S] bool."""
    column, row = _cells(key, map_width)
    return (row >= sizes[:, :1]) | (column >= sizes[:, 1:])


def published(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    op_mask: bool = False,
) -> Tensor:
    """Attend with everything materialised. ``op_mask``: drop what the op drops, instead of drawing random numbers."""
    batch, queries, heads, width = query.shape
    cells = key.shape[1]
    by_head = (query * width**-0.5).transpose(1, 2).reshape(batch * heads, queries, width)
    keys = key[:, None].expand(-1, heads, -1, -1).reshape(batch * heads, cells, width)
    scores = torch.bmm(by_head, keys.transpose(1, 2))
    if points is not None and scales is not None:
        grid = torch.stack(_cells(key, map_width), dim=-1).to(points.dtype) + 0.5
        centre, scale = (part.transpose(1, 2).reshape(batch * heads, queries, 1, 2) for part in (points, scales))
        distance = ((centre - grid).pow(2) * scale.pow(2)).sum(-1)
        scores = scores - (distance / SMCA_SMOOTH).to(scores.dtype)
    padding = _padding(key, sizes, map_width)[:, None, None]
    scores = scores.view(batch, heads, queries, cells).masked_fill(padding, float("-inf"))
    weights = scores.softmax(-1)
    if op_mask and dropout and seed is not None:
        keep = torch.stack([dropout_mask(seed, dropout, image, heads, queries, cells) for image in range(batch)])
        weights = weights * keep / (1 - dropout)
    else:
        weights = torch_dropout(weights, dropout)
    values = value.transpose(1, 2).reshape(batch * heads, cells, -1)
    out = torch.bmm(weights.flatten(0, 1), values).view(batch, heads, queries, -1)
    _ = weights.sum(1) / heads
    return out.transpose(1, 2).flatten(2)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """Attend by torch's attention with a mask, without prior; whichever implementation takes widths of 256 and 32."""
    keys = key[:, None].expand(-1, query.shape[2], -1, -1)
    mask = ~_padding(key, sizes, map_width)[:, None, None]
    out = scaled_dot_product_attention(query.transpose(1, 2), keys, value.transpose(1, 2), mask, dropout)
    return out.transpose(1, 2).flatten(2)


def _with_keywords(op: Run) -> Run:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sizes: Tensor,
        map_width: int,
        points: Tensor | None,
        scales: Tensor | None,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        return op(query, key, value, sizes, map_width, points=points, scales=scales, dropout=dropout, seed=seed)

    return attention


ours, reference = _with_keywords(salient_cross_attention), _with_keywords(salient_cross_attention_reference)


def forward_work(shape: Shape, sizes: Tensor, width: int, dtype: torch.dtype) -> Work:
    """Count query, key and value read, the result written; two products over the valid cells."""
    inputs, result, pairs = _sizes(shape, sizes, width, dtype)
    return Work(inputs + result, pairs * (width + width // HEADS))


def backward_work(shape: Shape, sizes: Tensor, width: int, dtype: torch.dtype) -> Work:
    """Count the same read again and the result's gradient; three gradients written; the scores again, four products."""
    inputs, result, pairs = _sizes(shape, sizes, width, dtype)
    return Work(2 * inputs + result, pairs * (3 * width + 2 * width // HEADS))


def _sizes(shape: Shape, sizes: Tensor, width: int, dtype: torch.dtype) -> tuple[int, int, float]:
    """Return bytes of the inputs and of the result, operations for each channel of a product over the valid cells."""
    rows, cells = shape.batch * shape.queries * HEADS, shape.batch * shape.height * shape.width
    inputs = (rows + 2 * cells) * width * element_bytes(dtype)
    result = rows * (width // HEADS) * element_bytes(dtype)
    return inputs, result, 2.0 * shape.queries * HEADS * sizes.prod(1).sum().item()


def _variants(dtype: torch.dtype, smca: bool, dropout: float) -> Iterator[Variant]:
    gate = partial(published, op_mask=True)
    yield from published_variants(dtype, published, gate=gate)
    # the reference goes image by image, the composition is what a compiler can fuse
    yield Variant("published torch.compile", published, compile=True, gate=gate if dropout else None)
    if not smca:
        # its dropout draws numbers of its own: what the gate compares is SDPA in the cases without
        yield Variant("torch SDPA", sdpa, gate=gate if dropout else None)
    yield Variant("reference eager", reference)
    yield Variant("ours", ours, ours=True)


def cases(options: Options) -> Iterator[Case]:
    """Yield cases with and without SMCA at training's dropout, and plain without dropout, which SDPA can do."""
    width = 32 if options.shapes == "small" else WIDTH
    for dtype in options.dtypes:
        for smca, dropout in ((True, DROPOUT), (False, DROPOUT), (False, 0.0)):
            for shape in SHAPES[options.shapes]:

                def make(
                    seed: int,
                    shape: Shape = shape,
                    dtype: torch.dtype = dtype,
                    smca: bool = smca,
                    dropout: float = dropout,
                ) -> Args:
                    random = generator(seed, options.device)
                    batch, queries, cells = shape.batch, shape.queries, shape.height * shape.width
                    size = torch.tensor([shape.width, shape.height], device=options.device)
                    return (
                        (normal(random, batch, queries, HEADS, width) * 2).to(dtype),
                        normal(random, batch, cells, width, dtype=dtype),
                        normal(random, batch, cells, HEADS, width // HEADS, dtype=dtype),
                        valid_sizes(random, shape),
                        shape.width,
                        uniform(random, batch, queries, HEADS, 2) * size if smca else None,
                        normal(random, batch, queries, HEADS, 2) * 0.7 if smca else None,
                        dropout,
                        torch.tensor([(seed << 32) + 11], device=options.device) if dropout else None,
                    )

                work = forward_work(shape, make(0)[3], width, dtype)
                yield Case(
                    name=f"{shape} {'SMCA' if smca else 'plain'} dropout {dropout:g}",
                    dtype=dtype,
                    make=make,
                    variants=tuple(_variants(dtype, smca, dropout)),
                    reference=reference,
                    eager=partial(published, op_mask=True),
                    work={FORWARD: work, BOTH: total(work, backward_work(shape, make(0)[3], width, dtype))},
                    wanted=(0, 1, 2, 5, 6) if smca else (0, 1, 2),
                    shared=(8,),
                    images=(0, 1),  # the first: an image's dropout depends on its number
                    compiled=shape == SHAPES[options.shapes][0],
                )


if __name__ == "__main__":
    sys.exit(main("salient_cross_attention", cases))
