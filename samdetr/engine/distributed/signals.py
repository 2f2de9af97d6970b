"""Ctrl-C and SIGTERM as a flag that the training loop reads between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import NoReturn, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "\nsaving; Ctrl-C again stops at once, without saving\n"
REPEAT_AFTER = 1.0  # seconds: a scheduler and a launcher may both pass the same SIGTERM on


class SignalCounter:
    """Tells the first signal of a process from a second one, which means: stop at once, without saving."""

    def __init__(self) -> None:
        self._since: float | None = None

    def is_first(self) -> bool:
        """Count a signal and return whether it is the first."""
        if self._since is not None:
            return False
        self._since = time.monotonic()
        return True

    def is_second(self, number: int) -> bool:
        """Return whether a later signal is meant as a second one: a Ctrl-C, or a SIGTERM some time after the first."""
        return self._since is not None and (number == signal.SIGINT or time.monotonic() - self._since >= REPEAT_AFTER)


class StopSignal:
    """While active, the first signal only sets ``number`` and prints that; a second one raises KeyboardInterrupt.

    ``number`` may also be set to another process's signal, before this process's own comes.
    """

    def __init__(self, *, prints: bool = True) -> None:
        self.number: int | None = None
        self.prints = prints
        self.at_once = False  # a second signal came: nothing more is saved
        self._counter = SignalCounter()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._counter.is_first():
            if self._counter.is_second(number):
                self.number, self.at_once = number, True
                raise KeyboardInterrupt
            return
        self.number = self.number or number
        if number == signal.SIGINT and self.prints:
            with contextlib.suppress(OSError):
                os.write(2, SAVING.encode())  # print must not be entered twice, as a handler could

    def exit(self) -> NoReturn:
        """End the program as the signal asks: raise KeyboardInterrupt, or SystemExit with code 143 after SIGTERM."""
        if self.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
