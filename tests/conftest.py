"""Shared test set-up: fixed threads, Triton's interpreter where there is no GPU, gpu tests skipped aloud."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when samdetr_kernels defines its kernels


def pytest_configure() -> None:
    # of several processes each has one thread: threads that wait for each other while they share cores are slow
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
