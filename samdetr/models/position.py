"""Sine position embeddings of map cells, points and boxes, and the number of valid cells of each image.

The constants are DETR's: half of the channels for y, then half for x, alternating sine and cosine, temperature
10000. They are evaluated in float32 and in one fixed order, because at padded cells SAM-DETR's normalisation divides
by about 1e-6 and its result depends on every rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURE = 10000.0
EPSILON = 1e-6


class MapGeometry(NamedTuple):
    """Where an image lies in its feature map."""

    valid: Tensor  # [B, 2] int64, valid (h, w) in cells
    mask: Tensor  # [B, H, W] bool, True within the valid cells
    sampling_limit: Tensor | None  # [B, 2] int64 if sampling stops at the valid cells, None if it sees padding


def valid_cells(image_sizes: Tensor, image_shape: tuple[int, int], map_shape: tuple[int, int]) -> Tensor:
    """Count valid (height, width) in cells as the published code does: by the mask of the pixels at the cell's index.

    image_sizes: [B, 2] int (h, w) of the valid pixels in padded images of ``image_shape``. Returns [B, 2] int64.
    """
    counts = []
    for axis in range(2):
        scale = image_shape[axis] / map_shape[axis]
        cell = torch.arange(map_shape[axis], device=image_sizes.device, dtype=torch.float32)
        counts.append((torch.floor(cell * scale) < image_sizes[:, axis, None]).sum(-1))
    return torch.stack(counts, dim=-1)


def covered_cells(image_sizes: Tensor, stride: int) -> Tensor:
    """Count valid (height, width) in cells whatever the padding: ceil(size / stride). [B, 2] int -> [B, 2] int64."""
    return (image_sizes + stride - 1) // stride


def valid_mask(valid: Tensor, height: int, width: int) -> Tensor:
    """Make the mask of [B, 2] valid (h, w): [B, height, width] bool, True within the valid cells."""
    rows = torch.arange(height, device=valid.device) < valid[:, :1]
    columns = torch.arange(width, device=valid.device) < valid[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def sine_map(
    valid: Tensor, height: int, width: int, channels: int, *, offset: float = 0.5, temperature: float = TEMPERATURE
) -> Tensor:
    """Compute the position embedding of every map cell.

    valid: [B, 2] int (h, w) of the valid cells. Returns [B, height, width, channels] float32. Along an axis the
    coordinate is ``(i - o) / (n - o + 1e-6 + o) * 2 pi`` with i the valid cells counted up to and including this one,
    n all valid cells of its row or column and o the offset (SAM-DETR 0.5, DETR 0); at padded cells both counts may be
    zero.
    """
    mask = valid_mask(valid, height, width).to(torch.float32)
    down, across = (
        torch.minimum(torch.arange(1, size + 1, device=valid.device), valid[:, axis, None]).to(torch.float32)
        for axis, size in ((0, height), (1, width))
    )
    column_exists, row_exists = mask[:, :1, :], mask[:, :, :1]
    embeddings = []
    for count, last in (
        (down[:, :, None] * column_exists, down[:, -1:, None] * column_exists),
        (across[:, None, :] * row_exists, across[:, None, -1:] * row_exists),
    ):
        coordinate = (count - offset) / ((last - offset) + EPSILON + offset) * (2 * math.pi)
        embeddings.append(_waves(coordinate, channels // 2, temperature))
    return torch.cat(embeddings, dim=-1)


def sine_points(points: Tensor, channels: int) -> Tensor:
    """Compute the position embedding of points (x, y) in [0, 1]: [..., 2] -> [..., channels] float32, y first."""
    x, y = (points.to(torch.float32) * (2 * math.pi)).unbind(-1)
    return torch.cat((_waves(y, channels // 2), _waves(x, channels // 2)), dim=-1)


def sine_boxes(boxes: Tensor, channels: int) -> Tensor:
    """Compute the embedding of boxes (cx, cy, w, h) in [0, 1]: [..., 4] -> [..., channels] float32, a quarter for each
    number."""
    return _waves(boxes.to(torch.float32) * (2 * math.pi), channels // 4).flatten(-2)


def _waves(coordinate: Tensor, channels: int, temperature: float = TEMPERATURE) -> Tensor:
    """Compute sine and cosine in turns, of falling frequency: [...] -> [..., channels]."""
    index = torch.arange(channels, device=coordinate.device, dtype=torch.float32)
    period = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)
    angle = coordinate[..., None] / period
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)
