"""The section [compute] decided for this machine: device, precision, compilation, CUDA graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch

from samdetr.errors import SamdetrError
from samdetr_kernels import force_reference

if TYPE_CHECKING:
    from samdetr.recipe import ComputeSection


class Compute(NamedTuple):
    """A recipe's compute section, decided for a device."""

    precision: torch.dtype  # bfloat16 or float32
    compile: bool
    cuda_graph: bool
    activation_checkpoint: bool = False  # the layers' activations, in the backward pass


EXACT = Compute(torch.float32, compile=False, cuda_graph=False)


def choose_device(name: str, kernels: str) -> torch.device:
    """Return the device of ``run.device``: "auto" is the first GPU if there is one, else the CPU.

    kernels: ``compute.kernels``, which the ops use from now on. Raises SamdetrError when "cuda" is asked for and there
    is no GPU.
    """
    force_reference(kernels == "reference")
    if name == "cuda" and not torch.cuda.is_available():
        raise SamdetrError('run.device = "cuda", but torch finds no GPU: set it to "cpu" or "auto".')
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_compute(section: ComputeSection, device: torch.device, *, buckets: bool, processes: int = 1) -> Compute:
    """Decide what is "auto". buckets: whether batches have a known small set of padded shapes.

    Raises SamdetrError for what this device, or batches of any shape, cannot have.
    """
    for key in ("compile", "cuda_graph"):
        if getattr(section, key) == "on" and not buckets:
            raise SamdetrError(
                f'compute.{key} = "on" needs batches of few shapes, known before: set data.batching = "buckets".'
            )
    if section.cuda_graph == "on" and device.type != "cuda":
        raise SamdetrError('compute.cuda_graph = "on" needs a GPU: set it to "off".')
    if section.cuda_graph == "on" and processes > 1:
        raise SamdetrError('compute.cuda_graph = "on" is for one process: set it to "off".')
    if section.cuda_graph == "on" and section.activation_checkpointing != "off":
        raise SamdetrError(
            'compute.cuda_graph = "on" cannot record what compute.activation_checkpointing = '
            f'"{section.activation_checkpointing}" does with random states: set one of them to "off".'
        )
    return Compute(
        precision=choose_precision(section.precision, device),
        compile=section.compile == "on" or (section.compile == "auto" and buckets and device.type == "cuda"),
        cuda_graph=section.cuda_graph == "on",
        activation_checkpoint=section.activation_checkpointing == "layers",
    )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of ``compute.precision``; "auto" is bfloat16 where the device multiplies it in hardware."""
    if name != "auto":
        return torch.bfloat16 if name == "bf16" else torch.float32
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


def autocast(precision: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products and convolutions on the device compute in ``precision``."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)
