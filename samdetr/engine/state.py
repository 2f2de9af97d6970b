"""The train state: exactly what a checkpoint saves and a resumed run continues from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from samdetr.engine.checkpoint.format import AVERAGE, MODEL, OPTIMIZER, Progress, model_tensors, optimizer_tensors
from samdetr.engine.checkpoint.saving import Saver
from samdetr.engine.ema import EMA
from samdetr.engine.optim import NonFiniteGuard
from samdetr.models import Detector


class Meter:
    """Means of the step values ``names`` over some steps."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.count = 0
        self.sums = [0.0] * len(names)

    def add(self, values: Sequence[float]) -> None:
        """Count one step; values in the order of the names."""
        self.sums = [total + value for total, value in zip(self.sums, values, strict=True)]
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return the mean of every step value by name; nothing if there was no step."""
        if not self.count:
            return {}
        return {name: total / self.count for name, total in zip(self.names, self.sums, strict=True)}

    def to_json(self) -> dict[str, float]:
        """Return the sums and their count, for `from_json`."""
        return {"count": self.count, **dict(zip(self.names, self.sums, strict=True))}

    @classmethod
    def from_json(cls, names: Sequence[str], value: Mapping[str, float] | None) -> Meter:
        """Restore what `to_json` returned; from None, an empty meter."""
        meter = cls(names)
        if value:
            meter.count = int(value["count"])
            meter.sums = [value[name] for name in names]
        return meter


@dataclass
class TrainState:
    """The state that the steps of a run change."""

    model: Detector
    optimizer: NonFiniteGuard
    ema: EMA | None
    progress: Progress
    epoch_meter: Meter  # of the epoch's steps so far
    interval_meter: Meter  # of the steps since the last line of metrics.jsonl

    def save(self, saver: Saver, facts: Mapping[str, object]) -> None:
        """Start to write the checkpoint ``last``. All processes must call it, at the same step.

        facts: the same in every checkpoint: recipe, categories, data, environment. Raises as `Saver.save` does.
        """
        self.progress.epoch_sums = self.epoch_meter.to_json()
        self.progress.interval_sums = self.interval_meter.to_json()
        parts = {
            # other processes' statistics of BatchNorm are not the run's; first, as it gives up gathered layers
            MODEL: model_tensors(self.model, with_buffers=saver.world.is_main),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer),
            AVERAGE: self.ema.averages if self.ema else {},
        }
        averaged_steps = self.ema.count if self.ema else 0
        saver.save(parts, self.progress, {**facts, "averaged_steps": averaged_steps})

    def finish_steps(self) -> dict[str, float]:
        """Note that the epoch's steps are done and its evaluation is due; return the means of its step values."""
        means = self.epoch_meter.means()
        self.progress.evaluation_due, self.epoch_meter = True, Meter(self.epoch_meter.names)
        return means

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, where there are any, into the model for the length of the context."""
        if self.ema is None:
            yield
        else:
            with self.ema.in_place():
                yield
