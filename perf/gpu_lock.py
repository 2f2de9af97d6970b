"""Lock of a GPU that several processes share: who measures times holds it, while others compile on the host."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCK_VARIABLE = "PERF_GPU_LOCK"  # the file that processes lock; unset: there is nobody else
_held: list[str] = []  # by this process


@contextmanager
def gpu_alone() -> Iterator[None]:
    """Wait for the GPU, and hold it within the context; within another it is held already."""
    path = os.environ.get(LOCK_VARIABLE)
    if not path or _held:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(path)
        try:
            yield
        finally:
            _held.clear()
            fcntl.flock(file, fcntl.LOCK_UN)  # not by closing: a child that was begun within has the file too
