"""What the host and the device know of each other: values on their way to the host, and how far ahead the host is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """What the host knows of a step when it starts it. Numbers from 0, but ``number``, the steps done with it."""

    number: int
    epoch: int
    step_in_epoch: int
    lr: float


class RunAheadLimit:
    """Keeps the host at most ``steps`` ahead of a GPU: their batches are in memory, and a signal waits for them.

    The wait itself leaves the device work: the step before is still under way when the host goes on.
    """

    def __init__(self, device: torch.device, steps: int = 2) -> None:
        self._device, self._steps = device, steps
        self._events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """A step has been launched: wait for the one ``steps`` before it."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        if len(self._events) > self._steps:
            self._events.popleft().synchronize()


class AsyncMetrics:
    """Values of steps in their order. On a GPU they arrive some steps late, in bundles; on a CPU at once."""

    def __init__(self) -> None:
        self._steps: list[Step] = []  # not sent yet, with
        self._values: list[Tensor] = []  # theirs
        self._sent: tuple[list[Step], Tensor, torch.cuda.Event | None] | None = None

    def add(self, step: Step, values: Tensor) -> None:
        """values: 1-D, on the device; not written to any more."""
        self._steps.append(step)
        self._values.append(values)

    def flush(self) -> None:
        """Start the copy of what has been added since the last call, unless one is still under way."""
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
        """The steps whose values have been copied since the last call. Does not wait."""
        event = self._sent[2] if self._sent is not None else None
        if event is None or event.query():  # type: ignore[no-untyped-call]
            yield from self._take()

    def drain(self) -> Iterator[tuple[Step, list[float]]]:
        """All steps that have not been returned yet; waits for the device."""
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
