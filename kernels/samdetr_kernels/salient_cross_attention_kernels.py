"""The forward Triton kernel of `salient_cross_attention`, its launcher, and what the backward kernels share with it."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.attention_dropout import kept, row_keys, threshold_of
from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.launch import Tile, float32_precision, launch, next_power_of_2

SMCA_WIDTH = 8.0  # the Gaussian's denominator (SMCA-DETR, equation 4)
MAX_CELLS = 1 << 20  # up to here fp32 finds a cell's row without error (`map_cells`)
ROOT = tl.constexpr(SMCA_WIDTH**-0.5)


def empty_results(query: Tensor, value: Tensor, points: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `salient_cross_attention_forward_triton` returns."""
    batch, queries, heads, _ = query.shape
    out = query.new_empty(batch, queries, heads * value.shape[3])
    wide = compute_dtype(query)
    rest = query.new_empty(0 if query.dtype == wide or points is None else out.shape)
    return out, query.new_empty(batch, heads, queries, dtype=wide), rest


@triton.jit
def valid_size(p_valid, i_b, cells, map_width):  # type: ignore[no-untyped-def]
    """Load the number and width of the image's valid cells. p_valid: [B, 2] (h, w), any integer dtype."""
    height, width = tl.load(p_valid + 2 * i_b).to(tl.int64), tl.load(p_valid + 2 * i_b + 1).to(tl.int64)
    height = tl.minimum(tl.maximum(height, 0), cells // map_width).to(tl.int32)
    width = tl.minimum(tl.maximum(width, 0), map_width).to(tl.int32)
    return height * width, width


@triton.jit
def map_cells(o_j, width, map_width):  # type: ignore[no-untyped-def]
    """Return index in the map and centre (x, y) of the valid cells numbered ``o_j``; exact up to MAX_CELLS cells."""
    width = tl.maximum(width, 1).to(tl.float32)
    b_j = o_j.to(tl.float32)
    b_y = tl.floor((b_j + 0.5) * (1.0 / width))
    b_x = b_j - b_y * width
    return b_y.to(tl.int32) * map_width + b_x.to(tl.int32), b_x + 0.5, b_y + 0.5


@triton.jit
def row_places(o_rows, m_rows, stride, LENGTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return offsets and mask of whole rows of a matrix."""
    o_columns = tl.arange(0, BLOCK)
    mask = m_rows[:, None]
    if LENGTH < BLOCK:
        mask = mask & (o_columns < LENGTH)[None, :]
    return o_rows.to(tl.int64)[:, None] * stride + o_columns[None, :], mask


@triton.jit
def load_rows(p_rows, o_rows, m_rows, stride, LENGTH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load rows of a matrix. p_rows: [rows, LENGTH] of any dtype, ``stride`` elements from row to row."""
    offsets, mask = row_places(o_rows, m_rows, stride, LENGTH, BLOCK)
    return tl.load(p_rows + offsets, mask=mask, other=0.0)


@triton.jit
def load_pairs(p_rows, o_rows, m_rows, stride):  # type: ignore[no-untyped-def]
    """Load pairs (x, y) in fp32. p_rows: [rows, 2] of any floating dtype, ``stride`` elements from row to row."""
    p_pair = p_rows + o_rows.to(tl.int64) * stride
    x = tl.load(p_pair, mask=m_rows, other=0.0).to(tl.float32)
    return x, tl.load(p_pair + 1, mask=m_rows, other=0.0).to(tl.float32)


# these change with every batch of multi-scale training, or with the recipe: one compilation serves all
UNSPECIALIZED = ["queries", "cells", "map_width", "threshold"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _salient_cross_attention_forward_kernel(  # type: ignore[no-untyped-def]
    p_query,  # [B, N, M, D] fp16, bf16 or fp32
    p_key,  # [B, S, D] as query
    p_value,  # [B, S, M, E] as query
    p_valid,  # [B, 2] (h, w), any integer dtype
    p_points,  # [B, N, M, 2] (x, y), any floating dtype; or None
    p_scales,  # [B, N, M, 2] (x, y), any floating dtype; or None
    p_seed,  # [1] int64, or None
    p_out,  # [B, N, M, E] as query
    p_rest,  # [B, N, M, E] as query: what rounding took from out; [0] in fp32 and without points
    p_logsumexp,  # [B, M, N] fp32
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
    """Attend from BLOCK_N queries of one head in each program: online softmax over the valid cells."""
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = valid_size(p_valid, i_b, cells, map_width)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < queries
    i_row, i_head = i_b * queries * HEADS + i_m, i_b * HEADS + i_m
    b_query = load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
    if HAS_SMCA:
        b_px, b_py = load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = b_sx * ROOT, b_sy * ROOT
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
        o_s, b_x, b_y = map_cells(o_j, width, map_width)
        b_key = load_rows(p_key, o_s, m_s, D, D, BLOCK_D)
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
        b_value = load_rows(p_value, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_out = tl.dot(b_weights.to(b_value.dtype), b_value, b_out * b_decay[:, None], input_precision=PRECISION)
    # a sum is at least 1, or 0 where no cell is valid, or NaN, which a maximum would hide
    b_out *= (keep_scale / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    o_out, m_out = row_places(o_n, m_n, HEADS * E, E, BLOCK_E)
    b_narrow = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + i_row * E + o_out, b_narrow, mask=m_out)
    if HAS_SMCA and p_out.dtype.element_ty != tl.float32:
        tl.store(p_rest + i_row * E + o_out, b_out - b_narrow.to(tl.float32), mask=m_out)
    tl.store(p_logsumexp + i_head * queries + o_n, b_max + tl.log(b_sum), mask=m_n)


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


def _largest(query: Tensor, value: Tensor) -> int:
    """Choose the row of the table whose tiles were reported at widths no less than these."""
    return next(width for width in (128, 256, 512) if query.shape[3] <= width and 8 * value.shape[3] <= width)


def tiles_of(query: Tensor, value: Tensor) -> _Tiles:
    return _TILES[query.element_size(), _largest(query, value)]


def constants_of(query: Tensor, value: Tensor, points: Tensor | None, dropout: float) -> dict[str, int | bool | str]:
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
    """Launch the forward kernel: output [B, N, M * E], logsumexp [B, M, N] fp32 of the scores, and the output's rest.

    The rest is what rounding took from the output, in its shape and dtype, which the gradient of the points needs;
    empty in fp32 and without points.
    """
    tensors = [query, key, value, valid_sizes, points, scales, seed]
    tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    batch, queries, heads, _ = query.shape
    out, logsumexp, rest = empty_results(query, value, points)
    sizes = (queries, key.shape[1], map_width, softmax_scale, 1 / (1 - dropout), threshold_of(dropout))
    tile = tiles_of(query, value).forward
    launch(
        _salient_cross_attention_forward_kernel,
        (triton.cdiv(queries, tile.blocks["BLOCK_N"]), heads, batch),
        tile,
        (*tensors, out, rest, logsumexp, *sizes),
        **constants_of(query, value, points, dropout),
    )
    return out, logsumexp, rest
