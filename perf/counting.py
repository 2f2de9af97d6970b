"""What a step asks of the device: launching ops, reads that make the host wait, peak memory, compiled kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# ops that allocate or describe, and start nothing on the device; views are told by their schema
_SILENT = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._local_scalar_dense,  # counted as a read
    aten._unsafe_view,
    aten.lift_fresh,
    aten.resize_,
    aten.set_,
    torch.ops.prim.device,
}
_READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2}
_COPIES = {aten._to_copy, aten.copy_}


class OpCounter(TorchDispatchMode):
    """Counts ops below autograd while it is entered: a custom op is one, views and allocations are none.

    launches: ops that do work, by name. reads: ops whose result the host waits for, by name; copies between host and
    device count as such when they block, which shows on a GPU only. host: tensors that live on the host whatever the
    device is (an optimizer's step numbers), whose reads do not wait.
    """

    def __init__(self, host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.views = 0
        self._host = {tensor.data_ptr() for tensor in host}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet, name = func.overloadpacket, str(func.overloadpacket)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.data_ptr() in self._host for tensor in tensors if tensor.layout == torch.strided):
            return result
        if packet in _READS or (packet in _COPIES and _blocks(tensors, args, kwargs or {})):
            self.reads[name] += 1
        if func.is_view or packet in _SILENT or not tensors:
            self.views += func.is_view
        else:
            self.launches[name] += 1
        return result


def _blocks(tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a copy between host and device makes the host wait: all but asynchronous ones of pinned memory."""
    devices = {tensor.device.type for tensor in tensors}
    if len(devices) == 1:
        return False
    asynchronous = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2] is True)
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    return not (asynchronous and all(tensor.is_pinned() for tensor in on_host))


def count_ops(call: Callable[[], object], host: Iterable[Tensor] = ()) -> OpCounter:
    """The ops of one call."""
    with OpCounter(host) as counter:
        call()
    return counter
