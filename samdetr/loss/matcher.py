"""Bipartite matching between queries and targets, for all decoder layers at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samdetr.loss.boxes import cxcywh_to_xyxy, generalized_iou
from samdetr.structures import Outputs, Targets
from samdetr_kernels import linear_assignment

UNMATCHED = -1
MAX_QUERIES = 4096  # of one assignment; of more (proposals of a first stage) the cheapest are taken
LOG_EPSILON = 1e-8


def focal_cost(logits: Tensor, labels: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Compute the focal loss of the target's class as a positive minus that as a negative: [L, B, Q, T].

    logits [L, B, Q, K], labels [L, B, Q, T]. The class cost of Deformable-DETR.
    """
    probability = logits.float().gather(-1, labels).sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + LOG_EPSILON).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + LOG_EPSILON).log()
    return positive - negative


def softmax_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute minus the probability of the target's class (DETR); shapes as of `focal_cost`."""
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
    """Compute the cost of giving target t to query q: [L, B, Q, T] float32; columns from ``counts`` on mean nothing.

    class_term: logits [L, B, Q, K] and labels [L, B, Q, T] -> the class cost before its weight.
    """
    labels = targets.labels[None, :, None].expand(*outputs.logits.shape[:3], -1)
    predicted, wanted = outputs.boxes.float()[..., None, :], targets.boxes[None, :, None]
    distance = (predicted - wanted).abs().sum(-1)
    overlap = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
    return class_cost * class_term(outputs.logits, labels) + l1_cost * distance - giou_cost * overlap


def match(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Find the cheapest one-to-one assignment of every layer and image, without leaving the device.

    cost [L, B, Q, T], counts [B] targets of each image. Returns the query of each target, [L, B, T] int64, which is -1
    beyond ``counts`` and for the targets left over where there are more than Q; and whether a cost is NaN or infinite,
    [L, B] bool: that image has no match in that layer.
    """
    layers, batch, queries, padded = cost.shape
    cost, counts = cost.flatten(0, 1), counts.repeat(layers)
    if queries <= MAX_QUERIES:
        indices, bad = linear_assignment(cost, counts)
    else:
        among, not_finite = candidates(cost, counts)
        indices, bad = linear_assignment(cost.gather(1, among[..., None].expand(-1, -1, padded)), counts)
        indices = torch.where(indices == UNMATCHED, UNMATCHED, among.gather(1, indices.clamp(min=0)))
        bad = bad | not_finite
    return indices.view(layers, batch, padded), bad.view(layers, batch)


def candidates(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the MAX_QUERIES queries that an assignment may need, ascending; and find costs that are not finite.

    cost [P, Q, T], counts [P] -> [P, MAX_QUERIES] int64 and [P] bool. A target among n needs no query beyond its n
    cheapest, since the others take n - 1 of these at most. All n lists fit up to 64 targets, and for more if they share
    queries; else the lists are cut, but not within their first MAX_QUERIES / n places.
    """
    problems, queries, padded = cost.shape
    present = torch.arange(padded, device=cost.device) < counts[:, None]
    not_finite = (~cost.isfinite() & present[:, None]).flatten(1).any(1)
    lists = cost.topk(min(padded, queries), dim=1, largest=False).indices  # [P, place, T]
    place = torch.arange(lists.shape[1], device=cost.device)[:, None]
    place = torch.where(present[:, None], place, queries).flatten(1)  # what is padding comes last
    best = torch.full((problems, queries), queries, dtype=place.dtype, device=cost.device)
    best = best.scatter_reduce(1, lists.flatten(1), place, "amin")
    return best.topk(MAX_QUERIES, dim=1, largest=False).indices.sort(dim=1).values, not_finite
