"""What the kernel tests share: the device that kernels run on, and memory that is never zero by chance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def kernel_device() -> torch.device:
    """A GPU, or the CPU under Triton's interpreter: launchers take either."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (the largest integer for integers), so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
