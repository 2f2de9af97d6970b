"""Box arithmetic on tensors of any leading shape."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert (cx, cy, w, h) to (x0, y0, x1, y1): [..., 4] -> [..., 4]."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - 0.5 * size, centre + 0.5 * size), dim=-1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the generalised IoU in [-1, 1] (Rezatofighi et al., CVPR 2019) of (x0, y0, x1, y1) boxes.

    [..., 4] and [..., 4], broadcast against each other -> [...]. Boxes of positive area are expected; two boxes
    that are the same point give NaN.
    """
    area_first, area_second = (_area(boxes[..., 2:] - boxes[..., :2]) for boxes in (first, second))
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = _area(overlap.clamp(min=0))
    union = area_first + area_second - intersection
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull_area = _area(hull.clamp(min=0))
    return intersection / union - (hull_area - union) / hull_area


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]  # the backward of prod counts zeros, and waits for their number
