"""Ctrl-C and SIGTERM as a flag that the training loop reads between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAVING = "\nsaving; Ctrl-C again stops at once, without saving\n"


class StopSignal:
    """While active, the first signal only sets ``number`` and says so; a second Ctrl-C ends the process at once."""

    def __init__(self, *, speaks: bool = True) -> None:
        self.number: int | None = None
        self.speaks = speaks
        self.at_once = False  # a second Ctrl-C came: nothing more is saved
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
        if self.number is not None and number == signal.SIGINT:
            self.at_once = True
            raise KeyboardInterrupt
        self.number = number
        if number == signal.SIGINT and self.speaks:
            with contextlib.suppress(OSError):
                os.write(2, SAVING.encode())  # print must not be entered twice, as a handler could

    def leave(self) -> None:
        """End the program as the signal asks (call after saving): KeyboardInterrupt, or exit code 143."""
        if self.number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
