"""Checks that ops make of their tensors before anything runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_integer(tensor: Tensor) -> bool:
    """Tell whether the tensor's dtype is an integer; bool is not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_devices(op: str, first: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise a ValueError that names the first of the others that is not on the device of ``first``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device}, got {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    """Write dtype, shape and device, for a message."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
