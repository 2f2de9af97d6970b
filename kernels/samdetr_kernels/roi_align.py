"""RoIAlign on a channels-last map.

Replaces ``torchvision.ops.roi_align(map, boxes, 7, aligned=True, sampling_ratio=-1)`` (He et al., ICCV 2017) to
rounding: ``out[b, n, p, q, c] = sum_{h, w} A_y[b, n, p, h] * A_x[b, n, q, w] * features[b, h, w, c]`` with the
matrices of `axis_weights`. A cell is read once a box however many samples fall on it, as one small matrix product;
the backward ``dF = sum_n A_y^T dO A_x`` is gathered by the program that owns the cells: no atomics, the same bits in
every run.

Gradients: of ``features`` only. The op treats the boxes as constants, as torchvision does; `roi_align_reference` is
differentiable in them wherever the number of samples does not change.
Dtypes: fp16, bf16, fp32; weights and sums are in fp32. fp64 runs the reference on every device.
Dims: B images, H x W cells, C channels, N boxes, P = Q = output_size, S cells that a box covers (with its border).
Bytes: forward B H W C read, B N P Q C written; backward the reverse; boxes are read again from the L2 cache.
Operations: 2 B N P^2 C S multiply-adds forward and as many backward (twice that for fp16 and bf16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.axis_weights import (
    axis_range,
    axis_weight,
    box_weights,
    check_inputs,
    compute_dtype,
    load_box,
    load_extent,
    not_finite,
    weighted_sum,
)
from samdetr_kernels.launch import Tile, float32_precision, launch, next_power_of_2, outside_autocast, runs_reference

# Chosen by registers and shared memory of the ahead-of-time report; not yet timed on a GPU.
FORWARD_TILES = {  # by bytes of an element
    2: Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=4, stages=2),
    4: Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=8, stages=1),
}
BACKWARD_TILE = Tile({"BLOCK_H": 2, "BLOCK_W": 16}, warps=8, stages=2)
BLOCK_ROWS = 64  # bins of a program's matrix product
MAX_BLOCK_C = 64


@outside_autocast
def roi_align_reference(
    features: Tensor, boxes: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Compute `roi_align` in plain torch, on any device and floating dtype."""
    dtype = compute_dtype(features)
    batch, height, width, channels = features.shape
    boxes_per_image = boxes.shape[1]
    weight_y, weight_x = box_weights(boxes, height, width, output_size, valid_sizes, dtype)
    rows = weight_y.flatten(1, 2) @ features.to(dtype).reshape(batch, height, width * channels)
    rows = rows.view(batch, boxes_per_image, output_size, width, channels)
    return (weight_x[:, :, None] @ rows).to(features.dtype)


@outside_autocast
def roi_align_backward_reference(
    grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None = None
) -> Tensor:
    """Compute d features [B, H, W, C] from ``grad`` [B, N, P, P, C], in the dtype of ``grad``."""
    dtype = compute_dtype(grad)
    batch, boxes_per_image, size, _, channels = grad.shape
    weight_y, weight_x = box_weights(boxes, height, width, size, valid_sizes, dtype)
    rows = weight_x[:, :, None].transpose(-1, -2) @ grad.to(dtype)  # [B, N, P, W, C]
    rows = rows.view(batch, boxes_per_image * size, width * channels)
    out = weight_y.flatten(1, 2).transpose(1, 2) @ rows
    return out.view(batch, height, width, channels).to(grad.dtype)


