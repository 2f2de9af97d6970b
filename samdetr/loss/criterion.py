"""The set-prediction loss of the DETR family (classification, L1 and generalised IoU on every decoder layer), and the
sum of Faster R-CNN's losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.loss.boxes import cxcywh_to_xyxy, generalized_iou
from samdetr.loss.matcher import UNMATCHED, focal_cost, match, matching_cost, softmax_cost
from samdetr.structures import Losses, Outputs, RegionLosses, Targets

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


class SetCriterion(nn.Module):
    """The sum over all layers of class, L1 and generalised IoU loss, each layer matched on its own (DETR).

    Weights and costs are those of the recipe's loss section. classification: "focal", a sigmoid for each class with
    alpha and gamma (Lin et al., ICCV 2017), or "softmax" over the classes and the last logit, no object, of weight
    no_object_weight (DETR). step_images: images of an optimizer step, over all its micro-batches and devices.
    """

    logged = ("loss_ce", "loss_bbox", "loss_giou")  # terms of the log; a step's are the sums of its micro-batches

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_cost: float = 2.0,
        l1_cost: float = 5.0,
        giou_cost: float = 2.0,
        classification: Literal["focal", "softmax"] = "focal",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        no_object_weight: float = 0.1,
        step_images: int = 1,
    ) -> None:
        super().__init__()
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.class_cost, self.l1_cost, self.giou_cost = class_cost, l1_cost, giou_cost
        self.classification, self.no_object_weight, self.step_images = classification, no_object_weight, step_images
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma

    def model_targets(self, targets: Targets) -> tuple[Targets, ...]:
        """Return what the model takes in training after images and sizes: nothing."""
        return ()

    def forward(self, outputs: Outputs, targets: Targets, num_boxes: Tensor | None = None) -> Losses:
        """Match the predictions and compute the losses.

        num_boxes: scalar that the sums are divided by (at least 1); default: the boxes of these targets. An optimizer
        step over several micro-batches or devices passes the boxes of all of them. The softmax loss is divided by the
        weights of all queries instead, those of ``step_images`` images where num_boxes is given.
        Proposals of a first stage are matched and weighed as one more layer, in which every target has the label 0.
        The total is NaN when a matching cost is NaN or infinite: the caller reads it, nothing here waits for it.
        """
        losses = self.layer_losses(outputs, targets, num_boxes)
        if outputs.proposals is None:
            return losses
        first_stage = Outputs(outputs.proposals.logits[None], outputs.proposals.boxes[None])
        object_or_not = targets._replace(labels=torch.zeros_like(targets.labels))
        total, terms = self.layer_losses(first_stage, object_or_not, num_boxes)
        terms = {f"{name}_enc": value for name, value in terms.items() if name != "class_error"}
        return Losses(losses.total + total, losses.terms | terms)

    def layer_losses(self, outputs: Outputs, targets: Targets, num_boxes: Tensor | None) -> Losses:
        """Compute the losses of the decoder layers in ``outputs``, without its proposals."""
        indices, bad = self.match(outputs, targets)
        boxes = targets.counts.sum() if num_boxes is None else num_boxes
        boxes = boxes.to(outputs.boxes.dtype)
        count = boxes.clamp(min=1)
        if self.classification == "softmax":
            images = len(targets.counts) if num_boxes is None else self.step_images
            queries = images * outputs.logits.shape[2]
            weights = boxes + self.no_object_weight * (queries - boxes)
            class_loss = self.softmax_loss(outputs.logits, targets.labels, indices) / weights
        else:
            class_loss = self.focal_loss(outputs.logits, targets.labels, indices) / count
        l1_loss, giou_loss = (loss / count for loss in self.box_losses(outputs.boxes, targets.boxes, indices))
        total = (self.class_weight * class_loss + self.l1_weight * l1_loss + self.giou_weight * giou_loss).sum()
        total = total.masked_fill(bad.any(), math.nan)
        with torch.no_grad():
            class_error = self.class_error(outputs.logits[-1], targets.labels, indices[-1])
            cardinality = self.cardinality_error(outputs.logits, targets.counts)
        terms = {"class_error": class_error}
        for name, values in (
            ("loss_ce", class_loss),
            ("loss_bbox", l1_loss),
            ("loss_giou", giou_loss),
            ("cardinality_error", cardinality),
        ):
            *auxiliary, final = values.detach().unbind()
            terms[name] = final
            terms.update({f"{name}_{layer}": value for layer, value in enumerate(auxiliary)})
        return Losses(total, terms)

    def match(self, outputs: Outputs, targets: Targets) -> tuple[Tensor, Tensor]:
        """Return each target's query, [L, B, T] int64, -1 for none; and where a cost is not finite, [L, B] bool."""
        class_term: Callable[[Tensor, Tensor], Tensor] = softmax_cost
        if self.classification == "focal":
            class_term = partial(focal_cost, alpha=self.focal_alpha, gamma=self.focal_gamma)
        weights = {"class_cost": self.class_cost, "l1_cost": self.l1_cost, "giou_cost": self.giou_cost}
        return match(matching_cost(outputs, targets, class_term, **weights), targets.counts)

    def softmax_loss(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Compute the weighted cross-entropy summed over images and queries: [L]."""
        layers, batch, queries, classes = logits.shape
        # one more column takes the labels of targets without a query
        target = labels.new_full((layers, batch, queries + 1), classes - 1)
        column = torch.where(indices == UNMATCHED, queries, indices)
        target = target.scatter(2, column, labels.expand(layers, -1, -1))[..., :-1]
        log_probability = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        weight = 1 - (1 - self.no_object_weight) * (target == classes - 1).to(logits.dtype)
        return -(weight * log_probability).sum((1, 2))

    def focal_loss(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Compute the sigmoid focal loss summed over images, queries and classes: [L]."""
        layers, batch, queries, classes = logits.shape
        matched = (indices != UNMATCHED).to(logits.dtype)
        flat_index = indices.clamp(min=0) * classes + labels
        target = logits.new_zeros(layers, batch, queries * classes).scatter_add(2, flat_index, matched)
        target = target.view(logits.shape)
        cross_entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        probability = logits.sigmoid()
        wrong = probability + target - 2 * probability * target  # 1 - p_t
        alpha = 1 - self.focal_alpha + (2 * self.focal_alpha - 1) * target
        return (alpha * wrong**self.focal_gamma * cross_entropy).sum((1, 2, 3))

    def box_losses(self, boxes: Tensor, wanted: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Compute L1 and 1 - generalised IoU of matched pairs, summed over images and targets: [L] each."""
        predicted = boxes.gather(2, indices.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
        matched = indices != UNMATCHED
        # a padded pair is compared with itself as a unit box, so that no gradient of it is NaN
        unit = torch.cat((torch.full_like(predicted[..., :2], 0.5), torch.ones_like(predicted[..., 2:])), dim=-1)
        predicted = torch.where(matched[..., None], predicted, unit)
        wanted = torch.where(matched[..., None], wanted[None].to(boxes.dtype), unit)
        l1 = (predicted - wanted).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return l1.sum((1, 2)), (1 - giou).sum((1, 2))

    @staticmethod
    def class_error(logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Compute the percentage of matched queries [B, T] whose best logit of [B, Q, K] is not the target's."""
        matched = indices != UNMATCHED
        best = logits.argmax(-1).gather(1, indices.clamp(min=0))
        correct = ((best == labels) & matched).sum()
        return 100 - 100 * correct / matched.sum().clamp(min=1)

    @staticmethod
    def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
        """Compute |queries whose best logit is not the last - targets|, mean over images (published log): [L]."""
        predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
        return (predicted - counts).abs().float().mean(-1)


class RegionCriterion(nn.Module):
    """The sum of the four losses that Faster R-CNN's forward pass gives, each of weight 1.

    They are torchvision's: means over the samples drawn of a micro-batch. An optimizer step has their mean over its
    images. Unlike `SetCriterion`'s, its loss depends on how the step is split into micro-batches.
    step_images: images of an optimizer step, over all its micro-batches and devices.
    """

    logged = RegionLosses._fields[:-1]

    def __init__(self, *, step_images: int = 1) -> None:
        super().__init__()
        self.step_images = step_images

    def model_targets(self, targets: Targets) -> tuple[Targets, ...]:
        """Return what the model takes in training after images and sizes: the targets."""
        return (targets,)

    def forward(self, outputs: RegionLosses, targets: Targets, num_boxes: Tensor | None = None) -> Losses:
        """Sum the losses. num_boxes: None where these images are the whole step; its value is not used."""
        share = 1.0 if num_boxes is None else len(targets.counts) / self.step_images
        losses = [share * loss for loss in outputs[:-1]]
        terms = dict(zip(self.logged, (loss.detach() for loss in losses), strict=True))
        return Losses(torch.stack(losses).sum(), {**terms, "class_error": outputs.class_error})


Criterion = SetCriterion | RegionCriterion


def build_criterion(recipe: Recipe) -> Criterion:
    """Build the criterion of a recipe's system and loss section."""
    if not recipe.model.matches_queries:
        return RegionCriterion(step_images=recipe.train.total_batch)
    section = recipe.loss
    return SetCriterion(
        class_weight=section.class_weight,
        l1_weight=section.l1_weight,
        giou_weight=section.giou_weight,
        class_cost=section.class_cost,
        l1_cost=section.l1_cost,
        giou_cost=section.giou_cost,
        classification=section.classification,
        focal_alpha=section.focal_alpha,
        focal_gamma=section.focal_gamma,
        no_object_weight=section.no_object_weight,
        step_images=recipe.train.total_batch,
    )
