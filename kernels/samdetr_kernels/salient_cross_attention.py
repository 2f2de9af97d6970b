"""Cross-attention of a detector's queries to its map, with one key that all heads share and SMCA's Gaussian prior.

Replaces ``dropout(softmax(q @ k^T / sqrt(D) + mask + prior)) @ v`` of SAM-DETR (CVPR 2022, section 3: a head's query is
one salient point's feature, as wide as the key) with the prior of SMCA-DETR (ICCV 2021, equation 4), for each image:

    score[m, n, s] = softmax_scale <q[n, m], k[s]> - (sx^2 (px - gx - 1/2)^2 + sy^2 (py - gy - 1/2)^2) / 8
    out[n, m] = sum_s keep[m, n, s] / (1 - p) softmax_s(score[m, n])[s] v[s, m]

over the cells s = (gy, gx) with gy < h and gx < w of the image's valid size: padded cells are never read. The prior and
the dropout mask are made in registers; nothing of size N x S is written. Dropout is counter-based: a 32-bit hash
(lowbias32, chained over seed, image, head and query, once more for the cell) is compared with p, so that forward,
backward and reference agree whatever the tiles are. In fp16 and bf16 the forward with a prior also keeps what rounding
took from its output: gradients of points and scales are sums of ``softmax * (d - sum(grad * out))``, small differences.

Gradients: query, key, value, points, scales. Determinism: no atomics, the same bits in every run.
Dtypes: fp16, bf16, fp32 for query, key, value (one of them for all); any floating dtype for points and scales; scores,
softmax, prior and sums in fp32. fp64 runs the reference on every device.
Dims: B images, N queries, M heads, D width of query and key, E width of a head's value, S = H x W cells.
Bytes: forward B N M (D + E) + B S (D + M E) elements; backward reads these twice and writes as many (and 4 B S D bytes
for each split of the heads when the batch is small).
Operations: forward 2 B M N S (D + E), backward 2 B M N S (4 D + 3 E), with S the valid cells.
"""

from __future__ import annotations

import math
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.attention_dropout import dropout_mask
from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.checks import DTYPES, check_devices, describe, is_integer
from samdetr_kernels.launch import in_autocast_dtype, outside_autocast, runs_reference
from samdetr_kernels.salient_cross_attention_backward_kernels import (
    empty_gradients,
    salient_cross_attention_backward_triton,
)
from samdetr_kernels.salient_cross_attention_kernels import (
    MAX_CELLS,
    SMCA_WIDTH,
    empty_results,
    salient_cross_attention_forward_triton,
)

MAX_WIDTH, MAX_HEAD_WIDTH = 512, 64


