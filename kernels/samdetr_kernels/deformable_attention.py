"""Multi-scale deformable attention: a few bilinear samples of several maps for every query and head.

Replaces the CUDA extension of Deformable DETR (Zhu et al., ICLR 2021, equation 3) and its PyTorch form, ``grid_sample``
of every level, to rounding: ``out[b, q, m] = sum_{l, p} weights[b, q, m, l, p] value_l[b, m](location[b, q, m, l, p])``
where ``value_l(x, y)`` interpolates level l at the cell coordinates (x W_l - 1/2, y H_l - 1/2), cells beyond the border
being zero (``bilinear, zeros, align_corners=False``). A sample whose location is not finite counts zero.

Gradients: of value, locations and weights; at the kinks, the centres of cells, those of ``grid_sample``.
Determinism: output and the gradients of locations and weights are summed by one program, the same bits in every run.
The gradient of value is scattered with atomic adds: in fp32, whose order shows in the last bits, or, deterministic, in
int64 fixed point, whose sums do not depend on their order (no sort of the samples, no segments). The unit of an image
and head is 2^-60 of a bound of its sums, or finer: as exact as fp32 for what is above 2^-36 of that bound. One gradient
that is not finite makes the gradient of its image and head NaN.
Dtypes: fp16, bf16, fp32, of each argument its own; arithmetic is in fp32. fp64 runs the reference on every device.
Dims: B images, S cells of all levels, M heads, D channels of a head, Q queries, L levels, P points.
Bytes: forward B S M D and 3 B Q M L P read, B Q M D written, and 4 B Q M L P D gathered from the L2 cache. Backward
also B Q M D read, 3 B Q M L P and B S M D written, 4 B Q M L P D added in the L2 cache to sums of 4 (fp32) or 8 bytes,
which are zeroed before and read after.
Operations: 8 B Q M L P D forward, 24 B Q M L P D backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.checks import DTYPES, check_devices
from samdetr_kernels.launch import Tile, launch, next_power_of_2, reference_forced

SpatialShapes = Sequence[tuple[int, int]]

MAX_LEVELS = 8
MAX_CHANNELS = 128
MAX_SIZE = (1 << 15) - 1  # of a map: both sizes fit one int32
_BITS, _MASK = tl.constexpr(15), tl.constexpr(MAX_SIZE)
SUM_BITS = 61  # of a fixed-point sum: int64 holds 63, the bound of the sum is itself rounded
FIXED_POINT_BYTES = 1 << 28  # of fixed-point sums held at once: more images than fit take turns

# A program is one warp, which sums over channels without barriers. A thread has 16 bytes of a cell forward, and 4 or 2
# channels backward: 16 bytes of what it adds. Chosen by registers of the ahead-of-time report; not yet timed on a GPU.
WARP = 32
FORWARD_BYTES, FAST_CHANNELS, DETERMINISTIC_CHANNELS = 16, 4, 2  # of a thread


def _samples(locations: Tensor, spatial_shapes: SpatialShapes) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """The four corners of the samples of every level, from locations [B, M, Q, L, P, 2].

    Yields the level, the corner's number among the S cells, its bilinear weight, and the derivatives of that weight by
    the location's x and y, each [B, M, Q, P]; a corner beyond the map is cell 0 with zero weight and derivatives.
    """
    first = 0
    for level, (height, width) in enumerate(spatial_shapes):
        x = locations[:, :, :, level, :, 0] * width - 0.5
        y = locations[:, :, :, level, :, 1] * height - 0.5
        for step_y, step_x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            cell_x, cell_y = x.floor() + step_x, y.floor() + step_y
            inside = (cell_x >= 0) & (cell_x < width) & (cell_y >= 0) & (cell_y < height)
            # no absolute value: at a kink the derivative must be that of the right-hand side
            weight_x = x - x.floor() if step_x else 1 - (x - x.floor())
            weight_y = y - y.floor() if step_y else 1 - (y - y.floor())
            cell = first + torch.where(inside, cell_y, 0).long() * width + torch.where(inside, cell_x, 0).long()
            slope_x, slope_y = weight_y * (width * (2 * step_x - 1)), weight_x * (height * (2 * step_y - 1))
            weight = torch.where(inside, weight_x * weight_y, 0)
            yield level, cell, weight, torch.where(inside, slope_x, 0), torch.where(inside, slope_y, 0)
        first += height * width


def _gather(value: Tensor, cell: Tensor) -> Tensor:
    """value [B, M, S, D] at cell [B, M, Q, P]: [B, M, Q, P, D]."""
    index = cell.flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
    return value.gather(2, index).view(*cell.shape, value.shape[-1])


def deformable_attention_reference(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Plain torch with the arguments and result of `deformable_attention`, on any device and floating dtype."""
    dtype = compute_dtype(value)
    by_head, attention = value.to(dtype).transpose(1, 2), weights.to(dtype).transpose(1, 2)
    out = by_head.new_zeros(*attention.shape[:3], value.shape[3])
    for level, cell, weight, *_ in _samples(locations.to(dtype).transpose(1, 2), spatial_shapes):
        out = out + ((attention[:, :, :, level] * weight)[..., None] * _gather(by_head, cell)).sum(3)
    return out.transpose(1, 2).flatten(2).to(value.dtype)


