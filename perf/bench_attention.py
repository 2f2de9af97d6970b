"""Self-attention of the encoder: torch's implementations one by one, with and without padding and dropout.

Published: scores, mask, softmax and dropout are written to memory. Before the times, each implementation says which
share of the weights it keeps at dropout 0.1, which must be 0.9: some round the probability. "ours" is `attend`, which
lets torch choose among those that do not, and makes a mask of keys channels of the heads: flash attention has no masks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from perf.gate import Args, Case, Run, Variant, Work, published_variants, reason, total
from perf.harness import BOTH, FORWARD, Options, main, read_options
from perf.inputs import HEADS, SHAPES, WIDTH, Shape, element_bytes, generator, normal, valid_sizes
from samdetr.models.layers import attend

DROPOUT = 0.1
TOLERANCE = 0.02  # of the implementations, relative; ours keeps the budget of every op
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def split(x: Tensor) -> Tensor:
    """Split heads: [B, S, C] -> [B, heads, S, C / heads]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def published(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attend with everything materialised; [B, S, C] each, mask [B, 1, 1, S] bool (True: attended)."""
    scores = split(query) * (query.shape[-1] // HEADS) ** -0.5 @ split(key).transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.dropout(scores.softmax(-1), dropout, train=True)
    return (weights @ split(value)).transpose(1, 2).flatten(2)


def with_backend(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Attend by one of torch's implementations. Raises RuntimeError where it does not take these inputs."""
    with sdpa_kernel(BACKENDS[name]):
        out = scaled_dot_product_attention(split(query), split(key), split(value), mask, dropout)
    return out.transpose(1, 2).flatten(2)


def ours(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attend as the encoder does."""
    return attend(query, key, value, heads=HEADS, dropout=dropout, mask=mask)


def kept_share(run: Run, shape: Shape, mask: Tensor | None, device: torch.device) -> float:
    """Measure the share of the weights that a dropout of 0.1 keeps: equal weights on values of one."""
    zeros = torch.zeros(shape.batch, shape.height * shape.width, WIDTH, dtype=torch.bfloat16, device=device)
    out = run(zeros, zeros, torch.ones_like(zeros), mask, DROPOUT)
    return out.double().mean().item() * (1 - DROPOUT)


def print_kept_shares(device: torch.device) -> None:
    """List each implementation with and without a mask."""
    shape = SHAPES["gpu" if device.type == "cuda" else "small"][0]
    cells = shape.height * shape.width
    for padded in (False, True):
        mask = torch.ones(shape.batch, 1, 1, cells, dtype=torch.bool, device=device) if padded else None
        backends = [(name, partial(with_backend, name)) for name in BACKENDS if device.type == "cuda"]
        for name, run in (*backends, ("ours", ours)):
            try:
                found = f"{kept_share(run, shape, mask, device):.4f}"
            except RuntimeError as error:
                found = reason(error)
            print(f"kept at dropout {DROPOUT}, mask {padded}: {name} {found}", flush=True)


def work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    """Count forward: three read, one written, two products; backward: five read, three written, five products."""
    cells, element = shape.height * shape.width, element_bytes(dtype)
    whole, product = shape.batch * cells * WIDTH * element, 2.0 * shape.batch * cells**2 * WIDTH
    return Work(4 * whole, 2 * product), Work(8 * whole, 5 * product)


def variants(dtype: torch.dtype, dropout: float, device: torch.device) -> Iterator[Variant]:
    """Make a case of all ways; the gate compares them without dropout, whose random numbers are each one's own."""

    def dropping(name: str, run: Run, is_ours: bool = False) -> Variant:
        tolerance = None if is_ours else TOLERANCE
        return Variant(name, partial(run, dropout=dropout), is_ours, gate=run if dropout else None, tolerance=tolerance)

    yield from published_variants(dtype, partial(published, dropout=dropout), gate=published if dropout else None)
    if device.type == "cuda":
        for name in BACKENDS:
            yield dropping(name, partial(with_backend, name))
    yield dropping("ours", ours, is_ours=True)


def cases(options: Options) -> Iterator[Case]:
    """Yield cases with padding and dropout, as in training; without padding; without dropout."""
    for dtype in options.dtypes:
        for padded, dropout in ((True, DROPOUT), (False, DROPOUT), (True, 0.0)):
            for shape in SHAPES[options.shapes]:

                def make(seed: int, shape: Shape = shape, dtype: torch.dtype = dtype, padded: bool = padded) -> Args:
                    random = generator(seed, options.device)
                    cells = shape.height * shape.width
                    inputs = [normal(random, shape.batch, cells, WIDTH, dtype=dtype) for _ in range(3)]
                    if not padded:
                        return (*inputs, None)
                    sizes = valid_sizes(random, shape)
                    cell = torch.arange(cells, device=options.device)
                    inside = (cell // shape.width < sizes[:, :1]) & (cell % shape.width < sizes[:, 1:])
                    return (*inputs, inside[:, None, None])

                forward, backward = work(shape, dtype)
                yield Case(
                    name=f"{shape} {'padded' if padded else 'whole'} dropout {dropout:g}",
                    dtype=dtype,
                    make=make,
                    variants=tuple(variants(dtype, dropout, options.device)),
                    reference=published,
                    eager=published,
                    work={FORWARD: forward, BOTH: total(forward, backward)},
                    wanted=(0, 1, 2),
                )


if __name__ == "__main__":
    print_kept_shares(read_options("attention", None).device)
    sys.exit(main("attention", cases))