def _offsets(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Compute distances point - cell centre of one image: [N, M, 2] -> x [M, N, 1, W] and y [M, N, H, 1]."""
    x, y = points.transpose(0, 1).unbind(-1)
    column, row = (torch.arange(n, dtype=x.dtype, device=x.device) + 0.5 for n in (width, height))
    return x[..., None, None] - column, y[..., None, None] - row[:, None]


def _scores(
    query: Tensor, key: Tensor, valid: Tensor, offsets: tuple[Tensor, Tensor] | None, scales: Tensor | None
) -> Tensor:
    """Compute scores [M, N, S] of one image, -inf where ``valid`` [H, W] is not; ``query`` [M, N, D] is scaled."""
    scores = (query.flatten(0, 1) @ key.T).view(*query.shape[:2], *valid.shape)
    outside = torch.where(valid, 0.0, math.inf).to(scores.dtype)
    if offsets is None or scales is None:
        return scores.sub_(outside).flatten(2)
    scale_x, scale_y = scales.transpose(0, 1)[..., None, None].unbind(2)
    # the prior is separable and the valid cells are a product of ranges: two terms of one axis each
    scores.sub_((offsets[0] * scale_x).square() / SMCA_WIDTH + outside[:1])
    return scores.sub_((offsets[1] * scale_y).square() / SMCA_WIDTH + outside[:, :1]).flatten(2)


class _Image(NamedTuple):
    """One image's tensors in the dtype of computation, laid out for `_scores`."""

    query: Tensor  # [M, N, D], scaled
    key: Tensor  # [S, D]
    value: Tensor  # [M, S, E]
    valid: Tensor  # [H, W]; all of the map where the image has no valid cell, so that no row is empty
    empty: Tensor  # [], whether that is so
    offsets: tuple[Tensor, Tensor] | None
    scales: Tensor | None
    keep: Tensor | None


def _image(
    image: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
) -> _Image:
    dtype = compute_dtype(query)
    _, queries, heads, _ = query.shape
    cells = key.shape[1]
    height = cells // map_width
    size = valid_sizes[image]
    empty = (size < 1).any()
    row, column = (torch.arange(n, device=query.device) for n in (height, map_width))
    valid = (row < size[0])[:, None] & (column < size[1])
    padding = ~valid.flatten()[:, None]
    return _Image(
        query=query[image].to(dtype).transpose(0, 1) * softmax_scale,
        key=key[image].to(dtype).masked_fill(padding, 0),
        value=value[image].to(dtype).masked_fill(padding[..., None], 0).transpose(0, 1),
        valid=valid | empty,
        empty=empty,
        offsets=None if points is None else _offsets(points[image].to(dtype), height, map_width),
        scales=None if scales is None else scales[image].to(dtype),
        keep=dropout_mask(seed, dropout, image, heads, queries, cells) if dropout and seed is not None else None,
    )


@outside_autocast
def _forward_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the op returns, image by image: N x S numbers fit the cache."""
    if len(query) == 0:
        return empty_results(query, value, points)
    outs, logsumexps = [], []
    for index in range(len(query)):
        image = _image(index, query, key, value, valid_sizes, map_width, points, scales, softmax_scale, dropout, seed)
        scores = _scores(image.query, image.key, image.valid, image.offsets, image.scales)
        weights = scores.softmax(-1)
        logsumexp = scores.detach().amax(-1) - weights.detach().amax(-1).log()
        if image.keep is not None:
            weights = weights * image.keep
        attended = (weights @ image.value).transpose(0, 1).flatten(1) / (1 - dropout)
        outs.append(attended.masked_fill(image.empty, 0))
        logsumexps.append(logsumexp.masked_fill(image.empty, -math.inf))
    wide = torch.stack(outs)
    out = wide.to(query.dtype)
    rest = out.new_empty(0) if out is wide or points is None else (wide - out).detach().to(query.dtype)
    return out, torch.stack(logsumexps), rest


def salient_cross_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    *,
    points: Tensor | None = None,
    scales: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Compute `salient_cross_attention` in plain torch, on any device and floating dtype."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _forward_reference(query, key, value, valid_sizes, map_width, points, scales, scale, dropout, seed)[0]


@outside_autocast
def _backward_reference(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    rest: Tensor,
) -> list[Tensor]:
    """Compute gradients of query, key, value, points, scales, in their shapes and dtypes; empty for an absent input."""
    gradients = empty_gradients(query, key, value, points, scales)
    d_query, d_key, d_value, d_points, d_scales = gradients
    _, queries, heads, _ = query.shape
    head_width = value.shape[3]
    for index in range(len(query)):
        image = _image(index, query, key, value, valid_sizes, map_width, points, scales, softmax_scale, dropout, seed)
        d_out = grad[index].to(image.query.dtype).view(queries, heads, head_width).transpose(0, 1)
        attended = (
            (out[index].to(d_out.dtype) + rest[index] if len(rest) else out[index])
            .view(queries, heads, head_width)
            .transpose(0, 1)
        )
        # a row without valid cells has weights exp(-inf) = 0
        row_sum = logsumexp[index].masked_fill(image.empty, math.inf)[..., None]
        scores = _scores(image.query, image.key, image.valid, image.offsets, image.scales)
        weights = scores.sub_(row_sum).exp_()
        d_scores = d_out @ image.value.transpose(1, 2)
        dropped = weights
        if image.keep is not None:
            factor = image.keep.to(d_out.dtype) / (1 - dropout)
            d_scores.mul_(factor)
            dropped = factor.mul_(weights)
        d_value[index] = (dropped.transpose(1, 2) @ d_out).transpose(0, 1)
        d_scores.sub_((d_out * attended).sum(-1, keepdim=True)).mul_(weights)
        if image.offsets is not None and image.scales is not None:
            d_terms = d_scores.view(*d_scores.shape[:2], *image.valid.shape)
            terms = zip(image.offsets, (d_terms.sum(2, keepdim=True), d_terms.sum(3, keepdim=True)), strict=True)
            for axis, (offset, d_term) in enumerate(terms):
                scale = image.scales[..., axis]
                first, second = ((d_term * offset**power).sum((2, 3)).T for power in (1, 2))
                d_points[index, ..., axis] = scale.square() * first * (-2 / SMCA_WIDTH)
                d_scales[index, ..., axis] = scale * second * (-2 / SMCA_WIDTH)
        d_query[index] = (d_scores @ image.key).transpose(0, 1) * softmax_scale
        d_key[index] = d_scores.flatten(0, 1).T @ image.query.flatten(0, 1)
    return gradients


@torch.library.custom_op("samdetr::salient_cross_attention", mutates_args=(), device_types="cuda")
def _salient_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    plain = runs_reference(query)
    forward = _forward_reference if plain else salient_cross_attention_forward_triton
    return forward(query, key, value, valid_sizes, map_width, points, scales, softmax_scale, dropout, seed)


_salient_cross_attention.register_kernel("cpu")(_forward_reference)


@_salient_cross_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, valid_sizes: Tensor, map_width: int, points: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(query, value, points)


@torch.library.custom_op("samdetr::salient_cross_attention_backward", mutates_args=(), device_types="cuda")
def _salient_cross_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    rest: Tensor,
) -> list[Tensor]:
    plain = runs_reference(query)
    backward = _backward_reference if plain else salient_cross_attention_backward_triton
    inputs = (query, key, value, valid_sizes, map_width, points, scales, softmax_scale, dropout, seed)
    return backward(grad, *inputs, out, logsumexp, rest)


_salient_cross_attention_backward.register_kernel("cpu")(_backward_reference)


@_salient_cross_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    *_: object,
) -> list[Tensor]:
    return empty_gradients(query, key, value, points, scales)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, valid_sizes, ctx.map_width, points, scales, ctx.softmax_scale, ctx.dropout, seed = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, valid_sizes, points, scales, seed, *output)


def _backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
    if grad is None:
        return (None,) * 10
    query, key, value, valid_sizes, points, scales, seed, *output = ctx.saved_tensors
    inputs = (query, key, value, valid_sizes, ctx.map_width, points, scales, ctx.softmax_scale, ctx.dropout, seed)
    d_query, d_key, d_value, d_points, d_scales = _salient_cross_attention_backward(grad, *inputs, *output)
    if points is None:
        d_points, d_scales = None, None
    return d_query, d_key, d_value, None, None, d_points, d_scales, None, None, None


_salient_cross_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.samdetr.salient_cross_attention)
def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Count the products with key and value at all cells of the map, from the shapes; a multiply-accumulate is 2."""
    batch, queries, heads, width = query
    return 2 * batch * queries * heads * key[1] * (width + value[3])


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
) -> None:
    def refuse(expectation: str, got: object) -> NoReturn:
        got = describe(got) if isinstance(got, Tensor) else got
        raise ValueError(f"salient_cross_attention: {expectation}, got {got}")

    # messages are made only when needed: torch.compile cannot format a dynamic size
    if query.dim() != 4 or query.dtype not in DTYPES or not 0 < query.shape[3] <= MAX_WIDTH:
        refuse(f"query must be a floating [B, N, M, D] with 0 < D <= {MAX_WIDTH}", query)
    batch, queries, heads, width = query.shape
    if key.dim() != 3 or key.shape[0] != batch or key.shape[2] != width or key.dtype != query.dtype:
        refuse(f"key must be a {query.dtype} [{batch}, S, {width}]", key)
    cells = key.shape[1]
    if value.dim() != 4 or value.shape[:3] != (batch, cells, heads) or value.dtype != query.dtype:
        refuse(f"value must be a {query.dtype} [{batch}, {cells}, {heads}, E]", value)
    if not 0 < value.shape[3] <= MAX_HEAD_WIDTH:
        refuse(f"value's width must be 1 to {MAX_HEAD_WIDTH}", value.shape[3])
    if map_width < 1 or not 0 < cells <= MAX_CELLS or cells % map_width:
        refuse(f"S must be a multiple of map_width from 1 to {MAX_CELLS}", f"S = {cells}, map_width = {map_width}")
    if valid_sizes.shape != (batch, 2) or not is_integer(valid_sizes):
        refuse(f"valid_sizes must be an integer [{batch}, 2]", valid_sizes)
    if (points is None) != (scales is None):
        refuse("points and scales must be given together", "one of them")
    for name, tensor in (("points", points), ("scales", scales)):
        if tensor is not None and (tensor.shape != (batch, queries, heads, 2) or tensor.dtype not in DTYPES):
            refuse(f"{name} must be a floating [{batch}, {queries}, {heads}, 2]", tensor)
    if not abs(softmax_scale) < math.inf:
        refuse("softmax_scale must be finite", softmax_scale)
    if not 0 <= dropout < 1:
        refuse("dropout must be at least 0 and less than 1", dropout)
    if dropout > 0 and (seed is None or seed.dtype != torch.int64 or seed.numel() != 1):
        refuse("dropout needs a seed, an int64 tensor of one element", seed)
    others = {"key": key, "value": value, "valid_sizes": valid_sizes, "points": points, "scales": scales}
    check_devices("salient_cross_attention", query, others | ({"seed": seed} if dropout > 0 else {}))


def salient_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    *,
    points: Tensor | None = None,
    scales: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attend from every query and head to the valid cells of its image's map.

    query: [B, N, M, D] floating, D at most 512. key: [B, S, D], shared by the heads. value: [B, S, M, E], E at most 64.
    S = H * map_width cells, row by row. valid_sizes: [B, 2] integer (h, w); cells at or beyond it do not exist
    (whatever they hold, NaN included), and an image without any gives zeros. points, scales: [B, N, M, 2] floating
    (x, y), both or none: centre in cells and raw inverse width of the Gaussian prior. softmax_scale: D ** -0.5 by
    default. dropout: share of weights dropped after the softmax, by the generator of `dropout_mask`. seed: int64 tensor
    of one element, on the same device, needed with dropout and new for every call. Under autocast query, key and value
    are cast to its dtype, as for torch's own attention. Returns [B, N, M * E] in the dtype of ``query``.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    _check(query, key, value, valid_sizes, map_width, points, scales, scale, dropout, seed)
    inputs = (query, key, value, valid_sizes, map_width, points, scales, scale, dropout, seed if dropout > 0 else None)
    out: Tensor = _salient_cross_attention(*inputs)[0]
    return out
