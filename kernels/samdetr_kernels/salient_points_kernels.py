"""The Triton kernels of `salient_points`, their tiles and launchers.

Dims: B images, H x W cells, C channels, N boxes, P points of a box, BINS bins of RoIAlign's grid along an axis.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.axis_weights import (
    load_box,
    load_extent,
    not_finite,
    point_range,
    point_weight,
    point_weight_and_slope,
    weighted_sum,
)
from samdetr_kernels.launch import Tile, float32_precision, launch, next_power_of_2

# Chosen by registers and shared memory of the ahead-of-time report; not yet timed on a GPU.
FORWARD_TILES = {  # by bytes of an element
    2: Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=4, stages=2),
    4: Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=8, stages=2),  # 4 warps spill
}
FEATURES_TILE = Tile({"BLOCK_H": 4, "BLOCK_W": 8, "BLOCK_R": 32}, warps=8, stages=2)
POINTS_TILE = Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=4, stages=2)
MAX_BLOCK_P = 32
MAX_BLOCK_C = 64


@triton.jit
def _span(x0, y0, x1, y1, b_px, b_py, m_p, height, width, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the smallest window [y_begin, y_end) x [x_begin, x_end) of cells that holds what all points read."""
    y_begin, y_end = point_range(y0, y1, b_py, height, BINS)
    x_begin, x_end = point_range(x0, x1, b_px, width, BINS)
    m_p = m_p & (y_begin < y_end) & (x_begin < x_end)
    y_begin, x_begin = tl.where(m_p, y_begin, height), tl.where(m_p, x_begin, width)
    y_end, x_end = tl.where(m_p, y_end, 0), tl.where(m_p, x_end, 0)
    return tl.min(y_begin, axis=0), tl.max(y_end, axis=0), tl.min(x_begin, axis=0), tl.max(x_end, axis=0)


