"""The published matcher and losses of SAM-DETR: layer by layer, image by image, with their waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from perf.baseline_model import to_corners
from samdetr.recipe import LossSection
from samdetr.structures import Outputs

LOG_EPSILON = 1e-8
Indices = list[tuple[Tensor, Tensor]]  # (queries, targets) of each image, on the host


class ImageTargets(NamedTuple):
    """Objects of one image as a published data set gives them: seven tensors, all of which are moved to the device."""

    labels: Tensor  # [n] int64
    boxes: Tensor  # [n, 4] (cx, cy, w, h) in [0, 1]
    image_id: Tensor  # [1]
    area: Tensor  # [n]
    iscrowd: Tensor  # [n]
    orig_size: Tensor  # [2]
    size: Tensor  # [2]

    def to(self, device: torch.device) -> ImageTargets:
        """Copy to the device, one copy a tensor, as published."""
        return ImageTargets(*(part.to(device) for part in self))


class BaselineCriterion(nn.Module):
    """Outputs of all layers and the images' targets -> the published dictionary of unweighted losses."""

    def __init__(self, section: LossSection) -> None:
        super().__init__()
        self.costs = (section.class_cost, section.l1_cost, section.giou_cost)
        self.alpha, self.gamma = section.focal_alpha, section.focal_gamma
        self.weights = {
            "loss_ce": section.class_weight,
            "loss_bbox": section.l1_weight,
            "loss_giou": section.giou_weight,
        }

    def forward(self, outputs: Outputs, targets: Sequence[ImageTargets]) -> dict[str, Tensor]:
        """Compute the final layer's losses, then the others' with their number in the name."""
        device = outputs.logits.device
        final = len(outputs.logits) - 1
        indices = self.match(outputs.logits[final], outputs.boxes[final], targets)
        boxes = torch.as_tensor([sum(len(target.labels) for target in targets)], dtype=torch.float, device=device)
        num_boxes = torch.clamp(boxes, min=1).item()
        losses = self.layer_losses(outputs.logits[final], outputs.boxes[final], targets, indices, num_boxes)
        losses["class_error"] = self.class_error(outputs.logits[final], targets, indices)
        for layer in range(final):
            logits, boxes = outputs.logits[layer], outputs.boxes[layer]
            indices = self.match(logits, boxes, targets)
            found = self.layer_losses(logits, boxes, targets, indices, num_boxes)
            losses.update({f"{name}_{layer}": value for name, value in found.items()})
        return losses

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weigh the losses that are differentiated; their sum is the loss."""
        return {
            name: value * self.weights[kind]
            for name, value in losses.items()
            if (kind := "_".join(name.split("_")[:2])) in self.weights
        }

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: Sequence[ImageTargets]) -> Indices:
        """Match queries to targets by scipy, image by image; the costs of the whole batch go to the host."""
        batch, queries = logits.shape[:2]
        probability = logits.flatten(0, 1).sigmoid()
        predicted = boxes.flatten(0, 1)
        labels = torch.cat([target.labels for target in targets])
        wanted = torch.cat([target.boxes for target in targets])
        negative = (1 - self.alpha) * (probability**self.gamma) * (-(1 - probability + LOG_EPSILON).log())
        positive = self.alpha * ((1 - probability) ** self.gamma) * (-(probability + LOG_EPSILON).log())
        class_cost = positive[:, labels] - negative[:, labels]
        l1_cost = torch.cdist(predicted, wanted, p=1)
        giou_cost = -generalized_iou(to_corners(predicted), to_corners(wanted))
        cost = self.costs[1] * l1_cost + self.costs[0] * class_cost + self.costs[2] * giou_cost
        cost = cost.view(batch, queries, -1).cpu()
        sizes = [len(target.boxes) for target in targets]
        solved = [linear_sum_assignment(part[image]) for image, part in enumerate(cost.split(sizes, -1))]
        return [(torch.as_tensor(row), torch.as_tensor(column)) for row, column in solved]

    def layer_losses(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[ImageTargets], indices: Indices, num_boxes: float
    ) -> dict[str, Tensor]:
        """Compute the three losses of a layer and its cardinality error."""
        losses = {"loss_ce": self.class_loss(logits, targets, indices, num_boxes)}
        losses["cardinality_error"] = self.cardinality_error(logits, targets)
        place = _places(indices)
        predicted = boxes[place]
        wanted = torch.cat([target.boxes[found] for target, (_, found) in zip(targets, indices, strict=True)])
        losses["loss_bbox"] = functional.l1_loss(predicted, wanted, reduction="none").sum() / num_boxes
        overlap = torch.diag(generalized_iou(to_corners(predicted), to_corners(wanted)))
        losses["loss_giou"] = (1 - overlap).sum() / num_boxes
        return losses

    def class_loss(self, logits: Tensor, targets: Sequence[ImageTargets], indices: Indices, num_boxes: float) -> Tensor:
        """Compute the sigmoid focal loss of all queries and classes, over the number of boxes."""
        batch, queries, classes = logits.shape
        found = _labels(targets, indices)
        labels = torch.full((batch, queries), classes, dtype=torch.int64, device=logits.device)
        labels[_places(indices)] = found
        one_hot = torch.zeros(batch, queries, classes + 1, dtype=logits.dtype, device=logits.device)
        one_hot.scatter_(2, labels.unsqueeze(-1), 1)
        one_hot = one_hot[:, :, :-1]
        probability = logits.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        right = probability * one_hot + (1 - probability) * (1 - one_hot)
        loss = entropy * ((1 - right) ** self.gamma)
        loss = (self.alpha * one_hot + (1 - self.alpha) * (1 - one_hot)) * loss
        return loss.mean(1).sum() / num_boxes * queries

    @torch.no_grad()
    def class_error(self, logits: Tensor, targets: Sequence[ImageTargets], indices: Indices) -> Tensor:
        """Compute the percentage of matched queries whose best logit is not the target's."""
        found = _labels(targets, indices)
        if not found.numel():
            return 100 - torch.zeros([], device=logits.device)
        best = logits[_places(indices)].topk(1, 1)[1].t()
        correct = best.eq(found.view(1, -1).expand_as(best))
        return 100 - correct[0].view(-1).float().sum(0) * (100.0 / len(found))

    @torch.no_grad()
    def cardinality_error(self, logits: Tensor, targets: Sequence[ImageTargets]) -> Tensor:
        """Compare the number of queries whose best logit is not the last with that of targets; only logged."""
        lengths = torch.as_tensor([len(target.labels) for target in targets], device=logits.device)
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(1)
        return functional.l1_loss(predicted.float(), lengths.float())


