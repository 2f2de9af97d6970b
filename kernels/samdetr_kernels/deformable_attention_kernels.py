"""The Triton kernels of `deformable_attention`, and their launchers.

Dims: B images, S cells of all levels, M heads, D channels of a head, Q queries, LEVELS levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.launch import Tile, launch, next_power_of_2

SpatialShapes = Sequence[tuple[int, int]]

MAX_LEVELS = 8
MAX_SIZE = (1 << 15) - 1  # of a map: both sizes fit one int32
_BITS, _MASK = tl.constexpr(15), tl.constexpr(MAX_SIZE)
SUM_BITS = 61  # of a fixed-point sum: int64 holds 63, the bound of the sum is itself rounded
FIXED_POINT_BYTES = 1 << 28  # of fixed-point sums held at once: more images than fit take turns

# A program is one warp, which sums over channels without barriers. A thread has 16 bytes of a cell forward, and 4 or 2
# channels backward: 16 bytes of what it adds. Chosen by registers of the ahead-of-time report; not yet timed on a GPU.
WARP = 32
FORWARD_BYTES, FAST_CHANNELS, DETERMINISTIC_CHANNELS = 16, 4, 2  # of a thread


@triton.jit
def _position(p_location, m_q, height, width):  # type: ignore[no-untyped-def]
    """Load cell coordinates (x, y) of samples; those that reach no cell or are not finite are moved to (-2, -2).

    p_location: [BLOCK_Q] pointers to (x, y) of any floating dtype.
    """
    x = tl.load(p_location, mask=m_q, other=-2.0).to(tl.float32) * width - 0.5
    y = tl.load(p_location + 1, mask=m_q, other=-2.0).to(tl.float32) * height - 0.5
    reaches = (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)
    return tl.where(reaches, x, -2.0), tl.where(reaches, y, -2.0)


@triton.jit
def _corner(x, y, height, width, CORNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return one of the four cells around (x, y): its number in the level, whether it exists, its weights by axis."""
    cell_x, cell_y = tl.floor(x) + CORNER % 2, tl.floor(y) + CORNER // 2
    m_cell = (cell_x >= 0.0) & (cell_x < width) & (cell_y >= 0.0) & (cell_y < height)
    i_cell = cell_y.to(tl.int32) * width + cell_x.to(tl.int32)
    return i_cell, m_cell, 1.0 - tl.abs(x - cell_x), 1.0 - tl.abs(y - cell_y)


