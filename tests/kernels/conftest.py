"""Fixtures of the kernel tests: the device that kernels run on, and memory that is never zero by chance."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from samdetr_kernels.aot import read_list
from samdetr_kernels.launch import Tile


def _mend_interpreter() -> None:
    """Make Triton's interpreter do what a GPU does.

    As it comes, it multiplies the bit patterns of bf16 operands (their products are exact in fp32), truncates to bf16
    instead of rounding, and turns a comparison of scalars that meets a vector into a float; Triton 3.6's takes no
    loaded number as the bound of a loop under NumPy 2.4.
    """
    multiply, splat, convert = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.create_splat,
        InterpreterBuilder.create_fp_to_fp,
    )
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self, a, b, *rest):
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    def create_splat(self, ret_ty, value):
        out = splat(self, ret_ty, value)
        out.data = out.data.astype(value.data.dtype)
        return out

    def create_fp_trunc(self, value, dst_type):
        if value.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(value.data)).bfloat16().view(torch.int16).numpy()
            return TensorHandle(rounded.view(np.uint16).reshape(value.data.shape), tl.bfloat16)
        return self.cast_impl(value, dst_type)

    def create_fp_to_fp(self, value, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16:
            return create_fp_trunc(self, value, dst_type)
        return convert(self, value, dst_type, rounding_mode)

    interpreter._patch_lang_tensor = patch_tensor
    InterpreterBuilder.create_dot, InterpreterBuilder.create_splat = create_dot, create_splat
    InterpreterBuilder.create_fp_trunc, InterpreterBuilder.create_fp_to_fp = create_fp_trunc, create_fp_to_fp


_mend_interpreter()


@pytest.fixture
def kernel_device() -> torch.device:
    """Return a GPU, or the CPU under Triton's interpreter: launchers take either."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Launched(NamedTuple):
    """Arguments that a launcher gave to `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    tile: Tile
    arguments: tuple[Any, ...]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """Fill a list with what launchers, which may be given meta tensors, would run; nothing runs."""
    found: list[Launched] = []
    for name in {entry.module for entry in read_list()}:
        module = importlib.import_module(f"samdetr_kernels.{name}")
        monkeypatch.setattr(module, "launch", lambda *launched, **_: found.append(Launched(*launched)))
    return found


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (the largest integer for integers), so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
