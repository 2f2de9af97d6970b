"""The published training step of SAM-DETR: what "times faster" refers to. Neither slowed down nor sped up.

fp32, NCHW, eager; the model is `perf.baseline_model`, the losses `perf.baseline_criterion`. AdamW and the clipping of
gradients run tensor by tensor, as in torch 1.8; gradients are reset to None, which is faster than the published zeros.
The published StepLR acts once an epoch, outside of a step.

    python perf/baseline.py [--batch 4] [--side 128]     # counts the step's launching ops beside the published ones
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perf.baseline_criterion import BaselineCriterion, ImageTargets
from perf.baseline_model import BaselineSAMDETR
from perf.counting import OpCounter
from perf.inputs import training_batch
from samdetr.errors import NonFiniteError
from samdetr.models import build_model
from samdetr.recipe import OptimSection, Recipe, load_recipe
from samdetr.structures import Batch, Outputs

__all__ = ["BaselineCriterion", "BaselineSAMDETR", "PublishedBatch", "baseline_step", "published_batch"]

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# kernel-launching ops of the published code at R50, batch 4 (forward, criterion, backward), and of all three with SMCA
PUBLISHED_OPS = {"forward": 1852, "criterion": 1132, "backward": 2071}
PUBLISHED_SMCA_OPS = 5440


class PublishedBatch(NamedTuple):
    """Batch of the published collate function: on the host, neither pinned nor packed."""

    images: Tensor  # [B, 3, H, W]
    mask: Tensor  # [B, H, W] bool, True: padding
    targets: tuple[ImageTargets, ...]

    def to(self, device: torch.device) -> PublishedBatch:
        """Copy the batch to the device, tensor by tensor."""
        targets = tuple(target.to(device) for target in self.targets)
        return PublishedBatch(self.images.to(device), self.mask.to(device), targets)


def published_batch(batch: Batch) -> PublishedBatch:
    """Bring a batch into the published form. The area, which the losses do not read, is made up."""
    mask = torch.ones(len(batch.images), *batch.images.shape[2:], dtype=torch.bool)
    targets = []
    for row, (height, width) in enumerate(batch.image_sizes.tolist()):
        mask[row, :height, :width] = False
        count = int(batch.targets.counts[row])
        boxes = batch.targets.boxes[row, :count].clone()
        targets.append(
            ImageTargets(
                labels=batch.targets.labels[row, :count].clone(),
                boxes=boxes,
                image_id=batch.image_ids[row : row + 1].clone(),
                area=boxes[:, 2:].prod(-1),
                iscrowd=torch.zeros(count, dtype=torch.int64),
                orig_size=batch.original_sizes[row].clone(),
                size=batch.image_sizes[row].clone(),
            )
        )
    return PublishedBatch(batch.images, mask, tuple(targets))


def build_baseline_optimizer(model: BaselineSAMDETR, section: OptimSection) -> torch.optim.AdamW:
    """Build AdamW over the published two groups, tensor by tensor."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = [parameter for name, parameter in trained.items() if name.startswith("backbone.")]
    rest = [parameter for name, parameter in trained.items() if not name.startswith("backbone.")]
    return torch.optim.AdamW(
        [{"params": rest, "lr": section.lr}, {"params": backbone, "lr": section.backbone_lr}],
        lr=section.lr,
        weight_decay=section.weight_decay,
        foreach=False,
        fused=False,
    )


class BaselineLoss(NamedTuple):
    """The loss that is differentiated, and the values that the step logs."""

    total: Tensor
    scaled: dict[str, Tensor]
    unscaled: dict[str, Tensor]
    value: float


def baseline_loss(criterion: BaselineCriterion, outputs: Outputs, targets: Sequence[ImageTargets]) -> BaselineLoss:
    """Compute losses and their weighted sum, and both again for the log, whose sum is read back before backward."""
    losses = criterion(outputs, targets)
    total = sum(criterion.weighted(losses).values(), start=torch.zeros_like(losses["loss_ce"]))
    unscaled = {f"{name}_unscaled": value.detach() for name, value in losses.items()}
    scaled = {name: value.detach() for name, value in criterion.weighted(losses).items()}
    value = sum(scaled.values(), start=torch.zeros_like(total)).item()
    if not math.isfinite(value):
        raise NonFiniteError("the baseline's loss is not finite")
    return BaselineLoss(total, scaled, unscaled, value)


def baseline_update(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Clip and update, tensor by tensor; returns the norm of the gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm else float("inf"), foreach=False)
    optimizer.step()
    return grad_norm


def baseline_log(loss: BaselineLoss, grad_norm: Tensor) -> dict[str, float]:
    """Read back every value, one by one, as the published meters do."""
    values = {"grad_norm": grad_norm, **loss.scaled, **loss.unscaled}
    return {"loss": loss.value, **{name: value.item() for name, value in values.items()}}


def baseline_step(
    model: BaselineSAMDETR,
    criterion: BaselineCriterion,
    optimizer: torch.optim.Optimizer,
    batch: PublishedBatch,
    *,
    device: torch.device,
    clip_norm: float,
) -> dict[str, float]:
    """Take a published optimizer step with a batch on the host; returns the values that it logs."""
    moved = batch.to(device)
    loss = baseline_loss(criterion, model(moved.images, moved.mask), moved.targets)
    optimizer.zero_grad()
    loss.total.backward()
    grad_norm = baseline_update(optimizer, clip_norm)
    return baseline_log(loss, grad_norm)


def count_step(recipe: Recipe, *, batch: int, height: int, width: int) -> dict[str, OpCounter]:
    """Count the ops of forward pass, losses and backward pass of the recipe's model; they depend on no size."""
    model, criterion = BaselineSAMDETR(recipe.model), BaselineCriterion(recipe.loss)
    model.load_from(build_model(recipe.model))
    model.train()
    inputs = published_batch(training_batch(batch, height, width, classes=recipe.model.num_classes))
    with OpCounter() as forward:
        outputs = model(inputs.images, inputs.mask)
    with OpCounter() as losses:
        loss = baseline_loss(criterion, outputs, inputs.targets)
    with OpCounter() as backward:
        loss.total.backward()
    return {"forward": forward, "criterion": losses, "backward": backward}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts of the two systems."""
    parser = argparse.ArgumentParser(description="Launching ops of the published step, beside the published counts.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="pixels; changes no count")
    options = parser.parse_args(argv)
    print(f"{'R50, batch ' + str(options.batch):<24}{'here':>8}{'published':>12}{'views':>8}")
    for name in ("r50_12ep", "r50_smca_12ep"):
        recipe = load_recipe(RECIPES / f"{name}.toml")
        counts = count_step(recipe, batch=options.batch, height=options.side, width=options.side)
        published: dict[str, int] = {} if recipe.model.smca else PUBLISHED_OPS
        for part, counter in counts.items():
            ops, views = counter.launches.total(), counter.views
            print(f"{name + ' ' + part:<24}{ops:>8}{published.get(part, '-'):>12}{views:>8}")
        total = PUBLISHED_SMCA_OPS if recipe.model.smca else sum(published.values())
        print(f"{name:<24}{sum(counter.launches.total() for counter in counts.values()):>8}{total:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
