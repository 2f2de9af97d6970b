"""Launching of Triton kernels, and the switch that makes ops run their references instead.

Every launch goes through `launch`, so that one place selects the tensor's device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


OPTIONS = {"enable_fp_fusion": True}  # of Triton, beside warps and stages; from 3.10 on it is off unless asked for


class Tile(NamedTuple):
    """Compile-time sizes of one kernel: block sizes by name, warps per program, software-pipelining stages."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2


_reference_forced = False


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, arguments: Sequence[Any], **constants: Any) -> None:
    """Run ``kernel`` on the device of its first tensor argument; an empty grid runs nothing."""
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants, **tile.blocks, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS)


def force_reference(enabled: bool) -> None:
    """Make ops on a GPU run their plain-torch reference instead of their Triton kernel, or no longer."""
    global _reference_forced
    _reference_forced = enabled


def reference_forced() -> bool:
    """Tell whether `force_reference` is on."""
    return _reference_forced


def runs_reference(tensor: Tensor) -> bool:
    """Tell whether a GPU runs the reference of an op with such a tensor: the kernels have no float64."""
    return _reference_forced or tensor.dtype == torch.float64


def outside_autocast(reference: Callable[P, R]) -> Callable[P, R]:
    """Decorate a reference so that its products keep the dtype of its tensors; its first argument must be a tensor.

    Autocast reaches into custom ops and would round products of the forward, but not those of the backward.
    """

    @wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type if isinstance(args[0], Tensor) else "cpu"
        if not torch.amp.is_autocast_available(device):  # the meta device
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return run


def in_autocast_dtype(*tensors: Tensor) -> Sequence[Tensor]:
    """Cast tensors to autocast's dtype where it is on; float64 stays, as everywhere under autocast."""
    device = tensors[0].device.type
    # the meta device has no autocast; torch.compile of torch 2.11 cannot ask whether a device has
    if tensors[0].is_meta or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors]


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, for ``number`` >= 1."""
    return 1 << (number - 1).bit_length()


def float32_precision(dtype: torch.dtype) -> str:
    """Return Triton's ``input_precision`` of products: exact, unless torch is allowed TF32 for fp32 tensors."""
    # torch's older settings set this too, but reading them raises once this was set
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
