"""The environments of processes that tests start: with the checkout's packages, and on the null GPU."""

from __future__ import annotations

import os

from perf import null_library
from perf.null_gpu import ROOT


def from_checkout() -> dict[str, str]:
    """Return this process's environment, with the checkout's packages."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def on_null_gpu() -> dict[str, str]:
    """Return the environment of a process on the null GPU. Raises NullGpuError where there is none."""
    return null_library.environment_on(null_library.build(null_library.source_folder()), from_checkout())
