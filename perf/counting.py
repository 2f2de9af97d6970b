"""Counts of what a step asks of the device: launching ops, waits of the host, peak memory, compiled kernels."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._inductor.codecache import PyCodeCache
from torch._ops import OpOverload
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

# ops that allocate or describe, and start nothing on the device; views are told by their schema
_SILENT = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::resize_", "aten::set_"),
    *("aten::resolve_conj", "aten::resolve_neg", "aten::_local_scalar_dense", "prim::device"),
    *("profiler::_record_function_enter_new", "profiler::_record_function_exit"),
}
_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}
_OP = re.compile(r"\w+::\w+")
_FUSED = "cpp_fused"  # how Inductor names its kernels for the CPU
# torch's warning of a wait; another one, said once, is about the debug mode itself
_WAITED = "called a synchronizing CUDA operation"
# an optimizer that goes tensor by tensor reads its step numbers, which live on the host: nothing waits
_OPTIMIZER = "Optimizer.step#"


class OpCounter(TorchDispatchMode):
    """Mode that counts the eager ops below autograd: a custom op is one, views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.views = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        self.views += func.is_view
        if not func.is_view and name not in _SILENT:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class Launches(NamedTuple):
    """Ops and kernels that one call started, by name."""

    ops: Counter[str]  # eager ops below autograd, and the ops that compiled graphs call; a custom op is one
    fused: Counter[str]  # calls of kernels that torch.compile generated for the CPU
    reads: Counter[str]  # ops whose scalar or shape the host waits for
    kernels: Counter[str]  # on a GPU: kernels of any origin, without copies and fills of memory

    def total(self) -> int:
        """Kernels on a GPU; without one the launching ops and fused kernels, of which a custom op is one."""
        return self.kernels.total() or self.ops.total() + self.fused.total()


def count_compiled_kernels(call: Callable[[], object]) -> Launches:
    """Count what a call starts, be it compiled, eager or mixed; call it before, so that nothing compiles in here.

    The ops are read from torch's profiler, which a compiled graph runs under unchanged (it does not under a
    `TorchDispatchMode`). Kernels generated for the CPU do not show there: their calls are counted at the functions of
    Inductor's modules. A replayed CUDA graph shows its kernels only.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with_overloads = torch._C._profiler._ExperimentalConfig(capture_overload_names=True)
    with (
        _counted_fused() as fused,
        _recorded_custom_ops(),
        profile(activities=activities, experimental_config=with_overloads, acc_events=True) as profiler,
    ):
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found = Launches(Counter(), fused, Counter(), Counter())
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and event.cpu_parent is None:
            _walk(event, found, in_optimizer=False)
        elif event.device_type == DeviceType.CUDA and not _is_no_kernel(event):
            found.kernels[event.name] += 1
    return found


def _is_no_kernel(event: FunctionEvent) -> bool:
    return event.is_user_annotation or event.name.startswith(("Memcpy", "Memset"))


def _walk(event: FunctionEvent, found: Launches, in_optimizer: bool) -> None:
    """Add an event: an op with a kernel of its own is one, whatever it calls; any other is what it calls."""
    if event.name in _READS and not in_optimizer:
        found.reads[event.name] += 1
    op = _op_of(event)
    if op is None or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
        for child in event.cpu_children:
            _walk(child, found, in_optimizer or event.name.startswith(_OPTIMIZER))
    elif not op.is_view and event.name not in _SILENT:
        found.ops[event.name] += 1


def _op_of(event: FunctionEvent) -> Any:
    """Return the registered op of an event, None where it is no op but a range."""
    if not _OP.fullmatch(event.name):
        return None
    namespace, name = event.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return None if packet is None else getattr(packet, event.overload_name or "default", None)


@contextmanager
def _recorded_custom_ops() -> Iterator[None]:
    """Let the profiler see custom ops called without autograd, which torch does not record."""
    original = OpOverload.__call__

    def call(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        if op.namespace in ("aten", "prim", "prims"):
            return original(op, *args, **kwargs)
        with record_function(op.name().split(".")[0]):
            return original(op, *args, **kwargs)

    OpOverload.__call__ = call
    try:
        yield
    finally:
        OpOverload.__call__ = original


@contextmanager
def _counted_fused() -> Iterator[Counter[str]]:
    """Count the calls of the kernels in every module that Inductor has loaded."""
    found: Counter[str] = Counter()
    originals: list[tuple[Any, str, Callable[..., object]]] = []

    def counted(name: str, kernel: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            found[name] += 1
            return kernel(*args)

        return call

    for module in PyCodeCache.modules:
        for name, kernel in list(vars(module).items()):
            if name.startswith(_FUSED) and callable(kernel):
                originals.append((module, name, kernel))
                setattr(module, name, counted(name, kernel))
    try:
        yield found
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)


def count_syncs(call: Callable[[], object]) -> int:
    """Count a call's waits for the GPU, as torch's debug mode sees them (no CUDA synchronize call)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(_WAITED in str(warning.message) for warning in caught)


def peak_bytes(call: Callable[[], object], device: torch.device, *, reserved: bool = False) -> int:
    """Measure the most bytes allocated at once during a call, above what was before it.

    reserved: on a GPU all that torch holds, for calls that replay CUDA graphs, whose memory is allocated for good.
    On the CPU by torch's allocator, as its profiler reports it: without the libraries' own scratch memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    assert profiler.profiler is not None
    changes = sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def host_ms(step: Callable[[], object]) -> float:
    """Measure the milliseconds in which the host starts all of a step on an idle GPU."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    return (time.perf_counter() - begin) * 1e3


def reserved_bytes(device: torch.device) -> int:
    """Return what torch holds of the GPU's memory, after giving back what it does not use; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Yield time and change in bytes of every allocation and release."""
    stack = list(events)
    while stack:
        event = stack.pop()
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size
        stack.extend(event.children)
