"""Settings that a launch takes from torch and hands to Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from samdetr_kernels.launch import Tile, float32_precision, launch

MATMUL = torch.backends.cuda.matmul


def older(precision: str) -> Callable[[], None]:
    return lambda: torch.set_float32_matmul_precision(precision)


def newer(precision: str) -> Callable[[], None]:
    return lambda: setattr(MATMUL, "fp32_precision", precision)


def of_all(precision: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends, "fp32_precision", precision)


def allow(allowed: bool) -> Callable[[], None]:
    return lambda: setattr(MATMUL, "allow_tf32", allowed)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    MATMUL.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], "ieee"),
        ([older("high")], "tf32"),
        ([older("medium")], "tf32"),
        ([older("high"), older("highest")], "ieee"),
        ([allow(True)], "tf32"),
        ([allow(True), allow(False)], "ieee"),
        ([newer("tf32")], "tf32"),
        ([newer("ieee")], "ieee"),
        ([older("high"), newer("ieee")], "ieee"),
        ([older("high"), newer("none")], "ieee"),
        ([newer("none"), of_all("tf32")], "tf32"),
        ([newer("ieee"), of_all("tf32")], "ieee"),
    ],
)
def test_every_way_to_allow_tf32_is_seen(steps, expected):
    for step in steps:
        step()
    assert float32_precision(torch.float32) == expected
    assert float32_precision(torch.bfloat16) == float32_precision(torch.float16) == "ieee"


def test_fused_multiply_adds_are_asked_for():
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.update(options)

    launch(Kernel(), (1,), Tile({"BLOCK": 4}), (torch.ones(1),))
    assert seen == {"BLOCK": 4, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
