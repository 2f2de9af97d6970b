"""RoIAlign along one axis as a small matrix: the algebra that both aligner ops share.

RoIAlign is separable: for one box ``RoIAlign(F) = A_y F A_x^T``, where row p of ``A`` is the mean, over the
samples of bin p, of the bilinear weights of each cell. The rules are those of He et al. (Mask R-CNN, 2017)
in torchvision's form ``aligned=True, sampling_ratio=-1``:

* edges are shifted by -0.5, a bin has ``ceil(side / bins)`` samples at the centres of equal parts;
* a sample below -1 or above the axis counts zero but stays in the mean; others are clamped into the axis;
* a box without positive side gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Samples of a bin are more than half a cell apart (or there is just one), so at most 4 of them fall within
# the two cells that a bilinear weight spans; one more absorbs rounding of the first candidate.
CANDIDATES = 5


def bin_weights(low: Tensor, high: Tensor, cells: int, bins: int, valid: Tensor | None = None) -> Tensor:
    """The matrix ``A`` of one axis.

    low, high: [B, N] edges of the boxes in cells, float. valid: [B] number of cells that exist in each map
    (default: all ``cells``); the rest weigh zero. Returns [B, N, bins, cells] in the dtype of ``low``.
    Differentiable in the edges wherever the number of samples does not change.
    """
    start = low - 0.5
    side = (high - 0.5) - start
    bin_size = (side / bins)[..., None, None, None]  # [B, N, 1, 1, 1]: axes bins, cells, candidates
    samples = torch.ceil(bin_size.detach()).clamp(min=0)
    count = samples.clamp(min=1)
    pitch = bin_size / count
    axis = torch.arange(max(bins, cells), device=low.device, dtype=low.dtype)
    bin_start = torch.addcmul(start[..., None, None, None], axis[:bins, None, None], bin_size)
    cell = axis[:cells, None]
    extent: Tensor | int = cells if valid is None else valid.to(low.dtype)[:, None, None, None, None]

    step = pitch.detach().clamp(min=torch.finfo(low.dtype).tiny)
    first = torch.floor((cell - 1 - bin_start.detach()) / step - 0.5).clamp(min=0) + 0.5
    number = first + torch.arange(CANDIDATES, device=low.device, dtype=low.dtype)  # sample index + 0.5
    position = torch.addcmul(bin_start, number, pitch)
    exists = (number < samples) & (position >= -1) & (position <= extent)
    if isinstance(extent, int):
        position = position.clamp(0, extent - 1)
    else:
        position = torch.minimum(position.clamp(min=0), extent - 1)
    weight = (1 - (position - cell).abs()).clamp(min=0)
    return torch.where(exists, weight, 0).sum(-1) / count[..., 0]


def box_weights(
    boxes: Tensor, height: int, width: int, bins: int, valid_sizes: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``A_y`` [B, N, bins, H] and ``A_x`` [B, N, bins, W] of (x0, y0, x1, y1) boxes, in ``dtype``."""
    x0, y0, x1, y1 = boxes.to(dtype).unbind(-1)
    valid_y, valid_x = (None, None) if valid_sizes is None else valid_sizes.unbind(-1)
    return bin_weights(y0, y1, height, bins, valid_y), bin_weights(x0, x1, width, bins, valid_x)


def check_inputs(op: str, features: Tensor, boxes: Tensor, valid_sizes: Tensor | None) -> None:
    """Raise a readable ValueError when shapes or dtypes do not fit together."""
    if features.dim() != 4 or not features.is_floating_point():
        raise ValueError(f"{op}: features must be a floating [B, H, W, C] tensor, got {_describe(features)}")
    batch = features.shape[0]
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4 or not boxes.is_floating_point():
        raise ValueError(f"{op}: boxes must be a floating [{batch}, N, 4] tensor, got {_describe(boxes)}")
    if valid_sizes is not None and (valid_sizes.shape != (batch, 2) or valid_sizes.is_floating_point()):
        raise ValueError(f"{op}: valid_sizes must be an integer [{batch}, 2] tensor, got {_describe(valid_sizes)}")


def compute_dtype(features: Tensor) -> torch.dtype:
    """fp32 accumulation for half precision; float64 stays float64."""
    return torch.promote_types(features.dtype, torch.float32)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
