"""Cross-attention of a detector's queries to its map, with one key that all heads share and SMCA's Gaussian prior.

Replaces ``dropout(softmax(q @ k^T / sqrt(D) + mask + prior)) @ v`` of SAM-DETR (CVPR 2022, section 3: a head's query is
one salient point's feature, as wide as the key) with the prior of SMCA-DETR (ICCV 2021, equation 4), for each image:

    score[m, n, s] = softmax_scale <q[n, m], k[s]> - (sx^2 (px - gx - 1/2)^2 + sy^2 (py - gy - 1/2)^2) / 8
    out[n, m] = sum_s keep[m, n, s] / (1 - p) softmax_s(score[m, n])[s] v[s, m]

over the cells s = (gy, gx) with gy < h and gx < w of the image's valid size: padded cells are never read. The prior and
the dropout mask are made in registers; nothing of size N x S is written. Dropout is counter-based: a 32-bit hash
(Wellons' lowbias32, three rounds for a row and one for a cell) of (seed, image, head, query, cell) is compared with p,
so that forward, backward and reference agree whatever the tiles are.

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
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.launch import Tile, float32_precision, launch, next_power_of_2, reference_forced

MAX_WIDTH, MAX_HEAD_WIDTH = 512, 128
MAX_CELLS = 1 << 20  # up to here fp32 finds a cell's row without error (`_cells`)
SMCA_WIDTH = 8.0

GOLDEN, MIX_1, MIX_2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # 2^32 / golden ratio; lowbias32's factors
_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)
_ROOT = tl.constexpr(SMCA_WIDTH**-0.5)
_GRADIENT = tl.constexpr(-2 / SMCA_WIDTH)


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def _threshold(dropout: float) -> int:
    """Hashes (as int32) below it are dropped."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def _mix_reference(x: Tensor) -> Tensor:
    """lowbias32 of int32, whose products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(MIX_2)
    return x ^ ((x >> 16) & 0xFFFF)


def dropout_mask(seed: Tensor, dropout: float, image: int, heads: int, queries: int, cells: int) -> Tensor:
    """Which weights of image number ``image`` the op keeps: [heads, queries, cells] bool. ``seed`` as for the op."""
    head, query, cell = (torch.arange(n, dtype=torch.int32, device=seed.device) for n in (heads, queries, cells))
    seed, golden = seed.reshape(()).long(), _signed(GOLDEN)
    key = _mix_reference(_mix_reference(seed.to(torch.int32) + golden) ^ (seed >> 32).to(torch.int32))
    key = _mix_reference(_mix_reference(key ^ image) ^ head)[:, None]
    rows = _mix_reference(_mix_reference(query ^ key) + _mix_reference(key + golden))
    x = rows[..., None] ^ (cell * golden)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MIX_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MIX_2))
    return x >= _threshold(dropout)  # lowbias32's last step would change the lower half only


def _offsets(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Distances point - cell centre of one image: [N, M, 2] -> x [M, N, 1, W] and y [M, N, H, 1]."""
    x, y = points.transpose(0, 1).unbind(-1)
    column, row = (torch.arange(n, dtype=x.dtype, device=x.device) + 0.5 for n in (width, height))
    return x[..., None, None] - column, y[..., None, None] - row[:, None]


def _scores(
    query: Tensor, key: Tensor, valid: Tensor, offsets: tuple[Tensor, Tensor] | None, scales: Tensor | None
) -> Tensor:
    """Scores [M, N, S] of one image, -inf where ``valid`` [H, W] is not; ``query`` [M, N, D] is scaled already."""
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
    """What the op returns, image by image: N x S numbers fit the cache."""
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
    rest = wide.new_empty(0) if out is wide else (wide - out).detach().to(query.dtype)
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
    """Plain torch with the signature and result of `salient_cross_attention`, on any device and floating dtype."""
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _forward_reference(query, key, value, valid_sizes, map_width, points, scales, scale, dropout, seed)[0]


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
    """Gradients of query, key, value, points, scales, of their shapes and dtypes; an absent input's is empty."""
    gradients = _empty_gradients(query, key, value, points, scales)
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


