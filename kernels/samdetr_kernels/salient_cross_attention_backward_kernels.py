"""The backward Triton kernels of `salient_cross_attention`, and their launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.attention_dropout import kept, row_keys, threshold_of
from samdetr_kernels.launch import launch
from samdetr_kernels.salient_cross_attention_kernels import (
    ROOT,
    SMCA_WIDTH,
    UNSPECIALIZED,
    constants_of,
    load_pairs,
    load_rows,
    map_cells,
    row_places,
    tiles_of,
    valid_size,
)

_GRADIENT = tl.constexpr(-2 / SMCA_WIDTH)
_PROGRAMS = 128  # fewer programs of the key-value kernel than this: split the heads


def empty_gradients(
    query: Tensor, key: Tensor, value: Tensor, points: Tensor | None, scales: Tensor | None
) -> list[Tensor]:
    """Allocate the gradients of all inputs; an absent input's has no elements."""
    inputs = (query, key, value, points, scales)
    return [query.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _salient_cross_attention_query_kernel(  # type: ignore[no-untyped-def]
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
    p_grad,  # [B, N, M, E] as query
    p_d_query,  # [B, N, M, D] as query
    p_d_points,  # [B, N, M, 2] as points; [0] without
    p_d_scales,  # [B, N, M, 2] as scales; [0] without
    p_delta,  # [B, M, N] fp32
    p_keys,  # [B, M, N] int32: dropout keys of the rows, or None
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
    """Compute the gradients of BLOCK_N queries of one head, and of their points and scales, in each program.

    Also write, for the kernel of key and value, each row's ``delta = sum(grad * out)`` and dropout key.
    """
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = valid_size(p_valid, i_b, cells, map_width)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < queries
    i_row = i_b * queries * HEADS + i_m
    o_head = (i_b * HEADS + i_m) * queries + o_n
    b_query = load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
    b_grad = load_rows(p_grad + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E)
    b_out = load_rows(p_out + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E).to(tl.float32)
    if HAS_SMCA and p_out.dtype.element_ty != tl.float32:
        b_out += load_rows(p_rest + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E).to(tl.float32)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out, 1)
    tl.store(p_delta + o_head, b_delta, mask=m_n)
    b_logsumexp = tl.load(p_logsumexp + o_head, mask=m_n, other=float("inf"))
    if HAS_SMCA:
        b_px, b_py = load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
        b_sx, b_sy = b_sx * ROOT, b_sy * ROOT
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
        o_s, b_x, b_y = map_cells(o_j, width, map_width)
        b_key = load_rows(p_key, o_s, m_s, D, D, BLOCK_D)
        b_value = load_rows(p_value, o_s, m_s, HEADS * E, E, BLOCK_E)
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
    o_out, m_out = row_places(o_n, m_n, HEADS * D, D, BLOCK_D)
    tl.store(p_d_query + i_row * D + o_out, b_d_query * softmax_scale, mask=m_out)
    if HAS_SMCA:
        o_pair = 2 * (i_row + o_n.to(tl.int64) * HEADS)
        b_sx, b_sy = b_sx / ROOT, b_sy / ROOT
        tl.store(p_d_points + o_pair, b_sx * b_sx * b_x1 * _GRADIENT, mask=m_n)
        tl.store(p_d_points + o_pair + 1, b_sy * b_sy * b_y1 * _GRADIENT, mask=m_n)
        tl.store(p_d_scales + o_pair, b_sx * b_x2 * _GRADIENT, mask=m_n)
        tl.store(p_d_scales + o_pair + 1, b_sy * b_y2 * _GRADIENT, mask=m_n)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "heads"])
