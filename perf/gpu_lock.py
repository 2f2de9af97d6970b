"""One GPU, several processes: what is timed holds the GPU alone, while others compile on the host."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

LOCK_VARIABLE = "PERF_GPU_LOCK"  # the file that processes lock; unset: there is nobody else


@contextmanager
def gpu_alone() -> Iterator[None]:
    """Wait for the GPU, and hold it within the context."""
    path = os.environ.get(LOCK_VARIABLE)
    if not path:
        yield
        return
    with open(path, "w") as file:  # the lock goes with the file, also where the process is killed
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
