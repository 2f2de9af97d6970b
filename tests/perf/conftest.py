"""The null GPU, or the reason why it is not there."""

from __future__ import annotations

import importlib.util

import pytest

from perf.null_library import NullGpuError
from tests.perf.null_gpu import on_null_gpu


@pytest.fixture
def null_gpu_there() -> None:
    """Skip the test, with the reason, where there is no null GPU or nothing to build it with."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the null GPU needs Triton, which is not installed")
    try:
        on_null_gpu()
    except NullGpuError as error:
        if "could not build" in str(error):
            raise
        pytest.skip(f"not counted: {error}")