# these change with every batch of multi-scale training: one compilation serves all
_UNSPECIALIZED = ["N", "H", "W"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _roi_align_forward_kernel(  # type: ignore[no-untyped-def]
    features,  # [B, H, W, C] fp16, bf16 or fp32
    boxes,  # [B, N, 4] (x0, y0, x1, y1), any floating dtype
    valid_sizes,  # [B, 2] (h, w), any integer dtype; or None
    out,  # [B, N, BINS, BINS, C] as features
    N,
    H,
    W,
    C,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Align a box and block of channels in each program."""
    ROWS: tl.constexpr = BLOCK_P * BLOCK_Q
    i_box = tl.program_id(0).to(tl.int64)
    i_image = i_box // N
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    height, width = load_extent(valid_sizes, i_image, H, W)
    x0, y0, x1, y1 = load_box(boxes + i_box * 4)
    y_begin, y_end = axis_range(y0, y1, 0.0, BINS - 1.0, height, BINS)
    x_begin, x_end = axis_range(x0, x1, 0.0, BINS - 1.0, width, BINS)
    p_image = features + i_image * H * W * C
    start = not_finite(x0, y0, x1, y1)

    o_row, o_cell = tl.arange(0, ROWS), tl.arange(0, BLOCK_H * BLOCK_W)
    o_q = tl.arange(0, BLOCK_Q)
    for first_p in range(0, BINS, BLOCK_P):
        o_p = first_p + tl.arange(0, BLOCK_P)
        b_out = tl.zeros((ROWS, BLOCK_C), tl.float32) + start
        for x_first in range(x_begin, x_end, BLOCK_W):
            o_x = x_first + tl.arange(0, BLOCK_W)
            b_x = axis_weight(x0, x1, o_q[:, None].to(tl.float32), o_x[None, :].to(tl.float32), width, BINS)
            for y_first in range(y_begin, y_end, BLOCK_H):
                o_y = y_first + tl.arange(0, BLOCK_H)
                b_y = axis_weight(y0, y1, o_p[:, None].to(tl.float32), o_y[None, :].to(tl.float32), height, BINS)
                b_weight = b_y[:, None, :, None] * b_x[None, :, None, :]
                b_weight = tl.reshape(b_weight, (ROWS, BLOCK_H * BLOCK_W))
                y, x = y_first + o_cell // BLOCK_W, x_first + o_cell % BLOCK_W
                m_cell = (y < y_end) & (x < x_end)
                p_cell = p_image + (y.to(tl.int64) * W + x) * C
                b_cell = tl.load(p_cell[:, None] + o_c[None, :], mask=m_cell[:, None] & m_c[None, :], other=0.0)
                b_out = weighted_sum(b_weight, b_cell, b_out, PRECISION)

        p, q = first_p + o_row // BLOCK_Q, o_row % BLOCK_Q
        m_row = (p < BINS) & (q < BINS)
        p_out = out + (i_box * BINS * BINS + p * BINS + q)[:, None] * C + o_c[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _roi_align_backward_kernel(  # type: ignore[no-untyped-def]
    grad,  # [B, N, BINS, BINS, C] fp16, bf16 or fp32
    boxes,  # [B, N, 4] (x0, y0, x1, y1), any floating dtype
    valid_sizes,  # [B, 2] (h, w), any integer dtype; or None
    out,  # [B, H, W, C] as grad
    N,
    H,
    W,
    C,
    BINS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sum the gradient of a window of BLOCK_H x BLOCK_W cells and block of channels over the boxes that reach it."""
    ROWS: tl.constexpr = BLOCK_P * BLOCK_Q
    windows_x = tl.cdiv(W, BLOCK_W)
    windows = tl.cdiv(H, BLOCK_H) * windows_x
    i_image = (tl.program_id(0) // windows).to(tl.int64)
    i_window = tl.program_id(0) % windows
    y_first, x_first = i_window // windows_x * BLOCK_H, i_window % windows_x * BLOCK_W
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    height, width = load_extent(valid_sizes, i_image, H, W)

    o_y, o_x = y_first + tl.arange(0, BLOCK_H), x_first + tl.arange(0, BLOCK_W)
    o_row, o_q = tl.arange(0, ROWS), tl.arange(0, BLOCK_Q)
    b_out = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    bad = 0.0
    for i_local in range(N):
        i_box = i_image * N + i_local
        x0, y0, x1, y1 = load_box(boxes + i_box * 4)
        bad += not_finite(x0, y0, x1, y1)
        y_begin, y_end = axis_range(y0, y1, 0.0, BINS - 1.0, height, BINS)
        x_begin, x_end = axis_range(x0, x1, 0.0, BINS - 1.0, width, BINS)
        rows_meet = (y_begin < y_first + BLOCK_H) & (y_end > y_first)
        if rows_meet & (x_begin < x_first + BLOCK_W) & (x_end > x_first):
            b_x = axis_weight(x0, x1, o_q[None, :].to(tl.float32), o_x[:, None].to(tl.float32), width, BINS)
            b_x = tl.where((o_x < width)[:, None], b_x, 0.0)
            for first_p in range(0, BINS, BLOCK_P):
                o_p = first_p + tl.arange(0, BLOCK_P)
                b_y = axis_weight(y0, y1, o_p[None, :].to(tl.float32), o_y[:, None].to(tl.float32), height, BINS)
                b_y = tl.where((o_y < height)[:, None], b_y, 0.0)
                b_weight = tl.reshape(b_y[:, None, :, None] * b_x[None, :, None, :], (BLOCK_H * BLOCK_W, ROWS))
                p, q = first_p + o_row // BLOCK_Q, o_row % BLOCK_Q
                m_row = (p < BINS) & (q < BINS)
                p_grad = grad + (i_box * BINS * BINS + p * BINS + q)[:, None] * C + o_c[None, :]
                b_grad = tl.load(p_grad, mask=m_row[:, None] & m_c[None, :], other=0.0)
                b_out = weighted_sum(b_weight, b_grad, b_out, PRECISION)

    o_cell = tl.arange(0, BLOCK_H * BLOCK_W)
    y, x = y_first + o_cell // BLOCK_W, x_first + o_cell % BLOCK_W
    p_out = out + (i_image * H * W + y.to(tl.int64) * W + x)[:, None] * C + o_c[None, :]
    tl.store(p_out, (b_out + bad).to(out.dtype.element_ty), mask=((y < H) & (x < W))[:, None] & m_c[None, :])


def _blocks(tile: Tile, output_size: int, channels: int) -> Tile:
    columns = next_power_of_2(output_size)
    rows = max(BLOCK_ROWS // columns, 1)
    block_c = min(max(next_power_of_2(channels), 16), MAX_BLOCK_C)
    return tile._replace(blocks={**tile.blocks, "BLOCK_P": rows, "BLOCK_Q": columns, "BLOCK_C": block_c})


def roi_align_forward_triton(
    features: Tensor, boxes: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Launch the forward kernel; arguments and result are those of `roi_align`."""
    batch, height, width, channels = features.shape
    number = boxes.shape[1]
    out = features.new_empty(batch, number, output_size, output_size, channels)
    tile = _blocks(FORWARD_TILES[features.element_size()], output_size, channels)
    launch(
        _roi_align_forward_kernel,
        (batch * number, triton.cdiv(channels, tile.blocks["BLOCK_C"])),
        tile,
        (
            features.contiguous(),
            boxes.contiguous(),
            None if valid_sizes is None else valid_sizes.contiguous(),
            out,
            number,
            height,
            width,
            channels,
        ),
        BINS=output_size,
        PRECISION=float32_precision(features.dtype),
    )
    return out


def roi_align_backward_triton(
    grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None = None
) -> Tensor:
    """Launch the backward kernel; arguments and result are those of `roi_align_backward_reference`."""
    batch, number, output_size, _, channels = grad.shape
    out = grad.new_empty(batch, height, width, channels)
    tile = _blocks(BACKWARD_TILE, output_size, channels)
    windows = triton.cdiv(height, tile.blocks["BLOCK_H"]) * triton.cdiv(width, tile.blocks["BLOCK_W"])
    launch(
        _roi_align_backward_kernel,
        (batch * windows, triton.cdiv(channels, tile.blocks["BLOCK_C"])),
        tile,
        (
            grad.contiguous(),
            boxes.contiguous(),
            None if valid_sizes is None else valid_sizes.contiguous(),
            out,
            number,
            height,
            width,
            channels,
        ),
        BINS=output_size,
        PRECISION=float32_precision(grad.dtype),
    )
    return out


@torch.library.custom_op("samdetr::roi_align", mutates_args=(), device_types="cuda")
def _roi_align(features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    if runs_reference(features):
        return roi_align_reference(features, boxes, output_size, valid_sizes)
    return roi_align_forward_triton(features, boxes, output_size, valid_sizes)


@_roi_align.register_kernel("cpu")
def _(features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    return roi_align_reference(features, boxes, output_size, valid_sizes)


@_roi_align.register_fake
def _(features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0], boxes.shape[1], output_size, output_size, features.shape[3])


@torch.library.custom_op("samdetr::roi_align_backward", mutates_args=(), device_types="cuda")
def _roi_align_backward(grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None) -> Tensor:
    if runs_reference(grad):
        return roi_align_backward_reference(grad, boxes, height, width, valid_sizes)
    return roi_align_backward_triton(grad, boxes, height, width, valid_sizes)


@_roi_align_backward.register_kernel("cpu")
def _(grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None) -> Tensor:
    return roi_align_backward_reference(grad, boxes, height, width, valid_sizes)


@_roi_align_backward.register_fake
def _(grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], height, width, grad.shape[-1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, boxes, _, valid_sizes = inputs
    ctx.save_for_backward(boxes, valid_sizes)
    ctx.map_size = features.shape[1], features.shape[2]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    boxes, valid_sizes = ctx.saved_tensors
    height, width = ctx.map_size
    return _roi_align_backward(grad, boxes, height, width, valid_sizes), None, None, None


_roi_align.register_autograd(_backward, setup_context=_setup_context)
register_flop_formula(torch.ops.samdetr.roi_align)(lambda *_, **__: 0)  # as in the papers' GFLOPs


def roi_align(features: Tensor, boxes: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None) -> Tensor:
    """Average bilinear samples in each of ``output_size`` x ``output_size`` bins of every box.

    features: [B, H, W, C] floating. boxes: [B, N, 4] floating (x0, y0, x1, y1) in map cells, constant for
    autograd. valid_sizes: [B, 2] integer (h, w); cells at or beyond it count as absent, so that the result
    does not depend on padding. Returns [B, N, output_size, output_size, C] in the dtype of ``features``.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    check_inputs("roi_align", features, boxes, valid_sizes, output_size)
    out: Tensor = _roi_align(features, boxes, output_size, valid_sizes)
    return out