def _salient_cross_attention_key_value_kernel(  # type: ignore[no-untyped-def]
    p_query,  # [B, N, M, D] fp16, bf16 or fp32
    p_key,  # [B, S, D] as query
    p_value,  # [B, S, M, E] as query
    p_valid,  # [B, 2] (h, w), any integer dtype
    p_points,  # [B, N, M, 2] (x, y), any floating dtype; or None
    p_scales,  # [B, N, M, 2] (x, y), any floating dtype; or None
    p_keys,  # [B, M, N] int32: dropout keys of the rows, or None
    p_logsumexp,  # [B, M, N] fp32
    p_grad,  # [B, N, M, E] as query
    p_delta,  # [B, M, N] fp32
    p_d_key,  # [splits, B, S, D] fp32, or [1, B, S, D] as query
    p_d_value,  # [B, S, M, E] as query
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
    """Sum the gradients of BLOCK_S valid cells over ``heads`` of the HEADS in each program; padded cells get zeros."""
    i_s, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    valid_cells, width = valid_size(p_valid, i_b, cells, map_width)
    first_head = i_split * heads
    p_d_key += (i_split * tl.num_programs(2) + i_b) * cells * D
    p_d_value += i_b * cells * HEADS * E
    o_j = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    # of the whole map's cells numbered o_j the padded ones belong to no program as valid cells: zeros
    m_pad = (o_j < cells) & ((o_j % map_width >= width) | (o_j // map_width * width >= valid_cells))
    o_pad, m_pad_row = row_places(o_j, m_pad, D, D, BLOCK_D)
    tl.store(p_d_key + o_pad, tl.zeros((BLOCK_S, BLOCK_D), tl.float32), mask=m_pad_row)
    o_pad, m_pad_row = row_places(o_j, m_pad, HEADS * E, E, BLOCK_E)
    for i_m in range(first_head, first_head + heads):
        tl.store(p_d_value + i_m * E + o_pad, tl.zeros((BLOCK_S, BLOCK_E), tl.float32), mask=m_pad_row)

    m_s = o_j < valid_cells
    o_s, b_x, b_y = map_cells(o_j, width, map_width)
    b_key = load_rows(p_key + i_b * cells * D, o_s, m_s, D, D, BLOCK_D)
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
        b_query = load_rows(p_query + i_row * D, o_n, m_n, HEADS * D, D, BLOCK_D)
        b_grad = load_rows(p_grad + i_row * E, o_n, m_n, HEADS * E, E, BLOCK_E)
        b_value = load_rows(p_value + i_m * E, o_s, m_s, HEADS * E, E, BLOCK_E)
        b_logsumexp = tl.load(p_logsumexp + i_head + o_n, mask=m_n, other=float("inf"))
        b_delta = tl.load(p_delta + i_head + o_n, mask=m_n, other=0.0)
        b_scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * softmax_scale
        if HAS_SMCA:
            b_px, b_py = load_pairs(p_points + i_row * 2, o_n, m_n, HEADS * 2)
            b_sx, b_sy = load_pairs(p_scales + i_row * 2, o_n, m_n, HEADS * 2)
            b_dx = (b_px[None, :] - b_x[:, None]) * (b_sx * ROOT)[None, :]
            b_dy = (b_py[None, :] - b_y[:, None]) * (b_sy * ROOT)[None, :]
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
        o_out, m_out = row_places(o_s, m_done, HEADS * E, E, BLOCK_E)
        tl.store(p_d_value + i_m * E + o_out, b_d_value, mask=m_out)
        b_d_scores = b_weights * (b_d_weights - b_delta[None, :])
        b_d_key = tl.dot(b_d_scores.to(b_query.dtype), b_query, b_d_key, input_precision=PRECISION)
    o_out, m_out = row_places(o_s, m_s, D, D, BLOCK_D)
    tl.store(p_d_key + o_out, b_d_key * softmax_scale, mask=m_out)


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
    """Launch the backward kernels: gradients of query, key, value, points, scales; an absent input's is empty."""
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
    constants = constants_of(query, value, points, dropout)
    inputs = (query, key, value, valid_sizes, points, scales)
    tile = tiles_of(query, value).query
    launch(
        _salient_cross_attention_query_kernel,
        (triton.cdiv(queries, tile.blocks["BLOCK_N"]), heads, batch),
        tile,
        (*inputs, seed, out, rest, logsumexp, grad, d_query, d_points, d_scales, delta, keys, *sizes),
        **constants,
    )
    tile = tiles_of(query, value).key_value
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
