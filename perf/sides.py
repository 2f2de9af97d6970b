"""The two sides of a comparison of training steps: ours, which is the engine's own step, and the published one.

What a recipe key changes about our step is built in `build_ours`, and nowhere else in perf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perf.baseline import (
    BaselineCriterion,
    BaselineSAMDETR,
    baseline_log,
    baseline_loss,
    baseline_step,
    baseline_update,
    build_baseline_optimizer,
    published_batch,
)
from samdetr.data.device import to_device
from samdetr.engine.compute.precision import EXACT, Compute
from samdetr.engine.optim import build_optimizer
from samdetr.engine.run.metrics import step_values
from samdetr.engine.start_up import prepare_step
from samdetr.engine.step import forward_backward, train_step, update
from samdetr.loss import SetCriterion, build_criterion
from samdetr.models import Detector, build_model
from samdetr.recipe import Recipe
from samdetr.structures import Batch, Targets

Mark = Callable[[str], None]  # called at the end of every phase with its name
STEP_VALUES = step_values(SetCriterion.logged)
PHASES = ("data", "forward", "criterion", "backward", "update", "log")


class Marked:
    """A module that marks the end of a phase when its call is done; all else is the module's own."""

    def __init__(self, module: nn.Module, mark: Mark, phase: str) -> None:
        self.module, self.mark, self.phase = module, mark, phase

    def __call__(self, *arguments: Any) -> Any:
        found = self.module(*arguments)
        self.mark(self.phase)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Side(NamedTuple):
    """One way to take a step. ``turn`` (0, 1, 2, ...) says which of the batches it takes."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[int], object]
    values: Callable[[int], dict[str, float]]  # a step, and what `STEP_VALUES` names, read back
    phases: Callable[[int, Mark], None]  # a step in parts
    recorded: bool = False  # whether CUDA graphs hold its gradients

    def state_bytes(self) -> int:
        """Sum parameters, buffers and the optimizer's state (after its first step); no gradients."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *(x for x in moments if isinstance(x, Tensor))]
        return sum(tensor.nbytes for tensor in tensors)


def build_ours(
    recipe: Recipe,
    model: Detector,
    batches: Sequence[Batch],
    device: torch.device,
    *,
    compute: Compute = EXACT,
    note: Callable[[str], None] = print,
) -> Side:
    """Build the engine's `train_step` on a model that is on the device, with batches as the prefetcher gives them.

    compute: what `prepare_step` compiles and records; the batches have one shape. ``note`` hears what it says.
    """
    criterion, optimizer = build_criterion(recipe), build_optimizer(model, recipe.optim)
    batches = [batch.pin_memory() if device.type == "cuda" else batch for batch in batches]
    clip_norm, precision = recipe.optim.clip_norm, compute.precision
    count, _, height, width = batches[0].images.shape
    graphs = prepare_step(
        model,
        model,
        criterion,
        optimizer,
        compute=compute,
        on_failure="error",
        clip_norm=clip_norm,
        bucket_shapes=[(height, width)],
        micro_batch=count,
        max_objects=batches[0].targets.labels.shape[1],
        device=device,
        started=lambda what: None,
        note=note,
    )

    def step(turn: int) -> Tensor:
        batch = [to_device(batches[turn % len(batches)], device)]
        return train_step(
            model, criterion, optimizer, batch, device=device, clip_norm=clip_norm, precision=precision, graphs=graphs
        )

    def values(turn: int) -> dict[str, float]:
        return dict(zip(step_values(criterion.logged), step(turn).tolist(), strict=True))

    def phases(turn: int, mark: Mark) -> None:
        optimizer.zero_grad(set_to_none=graphs is None)
        moved = to_device(batches[turn % len(batches)], device)
        mark("data")
        parts = Marked(model, mark, "forward"), Marked(criterion, mark, "criterion")
        loss = forward_backward(*parts, moved, moved.targets.counts.sum(), precision=precision)[0]
        mark("backward")
        update(optimizer, clip_norm, loss)
        mark("update")

    return Side("ours", model, optimizer, step, values, phases, recorded=graphs is not None)


def build_baseline(recipe: Recipe, model: Detector, batches: Sequence[Batch], device: torch.device) -> Side:
    """Build the published step with our model's weights. Raises RecipeError where nothing like it was published."""
    baseline = BaselineSAMDETR(recipe.model)
    baseline.load_from(model)
    baseline.to(device).train()
    criterion, optimizer = BaselineCriterion(recipe.loss), build_baseline_optimizer(baseline, recipe.optim)
    published = [published_batch(batch) for batch in batches]
    clip_norm = recipe.optim.clip_norm

    def step(turn: int) -> dict[str, float]:
        batch = published[turn % len(published)]
        return baseline_step(baseline, criterion, optimizer, batch, device=device, clip_norm=clip_norm)

    def values(turn: int) -> dict[str, float]:
        logged = step(turn)
        whole = ("loss", "grad_norm")
        return {name: logged[name if name in whole else f"{name}_unscaled"] for name in STEP_VALUES}

    def phases(turn: int, mark: Mark) -> None:
        moved = published[turn % len(published)].to(device)
        mark("data")
        outputs = baseline(moved.images, moved.mask)
        mark("forward")
        loss = baseline_loss(criterion, outputs, moved.targets)
        mark("criterion")
        optimizer.zero_grad()
        loss.total.backward()
        mark("backward")
        grad_norm = baseline_update(optimizer, clip_norm)
        mark("update")
        baseline_log(loss, grad_norm)
        mark("log")

    return Side("baseline", baseline, optimizer, step, values, phases)


def build_model_on(recipe: Recipe, device: torch.device) -> Detector:
    """Build the recipe's model with random weights of a fixed seed, in training mode."""
    torch.manual_seed(recipe.run.seed)
    return build_model(recipe.model).to(device).train()


def first_images(batch: Batch, count: int) -> Batch:
    """Return the first images of a batch."""
    targets = Targets(*(part[:count] for part in batch.targets))
    return Batch(
        batch.images[:count], batch.image_sizes[:count], targets, batch.image_ids[:count], batch.original_sizes[:count]
    )
