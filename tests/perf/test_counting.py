"""Waits for the GPU are counted by torch's warnings of them."""

from __future__ import annotations

import warnings

import pytest
import torch

from perf.counting import count_syncs

# torch says the first once a process, when the debug mode is set
NOTICE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
WAITED = "called a synchronizing CUDA operation"


def test_the_notice_about_the_debug_mode_is_no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []

    def set_mode(mode: object) -> None:
        modes.append(mode)
        if mode == "warn":
            warnings.warn(NOTICE, stacklevel=1)

    def step() -> None:
        for _ in range(2):
            warnings.warn(f"{WAITED} (Triggered internally at CUDAFunctions.h)", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert count_syncs(step) == 2
    assert count_syncs(lambda: None) == 0
    assert modes == ["warn", 0] * 2
