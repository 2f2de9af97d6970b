"""RoIAlign on a channels-last map.

Replaces ``torchvision.ops.roi_align(map, boxes, 7, aligned=True, sampling_ratio=-1)`` to rounding:
``out[b, n, p, q, c] = sum_{h, w} A_y[b, n, p, h] * A_x[b, n, q, w] * features[b, h, w, c]`` with the matrices
of `axis_weights`. Two small matrix products a box instead of a gather of every sample, and a backward
``dF = sum_n A_y^T dO A_x`` that is a sum over boxes: no atomics, the same bits in every run.

Gradients: of ``features`` only. The op treats the boxes as constants, as torchvision does;
`roi_align_reference` is differentiable in them wherever the number of samples does not change.
Dtypes: fp16, bf16, fp32, fp64; weights and sums are in fp32 or wider.
Dims: B images, H x W cells, C channels, N boxes, P = Q = output_size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samdetr_kernels.axis_weights import box_weights, check_inputs, compute_dtype


def roi_align_reference(
    features: Tensor, boxes: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None
) -> Tensor:
    """Plain torch with the signature and result of `roi_align`, on any device and floating dtype."""
    dtype = compute_dtype(features)
    batch, height, width, channels = features.shape
    boxes_per_image = boxes.shape[1]
    weight_y, weight_x = box_weights(boxes, height, width, output_size, valid_sizes, dtype)
    rows = weight_y.flatten(1, 2) @ features.to(dtype).reshape(batch, height, width * channels)
    rows = rows.view(batch, boxes_per_image, output_size, width, channels)
    return (weight_x[:, :, None] @ rows).to(features.dtype)


def roi_align_backward_reference(
    grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None = None
) -> Tensor:
    """d features [B, H, W, C] from ``grad`` [B, N, P, P, C], in the dtype of ``grad``."""
    dtype = compute_dtype(grad)
    batch, boxes_per_image, size, _, channels = grad.shape
    weight_y, weight_x = box_weights(boxes, height, width, size, valid_sizes, dtype)
    rows = weight_x[:, :, None].transpose(-1, -2) @ grad.to(dtype)  # [B, N, P, W, C]
    rows = rows.view(batch, boxes_per_image * size, width * channels)
    out = weight_y.flatten(1, 2).transpose(1, 2) @ rows
    return out.view(batch, height, width, channels).to(grad.dtype)


@torch.library.custom_op("samdetr::roi_align", mutates_args=())
def _roi_align(features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    return roi_align_reference(features, boxes, output_size, valid_sizes)


@_roi_align.register_fake
def _(features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None) -> Tensor:
    batch, _, _, channels = features.shape
    return features.new_empty(batch, boxes.shape[1], output_size, output_size, channels)


@torch.library.custom_op("samdetr::roi_align_backward", mutates_args=())
def _roi_align_backward(grad: Tensor, boxes: Tensor, height: int, width: int, valid_sizes: Tensor | None) -> Tensor:
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


def roi_align(features: Tensor, boxes: Tensor, output_size: int = 7, valid_sizes: Tensor | None = None) -> Tensor:
    """Mean of bilinear samples in each of ``output_size`` x ``output_size`` bins of every box.

    features: [B, H, W, C] floating. boxes: [B, N, 4] floating (x0, y0, x1, y1) in map cells, constant for
    autograd. valid_sizes: [B, 2] integer (h, w); cells at or beyond it count as absent, so that the result
    does not depend on padding. Returns [B, N, output_size, output_size, C] in the dtype of ``features``.
    Raises ValueError when shapes or dtypes do not fit.
    """
    check_inputs("roi_align", features, boxes, valid_sizes)
    if output_size < 1:
        raise ValueError(f"roi_align: output_size must be at least 1, got {output_size}")
    out: Tensor = _roi_align(features, boxes, output_size, valid_sizes)
    return out
