"""Bipartite matching between queries and targets, for all decoder layers at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samdetr.loss.boxes import cxcywh_to_xyxy, generalized_iou
from samdetr.structures import Outputs, Targets
from samdetr_kernels import linear_assignment

UNMATCHED = -1
LOG_EPSILON = 1e-8


def focal_cost(logits: Tensor, labels: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss of the target's class as a positive minus as a negative (Deformable-DETR): [L, B, Q, T].

    logits [L, B, Q, K], labels [L, B, Q, T].
    """
    probability = logits.float().gather(-1, labels).sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + LOG_EPSILON).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + LOG_EPSILON).log()
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of the target's class (DETR): shapes as of `focal_cost`."""
    return -logits.float().softmax(-1).gather(-1, labels)


@torch.no_grad()
def matching_cost(
    outputs: Outputs,
    targets: Targets,
    class_term: Callable[[Tensor, Tensor], Tensor],
    *,
    class_cost: float,
    l1_cost: float,
    giou_cost: float,
) -> Tensor:
    """Cost of giving target t to query q: [L, B, Q, T] float32. Columns at or beyond ``counts`` mean nothing.

    class_term: logits [L, B, Q, K] and labels [L, B, Q, T] -> the class cost before its weight.
    """
    labels = targets.labels[None, :, None].expand(*outputs.logits.shape[:3], -1)
    predicted, wanted = outputs.boxes.float()[..., None, :], targets.boxes[None, :, None]
    distance = (predicted - wanted).abs().sum(-1)
    overlap = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return class_cost * class_term(outputs.logits, labels) + l1_cost * distance - giou_cost * overlap


def match(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of every layer and image, without leaving the device.

    cost [L, B, Q, T], counts [B] targets of each image. Returns the query of each target, [L, B, T] int64, -1 beyond
    ``counts`` and for targets that more queries than Q would be needed for; and whether a cost is NaN or infinite,
    [L, B] bool: that image has no match in that layer.
    """
    layers, batch, _, padded = cost.shape
    indices, bad = linear_assignment(cost.flatten(0, 1), counts.repeat(layers))
    return indices.view(layers, batch, padded), bad.view(layers, batch)
