"""The processes of a run: how they start together, what they tell each other, and who has stopped responding.

A single process is a world of one, for which every call here does nothing.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _abort_process_group

from samdetr.errors import RecipeError, SamdetrError

if TYPE_CHECKING:
    from samdetr.recipe import ParallelSection


T = TypeVar("T")

ROLL_CALL = 3.0  # seconds between the first process that gives up waiting and the last
GLOO_CLEANUP = 0.2  # seconds that gloo's threads get before its groups are destroyed
# times the host's timeout: the host calls within one, waits one, and prints an error before NCCL ends the process
DEVICE_PATIENCE = 3


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
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on the device of ``values``, which it overwrites."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the processes' numbers. The host waits for the slowest process, but for no device."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return int(values)

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Return in all processes what ``make`` returns in the main one; if it fails there, raise SystemExit here."""
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
            raise failure or SystemExit(1)  # the main process prints why
        return made[0]

    def first_message(self, text: str) -> str:
        """Return the text of the first process that has one, "" where none has."""
        texts = [text] * self.size
        if self.size > 1:
            dist.all_gather_object(texts, text, group=self.group)
        return next(filter(None, texts), "")

    def with_own_group(self, timeout: float) -> World:
        """Return the same processes with a group of their own on the CPU, which a thread may use. All must call it.

        timeout: seconds that one process waits for another.
        """
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, dist.ProcessGroup)
        return self._replace(group=group)

    def gather(self, rows: Tensor) -> Tensor | None:
        """Return the rows [n, ...] of all processes on the CPU, in order of rank; None except in the main process."""
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
        """Return the ranks that do not call this too within `ROLL_CALL` seconds; who gives up waiting calls it."""
        assert self.store is not None
        self.store.set(f"given_up/{self.rank}", "")
        time.sleep(ROLL_CALL)
        return [rank for rank in range(self.size) if not self.store.check([f"given_up/{rank}"])]

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """Run the block in one process of each machine before the others: it may fill a cache that they share."""
        if self.local_rank > 0:
            self.all_reduce_max(0)
        yield
        if self.local_rank == 0:
            self.all_reduce_max(0)


ALONE = World()


def is_launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def init_world(device: torch.device, section: ParallelSection) -> Iterator[World]:
    """Join the processes that the launcher's environment describes; leave them at the end of the context.

    A call that waits longer than ``parallel.timeout`` for another process raises; a call on a GPU's tensors waits for
    `device_limit`.
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
        world.all_reduce_max(0)  # no process leaves while another still waits for it
    except Exception:
        leave = _abort_process_group  # what is under way on the device may wait for a process that is lost
        raise
    finally:
        # gloo's threads drop the tensors of a finished call under a lock, for which they need the GIL; a group's
        # destructor takes that lock and keeps the GIL: let them finish
        time.sleep(GLOO_CLEANUP)
        gc.collect()  # sharded modules hold groups in cycles, and groups must go before the interpreter does
        leave()


def device_limit(section: ParallelSection, device: torch.device) -> timedelta:
    """Return how long a call on tensors of ``device`` waits for a process: on a GPU, longer than the host does."""
    return timedelta(seconds=section.timeout * (DEVICE_PATIENCE if device.type == "cuda" else 1))


def is_communication_error(error: RuntimeError) -> bool:
    """Return whether a collective call failed because another process stopped responding."""
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def micro_batches_of(world: World, *, total_batch: int, micro_batch: int) -> int:
    """Return how many micro-batches of a step each process takes. Raises RecipeError where they differ."""
    count = total_batch // micro_batch
    if count % world.size:
        fitting = [n for n in range(1, micro_batch) if total_batch % (n * world.size) == 0]
        advice = f"set train.micro_batch to {max(fitting)}" if fitting else "use another number of processes"
        raise RecipeError(
            f"train.total_batch = {total_batch} makes {count} micro-batch{'es' if count > 1 else ''} of {micro_batch} "
            f"images, which {world.size} processes cannot share equally: {advice}."
        )
    return count // world.size
