"""One run over several processes: who takes part, and how they come to the same numbers and decisions.

A process alone is a world of one, for which every call here does nothing. Gradients are summed, not averaged: every
process divides its loss by the number of boxes of the whole step.

| strategy | a process holds | for |
|---|---|---|
| ddp | everything | up to some hundred million parameters: nothing is gathered, gradients travel during backward |
| fsdp | its share of every layer | large models: layers are gathered when they compute, in float32 |
| hsdp | its share among the processes of its machine | large models on several machines |
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from samdetr.errors import RecipeError, SamdetrError

if TYPE_CHECKING:
    from samdetr.models import Detector
    from samdetr.recipe import ParallelSection

T = TypeVar("T")
ROLL_CALL = 3.0  # seconds between the first process that gives up waiting and the last

AFTERWARDS = 0.2  # seconds
DEVICE_PATIENCE = 3  # limits of the host, which calls within one, waits one, and says so before NCCL ends the process


class World(NamedTuple):
    """The processes of a run and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1
    store: dist.Store | None = None  # what the processes can tell each other when nothing else works any more
    group: dist.ProcessGroup | None = None  # in which hosts wait for each other; None: the one that all share

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the device of ``values``, which it replaces."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' numbers. The host waits for the slowest of them, but for no device."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return int(values)

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes; all others wait for it. Where it fails, they end too."""
        if self.size == 1:
            return make()
        made: list[T | None] = [None]
        failure: SamdetrError | OSError | None = None
        if self.is_main:
            try:
                made = [make()]
            except (SamdetrError, OSError) as error:
                failure = error
        dist.broadcast_object_list(made, group=self.group)
        if made[0] is None:
            raise failure or SystemExit(1)  # the main process says why
        return made[0]

    def first_message(self, text: str) -> str:
        """The text of the first process that has one, "" where none has."""
        texts = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(texts, text, group=self.group)
        return next(filter(None, texts), "")

    def with_own_group(self, timeout: float) -> World:
        """The same processes, talking on the CPU past what they say here: for a thread. All of them must ask.

        timeout: seconds that one waits for another.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)
        return self._replace(group=group)

    def gather(self, rows: Tensor) -> Tensor | None:
        """The rows [n, ...] of all processes, on the CPU, in the order of ranks; None except in the main process."""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)]), group=self.group)
        most = max(int(count) for count in counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts] if self.is_main else None
        dist.gather(padded, gathered, group=self.group)
        if gathered is None:
            return None
        return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])

    def unresponsive_ranks(self) -> list[int]:
        """The processes that have not called this within `ROLL_CALL` seconds, as one does that has given up waiting."""
        assert self.store is not None
        self.store.set(f"given_up/{self.rank}", "")
        time.sleep(ROLL_CALL)
        return [rank for rank in range(self.size) if not self.store.check([f"given_up/{rank}"])]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of each machine runs the block before the others do: it may fill a cache that they share."""
        if self.local_rank > 0:
            self.all_reduce_max(0)
        yield
        if self.local_rank == 0:
            self.all_reduce_max(0)


ALONE = World()


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def init_world(device: torch.device, section: ParallelSection) -> Iterator[World]:
    """The world that the launcher's environment describes, for the length of the context.

    A call that waits longer than ``parallel.timeout`` for another process ends this one; of the device, `device_limit`.
    """
    if not is_launched():
        yield ALONE
        return
    found, _, _ = next(dist.rendezvous("env://"))
    rank, size, local_rank, local_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    # a launcher that starts the processes again keeps its store, with the addresses of those before
    store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-of-{size}", found)
    world = World(rank, size, local_rank, local_size, dist.PrefixStore("samdetr", store))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        timeout=device_limit(section, device),
        store=store,
        rank=world.rank,
        world_size=world.size,
    )
    world = world.with_own_group(section.timeout)
    leave = dist.destroy_process_group
    try:
        yield world
        world.all_reduce_max(0)  # nobody leaves while another still needs its answer
    except Exception:
        leave = _abort_process_group  # what is under way on the device may wait for a process that is lost
        raise
    finally:
        # gloo's threads drop the tensors of a finished call under a lock, for which they need the GIL; a group's
        # destructor takes that lock and keeps the GIL: let them finish
        time.sleep(AFTERWARDS)
        gc.collect()  # sharded modules hold groups in cycles, and groups must go before the interpreter does
        leave()


def device_limit(section: ParallelSection, device: torch.device) -> timedelta:
    """Return how long a call on tensors of ``device`` waits for another process: on a GPU longer than the host does."""
    return timedelta(seconds=section.timeout * (DEVICE_PATIENCE if device.type == "cuda" else 1))


def is_communication_error(error: RuntimeError) -> bool:
    """Whether a collective call failed because another process did not answer."""
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def micro_batches_of(world: World, *, total_batch: int, micro_batch: int) -> int:
    """How many micro-batches of a step each process takes. Raises RecipeError where they cannot be shared equally."""
    count = total_batch // micro_batch
    if count % world.size:
        fitting = [n for n in range(1, micro_batch) if total_batch % (n * world.size) == 0]
        advice = f"set train.micro_batch to {max(fitting)}" if fitting else "use another number of processes"
        raise RecipeError(
            f"train.total_batch = {total_batch} makes {count} micro-batch{'es' if count > 1 else ''} of {micro_batch} "
            f"images, which {world.size} processes cannot share equally: {advice}."
        )
    return count // world.size


def distribute(model: Detector, section: ParallelSection, world: World, device: torch.device) -> nn.Module:
    """The module to call for a forward pass of ``model``, which is on its device with its weights loaded.

    With sharding the model's parameters become DTensors: build the optimizer afterwards.
    """
    return model if world.size == 1 else wrap(model, section, world, device)


def wrap(model: Detector, section: ParallelSection, world: World, device: torch.device) -> nn.Module:
    """As `distribute`, whatever the number of processes; they must be in a process group."""
    if section.strategy == "ddp":
        parallel_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel_model.broadcast_buffers = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
        parallel_model.register_comm_hook(None, _sum_gradients)
        return parallel_model
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # fully_shard takes no channels-last filters
    mesh = _mesh(section, world, device)
    for part in [model.backbone, *model.regions().layers, model]:
        sharded = fully_shard(part, mesh=mesh, reshard_after_forward=section.reshard)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    return model


def no_grad_sync(model: nn.Module, *, keep: bool) -> AbstractContextManager[object]:
    """Around forward and backward of a micro-batch: with ``keep`` its gradients stay in this process for now."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync() if keep else nullcontext()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Forget gathered layers, after their shares were changed."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes; each of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, example: Tensor) -> Tensor:
    """``value``, whole in every process, divided as ``example`` is."""
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def _mesh(section: ParallelSection, world: World, device: torch.device) -> DeviceMesh:
    if section.strategy == "fsdp":
        return init_device_mesh(device.type, (world.size,), mesh_dim_names=("process",))
    ranks, limit = torch.arange(world.size).view(-1, world.local_size), device_limit(section, device)
    # a mesh that makes its groups itself gives them torch's own limit
    groups = [dist.new_subgroups_by_enumeration(part.tolist(), timeout=limit)[0] for part in (ranks.T, ranks)]
    names = ("machine", "process")
    return DeviceMesh.from_group(groups, device.type, ranks, mesh_dim_names=names)  # type: ignore[arg-type]


def _sum_gradients(state, bucket):  # type: ignore[no-untyped-def]  # DDP takes no annotation that is a string
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