# multi-scale training changes these with every batch: one compilation serves all
_UNSPECIALIZED = ["S", "Q", *(f"size_{level}" for level in range(MAX_LEVELS))]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _deformable_attention_forward_kernel(  # type: ignore[no-untyped-def]
    value,  # [B, S, M, D] fp16, bf16 or fp32
    locations,  # [B, Q, M, LEVELS, P, 2] (x, y), fp16, bf16 or fp32
    weights,  # [B, Q, M, LEVELS, P] fp16, bf16 or fp32
    out,  # [B, Q, M, D] as value
    S,
    Q,
    size_0,  # H << _BITS | W of level 0, and so on
    size_1,
    size_2,
    size_3,
    size_4,
    size_5,
    size_6,
    size_7,
    M: tl.constexpr,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the samples of an image, head and block of queries in each program."""
    sizes = (size_0, size_1, size_2, size_3, size_4, size_5, size_6, size_7)
    blocks = tl.cdiv(Q, BLOCK_Q)
    i_head = tl.program_id(0) % M
    i_image = (tl.program_id(0) // (M * blocks)).to(tl.int64)
    o_q = tl.program_id(0) // M % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q, m_d = o_q < Q, o_d < D
    i_row = (i_image * Q + o_q) * M + i_head

    b_out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    p_level = value + (i_image * S * M + i_head) * D
    for i_level in tl.static_range(LEVELS):
        height, width = sizes[i_level] >> _BITS, sizes[i_level] & _MASK
        for i_point in range(P):
            i_sample = i_row * (LEVELS * P) + i_level * P + i_point
            b_weight = tl.load(weights + i_sample, mask=m_q, other=0.0).to(tl.float32)
            x, y = _position(locations + i_sample * 2, m_q, height, width)
            for i_corner in tl.static_range(4):
                i_cell, m_cell, b_x, b_y = _corner(x, y, height, width, i_corner)
                p_cell = p_level + i_cell.to(tl.int64)[:, None] * (M * D) + o_d[None, :]
                b_cell = tl.load(p_cell, mask=m_cell[:, None] & m_d[None, :], other=0.0).to(tl.float32)
                b_out += (b_weight * b_x * b_y)[:, None] * b_cell
        p_level += (height * width).to(tl.int64) * (M * D)
    p_out = out + i_row[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _deformable_attention_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # [B, Q, M, D] as value
    value,  # [B, S, M, D] fp16, bf16 or fp32
    locations,  # [B, Q, M, LEVELS, P, 2] (x, y), fp16, bf16 or fp32
    weights,  # [B, Q, M, LEVELS, P] fp16, bf16 or fp32
    scale,  # [B, M] fp32: fixed-point units in 1, or None
    grad_value,  # [B, S, M, D] zeros: int64 beside a scale, else fp32; or None: not wanted
    grad_locations,  # [B, Q, M, LEVELS, P, 2] as locations
    grad_weights,  # [B, Q, M, LEVELS, P] as weights
    S,
    Q,
    size_0,  # H << _BITS | W of level 0, and so on
    size_1,
    size_2,
    size_3,
    size_4,
    size_5,
    size_6,
    size_7,
    M: tl.constexpr,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients of an image, head and block of queries in each program."""
    sizes = (size_0, size_1, size_2, size_3, size_4, size_5, size_6, size_7)
    blocks = tl.cdiv(Q, BLOCK_Q)
    i_head = tl.program_id(0) % M
    i_image = (tl.program_id(0) // (M * blocks)).to(tl.int64)
    o_q = tl.program_id(0) // M % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_d = tl.arange(0, BLOCK_D)
    m_q, m_d = o_q < Q, o_d < D
    i_row = (i_image * Q + o_q) * M + i_head

    p_grad = grad + i_row[:, None] * D + o_d[None, :]
    b_grad = tl.load(p_grad, mask=m_q[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    if scale is not None:
        b_scale = tl.load(scale + i_image * M + i_head)
    o_level = (i_image * S * M + i_head) * D
    for i_level in tl.static_range(LEVELS):
        height, width = sizes[i_level] >> _BITS, sizes[i_level] & _MASK
        for i_point in range(P):
            i_sample = i_row * (LEVELS * P) + i_level * P + i_point
            b_weight = tl.load(weights + i_sample, mask=m_q, other=0.0).to(tl.float32)
            x, y = _position(locations + i_sample * 2, m_q, height, width)
            b_dx, b_dy = tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q,), tl.float32)
            b_dweight = tl.zeros((BLOCK_Q,), tl.float32)
            for i_corner in tl.static_range(4):
                i_cell, m_cell, b_x, b_y = _corner(x, y, height, width, i_corner)
                o_cell = o_level + i_cell.to(tl.int64)[:, None] * (M * D) + o_d[None, :]
                m_tile = m_cell[:, None] & m_d[None, :]
                b_cell = tl.load(value + o_cell, mask=m_tile, other=0.0).to(tl.float32)
                b_along = tl.sum(b_grad * b_cell, axis=1)
                b_dweight += b_x * b_y * b_along
                b_dx += (i_corner % 2 * 2 - 1) * b_y * b_along
                b_dy += (i_corner // 2 * 2 - 1) * b_x * b_along
                if grad_value is not None:
                    b_added = (b_weight * b_x * b_y)[:, None] * b_grad
                    if scale is not None:
                        b_added = (b_added * b_scale).to(tl.int64)  # toward zero: off by less than one unit
                    tl.atomic_add(grad_value + o_cell, b_added, mask=m_tile, sem="relaxed")
            p_location = grad_locations + i_sample * 2
            tl.store(p_location, (b_dx * b_weight * width).to(grad_locations.dtype.element_ty), mask=m_q)
            tl.store(p_location + 1, (b_dy * b_weight * height).to(grad_locations.dtype.element_ty), mask=m_q)
            tl.store(grad_weights + i_sample, b_dweight.to(grad_weights.dtype.element_ty), mask=m_q)
        o_level += (height * width).to(tl.int64) * (M * D)


def _launch(
    kernel: Any,
    channels_of_thread: int,
    tensors: Sequence[Tensor | None],
    value: Tensor,
    weights: Tensor,
    spatial_shapes: SpatialShapes,
) -> None:
    """Launch a kernel on ``tensors`` and the sizes, which both kernels take."""
    batch, cells, heads, channels = value.shape
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    block_d = max(next_power_of_2(channels), 16)
    block_q = max(WARP * channels_of_thread // block_d, 1)
    # integers, for a tensor of sizes would be a transfer from the host in every call
    sizes = [height << _BITS.value | width for height, width in spatial_shapes] + [0] * (MAX_LEVELS - levels)
    launch(
        kernel,
        (batch * triton.cdiv(queries, block_q) * heads,),
        Tile({"BLOCK_Q": block_q, "BLOCK_D": block_d}, warps=1, stages=1),
        (*tensors, cells, queries, *sizes),
        M=heads,
        D=channels,
        LEVELS=levels,
        P=points,
    )


def deformable_attention_forward_triton(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Launch the forward kernel; arguments and result are those of `deformable_attention`."""
    out = value.new_empty(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])
    tensors = value.contiguous(), locations.contiguous(), weights.contiguous(), out
    channels_of_thread = FORWARD_BYTES // value.element_size()
    _launch(_deformable_attention_forward_kernel, channels_of_thread, tensors, value, weights, spatial_shapes)
    return out


def deformable_attention_backward_triton(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    locations: Tensor,
    weights: Tensor,
    deterministic: bool = False,
    of_value: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; d value, d locations and d weights from ``grad`` [B, Q, M * D].

    Each has the shape and dtype of its argument. Without ``of_value``, d value is empty and nothing is scattered.
    """
    inputs = [part.contiguous() for part in (grad, value, locations, weights)]
    grad_locations, grad_weights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)

    def run(images: slice, scale: Tensor | None, total: Tensor | None) -> None:
        parts = [part[images] for part in inputs]
        tensors = *parts, scale, total, grad_locations[images], grad_weights[images]
        channels_of_thread = FAST_CHANNELS if scale is None else DETERMINISTIC_CHANNELS
        kernel = _deformable_attention_backward_kernel
        _launch(kernel, channels_of_thread, tensors, parts[1], parts[3], spatial_shapes)

    if not of_value:
        run(slice(None), None, None)
        return value.new_empty(0), grad_locations, grad_weights
    if not deterministic:
        total = value.new_zeros(value.shape, dtype=torch.float32)
        run(slice(None), None, total)
        return total.to(value.dtype), grad_locations, grad_weights

    batch, cells, heads, channels = value.shape
    grad_value = value.new_empty(value.shape)
    scale, unit = _fixed_point(inputs[0].view(*weights.shape[:3], channels), weights)
    at_once = max(FIXED_POINT_BYTES // max(8 * cells * heads * channels, 1), 1)
    total = value.new_empty(min(at_once, batch), cells, heads, channels, dtype=torch.int64)
    for first in range(0, batch, at_once):
        images = slice(first, min(first + at_once, batch))
        some = total[: images.stop - first].zero_()
        run(images, scale[images], some)
        torch.mul(some, unit[images, None, :, None], out=grad_value[images])
    return grad_value, grad_locations, grad_weights


def _fixed_point(grad: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Choose units in 1 and their inverse, powers of two [B, M], such that no sum of contributions overflows int64."""
    largest = torch.linalg.vector_norm(grad, ord=math.inf, dim=-1, dtype=torch.float32)
    attention = torch.linalg.vector_norm(weights, ord=1, dim=(-2, -1), dtype=torch.float32)
    bound = (largest * attention).sum(1)
    scale = torch.exp2((SUM_BITS - torch.frexp(bound).exponent).clamp(-126, 126).float())
    return scale, torch.where(bound.isfinite(), 1 / scale, torch.nan)
