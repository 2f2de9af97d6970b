"""The Triton kernels of `salient_cross_attention`, their tiles and launchers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.attention_dropout import kept, row_keys, threshold_of
from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.launch import Tile, float32_precision, launch, next_power_of_2

SMCA_WIDTH = 8.0  # the Gaussian's denominator (SMCA-DETR, equation 4)
MAX_CELLS = 1 << 20  # up to here fp32 finds a cell's row without error (`_cells`)
_ROOT = tl.constexpr(SMCA_WIDTH**-0.5)
_GRADIENT = tl.constexpr(-2 / SMCA_WIDTH)


def empty_results(query: Tensor, value: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, heads, _ = query.shape
    out = query.new_empty(batch, queries, heads * value.shape[3])
    wide = compute_dtype(query)
    rest = query.new_empty(0 if query.dtype == wide or points is None else out.shape)
    return out, query.new_empty(batch, heads, queries, dtype=wide), rest


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, points: Tensor | None, scales: Tensor | None
) -> list[Tensor]:
    inputs = (query, key, value, points, scales)
    return [query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]


@triton.jit
def _valid_size(p_valid, i_b, cells, map_width):  # type: ignore[no-untyped-def]
    """Number and width of the image's valid cells."""
    height, width = tl.load(p_valid + 2 * i_b).to(tl.int64), tl.load(p_valid + 2 * i_b + 1).to(tl.int64)
    height = tl.minimum(tl.maximum(height, 0), cells // map_width).to(tl.int32)
    width = tl.minimum(tl.maximum(width, 0), map_width).to(tl.int32)
    return height * width, width


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


# these change with every batch of multi-scale training, or with the recipe: one compilation serves all
_UNSPECIALIZED = ["queries", "cells", "map_width", "threshold"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
        b_keys = row_keys(p_seed, i_b, i_m, o_n)
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
            b_weights = tl.where(kept(b_keys[:, None], o_s[None, :], threshold), b_weights, 0.0)
        b_value = _load_rows(p_value, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_out = tl.dot(b_weights.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    # a sum is at least 1, or 0 where no cell is valid, or NaN, which a maximum would hide
    b_out *= (keep_scale / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    o_out, m_out = _places(o_n, m_n, HEADS * E, E, BLOCK_E)
    b_narrow = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + i_row * E + o_out, b_narrow, mask=m_out)
    if HAS_SMCA and p_out.dtype.element_ty != tl.float32:
        tl.store(p_rest + i_row * E + o_out, b_out - b_narrow.to(tl.float32), mask=m_out)
    tl.store(p_logsumexp + i_head * queries + o_n, b_max + tl.log(b_sum), mask=m_n)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
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
    if HAS_SMCA and p_out.dtype.element_ty != tl.float32:
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
        b_keys = row_keys(p_seed, i_b, i_m, o_n)
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
            b_kept = kept(b_keys[:, None], o_s[None, :], threshold)
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


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "heads"])
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
    heads,
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
    """One program: gradients of BLOCK_S valid cells from ``heads`` of the HEADS, and zeros in padded cells."""
    i_s, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = _valid_size(p_valid, i_b, cells, map_width)
    first_head = i_split * heads
    p_d_key += (i_split * tl.num_programs(2) + i_b) * cells * D
    p_d_value += i_b * cells * HEADS * E
    o_j = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    # of the whole map's cells numbered o_j the padded ones belong to no program as valid cells: zeros
    m_pad = (o_j < cells) & ((o_j % map_width >= width) | (o_j // map_width * width >= valid_cells))
    o_pad, m_pad_row = _places(o_j, m_pad, D, D, BLOCK_D)
    tl.store(p_d_key + o_pad, tl.zeros((BLOCK_S, BLOCK_D), tl.float32), mask=m_pad_row)
    o_pad, m_pad_row = _places(o_j, m_pad, HEADS * E, E, BLOCK_E)
    for i_m in range(first_head, first_head + heads):
        tl.store(p_d_value + i_m * E + o_pad, tl.zeros((BLOCK_S, BLOCK_E), tl.float32), mask=m_pad_row)

    m_s = o_j < valid_cells
    o_s, b_x, b_y = _cells(o_j, width, map_width)
    b_key = _load_rows(p_key + i_b * cells * D, o_s, m_s, D, D, BLOCK_D)
    b_d_key = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    b_d_value = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    p_value += i_b * cells * HEADS * E
    blocks = tl.cdiv(queries, BLOCK_N)
    # heads and queries in one loop: with two, ptxas spills and the pipeline drains after every head
    for step in range(0, tl.where(i_s * BLOCK_S < valid_cells, heads * blocks, 0)):
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
            b_kept = kept(b_keys[None, :], o_s[:, None], threshold)
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


# Keyed by (bytes of an element, largest D and 8 E). Chosen by the compiler's report for sm_80, sm_90 and sm_100, not by
# time: no spills, at most 110 KB of shared memory and then as many queries and cells as fit. Other widths take these
# tiles too: of D from 16 to 512 with E from 12 to 64, (64, 32), (256, 64) and (512, 16) spill 8 or 16 bytes.
_TILES = {
    (2, 128): _Tiles(_tile(64, 64, 4), _tile(64, 32, 8), _tile(32, 64, 8)),  # reported at D = 96, E = 12
    (2, 256): _Tiles(_tile(64, 64, 4), _tile(32, 64, 8), _tile(64, 32, 8)),  # D = 256, E = 32
    (2, 512): _Tiles(_tile(32, 32, 4), _tile(32, 32, 8), _tile(16, 32, 8)),  # D = 512, E = 64
    (4, 128): _Tiles(_tile(32, 32, 8), _tile(16, 16, 4), _tile(16, 16, 8)),  # fp32 likewise, exact and TF32
    (4, 256): _Tiles(_tile(32, 32, 8), _tile(16, 16, 8), _tile(16, 16, 8)),
    (4, 512): _Tiles(_tile(16, 16, 8), _tile(16, 16, 16), _tile(16, 16, 8)),  # exact only: TF32 would spill
}
_PROGRAMS = 128  # fewer programs of the key-value kernel than this: split the heads


def _largest(query: Tensor, value: Tensor) -> int:
    """The width of the table's row whose tiles were reported at widths no less than these."""
    return next(width for width in (128, 256, 512) if query.shape[3] <= width and 8 * value.shape[3] <= width)


def _tiles(query: Tensor, value: Tensor) -> _Tiles:
    return _TILES[query.element_size(), _largest(query, value)]


def _constants(query: Tensor, value: Tensor, points: Tensor | None, dropout: float) -> dict[str, int | bool | str]:
    (_, _, heads, width), head_width = query.shape, value.shape[3]
    return {
        "HEADS": heads,
        "D": width,
        "E": head_width,
        "HAS_SMCA": points is not None,
        "HAS_DROPOUT": dropout > 0,
        "PRECISION": float32_precision(query.dtype) if _largest(query, value) < 512 else "ieee",
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
    output (its shape and dtype; empty in fp32 and without points), which the gradient of the points needs."""
    tensors = [query, key, value, valid_sizes, points, scales, seed]
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    batch, queries, heads, _ = query.shape
    out, logsumexp, rest = empty_results(query, value, points)
    sizes = (queries, key.shape[1], map_width, softmax_scale, 1 / (1 - dropout), threshold_of(dropout))
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
    gradients = empty_gradients(query, key, value, points, scales)
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
    sizes = (queries, cells, map_width, softmax_scale, 1 / (1 - dropout), threshold_of(dropout))
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
        (*inputs, keys, logsumexp, grad, delta, partial, d_value, *sizes, heads // split),
        **constants,
    )
    if split > 1:
        d_key.copy_(partial.sum(0))
    return gradients
