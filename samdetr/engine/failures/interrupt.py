"""Ctrl-C and SIGTERM as a flag that the training loop reads between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "\nsaving; Ctrl-C again stops at once, without saving\n"
AGAIN = 1.0  # seconds: a scheduler and a launcher may both pass one SIGTERM on


class Heard:
    """Tells the first signal of a process from a second one, which wants no more saving."""

    def __init__(self) -> None:
        self._since: float | None = None

    def first(self) -> bool:
        """Whether no signal has been counted yet; counts one."""
        if self._since is not None:
            return False
        self._since = time.monotonic()
        return True

    def second(self, number: int) -> bool:
        """Whether one that is not the first is meant: a Ctrl-C, or a SIGTERM not at the same time as the first."""
        return self._since is not None and (number == signal.SIGINT or time.monotonic() - self._since >= AGAIN)


class StopSignal:
    """While active, the first signal only sets ``number`` and says so; a second one ends the process at once.

    Other processes may set ``number`` before this one's own signal comes.
    """

    def __init__(self, *, speaks: bool = True) -> None:
        self.number: int | None = None
        self.speaks = speaks
        self.at_once = False  # a second signal came: nothing more is saved
        self._heard = Heard()
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.number is not None

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
        if not self._heard.first():
            if self._heard.second(number):
                self.number, self.at_once = number, True
                raise KeyboardInterrupt
            return
        self.number = self.number or number
        if number == signal.SIGINT and self.speaks:
            with contextlib.suppress(OSError):
                os.write(2, SAVING.encode())  # print must not be entered twice, as a handler could

    def leave(self) -> None:
        """End the program as the signal asks (call after saving): KeyboardInterrupt, or exit code 143."""
        if self.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
