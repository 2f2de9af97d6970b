"""Counts a run's steps as their values arrive on the host: means, lines of metrics.jsonl, skipped steps.

A step whose loss or gradient is not finite changes nothing: the optimizer sees to that on the device
(`optim.NonFiniteGuard`). The host learns of it here, on a GPU some steps later. After a skipped step the step's number,
and with it learning rate and order of images, advance, as does the warm-up of the averages, which themselves stay;
AdamW's own count of updates does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from samdetr.engine.distributed.world import World
from samdetr.engine.run.log import RunLog
from samdetr.engine.run.metrics import AsyncMetrics, Step, terms_not_finite
from samdetr.engine.state import Meter, TrainState


class FailedStep(NamedTuple):
    """A step that ends the run: its loss or gradient is not finite, and it may not be skipped."""

    step: Step
    values: Mapping[str, float]  # as `step_values` names them
    image_ids: Sequence[int]  # of all processes


@dataclass
class StepReports:
    """Counts steps as their values arrive, up to one that ends the run."""

    state: TrainState
    log: RunLog
    log_every: int  # steps between two lines of metrics.jsonl
    image_ids: Callable[[int, int], list[int]]  # of all processes, by epoch and step in it
    metrics: AsyncMetrics = field(default_factory=AsyncMetrics)
    failed: FailedStep | None = None  # known so far

    def add(self, step: Step, values: Tensor) -> None:
        """Take the values of the step just launched, and count those that have arrived. Does not wait.

        values: [V] on the device, in the order of `metrics.step_values`.
        """
        self.metrics.add(step, values)
        if values.device.type == "cpu" or step.number % self.log_every == 0:
            self.metrics.flush()
        self._count(self.metrics.ready())

    def finish(self, world: World) -> FailedStep | None:
        """Wait for the values of all steps, count them, and return the step that ends the run, if there is one.

        All processes must call it, after the same step; all of them return the same.
        """
        world.all_reduce_max(0)  # notice a lost process here, before waiting for a device that waits for it
        self._count(self.metrics.drain())
        return self.failed

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
                by_name = dict(zip(state.epoch_meter.names, values, strict=True))
                image_ids = self.image_ids(step.epoch, step.step_in_epoch)
                if progress.skips_in_row > state.optimizer.max_skips:
                    self.failed = FailedStep(step, by_name, image_ids)
                    return
                progress.skips += 1
                self.log.skipped(step, terms_not_finite(by_name), image_ids, in_row=progress.skips_in_row)
            if step.number % self.log_every == 0 and state.interval_meter.count:
                self.log.interval(step.epoch, step.number, state.interval_meter.means(), step.lr)
                state.interval_meter = Meter(state.interval_meter.names)
