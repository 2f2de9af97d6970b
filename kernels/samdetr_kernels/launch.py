"""How the ops start their Triton kernels, and the switch that makes them run their references instead.

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
    """Whether ops on a GPU run their plain-torch reference instead of their Triton kernel, from now on."""
    global _reference_forced
    _reference_forced = enabled


def reference_forced() -> bool:
    """What `force_reference` was last told."""
    return _reference_forced


def outside_autocast(reference: Callable[P, R]) -> Callable[P, R]:
    """A reference whose products keep the dtype of its tensors: autocast reaches into custom ops and would round them.

    The forward's products would then differ from the backward's, which autocast does not reach. The first argument
    must be a tensor.
    """

    @wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = args[0].device.type if isinstance(args[0], Tensor) else "cpu"
        if not torch.amp.is_autocast_available(device):  # the meta device
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return run


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is at least ``number``, for ``number`` >= 1."""
    return 1 << (number - 1).bit_length()


def float32_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` of products: exact, unless the user allowed TF32 in torch for fp32 tensors."""
    # torch's older settings set this too, but reading them raises once this was set
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
