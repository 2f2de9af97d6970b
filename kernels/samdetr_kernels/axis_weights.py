"""RoIAlign along one axis as a small matrix: the algebra that both aligner ops share.

RoIAlign is separable: for one box ``RoIAlign(F) = A_y F A_x^T``, where row p of ``A`` is the mean, over the
samples of bin p, of the bilinear weights of each cell. The rules are those of He et al. (Mask R-CNN, 2017)
in torchvision's form ``aligned=True, sampling_ratio=-1``:

* edges are shifted by -0.5, a bin has ``ceil(side / bins)`` samples at the centres of equal parts;
* a sample below -1 or above the axis counts zero but stays in the mean; others are clamped into the axis;
* a box without positive side gives zeros, one whose side is not finite NaN: a model that diverged must show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.checks import DTYPES, check_devices, describe, is_integer

# Samples of a bin are more than half a cell apart (or there is just one), so at most 4 of them fall within
# the two cells that a bilinear weight spans; one more absorbs rounding of the first candidate.
CANDIDATES = 5
MAX_OUTPUT_SIZE = 64
_CANDIDATES = tl.constexpr(CANDIDATES)


def bin_weights(low: Tensor, high: Tensor, cells: int, bins: int, valid: Tensor | None = None) -> Tensor:
    """Compute the matrix ``A`` of one axis.

    low, high: [B, N] edges of the boxes in cells, float. valid: [B] number of cells that exist in each map
    (default: all ``cells``; clamped to [0, cells]); the rest weigh zero. Returns [B, N, bins, cells] in the dtype of
    ``low``. Differentiable in the edges wherever the number of samples does not change.
    """
    start = low - 0.5
    side = (high - 0.5) - start
    # a tensor, since CUDA multiplies by a number's rounded inverse: the number of samples jumps with the quotient
    exact_bins = torch.full((), float(bins), dtype=side.dtype, device=side.device)
    bin_size = (side / exact_bins)[..., None, None, None]  # [B, N, 1, 1, 1]: axes bins, cells, candidates
    samples = torch.ceil(bin_size.detach()).clamp(min=0)
    count = samples.clamp(min=1) + (bin_size - bin_size).detach()  # NaN where the side is not finite
    pitch = bin_size / count
    axis = torch.arange(max(bins, cells), device=low.device, dtype=low.dtype)
    bin_start = torch.addcmul(start[..., None, None, None], axis[:bins, None, None], bin_size)
    cell = axis[:cells, None]
    extent: Tensor | int = cells
    if valid is not None:
        extent = valid.clamp(0, cells).to(low.dtype)[:, None, None, None, None]

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
    """Compute ``A_y`` [B, N, bins, H] and ``A_x`` [B, N, bins, W] of (x0, y0, x1, y1) boxes, in ``dtype``."""
    x0, y0, x1, y1 = boxes.to(dtype).unbind(-1)
    valid_y, valid_x = (None, None) if valid_sizes is None else valid_sizes.unbind(-1)
    return bin_weights(y0, y1, height, bins, valid_y), bin_weights(x0, x1, width, bins, valid_x)


@triton.jit
def axis_weight(low, high, bin_number, cell, extent, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute elements of ``A`` in fp32: arguments broadcast; all but ``extent`` and BINS are fp32.

    low, high: the box's edges. bin_number: row of ``A``, anything outside [0, BINS) gives 0. cell: column of ``A``.
    extent: integer, cells that exist.
    """
    start = low - 0.5
    # exactly rounded, as in the reference: the number of samples jumps with the quotient
    bin_size = tl.div_rn((high - 0.5) - start, BINS * 1.0)
    samples = tl.maximum(tl.ceil(bin_size), 0.0)
    count = tl.maximum(samples, 1.0)
    pitch = tl.div_rn(bin_size, count)
    bin_start = start + bin_number * bin_size
    # a pitch below 0.5 belongs to a single sample, which is then the first candidate
    first = tl.maximum(tl.floor((cell - 1.0 - bin_start) / tl.maximum(pitch, 0.25) - 0.5), 0.0) + 0.5
    total = tl.zeros_like(first)
    for i_candidate in tl.static_range(_CANDIDATES):
        number = first + i_candidate
        position = bin_start + number * pitch
        exists = (number < samples) & (position >= -1.0) & (position <= extent)
        position = tl.minimum(tl.maximum(position, 0.0), extent - 1.0)
        total += tl.where(exists, tl.maximum(1.0 - tl.abs(position - cell), 0.0), 0.0)
    return tl.where((bin_number >= 0) & (bin_number < BINS), total / count, 0.0)


