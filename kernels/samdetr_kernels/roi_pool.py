"""One feature vector a box: the mean or the maximum over its RoIAlign bins, without writing the bins.

Replaces ``roi_align(map, boxes, 7).mean((-2, -1))`` and ``.amax((-2, -1))``: the resampling by averaging and by the
maximum of SAM-DETR's ablation (CVPR 2022, table 2). The kernels are those of `roi_align` with the reduction in
registers; the maximum keeps the bin that gave it (the first of equal ones, the first NaN if there is one) for the
backward.

Gradients: of ``features`` only; the boxes are constants. Determinism: no atomics, the same bits in every run.
Dtypes: fp16, bf16, fp32; weights and sums are in fp32. fp64 runs the reference on every device.
Dims: B images, H x W cells, C channels, N boxes, P = output_size.
Bytes: forward B H W C read, B N C written (and 4 B N C for the maximum's bins); backward the reverse.
Operations: as `roi_align`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samdetr_kernels.axis_weights import check_inputs, compute_dtype
from samdetr_kernels.launch import reference_forced
from samdetr_kernels.roi_align import (
    MAX,
    MEAN,
    roi_align_backward_reference,
    roi_align_backward_triton,
    roi_align_forward_triton,
    roi_align_reference,
)


def roi_pool_reference(
    features: Tensor,
    boxes: Tensor,
    output_size: int = 7,
    valid_sizes: Tensor | None = None,
    mode: str = MEAN,
) -> Tensor:
    """Plain torch with the signature and result of `roi_pool`, on any device and floating dtype."""
    return _forward_reference(features, boxes, output_size, valid_sizes, mode)[0]


def _forward_reference(
    features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    """The pooled features [B, N, C] and, for the maximum, its bin [B, N, C] int32 (else empty)."""
    bins = roi_align_reference(features.to(compute_dtype(features)), boxes, output_size, valid_sizes).flatten(2, 3)
    if mode == MEAN:
        return bins.mean(2).to(features.dtype), torch.empty(0, dtype=torch.int32, device=features.device)
    best = bins.amax(2)
    hits = (bins == best[:, :, None]) | bins.isnan()
    index = hits.to(torch.uint8).argmax(2)  # the first of equal ones; where there is NaN, the first NaN
    return bins.gather(2, index[:, :, None])[:, :, 0].to(features.dtype), index.to(torch.int32)


def _backward_reference(
    grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    output_size: int,
    valid_sizes: Tensor | None,
    mode: str,
) -> Tensor:
    """d features [B, H, W, C] from ``grad`` [B, N, C]."""
    bins, wide = output_size**2, grad.to(compute_dtype(grad))
    if mode == MEAN:
        spread = (wide / bins)[:, :, None].expand(-1, -1, bins, -1)
    else:
        spread = wide.new_zeros(*grad.shape[:2], bins, grad.shape[2])
        spread.scatter_(2, index.long()[:, :, None], wide[:, :, None])
    spread = spread.reshape(*grad.shape[:2], output_size, output_size, grad.shape[2])
    return roi_align_backward_reference(spread, boxes, height, width, valid_sizes).to(grad.dtype)


@torch.library.custom_op("samdetr::roi_pool", mutates_args=(), device_types="cuda")
def _roi_pool(
    features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    if reference_forced() or features.dtype == torch.float64:
        return _forward_reference(features, boxes, output_size, valid_sizes, mode)
    return roi_align_forward_triton(features, boxes, output_size, valid_sizes, mode)


@_roi_pool.register_kernel("cpu")
def _(
    features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    return _forward_reference(features, boxes, output_size, valid_sizes, mode)


@_roi_pool.register_fake
def _(
    features: Tensor, boxes: Tensor, output_size: int, valid_sizes: Tensor | None, mode: str
) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], boxes.shape[1], features.shape[3])
    return features.new_empty(shape), features.new_empty(shape if mode == MAX else 0, dtype=torch.int32)


@torch.library.custom_op("samdetr::roi_pool_backward", mutates_args=(), device_types="cuda")
def _roi_pool_backward(
    grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    output_size: int,
    valid_sizes: Tensor | None,
    mode: str,
) -> Tensor:
    if reference_forced() or grad.dtype == torch.float64:
        return _backward_reference(grad, index, boxes, height, width, output_size, valid_sizes, mode)
    return roi_align_backward_triton(grad, index, boxes, height, width, output_size, valid_sizes, mode)


@_roi_pool_backward.register_kernel("cpu")
def _(
    grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    output_size: int,
    valid_sizes: Tensor | None,
    mode: str,
) -> Tensor:
    return _backward_reference(grad, index, boxes, height, width, output_size, valid_sizes, mode)


@_roi_pool_backward.register_fake
def _(
    grad: Tensor,
    index: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    output_size: int,
    valid_sizes: Tensor | None,
    mode: str,
) -> Tensor:
    return grad.new_empty(grad.shape[0], height, width, grad.shape[2])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, boxes, ctx.output_size, valid_sizes, ctx.mode = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(boxes, valid_sizes, output[1])
    ctx.map_size = features.shape[1], features.shape[2]


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    if grad is None:
        return None, None, None, None, None
    boxes, valid_sizes, index = ctx.saved_tensors
    out = _roi_pool_backward(grad, index, boxes, *ctx.map_size, ctx.output_size, valid_sizes, ctx.mode)
    return out, None, None, None, None


_roi_pool.register_autograd(_backward, setup_context=_setup_context)


def roi_pool(
    features: Tensor,
    boxes: Tensor,
    output_size: int = 7,
    valid_sizes: Tensor | None = None,
    mode: str = MEAN,
) -> Tensor:
    """The mean or the maximum over the RoIAlign bins of every box.

    features: [B, H, W, C] floating. boxes: [B, N, 4] floating (x0, y0, x1, y1) in map cells, constant for
    autograd. valid_sizes: [B, 2] integer (h, w); cells at or beyond it count as absent. mode: "mean" or "max".
    Returns [B, N, C] in the dtype of ``features``. Raises ValueError when shapes, dtypes, devices or mode do not fit.
    """
    check_inputs("roi_pool", features, boxes, valid_sizes, output_size)
    if mode not in (MEAN, MAX):
        raise ValueError(f'roi_pool: mode must be "mean" or "max", got {mode!r}')
    out: Tensor = _roi_pool(features, boxes, output_size, valid_sizes, mode)[0]
    return out
