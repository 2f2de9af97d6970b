"""Features at salient points of boxes: RoIAlign followed by bilinear sampling, without the RoI features.

Replaces ``grid_sample(roi_align(map, boxes, 7), points, bilinear, zeros, align_corners=False)`` (SAM-DETR,
CVPR 2022, section 3.3) to rounding. Bilinear sampling of the bins at (px, py) weighs bin b of an axis by
``tent(p)_b = max(0, 1 - |((p + 1) * 7 - 1) / 2 - b|)``, so a point is rank one on the map:
``out[b, n, k, c] = a_y^T features[b, :, :, c] a_x`` with ``a = tent(p)^T A`` and A of `axis_weights`.
Points anywhere in the image (SAM-DETR's ablation of the search range) are points of the box (0, 0, w, h).

Gradients: of ``features`` and of ``points``. The boxes are constants for the op; `salient_points_reference` is
differentiable in them wherever the number of samples does not change.
Determinism: every output element is summed by one program, no atomics, the same bits in every run.
Dtypes: fp16, bf16, fp32; weights and sums are in fp32. fp64 runs the reference on every device.
Dims: B images, H x W cells, C channels, N boxes, P points of a box, S cells that the points of a box span.
Bytes: forward B H W C read, B N P C written; backward both read, B H W C written. The published composition also
writes and reads B N 49 C.
Operations: B N P C S multiply-adds forward, twice as many backward (products with fp16 and bf16 features cost two,
except that of the gradient of the points).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.axis_weights import box_weights, check_inputs, compute_dtype
from samdetr_kernels.checks import DTYPES, check_devices, describe
from samdetr_kernels.launch import outside_autocast, runs_reference
from samdetr_kernels.salient_points_kernels import (
    empty_gradients,
    salient_points_backward_triton,
    salient_points_forward_triton,
)


def _bin_offsets(coordinate: Tensor, bins: int) -> Tensor:
    """Compute the distance from point to bin centre, in bins: [B, N, P] in [-1, 1] -> [B, N, P, bins]."""
    centres = torch.arange(bins, device=coordinate.device, dtype=coordinate.dtype)
    return (((coordinate + 1) * bins - 1) / 2)[..., None] - centres


def _axis_vector(coordinate: Tensor, weights: Tensor) -> Tensor:
    """Compute ``a = tent(p)^T A``: [B, N, P] and [B, N, bins, cells] -> [B, N, P, cells]."""
    tent = (1 - _bin_offsets(coordinate, weights.shape[2]).abs()).clamp(min=0)
    return tent @ weights


def _axis_gradient(coordinate: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
    """Compute d coordinate [B, N, P] from the gradient of ``a`` [B, N, P, cells]."""
    bins = weights.shape[2]
    offset = _bin_offsets(coordinate, bins)
    inside = ((offset >= -1) & (offset < 1)).to(grad.dtype)
    slope = torch.where(offset < 0, inside, -inside) * (bins / 2)
    return (slope * (grad @ weights.transpose(-1, -2))).sum(-1)


@outside_autocast
def salient_points_reference(
    features: Tensor, boxes: Tensor, points: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Compute `salient_points` in plain torch, on any device and floating dtype."""
    dtype = compute_dtype(features)
    batch, height, width, channels = features.shape
    weight_y, weight_x = box_weights(boxes, height, width, output_size, valid_sizes, dtype)
    x, y = points.to(dtype).unbind(-1)
    vector_y, vector_x = _axis_vector(y, weight_y), _axis_vector(x, weight_x)
    cells = (vector_y[..., :, None] * vector_x[..., None, :]).flatten(3).flatten(1, 2)
    out = cells @ features.to(dtype).reshape(batch, height * width, channels)
    return out.view(*points.shape[:3], channels).to(features.dtype)