def _empty_results(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    out = query.new_empty(batch, queries, heads * value.shape[3])
    wide = compute_dtype(query)
    rest = query.new_empty(0 if query.dtype == wide else out.shape)
    return out, query.new_empty(batch, heads, queries, dtype=wide), rest


def _empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, points: Tensor | None, scales: Tensor | None
) -> list[Tensor]:
    inputs = (query, key, value, points, scales)
    return [query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """lowbias32 of uint32."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def _row_keys(p_seed, i_b, i_m, o_n):  # type: ignore[no-untyped-def]
    """What the dropout of one row's cells starts from; two hashes of the row, so that rows do not share a sequence."""
    seed = tl.load(p_seed)
    key = _mix(_mix(seed.to(tl.uint32) + _GOLDEN) ^ (seed >> 32).to(tl.uint32))
    key = _mix(_mix(key ^ i_b.to(tl.uint32)) ^ i_m.to(tl.uint32))
    return _mix(_mix(o_n.to(tl.uint32) ^ key) + _mix(key + _GOLDEN))


@triton.jit
def _kept(b_keys, o_s, threshold):  # type: ignore[no-untyped-def]
    """Whether dropout keeps the weights of cells ``o_s`` in rows ``b_keys``, which broadcast."""
    x = b_keys ^ (o_s.to(tl.uint32) * _GOLDEN)
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def _valid_size(p_valid, i_b, cells, map_width):  # type: ignore[no-untyped-def]
    """Number and width of the image's valid cells."""
    height = tl.load(p_valid + 2 * i_b).to(tl.int32)
    width = tl.load(p_valid + 2 * i_b + 1).to(tl.int32)
    width = tl.minimum(tl.maximum(width, 0), map_width)
    return tl.minimum(tl.maximum(height, 0), cells // map_width) * width, width


@triton.jit
def _cells(o_j, width, map_width):  # type: ignore[no-untyped-def]
    """Index in the map and centre (x, y) of the valid cells numbered ``o_j``; exact up to MAX_CELLS cells."""
    width = tl.maximum(width, 1).to(tl.float32)
    b_j = o_j.to(tl.float32)
    b_y = tl.floor((b_j + 0.5) * (1.0 / width))
    b_x = b_j - b_y * width
    return b_y.to(tl.int32) * map_width + b_x.to(tl.int32), b_x + 0.5, b_y + 0.5


@triton.jit
def _places(o_rows, m_rows, stride, LENGTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets and mask of whole rows of a matrix."""
    o_columns = tl.arange(0, BLOCK)
    mask = m_rows[:, None]
    if LENGTH < BLOCK:
        mask = mask & (o_columns < LENGTH)[None, :]
    return o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :], mask


@triton.jit
def _load_rows(pointer, o_rows, m_rows, stride, LENGTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets, mask = _places(o_rows, m_rows, stride, LENGTH, BLOCK)
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def _load_pairs(pointer, o_rows, m_rows, stride):  # type: ignore[no-untyped-def]
    pointers = pointer + o_rows.to(tl.int64) * stride
    x = tl.load(pointers, mask=m_rows, other=0.0).to(tl.float32)
    return x, tl.load(pointers + 1, mask=m_rows, other=0.0).to(tl.float32)


@triton.jit
def _salient_cross_attention_forward_kernel(  # type: ignore[no-untyped-def]
    p_query,
    p_key,
    p_value,
    p_valid,
    p_points,
    p_scales,
    p_seed,
    p_out,
    p_rest,
    p_logsumexp,
    queries,
    cells,
    map_width,
    softmax_scale,
    keep_scale,
    threshold,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SMCA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: BLOCK_N queries of one head; online softmax over the valid cells."""
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = _valid_size(p_valid, i_b, cells, map_width)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < queries
    i_row, i_head = i_b * queries * HEADS + i_m, i_b * HEADS + i_m
    b_query = _load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
    if HAS_SMCA:
        b_px, b_py = _load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = _load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = b_sx * _ROOT, b_sy * _ROOT
    if HAS_DROPOUT:
        b_keys = _row_keys(p_seed, i_b, i_m, o_n)
    p_key += i_b * cells * D
    p_value += (i_b * cells * HEADS + i_m) * E
    b_max = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_out = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for j in range(0, valid_cells, BLOCK_S):
        o_j = j + tl.arange(0, BLOCK_S)
        m_s = o_j < valid_cells
        o_s, b_x, b_y = _cells(o_j, width, map_width)
        b_key = _load_rows(p_key, o_s, m_s, D, D, BLOCK_D)
        b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * softmax_scale
        if HAS_SMCA:
            b_dx = (b_px[:, None] - b_x[None, :]) * b_sx[:, None]
            b_dy = (b_py[:, None] - b_y[None, :]) * b_sy[:, None]
            b_scores -= b_dx * b_dx + b_dy * b_dy
        b_scores = tl.where(m_s[None, :], b_scores, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp(b_scores - b_new[:, None])
        b_decay = tl.exp(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_weights, 1)
        b_max = b_new
        if HAS_DROPOUT:
            b_weights = tl.where(_kept(b_keys[:, None], o_s[None, :], threshold), b_weights, 0.0)
        b_value = _load_rows(p_value, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_out = tl.dot(b_weights.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    # a sum is at least 1, or 0 where no cell is valid
    b_out *= (keep_scale / tl.maximum(b_sum, 0.5))[:, None]
    o_out, m_out = _places(o_n, m_n, HEADS * E, E, BLOCK_E)
    b_narrow = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + i_row * E + o_out, b_narrow, mask=m_out)
    if p_out.dtype.element_ty != tl.float32:
        tl.store(p_rest + i_row * E + o_out, b_out - b_narrow.to(tl.float32), mask=m_out)
    tl.store(p_logsumexp + i_head * queries + o_n, b_max + tl.log(b_sum), mask=m_n)


@triton.jit
def _salient_cross_attention_query_kernel(  # type: ignore[no-untyped-def]
    p_query,
    p_key,
    p_value,
    p_valid,
    p_points,
    p_scales,
    p_seed,
    p_out,
    p_rest,
    p_logsumexp,
    p_grad,
    p_d_query,
    p_d_points,
    p_d_scales,
    p_delta,
    p_keys,
    queries,
    cells,
    map_width,
    softmax_scale,
    keep_scale,
    threshold,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SMCA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: gradients of BLOCK_N queries of one head and of their points and scales.

    Also writes, for the kernel of key and value, each row's ``delta = sum(grad * out)`` and dropout key.
    """
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = _valid_size(p_valid, i_b, cells, map_width)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < queries
    i_row = i_b * queries * HEADS + i_m
    o_head = (i_b * HEADS + i_m) * queries + o_n
    b_query = _load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
    b_grad = _load_rows(p_grad + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E)
    b_out = _load_rows(p_out + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E).to(tl.float32)
    if p_out.dtype.element_ty != tl.float32:
        b_out += _load_rows(p_rest + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E).to(tl.float32)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out, 1)
    tl.store(p_delta + o_head, b_delta, mask=m_n)
    b_logsumexp = tl.load(p_logsumexp + o_head, mask=m_n, other=float("inf"))
    if HAS_SMCA:
        b_px, b_py = _load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = _load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = b_sx * _ROOT, b_sy * _ROOT
        b_x1 = tl.zeros((BLOCK_N,), tl.float32)
        b_x2 = tl.zeros((BLOCK_N,), tl.float32)
        b_y1 = tl.zeros((BLOCK_N,), tl.float32)
        b_y2 = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_DROPOUT:
        b_keys = _row_keys(p_seed, i_b, i_m, o_n)
        tl.store(p_keys + o_head, b_keys.to(tl.int32, bitcast=True), mask=m_n)
    p_key += i_b * cells * D
    p_value += (i_b * cells * HEADS + i_m) * E
    b_d_query = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in range(0, valid_cells, BLOCK_S):
        o_j = j + tl.arange(0, BLOCK_S)
        m_s = o_j < valid_cells
        o_s, b_x, b_y = _cells(o_j, width, map_width)
        b_key = _load_rows(p_key, o_s, m_s, D, D, BLOCK_D)
        b_value = _load_rows(p_value, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * softmax_scale
        if HAS_SMCA:
            b_dx = b_px[:, None] - b_x[None, :]
            b_dy = b_py[:, None] - b_y[None, :]
            b_tx = b_dx * b_sx[:, None]
            b_ty = b_dy * b_sy[:, None]
            b_scores -= b_tx * b_tx + b_ty * b_ty
        b_weights = tl.where(m_s[None, :], tl.exp(b_scores - b_logsumexp[:, None]), 0.0)
        b_d_weights = tl.dot(b_grad, tl.trans(b_value), input_precision=PRECISION)
        if HAS_DROPOUT:
            b_kept = _kept(b_keys[:, None], o_s[None, :], threshold)
            b_d_weights = tl.where(b_kept, b_d_weights * keep_scale, 0.0)
        b_d_scores = b_weights * (b_d_weights - b_delta[:, None])
        if HAS_SMCA:
            b_x1 += tl.sum(b_d_scores * b_dx, 1)
            b_x2 += tl.sum(b_d_scores * b_dx * b_dx, 1)
            b_y1 += tl.sum(b_d_scores * b_dy, 1)
            b_y2 += tl.sum(b_d_scores * b_dy * b_dy, 1)
        b_d_query = tl.dot(b_d_scores.to(b_key.dtype), b_key, b_d_query, input_precision=PRECISION)
    o_out, m_out = _places(o_n, m_n, HEADS * D, D, BLOCK_D)
    tl.store(p_d_query + i_row * D + o_out, b_d_query * softmax_scale, mask=m_out)
    if HAS_SMCA:
        o_pair = 2 * (i_row + o_n.to(tl.int64) * HEADS)
        b_sx, b_sy = b_sx / _ROOT, b_sy / _ROOT
        tl.store(p_d_points + o_pair, b_sx * b_sx * b_x1 * _GRADIENT, mask=m_n)
        tl.store(p_d_points + o_pair + 1, b_sy * b_sy * b_y1 * _GRADIENT, mask=m_n)
        tl.store(p_d_scales + o_pair, b_sx * b_x2 * _GRADIENT, mask=m_n)
        tl.store(p_d_scales + o_pair + 1, b_sy * b_y2 * _GRADIENT, mask=m_n)


@triton.jit
def _salient_cross_attention_key_value_kernel(  # type: ignore[no-untyped-def]
    p_query,
    p_key,
    p_value,
    p_valid,
    p_points,
    p_scales,
    p_keys,
    p_logsumexp,
    p_grad,
    p_delta,
    p_d_key,
    p_d_value,
    queries,
    cells,
    map_width,
    softmax_scale,
    keep_scale,
    threshold,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    HAS_SMCA: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: gradients of BLOCK_S valid cells from HEADS / SPLIT heads, and zeros in padded cells."""
    i_s, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = _valid_size(p_valid, i_b, cells, map_width)
    first_head = i_split * (HEADS // SPLIT)
    p_d_key += (i_split * tl.num_programs(2) + i_b) * cells * D
    p_d_value += i_b * cells * HEADS * E
    o_j = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    # of the whole map's cells numbered o_j the padded ones belong to no program as valid cells: zeros
    m_pad = (o_j < cells) & ((o_j % map_width >= width) | (o_j // map_width * width >= valid_cells))
    o_pad, m_pad_row = _places(o_j, m_pad, D, D, BLOCK_D)
    tl.store(p_d_key + o_pad, tl.zeros((BLOCK_S, BLOCK_D), tl.float32), mask=m_pad_row)
    o_pad, m_pad_row = _places(o_j, m_pad, HEADS * E, E, BLOCK_E)
    for i_m in range(first_head, first_head + HEADS // SPLIT):
        tl.store(p_d_value + i_m * E + o_pad, tl.zeros((BLOCK_S, BLOCK_E), tl.float32), mask=m_pad_row)

    m_s = o_j < valid_cells
    o_s, b_x, b_y = _cells(o_j, width, map_width)
    b_key = _load_rows(p_key + i_b * cells * D, o_s, m_s, D, D, BLOCK_D)
    b_d_key = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    b_d_value = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    p_value += i_b * cells * HEADS * E
    blocks = tl.cdiv(queries, BLOCK_N)
    # heads and queries in one loop: with two, ptxas spills and the pipeline drains after every head
    for step in range(0, tl.where(i_s * BLOCK_S < valid_cells, HEADS // SPLIT * blocks, 0)):
        i_m, i_n = first_head + step // blocks, step % blocks
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < queries
        i_row = i_b * queries * HEADS + i_m
        i_head = (i_b * HEADS + i_m) * queries
        b_query = _load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
        b_grad = _load_rows(p_grad + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E)
        b_value = _load_rows(p_value + i_m * E, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_logsumexp = tl.load(p_logsumexp + i_head + o_n, mask=m_n, other=float("inf"))
        b_delta = tl.load(p_delta + i_head + o_n, mask=m_n, other=0.0)
        b_scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * softmax_scale
        if HAS_SMCA:
            b_px, b_py = _load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
            b_sx, b_sy = _load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
            b_dx = (b_px[None, :] - b_x[:, None]) * (b_sx * _ROOT)[None, :]
            b_dy = (b_py[None, :] - b_y[:, None]) * (b_sy * _ROOT)[None, :]
            b_scores -= b_dx * b_dx + b_dy * b_dy
        # rows beyond the valid cells hold numbers that nothing stores
        b_weights = tl.exp(b_scores - b_logsumexp[None, :])
        b_d_weights = tl.dot(b_value, tl.trans(b_grad), input_precision=PRECISION)
        b_dropped = b_weights
        if HAS_DROPOUT:
            b_keys = tl.load(p_keys + i_head + o_n, mask=m_n, other=0).to(tl.uint32, bitcast=True)
            b_kept = _kept(b_keys[None, :], o_s[:, None], threshold)
            b_dropped = tl.where(b_kept, b_weights * keep_scale, 0.0)
            b_d_weights = tl.where(b_kept, b_d_weights * keep_scale, 0.0)
        b_d_value = tl.where(i_n > 0, b_d_value, 0.0)
        b_d_value = tl.dot(b_dropped.to(b_grad.dtype), b_grad, b_d_value, input_precision=PRECISION)
        m_done = o_j < tl.where(i_n == blocks - 1, valid_cells, 0)
        o_out, m_out = _places(o_s, m_done, HEADS * E, E, BLOCK_E)
        tl.store(p_d_value + i_m * E + o_out, b_d_value, mask=m_out)
        b_d_scores = b_weights * (b_d_weights - b_delta[None, :])
        b_d_key = tl.dot(b_d_scores.to(b_query.dtype), b_query, b_d_key, input_precision=PRECISION)
    o_out, m_out = _places(o_s, m_s, D, D, BLOCK_D)
    tl.store(p_d_key + o_out, b_d_key * softmax_scale, mask=m_out)


class _Tiles(NamedTuple):
    forward: Tile
    query: Tile
    key_value: Tile


def _tile(queries: int, cells: int, warps: int) -> Tile:
    return Tile({"BLOCK_N": queries, "BLOCK_S": cells}, warps)


# Keyed by (bytes of an element, largest D = 8 E). Timed on no GPU yet: chosen by the compiler's report for sm_80, sm_90
# and sm_100 (`example_launches`): no spills, at most 110 KB of shared memory and then as many queries and cells as fit.
_TILES = {
    (2, 128): _Tiles(_tile(64, 64, 4), _tile(64, 32, 8), _tile(32, 64, 8)),  # reported at D = 96, E = 12
    (2, 256): _Tiles(_tile(64, 64, 4), _tile(32, 64, 8), _tile(64, 32, 8)),  # D = 256, E = 32
    (2, 512): _Tiles(_tile(32, 32, 4), _tile(32, 32, 8), _tile(16, 32, 8)),  # D = 512, E = 64
    (4, 128): _Tiles(_tile(32, 32, 8), _tile(16, 16, 4), _tile(16, 16, 8)),  # fp32 likewise, exact and TF32
    (4, 256): _Tiles(_tile(32, 32, 8), _tile(16, 16, 8), _tile(16, 16, 8)),
    (4, 512): _Tiles(_tile(16, 16, 8), _tile(16, 16, 16), _tile(16, 16, 8)),  # exact only: TF32 would spill
}
_PROGRAMS = 128  # fewer programs of the key-value kernel than this: split the heads


def _tiles(query: Tensor, value: Tensor) -> _Tiles:
    width = max(query.shape[3], 4 * value.shape[3])
    return _TILES[query.element_size(), next(largest for largest in (128, 256, 512) if width <= largest)]


def _constants(query: Tensor, value: Tensor, points: Tensor | None, dropout: float) -> dict[str, int | bool | str]:
    (_, _, heads, width), head_width = query.shape, value.shape[3]
    return {
        "HEADS": heads,
        "D": width,
        "E": head_width,
        "HAS_SMCA": points is not None,
        "HAS_DROPOUT": dropout > 0,
        "PRECISION": float32_precision() if width <= 256 else "ieee",
        "BLOCK_D": max(16, next_power_of_2(width)),
        "BLOCK_E": max(16, next_power_of_2(head_width)),
    }


def salient_cross_attention_forward_triton(
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
    """Launcher: the output [B, N, M * E], the logsumexp [B, M, N] fp32 of the scores, and what rounding took from the
    output (its shape and dtype; empty in fp32), which the gradient of the points needs."""
    tensors = [query, key, value, valid_sizes, points, scales, seed]
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    batch, queries, heads, _ = query.shape
    out, logsumexp, rest = _empty_results(query, value)
    sizes = (queries, key.shape[1], map_width, softmax_scale, 1 / (1 - dropout), _threshold(dropout))
    tile = _tiles(query, value).forward
    launch(
        _salient_cross_attention_forward_kernel,
        (triton.cdiv(queries, tile.blocks["BLOCK_N"]), heads, batch),
        tile,
        (*tensors, out, rest, logsumexp, *sizes),
        **_constants(query, value, points, dropout),
    )
    return out, logsumexp, rest


def salient_cross_attention_backward_triton(
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
    """Launcher: gradients of query, key, value, points, scales (an absent input's is empty)."""
    gradients = _empty_gradients(query, key, value, points, scales)
    d_query, d_key, d_value, d_points, d_scales = gradients
    batch, queries, heads, width = query.shape
    cells = key.shape[1]
    if queries == 0:
        d_key.zero_()
        d_value.zero_()
        return gradients
    grad, query, key, value, valid_sizes, out, logsumexp, rest = (
        tensor.contiguous() for tensor in (grad, query, key, value, valid_sizes, out, logsumexp, rest)
    )
    points, scales, seed = (None if tensor is None else tensor.contiguous() for tensor in (points, scales, seed))
    delta = torch.empty_like(logsumexp)
    keys = torch.empty_like(logsumexp, dtype=torch.int32) if dropout > 0 else None
    sizes = (queries, cells, map_width, softmax_scale, 1 / (1 - dropout), _threshold(dropout))
    constants = _constants(query, value, points, dropout)
    inputs = (query, key, value, valid_sizes, points, scales)
    tile = _tiles(query, value).query
    launch(
        _salient_cross_attention_query_kernel,
        (triton.cdiv(queries, tile.blocks["BLOCK_N"]), heads, batch),
        tile,
        (*inputs, seed, out, rest, logsumexp, grad, d_query, d_points, d_scales, delta, keys, *sizes),
        **constants,
    )
    tile = _tiles(query, value).key_value
    blocks = triton.cdiv(cells, tile.blocks["BLOCK_S"])
    divisors = [count for count in range(1, heads + 1) if heads % count == 0]
    split = next((count for count in divisors if batch * blocks * count >= _PROGRAMS), heads)
    partial = d_key if split == 1 else key.new_empty(split, batch, cells, width, dtype=torch.float32)
    launch(
        _salient_cross_attention_key_value_kernel,
        (blocks, split, batch),
        tile,
        (*inputs, keys, logsumexp, grad, delta, partial, d_value, *sizes),
        SPLIT=split,
        **constants,
    )
    if split > 1:
        d_key.copy_(partial.sum(0))
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
    plain = reference_forced() or query.dtype == torch.float64
    forward = _forward_reference if plain else salient_cross_attention_forward_triton
    return forward(query, key, value, valid_sizes, map_width, points, scales, softmax_scale, dropout, seed)


_salient_cross_attention.register_kernel("cpu")(_forward_reference)


@_salient_cross_attention.register_fake
def _(
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
    return _empty_results(query, value)


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
    plain = reference_forced() or query.dtype == torch.float64
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
    softmax_scale: float,
    dropout: float,
    seed: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    rest: Tensor,
) -> list[Tensor]:
    return _empty_gradients(query, key, value, points, scales)


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


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid_sizes: Tensor,
    map_width: int,
    points: Tensor | None,
    scales: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    def expect(fits: bool, expectation: str, got: object) -> None:
        if not fits:
            if isinstance(got, Tensor):
                got = f"{got.dtype} {list(got.shape)} on {got.device}"
            raise ValueError(f"salient_cross_attention: {expectation}, got {got}")

    expect(
        query.dim() == 4 and query.is_floating_point() and query.shape[0] > 0 and 0 < query.shape[3] <= MAX_WIDTH,
        f"query must be a floating [B, N, M, D] with B > 0 and 0 < D <= {MAX_WIDTH}",
        query,
    )
    batch, queries, heads, width = query.shape
    expect(
        key.dim() == 3 and key.shape[0] == batch and key.shape[2] == width and key.dtype == query.dtype,
        f"key must be a {query.dtype} [{batch}, S, {width}]",
        key,
    )
    cells = key.shape[1]
    expect(
        value.dim() == 4 and value.shape[:3] == (batch, cells, heads) and value.dtype == query.dtype,
        f"value must be a {query.dtype} [{batch}, {cells}, {heads}, E]",
        value,
    )
    expect(0 < value.shape[3] <= MAX_HEAD_WIDTH, f"value's width must be 1 to {MAX_HEAD_WIDTH}", value.shape[3])
    expect(
        map_width > 0 and 0 < cells <= MAX_CELLS and cells % map_width == 0,
        f"S must be a multiple of map_width from 1 to {MAX_CELLS}",
        f"S = {cells}, map_width = {map_width}",
    )
    expect(
        valid_sizes.shape == (batch, 2) and not valid_sizes.is_floating_point(),
        f"valid_sizes must be an integer [{batch}, 2]",
        valid_sizes,
    )
    expect((points is None) == (scales is None), "points and scales must be given together", "one of them")
    for name, tensor in (("points", points), ("scales", scales)):
        expect(
            tensor is None or (tensor.shape == (batch, queries, heads, 2) and tensor.is_floating_point()),
            f"{name} must be a floating [{batch}, {queries}, {heads}, 2]",
            tensor,
        )
    expect(0 <= dropout < 1, "dropout must be at least 0 and less than 1", dropout)
    if dropout > 0:
        expect(
            seed is not None and seed.dtype == torch.int64 and seed.numel() == 1,
            "dropout needs a seed, an int64 tensor of one element",
            seed,
        )
    for name, tensor in (("key", key), ("value", value), ("valid_sizes", valid_sizes), ("points", points)):
        expect(tensor is None or tensor.device == query.device, f"{name} must be on {query.device}", tensor)


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
    """Attention of every query and head to the valid cells of its image's map.

    query: [B, N, M, D] floating. key: [B, S, D], shared by the heads. value: [B, S, M, E]. S = H * map_width cells,
    row by row. valid_sizes: [B, 2] integer (h, w); cells at or beyond it do not exist (whatever they hold, NaN
    included), and an image without any gives zeros. points, scales: [B, N, M, 2] floating (x, y), both or none: centre
    in cells and raw inverse width of the Gaussian prior. softmax_scale: D ** -0.5 by default. dropout: share of weights
    dropped after the softmax, by the generator of `dropout_mask`. seed: int64 tensor of one element, on the same
    device, needed with dropout and new for every call. Returns [B, N, M * E] in the dtype of ``query``.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    _check(query, key, value, valid_sizes, map_width, points, scales, dropout, seed)
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    inputs = (query, key, value, valid_sizes, map_width, points, scales, scale, dropout, seed if dropout > 0 else None)
    out: Tensor = _salient_cross_attention(*inputs)[0]
    return out


def example_launches() -> None:
    """Both launchers at the shapes of training, for the ahead-of-time report."""
    half, full = torch.bfloat16, torch.float32
    cases = [(16, 25, 38, 256, 32, half, smca, dropout) for smca in (True, False) for dropout in (0.0, 0.1)]
    cases += [(batch, 50, 76, 256, 32, torch.float16, True, 0.1) for batch in (16, 4)]
    cases += [(4, 25, 38, 256, 32, dtype, True, 0.1) for dtype in (half, full)]
    cases += [(16, 50, 76, width, width // 8, dtype, True, 0.1) for width in (96, 256, 512) for dtype in (half, full)]
    for batch, height, width, channels, head_width, dtype, smca, dropout in cases:
        query = torch.empty(batch, 300, 8, channels, dtype=dtype, device="meta")
        key = torch.empty(batch, height * width, channels, dtype=dtype, device="meta")
        value = torch.empty(batch, height * width, 8, head_width, dtype=dtype, device="meta")
        valid = torch.empty(batch, 2, dtype=torch.int64, device="meta")
        points = torch.empty(batch, 300, 8, 2, device="meta") if smca else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
        inputs = (query, key, value, valid, width, points, points, channels**-0.5, dropout, seed)
        results = salient_cross_attention_forward_triton(*inputs)
        salient_cross_attention_backward_triton(torch.empty_like(results[0]), *inputs, *results)