def _places(indices: Indices) -> tuple[Tensor, Tensor]:
    """Return image and query of every match of the batch, on the host."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(indices)])
    return images, torch.cat([queries for queries, _ in indices])


def _labels(targets: Sequence[ImageTargets], indices: Indices) -> Tensor:
    """Return the label of every match of the batch."""
    return torch.cat([target.labels[found] for target, (_, found) in zip(targets, indices, strict=True)])


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute GIoU of all pairs of (x0, y0, x1, y1) boxes, [N, 4] and [M, 4] -> [N, M]; asserts wait for it."""
    assert (first[:, 2:] >= first[:, :2]).all()
    assert (second[:, 2:] >= second[:, :2]).all()
    intersection, union = _overlap(first, second)
    low = torch.min(first[:, None, :2], second[:, :2])
    high = torch.max(first[:, None, 2:], second[:, 2:])
    sides = (high - low).clamp(min=0)
    hull = sides[:, :, 0] * sides[:, :, 1]
    return intersection / union - (hull - union) / hull


def _overlap(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    area_first, area_second = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second))
    low = torch.max(first[:, None, :2], second[:, :2])
    high = torch.min(first[:, None, 2:], second[:, 2:])
    sides = (high - low).clamp(min=0)
    intersection = sides[:, :, 0] * sides[:, :, 1]
    return intersection, area_first[:, None] + area_second - intersection