@outside_autocast
def salient_points_backward_reference(
    grad: Tensor,
    features: Tensor,
    boxes: Tensor,
    points: Tensor,
    output_size: int = 7,
    valid_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute d features [B, H, W, C] and d points [B, N, P, 2] from ``grad`` [B, N, P, C]."""
    dtype = compute_dtype(features)
    batch, height, width, channels = features.shape
    weight_y, weight_x = box_weights(boxes, height, width, output_size, valid_sizes, dtype)
    x, y = points.to(dtype).unbind(-1)
    vector_y, vector_x = _axis_vector(y, weight_y), _axis_vector(x, weight_x)
    flat_grad = grad.to(dtype).flatten(1, 2)
    cells = (vector_y[..., :, None] * vector_x[..., None, :]).flatten(3).flatten(1, 2)
    grad_features = (cells.transpose(1, 2) @ flat_grad).view(features.shape)

    flat_features = features.to(dtype).reshape(batch, height * width, channels)
    grad_cells = (flat_grad @ flat_features.transpose(1, 2)).view(*points.shape[:3], height, width)
    grad_y = (grad_cells @ vector_x[..., None]).squeeze(-1)
    grad_x = (vector_y[..., None, :] @ grad_cells).squeeze(-2)
    grad_points = torch.stack((_axis_gradient(x, weight_x, grad_x), _axis_gradient(y, weight_y, grad_y)), dim=-1)
    return grad_features.to(features.dtype), grad_points.to(points.dtype)


@torch.library.custom_op("samdetr::salient_points", mutates_args=(), device_types="cuda")
def _salient_points(
    features: Tensor, boxes: Tensor, points: Tensor, output_size: int, valid_sizes: Tensor | None
) -> Tensor:
    if runs_reference(features):
        return salient_points_reference(features, boxes, points, output_size, valid_sizes)
    return salient_points_forward_triton(features, boxes, points, output_size, valid_sizes)


@_salient_points.register_kernel("cpu")
def _(features: Tensor, boxes: Tensor, points: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    return salient_points_reference(features, boxes, points, output_size, valid_sizes)


@_salient_points.register_fake
def _(features: Tensor, boxes: Tensor, points: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    return features.new_empty(*points.shape[:3], features.shape[-1])


def _backward_reference(
    grad: Tensor,
    features: Tensor,
    boxes: Tensor,
    points: Tensor,
    output_size: int,
    valid_sizes: Tensor | None,
    of_features: bool,
    of_points: bool,
) -> tuple[Tensor, Tensor]:
    found = salient_points_backward_reference(grad, features, boxes, points, output_size, valid_sizes)
    none = empty_gradients(features, points, False, False)
    return found[0] if of_features else none[0], found[1] if of_points else none[1]


@torch.library.custom_op("samdetr::salient_points_backward", mutates_args=(), device_types="cuda")
def _salient_points_backward(
    grad: Tensor,
    features: Tensor,
    boxes: Tensor,
    points: Tensor,
    output_size: int,
    valid_sizes: Tensor | None,
    of_features: bool,
    of_points: bool,
) -> tuple[Tensor, Tensor]:
    if runs_reference(features):
        return _backward_reference(grad, features, boxes, points, output_size, valid_sizes, of_features, of_points)
    wanted = (of_features, of_points)
    return salient_points_backward_triton(grad, features, boxes, points, output_size, valid_sizes, wanted)


_salient_points_backward.register_kernel("cpu")(_backward_reference)


@_salient_points_backward.register_fake
def _(
    grad: Tensor,
    features: Tensor,
    boxes: Tensor,
    points: Tensor,
    output_size: int,
    valid_sizes: Tensor | None,
    of_features: bool,
    of_points: bool,
) -> tuple[Tensor, Tensor]:
    return empty_gradients(features, points, of_features, of_points)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, boxes, points, output_size, valid_sizes = inputs
    ctx.save_for_backward(features, boxes, points, valid_sizes)
    ctx.output_size = output_size


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    features, boxes, points, valid_sizes = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    found = _salient_points_backward(grad, features, boxes, points, ctx.output_size, valid_sizes, *wanted)
    return found[0] if wanted[0] else None, None, found[1] if wanted[1] else None, None, None


_salient_points.register_autograd(_backward, setup_context=_setup_context)
register_flop_formula(torch.ops.samdetr.salient_points)(lambda *_, **__: 0)  # sampling, as in the papers' GFLOPs


def salient_points(
    features: Tensor, boxes: Tensor, points: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Sample every box's RoIAlign features at points given relative to the box.

    features: [B, H, W, C] floating. boxes: [B, N, 4] floating (x0, y0, x1, y1) in map cells, constant for
    autograd. points: [B, N, P, 2] floating (x, y), -1 and 1 are the box's edges. output_size: bins of the
    RoIAlign grid per axis. valid_sizes: [B, 2] integer (h, w); cells at or beyond it count as absent.
    Returns [B, N, P, C] in the dtype of ``features``. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    check_inputs("salient_points", features, boxes, valid_sizes, output_size)
    shaped = points.dim() == 4 and points.shape[:2] == boxes.shape[:2] and points.shape[3] == 2
    if not shaped or points.dtype not in DTYPES:
        expected = f"[{boxes.shape[0]}, {boxes.shape[1]}, P, 2]"
        raise ValueError(f"salient_points: points must be a floating {expected} tensor, got {describe(points)}")
    check_devices("salient_points", features, {"points": points})
    out: Tensor = _salient_points(features, boxes, points, output_size, valid_sizes)
    return out
