"""What the tests on the null GPU share: the reason why there is none."""

from __future__ import annotations

import importlib.util

import pytest

from perf import null_library
from perf.null_library import NullGpuError


@pytest.fixture
def null_gpu_there() -> None:
    """Skip the test, with the reason, where there is no null GPU or nothing to build it with."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the null GPU needs Triton, which is not installed")
    try:
        null_library.build(null_library.source_folder())
    except NullGpuError as error:
        if "could not build" in str(error):
            raise
        pytest.skip(f"not counted: {error}")