def deformable_attention_backward_reference(
    grad: Tensor, value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d value, d locations and d weights from ``grad`` [B, Q, M * D], each shaped and typed as its argument."""
    dtype = compute_dtype(value)
    by_head, attention = value.to(dtype).transpose(1, 2), weights.to(dtype).transpose(1, 2)
    upstream = grad.to(dtype).reshape(*weights.shape[:3], 1, value.shape[3]).transpose(1, 2)  # [B, M, Q, 1, D]
    grad_value = by_head.new_zeros(by_head.shape)
    grad_weights = attention.new_zeros(attention.shape)
    grad_locations = attention.new_zeros(*attention.shape, 2)
    for level, cell, weight, *slopes in _samples(locations.to(dtype).transpose(1, 2), spatial_shapes):
        share = attention[:, :, :, level]
        added = ((share * weight)[..., None] * upstream).flatten(2, 3)
        grad_value.scatter_add_(2, cell.flatten(2)[..., None].expand_as(added), added)
        along = (_gather(by_head, cell) * upstream).sum(-1)
        grad_weights[:, :, :, level] += weight * along
        grad_locations[:, :, :, level] += torch.stack(slopes, dim=-1) * (share * along)[..., None]
    return (
        grad_value.transpose(1, 2).to(value.dtype).contiguous(),
        grad_locations.transpose(1, 2).to(locations.dtype).contiguous(),
        grad_weights.transpose(1, 2).to(weights.dtype).contiguous(),
    )


@triton.jit
def _position(p_location, m_q, height, width):  # type: ignore[no-untyped-def]
    """Cell coordinates (x, y) of samples; those that reach no cell, and those not finite, are moved to (-2, -2)."""
    x = tl.load(p_location, mask=m_q, other=-2.0).to(tl.float32) * width - 0.5
    y = tl.load(p_location + 1, mask=m_q, other=-2.0).to(tl.float32) * height - 0.5
    reaches = (x >= -1.0) & (x < width) & (y >= -1.0) & (y < height)
    return tl.where(reaches, x, -2.0), tl.where(reaches, y, -2.0)


@triton.jit
def _corner(x, y, height, width, CORNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of the four cells around (x, y): its number in the level, whether it exists, its weights along x and y."""
    cell_x, cell_y = tl.floor(x) + CORNER % 2, tl.floor(y) + CORNER // 2
    m_cell = (cell_x >= 0.0) & (cell_x < width) & (cell_y >= 0.0) & (cell_y < height)
    i_cell = cell_y.to(tl.int32) * width + cell_x.to(tl.int32)
    return i_cell, m_cell, 1.0 - tl.abs(x - cell_x), 1.0 - tl.abs(y - cell_y)


# multi-scale training changes these with every batch: one compilation serves all
_UNSPECIALIZED = ["S", "Q", *(f"size_{level}" for level in range(MAX_LEVELS))]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _deformable_attention_forward_kernel(  # type: ignore[no-untyped-def]
    value,  # [B, S, M, D]
    locations,  # [B, Q, M, LEVELS, P, 2]
    weights,  # [B, Q, M, LEVELS, P]
    out,  # [B, Q, M, D]
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
    """One program an image, head and block of queries."""
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
    grad,  # [B, Q, M, D]
    value,  # [B, S, M, D]
    locations,  # [B, Q, M, LEVELS, P, 2]
    weights,  # [B, Q, M, LEVELS, P]
    scale,  # [B, M] fp32: fixed-point units in 1, or None
    grad_value,  # [B, S, M, D] zeros: int64 beside a scale, else fp32; or None: not wanted
    grad_locations,  # [B, Q, M, LEVELS, P, 2]
    grad_weights,  # [B, Q, M, LEVELS, P]
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
    """One program an image, head and block of queries."""
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
    """Run a kernel on ``tensors`` and the sizes, which every kernel takes."""
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
    """What `deformable_attention` returns, by the Triton kernel."""
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
    """d value, d locations and d weights from ``grad`` [B, Q, M * D], each shaped and typed as its argument.

    Not ``of_value``, that of value is empty and nothing is scattered.
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
    """Units in 1 and their inverse, powers of two [B, M], such that no sum of contributions overflows int64."""
    largest = torch.linalg.vector_norm(grad, ord=math.inf, dim=-1, dtype=torch.float32)
    attention = torch.linalg.vector_norm(weights, ord=1, dim=(-2, -1), dtype=torch.float32)
    bound = (largest * attention).sum(1)
    scale = torch.exp2((SUM_BITS - torch.frexp(bound).exponent).clamp(-126, 126).float())
    return scale, torch.where(bound.isfinite(), 1 / scale, torch.nan)


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _runs_reference(value: Tensor) -> bool:
    return reference_forced() or value.dtype == torch.float64


@torch.library.custom_op("samdetr::deformable_attention", mutates_args=(), device_types="cuda")
def _deformable_attention(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> Tensor:
    """``sizes``: H, W of every level in one list. ``deterministic`` is for the backward."""
    forward = deformable_attention_reference if _runs_reference(value) else deformable_attention_forward_triton
    return forward(value, _pairs(sizes), locations, weights)


@_deformable_attention.register_kernel("cpu")
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool) -> Tensor:
    return deformable_attention_reference(value, _pairs(sizes), locations, weights)


@_deformable_attention.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool) -> Tensor:
    return value.new_empty(value.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


def _backward_reference(
    grad: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    deterministic: bool,
    of_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = deformable_attention_backward_reference(grad, value, _pairs(sizes), locations, weights)
    return found if of_value else (value.new_empty(0), *found[1:])


@torch.library.custom_op("samdetr::deformable_attention_backward", mutates_args=(), device_types="cuda")
def _deformable_attention_backward(
    grad: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    deterministic: bool,
    of_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if _runs_reference(value):
        return _backward_reference(grad, value, sizes, locations, weights, deterministic, of_value)
    return deformable_attention_backward_triton(grad, value, _pairs(sizes), locations, weights, deterministic, of_value)


_deformable_attention_backward.register_kernel("cpu")(_backward_reference)


@_deformable_attention_backward.register_fake
def _(
    grad: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    deterministic: bool,
    of_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    of_value_shape = value.shape if of_value else 0
    return value.new_empty(of_value_shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    value, ctx.sizes, locations, weights, ctx.deterministic = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    value, locations, weights = ctx.saved_tensors
    of_value = ctx.needs_input_grad[0]
    grads = _deformable_attention_backward(grad, value, ctx.sizes, locations, weights, ctx.deterministic, of_value)
    return grads[0] if of_value else None, None, grads[1], grads[2], None


_deformable_attention.register_autograd(_backward, setup_context=_setup_context)
register_flop_formula(torch.ops.samdetr.deformable_attention)(lambda *_, **__: 0)  # sampling: no product of matrices


def deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    locations: Tensor,
    weights: Tensor,
    *,
    deterministic: bool | None = None,
) -> Tensor:
    """Sum, for every query and head, of weighted bilinear samples of all levels.

    value: [B, S, M, D] floating, D at most 128; the cells of the levels one after another, each row by row.
    spatial_shapes: (H, W) of every level, at most 8; S is the sum of H * W. locations: [B, Q, M, L, P, 2] floating
    (x, y), 0 and 1 are the map's edges. weights: [B, Q, M, L, P] floating. deterministic: whether the gradient of
    value has the same bits in every run; None follows ``torch.are_deterministic_algorithms_enabled()``.
    Returns [B, Q, M * D] in the dtype of ``value``. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    _check_inputs(value, spatial_shapes, locations, weights)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    sizes = [size for shape in spatial_shapes for size in shape]
    out: Tensor = _deformable_attention(value, sizes, locations, weights, deterministic)
    return out


def _check_inputs(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> None:
    op, levels = "deformable_attention", len(spatial_shapes)
    if value.dim() != 4 or not 1 <= value.shape[3] <= MAX_CHANNELS:
        raise ValueError(f"{op}: value must be [B, S, M, D] with D from 1 to {MAX_CHANNELS}, got {list(value.shape)}")
    if not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"{op}: spatial_shapes must have 1 to {MAX_LEVELS} levels, got {levels}")
    if not all(len(shape) == 2 and min(shape) >= 1 and max(shape) <= MAX_SIZE for shape in spatial_shapes):
        raise ValueError(f"{op}: spatial_shapes must be (H, W) from 1 to {MAX_SIZE}, got {list(spatial_shapes)}")
    cells = sum(height * width for height, width in spatial_shapes)
    if cells != value.shape[1]:
        raise ValueError(f"{op}: spatial_shapes have {cells} cells, value has {value.shape[1]}")
    batch, _, heads, _ = value.shape
    if weights.dim() != 5 or (weights.shape[0], *weights.shape[2:4]) != (batch, heads, levels):
        raise ValueError(f"{op}: weights must be [{batch}, Q, {heads}, {levels}, P], got {list(weights.shape)}")
    if locations.shape != (*weights.shape, 2):
        raise ValueError(f"{op}: locations must be {[*weights.shape, 2]}, got {list(locations.shape)}")
    dtypes = [part.dtype for part in (value, locations, weights)]
    if not set(dtypes) <= set(DTYPES) or len({dtype == torch.float64 for dtype in dtypes}) > 1:
        raise ValueError(
            f"{op}: value, locations and weights must be fp16, bf16 or fp32 each, or all fp64, got {dtypes}"
        )
    check_devices(op, value, {"locations": locations, "weights": weights})
