"""Steps whose loss or gradient is not finite: the run skips and counts them, or stops with a file to replay.

Such a step changes nothing: the optimizer sees to that on the device (`optim.NonFiniteGuard`). The host learns of it
here, on a GPU some steps later. After a skipped step the step's number, and with it learning rate and order of images,
advance, as does the warm-up of the averages, which themselves stay; AdamW's own count of updates does not.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from samdetr.engine.checkpoint.format import model_tensors
from samdetr.engine.distributed.parallel import full_tensor
from samdetr.engine.distributed.world import World
from samdetr.engine.failures.replay import write_replay
from samdetr.engine.run.folder import has_checkpoint, resume_command
from samdetr.engine.run.log import RunLog
from samdetr.engine.run.metrics import AsyncMetrics, Meter, Step
from samdetr.engine.state import TrainState
from samdetr.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


@dataclass
class StepReports:
    """Counts steps as their values arrive on the host, up to one that is not finite and may not be skipped."""

    state: TrainState
    recipe: Recipe
    folder: Path
    world: World
    log: RunLog
    image_ids: Callable[[int, int], list[int]]  # of all processes, by epoch and step in it
    facts: Mapping[str, object]  # as every checkpoint has them
    metrics: AsyncMetrics = field(default_factory=AsyncMetrics)
    failed_step: tuple[Step, list[float]] | None = None  # the step that ends the run, and its values

    @property
    def failed(self) -> bool:
        """Whether a step is known that ends the run; `finish` then raises."""
        return self.failed_step is not None

    def add(self, step: Step, values: Tensor) -> None:
        """Take the values of the step just launched, and count those that have arrived. Does not wait.

        values: [V] on the device, in the order of `metrics.step_values`.
        """
        self.metrics.add(step, values)
        if values.device.type == "cpu" or step.number % self.recipe.train.log_every == 0:
            self.metrics.flush()
        self._count(self.metrics.ready())

    def finish(self) -> None:
        """Wait for the values of all steps and count them. All processes must call it, after the same step.

        Raises NonFiniteError in all of them where a step was not finite and may not be skipped.
        """
        self.world.all_reduce_max(0)  # notice a lost process here, before waiting for a device that waits for it
        self._count(self.metrics.drain())
        if self.failed_step:
            step, values = self.failed_step
            ids = self.image_ids(step.epoch, step.step_in_epoch)
            stop_with_replay(self.state, self.recipe, self.folder, self.world, step, values, ids, self.facts)

    def _count(self, steps: Iterator[tuple[Step, list[float]]]) -> None:
        state, progress = self.state, self.state.progress
        for step, values in steps:
            if self.failed:
                return
            if math.isfinite(values[0]) and math.isfinite(values[-1]):  # the loss and the gradient's norm
                progress.skips_in_row = 0
                state.epoch_meter.add(values)
                state.interval_meter.add(values)
            else:
                progress.skips_in_row += 1
                if progress.skips_in_row > state.optimizer.max_skips:
                    self.failed_step = step, values
                    return
                progress.skips += 1
                terms = terms_not_finite(state.epoch_meter.names, values)
                image_ids = self.image_ids(step.epoch, step.step_in_epoch)
                self.log.skipped(step, terms, image_ids, in_row=progress.skips_in_row)
            if step.number % self.recipe.train.log_every == 0 and state.interval_meter.count:
                self.log.interval(step.epoch, step.number, state.interval_meter.means(), step.lr)
                state.interval_meter = Meter(state.interval_meter.names)


def terms_not_finite(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Name which of a step's values (`step_values`) went wrong: terms of the loss, else the total or the gradient."""
    bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    return [name for name in bad if name not in ("loss", "class_error", "grad_norm")] or [
        "the total loss (a term of an earlier layer, or a cost of the matching)" if "loss" in bad else "the gradient"
    ]


def stop_with_replay(
    state: TrainState,
    recipe: Recipe,
    folder: Path,
    world: World,
    step: Step,
    values: Sequence[float],
    image_ids: Sequence[int],
    facts: Mapping[str, object],
) -> NoReturn:
    """Write the replay of a step whose values were not finite, and raise the NonFiniteError that ends the run.

    All processes must call it after the same step; the main one writes. The optimizer has changed nothing since that
    step.
    """
    names, max_skips = state.epoch_meter.names, state.optimizer.max_skips
    file = folder / f"nonfinite-step-{step.number:08d}.safetensors"
    tensors = {name: full_tensor(value.detach()) for name, value in model_tensors(state.model).items()}
    by_name = dict(zip(names, values, strict=True))
    sizes = {"micro_batch": recipe.train.images, "processes": world.size, "seed": recipe.run.seed}
    try:
        world.broadcast_from_main(lambda: write_replay(file, tensors, step, by_name, image_ids, facts, **sizes))
        way = f"to find the module: samdetr debug-nan {shlex.quote(str(file))}"
    except CheckpointError as error:
        way = f"there is no file to replay, {error}"
    if max_skips:
        again = "raise train.max_skips"
    elif has_checkpoint(folder):
        again = f"skip such steps with {resume_command(folder)} --set train.on_nonfinite=skip"
    else:
        again = 'set train.on_nonfinite = "skip" to skip such steps'
    skipped = f" after {state.progress.skips_in_row - 1} skipped in a row" if max_skips else ""
    raise NonFiniteError(
        f"the loss or its gradient is not finite at step {step.number}{skipped} (epoch {step.epoch + 1}, image ids "
        f"{', '.join(map(str, image_ids))}): {', '.join(terms_not_finite(names, values))}; no parameter was changed by "
        f"this step or after it; {way}. Lower optim.lr, look at these images, or {again}; what was saved is in "
        f"{folder}."
    )
