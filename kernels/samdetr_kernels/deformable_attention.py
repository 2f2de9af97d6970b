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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.axis_weights import compute_dtype
from samdetr_kernels.checks import DTYPES, check_devices
from samdetr_kernels.deformable_attention_kernels import (
    MAX_LEVELS,
    MAX_SIZE,
    SpatialShapes,
    deformable_attention_backward_triton,
    deformable_attention_forward_triton,
)
from samdetr_kernels.launch import runs_reference

MAX_CHANNELS = 128


def _samples(locations: Tensor, spatial_shapes: SpatialShapes) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the four corners of the samples of every level, from locations [B, M, Q, L, P, 2].

    Each is the level, the corner's number among the S cells, its bilinear weight, and the derivatives of that weight by
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
    """Gather value [B, M, S, D] at cell [B, M, Q, P]: [B, M, Q, P, D]."""
    index = cell.flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
    return value.gather(2, index).view(*cell.shape, value.shape[-1])


def deformable_attention_reference(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """Compute `deformable_attention` in plain torch, on any device and floating dtype."""
    dtype = compute_dtype(value)
    by_head, attention = value.to(dtype).transpose(1, 2), weights.to(dtype).transpose(1, 2)
    out = by_head.new_zeros(*attention.shape[:3], value.shape[3])
    for level, cell, weight, *_ in _samples(locations.to(dtype).transpose(1, 2), spatial_shapes):
        out = out + ((attention[:, :, :, level] * weight)[..., None] * _gather(by_head, cell)).sum(3)
    return out.transpose(1, 2).flatten(2).to(value.dtype)


def deformable_attention_backward_reference(
    grad: Tensor, value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute d value, d locations and d weights from ``grad`` [B, Q, M * D], each shaped and typed as its argument."""
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


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@torch.library.custom_op("samdetr::deformable_attention", mutates_args=(), device_types="cuda")
def _deformable_attention(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool
) -> Tensor:
    # sizes: H, W of every level in one list; deterministic is for the backward
    forward = deformable_attention_reference if runs_reference(value) else deformable_attention_forward_triton
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
    if runs_reference(value):
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
    """Sum weighted bilinear samples of all levels, for every query and head.

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