# these change with every batch of multi-scale training: one compilation serves all
_UNSPECIALIZED = ["N", "P", "H", "W"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _salient_points_forward_kernel(  # type: ignore[no-untyped-def]
    features,  # [B, H, W, C] fp16, bf16 or fp32
    boxes,  # [B, N, 4] (x0, y0, x1, y1), any floating dtype
    points,  # [B, N, P, 2] (x, y), any floating dtype
    valid_sizes,  # [B, 2] (h, w), any integer dtype; or None
    out,  # [B, N, P, C] as features
    N,
    P,
    H,
    W,
    C,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sample a box, block of its points and block of channels in each program, from the cells that the points span."""
    i_box = tl.program_id(0).to(tl.int64)
    i_image = i_box // N
    height, width = load_extent(valid_sizes, i_image, H, W)
    x0, y0, x1, y1 = load_box(boxes + i_box * 4)
    o_p = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    p_point = points + (i_box * P + o_p) * 2
    b_px = tl.load(p_point, mask=m_p, other=0.0).to(tl.float32)
    b_py = tl.load(p_point + 1, mask=m_p, other=0.0).to(tl.float32)
    y_begin, y_end, x_begin, x_end = _span(x0, y0, x1, y1, b_px, b_py, m_p, height, width, BINS)

    o_cell = tl.arange(0, BLOCK_H * BLOCK_W)
    p_image = features + i_image * H * W * C
    b_out = tl.zeros((BLOCK_P, BLOCK_C), tl.float32) + not_finite(x0, y0, x1, y1)
    for x_first in range(x_begin, x_end, BLOCK_W):
        o_x = x_first + tl.arange(0, BLOCK_W)
        b_x = point_weight(x0, x1, b_px[:, None], o_x[None, :].to(tl.float32), width, BINS)
        for y_first in range(y_begin, y_end, BLOCK_H):
            o_y = y_first + tl.arange(0, BLOCK_H)
            b_y = point_weight(y0, y1, b_py[:, None], o_y[None, :].to(tl.float32), height, BINS)
            b_weight = tl.reshape(b_y[:, :, None] * b_x[:, None, :], (BLOCK_P, BLOCK_H * BLOCK_W))
            y, x = y_first + o_cell // BLOCK_W, x_first + o_cell % BLOCK_W
            m_cell = (y < y_end) & (x < x_end)
            p_cell = p_image + (y.to(tl.int64) * W + x) * C
            b_cell = tl.load(p_cell[:, None] + o_c[None, :], mask=m_cell[:, None] & m_c[None, :], other=0.0)
            b_out = weighted_sum(b_weight, b_cell, b_out, PRECISION)
    p_out = out + (i_box * P + o_p)[:, None] * C + o_c[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _salient_points_features_kernel(  # type: ignore[no-untyped-def]
    grad,  # [B, N, P, C] as features: fp16, bf16 or fp32
    boxes,  # [B, N, 4] (x0, y0, x1, y1), any floating dtype
    points,  # [B, N, P, 2] (x, y), any floating dtype
    valid_sizes,  # [B, 2] (h, w), any integer dtype; or None
    out,  # [B, H, W, C] as features
    N,
    P,
    H,
    W,
    C,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sum the gradient of a window of cells and block of channels over its image's points, BLOCK_R at once."""
    windows_x = tl.cdiv(W, BLOCK_W)
    windows = tl.cdiv(H, BLOCK_H) * windows_x
    i_image = (tl.program_id(0) // windows).to(tl.int64)
    i_window = tl.program_id(0) % windows
    y_first, x_first = i_window // windows_x * BLOCK_H, i_window % windows_x * BLOCK_W
    height, width = load_extent(valid_sizes, i_image, H, W)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    o_y, o_x = y_first + tl.arange(0, BLOCK_H), x_first + tl.arange(0, BLOCK_W)
    m_y, m_x = (o_y < height)[:, None], (o_x < width)[:, None]

    b_out = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    b_bad = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, N * P, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        m_r = o_r < N * P
        i_row = i_image * N * P + o_r
        p_box = boxes + (i_image * N + o_r // P) * 4
        x0 = tl.load(p_box, mask=m_r, other=0.0).to(tl.float32)
        y0 = tl.load(p_box + 1, mask=m_r, other=0.0).to(tl.float32)
        x1 = tl.load(p_box + 2, mask=m_r, other=0.0).to(tl.float32)
        y1 = tl.load(p_box + 3, mask=m_r, other=0.0).to(tl.float32)
        b_px = tl.load(points + i_row * 2, mask=m_r, other=0.0).to(tl.float32)
        b_py = tl.load(points + i_row * 2 + 1, mask=m_r, other=0.0).to(tl.float32)
        b_bad += not_finite(x0, y0, x1, y1)
        y_begin, y_end = point_range(y0, y1, b_py, height, BINS)
        x_begin, x_end = point_range(x0, x1, b_px, width, BINS)
        meets = (y_begin < y_first + BLOCK_H) & (y_end > y_first) & (x_begin < x_first + BLOCK_W) & (x_end > x_first)
        if tl.max((meets & m_r).to(tl.int32), axis=0) > 0:
            b_y = point_weight(y0[None, :], y1[None, :], b_py[None, :], o_y[:, None].to(tl.float32), height, BINS)
            b_x = point_weight(x0[None, :], x1[None, :], b_px[None, :], o_x[:, None].to(tl.float32), width, BINS)
            b_y, b_x = tl.where(m_y & m_r[None, :], b_y, 0.0), tl.where(m_x, b_x, 0.0)
            b_weight = tl.reshape(b_y[:, None, :] * b_x[None, :, :], (BLOCK_H * BLOCK_W, BLOCK_R))
            p_grad = grad + i_row[:, None] * C + o_c[None, :]
            b_grad = tl.load(p_grad, mask=(meets & m_r)[:, None] & m_c[None, :], other=0.0)
            b_out = weighted_sum(b_weight, b_grad, b_out, PRECISION)

    o_cell = tl.arange(0, BLOCK_H * BLOCK_W)
    y, x = y_first + o_cell // BLOCK_W, x_first + o_cell % BLOCK_W
    p_out = out + (i_image * H * W + y.to(tl.int64) * W + x)[:, None] * C + o_c[None, :]
    b_out += tl.sum(b_bad, axis=0)
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=((y < H) & (x < W))[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _salient_points_points_kernel(  # type: ignore[no-untyped-def]
    grad,  # [B, N, P, C] as features
    features,  # [B, H, W, C] fp16, bf16 or fp32
    boxes,  # [B, N, 4] (x0, y0, x1, y1), any floating dtype
    points,  # [B, N, P, 2] (x, y), any floating dtype
    valid_sizes,  # [B, 2] (h, w), any integer dtype; or None
    out,  # [B, N, P, 2] as points
    N,
    P,
    H,
    W,
    C,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sum the gradients of a box's block of points: that of each cell's weight, then two sums over the cells."""
    i_box = tl.program_id(0).to(tl.int64)
    i_image = i_box // N
    height, width = load_extent(valid_sizes, i_image, H, W)
    x0, y0, x1, y1 = load_box(boxes + i_box * 4)
    o_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    p_point = points + (i_box * P + o_p) * 2
    b_px = tl.load(p_point, mask=m_p, other=0.0).to(tl.float32)
    b_py = tl.load(p_point + 1, mask=m_p, other=0.0).to(tl.float32)
    y_begin, y_end, x_begin, x_end = _span(x0, y0, x1, y1, b_px, b_py, m_p, height, width, BINS)

    o_cell = tl.arange(0, BLOCK_H * BLOCK_W)
    p_image = features + i_image * H * W * C
    p_grad = grad + (i_box * P + o_p)[:, None] * C
    b_dx = tl.zeros((BLOCK_P,), tl.float32) + not_finite(x0, y0, x1, y1)
    b_dy = b_dx
    for x_first in range(x_begin, x_end, BLOCK_W):
        o_x = x_first + tl.arange(0, BLOCK_W)
        b_x, b_slope_x = point_weight_and_slope(x0, x1, b_px[:, None], o_x[None, :].to(tl.float32), width, BINS)
        for y_first in range(y_begin, y_end, BLOCK_H):
            o_y = y_first + tl.arange(0, BLOCK_H)
            b_y, b_slope_y = point_weight_and_slope(y0, y1, b_py[:, None], o_y[None, :].to(tl.float32), height, BINS)
            y, x = y_first + o_cell // BLOCK_W, x_first + o_cell % BLOCK_W
            m_cell = (y < y_end) & (x < x_end)
            p_cell = p_image + (y.to(tl.int64) * W + x)[None, :] * C
            b_weight_grad = tl.zeros((BLOCK_P, BLOCK_H * BLOCK_W), tl.float32)
            for c_first in range(0, C, BLOCK_C):
                o_c = c_first + tl.arange(0, BLOCK_C)
                m_c = o_c < C
                b_grad = tl.load(p_grad + o_c[None, :], mask=m_p[:, None] & m_c[None, :], other=0.0)
                b_cell = tl.load(p_cell + o_c[:, None], mask=m_cell[None, :] & m_c[:, None], other=0.0)
                b_weight_grad = tl.dot(b_grad, b_cell, b_weight_grad, input_precision=PRECISION)
            b_weight_grad = tl.reshape(b_weight_grad, (BLOCK_P, BLOCK_H, BLOCK_W))
            b_dx += tl.sum(tl.sum(b_weight_grad * b_y[:, :, None] * b_slope_x[:, None, :], axis=2), axis=1)
            b_dy += tl.sum(tl.sum(b_weight_grad * b_slope_y[:, :, None] * b_x[:, None, :], axis=2), axis=1)
    p_out = out + (i_box * P + o_p) * 2
    tl.store(p_out, b_dx.to(out.dtype.element_ty), mask=m_p)
    tl.store(p_out + 1, b_dy.to(out.dtype.element_ty), mask=m_p)


def _blocks(tile: Tile, channels: int, points: int | None = None) -> Tile:
    """Complete the tile by as many channels as it needs, and as many points if the kernel has a block of them."""
    blocks = {**tile.blocks, "BLOCK_C": min(max(next_power_of_2(channels), 16), MAX_BLOCK_C)}
    if points is not None:
        blocks["BLOCK_P"] = min(max(next_power_of_2(points), 16), MAX_BLOCK_P)
    return tile._replace(blocks=blocks)


def salient_points_forward_triton(
    features: Tensor, boxes: Tensor, points: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Launch the forward kernel; arguments and result are those of `salient_points`."""
    batch, height, width, channels = features.shape
    number, count = points.shape[1:3]
    out = features.new_empty(batch, number, count, channels)
    if out.numel() == 0:
        return out
    tile = _blocks(FORWARD_TILES[features.element_size()], channels, count)
    grid = (batch * number, triton.cdiv(channels, tile.blocks["BLOCK_C"]), triton.cdiv(count, tile.blocks["BLOCK_P"]))
    inputs = (features.contiguous(), boxes.contiguous(), points.contiguous())
    valid_sizes = None if valid_sizes is None else valid_sizes.contiguous()
    launch(
        _salient_points_forward_kernel,
        grid,
        tile,
        (*inputs, valid_sizes, out, number, count, height, width, channels),
        BINS=output_size,
        PRECISION=float32_precision(features.dtype),
    )
    return out


def empty_gradients(features: Tensor, points: Tensor, of_features: bool, of_points: bool) -> tuple[Tensor, Tensor]:
    """Allocate d features and d points, without elements where it is not wanted."""
    return features.new_empty(features.shape if of_features else 0), points.new_empty(points.shape if of_points else 0)


def salient_points_backward_triton(
    grad: Tensor,
    features: Tensor,
    boxes: Tensor,
    points: Tensor,
    output_size: int = 7,
    valid_sizes: Tensor | None = None,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernels; d features [B, H, W, C] and d points [B, N, P, 2] from ``grad`` [B, N, P, C].

    A gradient that is not ``wanted`` is empty.
    """
    batch, height, width, channels = features.shape
    number, count = points.shape[1:3]
    grad_features, grad_points = empty_gradients(features, points, *wanted)
    grad, features, boxes, points = grad.contiguous(), features.contiguous(), boxes.contiguous(), points.contiguous()
    valid_sizes = None if valid_sizes is None else valid_sizes.contiguous()
    sizes = (number, count, height, width, channels)
    constants = {"BINS": output_size, "PRECISION": float32_precision(features.dtype)}

    if grad_features.numel():
        tile = _blocks(FEATURES_TILE, channels)
        windows = triton.cdiv(height, tile.blocks["BLOCK_H"]) * triton.cdiv(width, tile.blocks["BLOCK_W"])
        grid: tuple[int, ...] = (batch * windows, triton.cdiv(channels, tile.blocks["BLOCK_C"]))
        arguments: tuple[object, ...] = (grad, boxes, points, valid_sizes, grad_features, *sizes)
        launch(_salient_points_features_kernel, grid, tile, arguments, **constants)
    if grad_points.numel():
        tile = _blocks(POINTS_TILE, channels, count)
        grid = (batch * number, triton.cdiv(count, tile.blocks["BLOCK_P"]))
        arguments = (grad, features, boxes, points, valid_sizes, grad_points, *sizes)
        launch(_salient_points_points_kernel, grid, tile, arguments, **constants)
    return grad_features, grad_points
