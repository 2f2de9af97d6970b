"""Values of steps: their names, their way from the device to the host, and how far the host runs ahead."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def step_values(logged: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the values of `train_step`, in their order. logged: the criterion's terms."""
    return ("loss", *logged, "class_error", "grad_norm")


def terms_not_finite(values: Mapping[str, float]) -> list[str]:
    """Name which of a step's values (`step_values`) went wrong: terms of the loss, else the total or the gradient."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return [name for name in bad if name not in ("loss", "class_error", "grad_norm")] or [
        "the total loss (a term of an earlier layer, or a cost of the matching)" if "loss" in bad else "the gradient"
    ]


class Step(NamedTuple):
    """A step as the host knows it when it launches it. Counted from 0, except ``number``, the steps done with it."""

    number: int
    epoch: int
    step_in_epoch: int
    lr: float


class RunAheadLimit:
    """Keeps the host at most ``steps`` ahead of a GPU: their batches are in memory, and a signal waits for them.

    When the wait ends the GPU still has work: the step before is under way.
    """

    def __init__(self, device: torch.device, steps: int = 2) -> None:
        self._device, self._steps = device, steps
        self._events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Wait for the step launched ``steps`` before the one just launched."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps:
            self._events.popleft().synchronize()


class AsyncMetrics:
    """Values of steps in their order. From a GPU they arrive some steps late, in bundles; on a CPU at once."""

    def __init__(self) -> None:
        self._steps: list[Step] = []  # not sent yet
        self._values: list[Tensor] = []  # of these steps
        self._sent: tuple[list[Step], Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: Step, values: Tensor) -> None:
        """Keep a step's values: [V] on the device, not written to any more."""
        self._steps.append(step)
        self._values.append(values)

    def flush(self) -> None:
        """Start to copy what was added since the last call, unless a copy is still under way."""
        if self._sent is not None or not self._steps:
            return
        stacked, event = torch.stack(self._values), None
        if stacked.device.type == "cuda":
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            host.copy_(stacked, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            stacked = host
        self._sent = self._steps, stacked, event
        self._steps, self._values = [], []

    def ready(self) -> Iterator[tuple[Step, list[float]]]:
        """Yield the steps whose values have been copied since the last call. Does not wait."""
        event = self._sent[2] if self._sent is not None else None
        if event is None or event.query():  # type: ignore[no-untyped-call]
            yield from self._take()

    def drain(self) -> Iterator[tuple[Step, list[float]]]:
        """Yield all steps that have not been yielded yet; waits for the device."""
        yield from self._take()
        self.flush()
        yield from self._take()

    def _take(self) -> Iterator[tuple[Step, list[float]]]:
        if self._sent is None:
            return
        steps, values, event = self._sent
        self._sent = None
        if event is not None:
            event.synchronize()
        yield from zip(steps, values.tolist(), strict=True)