@triton.jit
def axis_range(low, high, first_bin, last_bin, extent, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the cells [begin, end), int32, outside which `axis_weight` is 0 for bins first_bin .. last_bin (fp32)."""
    start = low - 0.5
    side = (high - 0.5) - start
    bin_size = tl.div_rn(side, BINS * 1.0)
    begin = tl.floor(start + first_bin * bin_size)
    end = tl.floor(start + (last_bin + 1.0) * bin_size) + 2.0
    exists = (side > 0.0) & (end > -1.0) & (begin <= extent) & (first_bin <= last_bin) & (extent > 0)
    begin = tl.minimum(tl.maximum(begin, 0.0), extent - 1.0)
    end = tl.minimum(tl.maximum(end, 1.0), extent * 1.0)
    return tl.where(exists, begin, 0.0).to(tl.int32), tl.where(exists, end, 0.0).to(tl.int32)


@triton.jit
def point_weight(low, high, coordinate, cell, extent, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute ``tent(p)^T A`` at one cell; arguments as for `axis_weight`, coordinate in [-1, 1] of the box."""
    weight, _slope = point_weight_and_slope(low, high, coordinate, cell, extent, BINS)
    return weight


@triton.jit
def point_weight_and_slope(low, high, coordinate, cell, extent, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute `point_weight` and its derivative by the coordinate."""
    position = ((coordinate + 1.0) * BINS - 1.0) * 0.5
    # there every weight is 0; without the limits an infinite point would give inf - inf. NaN passes
    position = tl.where(position < -2.0, -2.0, tl.where(position > BINS + 1.0, BINS + 1.0, position))
    bin_before = tl.floor(position)
    before = axis_weight(low, high, bin_before, cell, extent, BINS)
    after = axis_weight(low, high, bin_before + 1.0, cell, extent, BINS)
    return before + (position - bin_before) * (after - before), (after - before) * (0.5 * BINS)


@triton.jit
def point_range(low, high, coordinate, extent, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the cells [begin, end) that a point's bilinear sample of the bins reads."""
    bin_before = tl.floor(((coordinate + 1.0) * BINS - 1.0) * 0.5)
    first = tl.minimum(tl.maximum(bin_before, 0.0), BINS * 1.0)
    last = tl.maximum(tl.minimum(bin_before + 1.0, BINS - 1.0), -1.0)
    return axis_range(low, high, first, last, extent, BINS)


@triton.jit
def load_box(p_box):  # type: ignore[no-untyped-def]
    """Load the edges x0, y0, x1, y1 in fp32. p_box: one box [4] of any floating dtype."""
    x0, y0 = tl.load(p_box).to(tl.float32), tl.load(p_box + 1).to(tl.float32)
    x1, y1 = tl.load(p_box + 2).to(tl.float32), tl.load(p_box + 3).to(tl.float32)
    return x0, y0, x1, y1


@triton.jit
def not_finite(x0, y0, x1, y1):  # type: ignore[no-untyped-def]
    """Return 0, or NaN where a side of the box is not finite; sums start from it."""
    side_x, side_y = x1 - x0, y1 - y0
    return (side_x - side_x) + (side_y - side_y)


@triton.jit
def load_extent(valid_sizes, i_image, H, W):  # type: ignore[no-untyped-def]
    """Load the rows and columns of the image's map that exist, clamped, int32.

    valid_sizes: [B, 2] (h, w) of any integer dtype, or None: all.
    """
    height, width = H, W
    if valid_sizes is not None:
        height, width = tl.load(valid_sizes + i_image * 2), tl.load(valid_sizes + i_image * 2 + 1)
        height = tl.minimum(tl.maximum(height.to(tl.int64), 0), H).to(tl.int32)
        width = tl.minimum(tl.maximum(width.to(tl.int64), 0), W).to(tl.int32)
    return height, width


@triton.jit
def weighted_sum(weights, values, accumulator, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute accumulator + weights @ values, with fp32 weights and values of any dtype.

    Beside half-precision values a weight is two terms of that dtype, so that only the values' rounding is felt.
    """
    if values.dtype == tl.float32:
        return tl.dot(weights, values, accumulator, input_precision=PRECISION)
    high = weights.to(values.dtype)
    low = (weights - high.to(tl.float32)).to(values.dtype)
    return tl.dot(low, values, tl.dot(high, values, accumulator))


def check_inputs(op: str, features: Tensor, boxes: Tensor, valid_sizes: Tensor | None, output_size: int) -> None:
    """Raise a readable ValueError when shapes, dtypes or devices do not fit together."""
    if not 1 <= output_size <= MAX_OUTPUT_SIZE:
        raise ValueError(f"{op}: output_size must be between 1 and {MAX_OUTPUT_SIZE}, got {output_size}")
    if features.dim() != 4 or features.dtype not in DTYPES:
        raise ValueError(f"{op}: features must be a floating [B, H, W, C] tensor, got {describe(features)}")
    batch = features.shape[0]
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4 or boxes.dtype not in DTYPES:
        raise ValueError(f"{op}: boxes must be a floating [{batch}, N, 4] tensor, got {describe(boxes)}")
    if valid_sizes is not None and (valid_sizes.shape != (batch, 2) or not is_integer(valid_sizes)):
        raise ValueError(f"{op}: valid_sizes must be an integer [{batch}, 2] tensor, got {describe(valid_sizes)}")
    check_devices(op, features, {"boxes": boxes, "valid_sizes": valid_sizes})


def compute_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype to compute in: fp32 for half precision, else the features' own."""
    return torch.promote_types(features.dtype, torch.float32)
