"""Activation checkpointing: layers keep only their inputs, and compute again in the backward pass what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from samdetr.models import Detector

T = TypeVar("T")


class SavedBytes:
    """The tensors that `counting_saved` has counted."""

    def __init__(self) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    @property
    def total(self) -> int:
        """Bytes, each storage once."""
        return sum(storage.nbytes() for storage in self.storages.values())


def checkpoint_activations(model: Detector) -> None:
    """Checkpoint every layer of the model's stacks, once they are compiled or if they are not.

    A layer's random state is that of its forward pass again, so that dropout has the same mask: in float32 losses and
    gradients are the same bits. Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).
    """
    for layer in model.layers:
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., T], *inputs: Any) -> T:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    found: T = checkpoint(forward, *inputs, use_reentrant=False)
    return found


@contextmanager
def counting_saved(model: torch.nn.Module) -> Iterator[SavedBytes]:
    """Count what autograd keeps for the backward pass within the context, without parameters and buffers."""
    own = {part.untyped_storage()._cdata for part in (*model.parameters(), *model.buffers())}
    counted = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            counted.storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
