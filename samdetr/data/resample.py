"""The training augmentation's pixels, computed on the device for a whole batch: two batched matrix products.

Flip, resize, crop and resize are linear in the rows and in the columns of an image, so each image needs one matrix for
its rows and one for its columns. Rows and columns of the matrices beyond the image are zero: the result comes padded.
Antialiased bilinear weights are those of torchvision's resize; only the 8-bit rounding between its passes is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samdetr.data.transforms import Plan, resized_sides
from samdetr.structures import Resample


def geometry_of(plan: Plan, height: int, width: int) -> tuple[int, ...]:
    """What `resample` needs to know of one image of these sides: flip, then five numbers a direction."""
    first_height, first_width = resized_sides(height, width, plan.first, None) if plan.first else (height, width)
    top, left, region_height, region_width = plan.region
    rows = (height, first_height, top, region_height, plan.shape[0])
    return (int(plan.flip), *rows, width, first_width, left, region_width, plan.shape[1])


def collect(geometries: Sequence[tuple[int, ...]], shape: tuple[int, int]) -> Resample:
    """Of a batch that becomes ``shape``: the bounds that the device must not be asked for."""
    rows, columns = (max(geometry[at] for geometry in geometries) for at in (4, 9))
    return Resample(*shape, rows, columns)


def resample(images: Tensor, geometry: Tensor, todo: Resample, dtype: torch.dtype) -> Tensor:
    """uint8 [B, 3, h, w] photos, zero-padded -> float32 [B, 3, H, W], whole levels 0 to 255, zero-padded.

    geometry: [B, 11] int64, rows of `geometry_of`.
    dtype: of the products, which add up in float32; float16 costs less than a tenth of a
        level on average, at most one.
    """
    flip, *sides = geometry.unbind(dim=1)
    no_flip = torch.zeros_like(flip)
    rows = _matrix(no_flip, sides[:5], todo.height, todo.rows, images.shape[2])
    columns = _matrix(flip, sides[5:], todo.width, todo.columns, images.shape[3])
    left = rows.to(dtype)[:, None] @ images.to(dtype)
    return (left @ columns.to(dtype)[:, None].mT).float().round_().clamp_(0, 255)


def _matrix(flip: Tensor, sides: Sequence[Tensor], outputs: int, region: int, inputs: int) -> Tensor:
    """[B, outputs, inputs] float32: what one direction of the result takes from that of the photo."""
    source, first, start, length, final = (side[:, None] for side in sides)  # [B, 1] each
    places = torch.arange(max(outputs, region, inputs), device=flip.device)[None]
    photo = places[:, :inputs]
    photo = torch.where(flip[:, None] > 0, source - 1 - photo, photo)
    within = places[:, :region].expand(len(flip), -1)
    to_region = _triangles(source, first, within + start, photo)
    to_result = _triangles(length, final, places[:, :outputs], within)
    to_result = to_result * (places[:, :outputs] < final)[:, :, None]
    return to_result @ to_region


def _triangles(size: Tensor, resized: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Antialiased bilinear weights [B, n, m] of places ``inputs`` [B, m] in [0, size) for ``outputs`` [B, n]."""
    scale = (size / resized)[:, :, None]
    distance = inputs[:, None] + 0.5 - scale * (outputs[:, :, None] + 0.5)
    weights = (1 - distance.abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((inputs >= 0) & (inputs < size))[:, None]
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)
