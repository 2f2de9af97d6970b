"""Loaders: worker processes decode and augment; the batches of an epoch come in a fixed order."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from samdetr.data.batching import EpochSampler, MicroBatch, Shape, collate, cut_step, epoch_order
from samdetr.data.buckets import BucketSampler, useful_pixels
from samdetr.data.datasets import DetectionDataset
from samdetr.errors import DataError
from samdetr.structures import Batch

_DESCRIBED = 20_000  # images whose batches `TrainLoader.describe` looks at


class Shard(NamedTuple):
    """The micro-batches that a process loads: those at ``rank``, ``rank + ranks``, ... of all."""

    rank: int = 0
    ranks: int = 1


SINGLE_SHARD = Shard()


class _Loader:
    """A DataLoader over lists of keys whose workers live until `close`, or until the process ends."""

    def __init__(
        self, dataset: DetectionDataset, sampler: Iterable[MicroBatch], shard: Shard, workers: int, pin: bool
    ) -> None:
        # A generator of its own: DataLoader draws a seed for its workers and must not advance the caller's.
        with _no_warning_about_workers():
            self._loader: DataLoader[Batch | DataError] = DataLoader(
                _BatchDataset(dataset),
                batch_size=None,
                sampler=_Sharded(sampler, shard),
                num_workers=workers,
                collate_fn=_identity,
                pin_memory=pin and torch.cuda.is_available(),
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
                persistent_workers=workers > 0,
            )
        self._closes_at_exit = workers == 0

    def close(self) -> None:
        """End the worker processes."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _batches(self) -> Iterator[Batch]:
        with _no_warning_about_workers(), _signals_blocked():
            items = iter(self._loader)
        if not self._closes_at_exit:
            # Workers ignore SIGTERM: at exit they are told to end before torch and multiprocessing wait for
            # them. Hooks run last in, first out, so this one is registered after the workers have started.
            atexit.register(_close_if_alive, weakref.ref(self))
            self._closes_at_exit = True
        try:
            for item in items:
                if isinstance(item, DataError):
                    raise item
                yield item
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a loader process was killed, usually because memory (or a container's shared memory) ran out: "
                "lower data.workers, or set it to 0 to load in the main process"
            ) from error


class TrainLoader(_Loader):
    """Optimizer steps of an epoch, each a list of micro-batches, which are padded each on its own.

    The batches depend on (seed, epoch, step) only, not on the number of workers or on earlier iterations.
    Without ``bucket_shapes`` they are random (published); with them the rule of `samdetr.data.buckets` holds. This
    process loads its shard of a step's micro-batches, whose number ``shard.ranks`` divides.
    Workers live until `close`, which also runs when the process ends.

    Raises:
        DataError: when built: fewer images than ``total_batch``.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        *,
        total_batch: int,
        micro_batch: int,
        workers: int,
        seed: int,
        pin_memory: bool,
        bucket_shapes: Sequence[Shape] | None = None,
        shard: Shard = SINGLE_SHARD,
    ) -> None:
        self._dataset, self._total, self._micro, self._seed = dataset, total_batch, micro_batch, seed
        self._micro_per_step = -(-total_batch // micro_batch) // shard.ranks
        self._steps: EpochSampler | BucketSampler
        if bucket_shapes is None:
            self._steps = EpochSampler(len(dataset), total_batch, seed, shuffle=True)
            super().__init__(dataset, _MicroSampler(self._steps, micro_batch), shard, workers, pin_memory)
        else:
            self._steps = BucketSampler(
                dataset.planned_sizes, len(dataset), bucket_shapes, batch=total_batch, micro=micro_batch, seed=seed
            )
            super().__init__(dataset, self._steps, shard, workers, pin_memory)

    @property
    def bucket_shapes(self) -> tuple[Shape, ...] | None:
        """The padded (height, width) that micro-batches can have; None: any."""
        return self._steps.shapes if isinstance(self._steps, BucketSampler) else None

    @property
    def max_objects(self) -> int:
        """The T of all batches: the most objects of an image."""
        return self._dataset.max_objects

    def describe(self) -> str:
        """Describe the first epoch's batches, and the share of their pixels that is no padding. Nothing is decoded."""
        batches = max(1, _DESCRIBED // self._micro)
        rows = epoch_order(len(self._dataset), self._seed, 0)[: batches * self._micro]
        rows = rows[: len(rows) - len(rows) % self._micro]
        sizes = self._dataset.planned_sizes(0, rows)
        random = useful_pixels(sizes, sizes.reshape(-1, self._micro, 2).max(axis=1))
        if not isinstance(self._steps, BucketSampler):
            return f"batches: random, each padded to its largest image, {random:.0%} useful pixels"
        plan = self._steps.plan(0)[:batches]
        sizes = self._dataset.planned_sizes(0, np.concatenate([rows for rows, _ in plan]))
        found = useful_pixels(sizes, np.array([shape for _, shape in plan]))
        advice = ': data.batching = "random" pads less here' if random > found else ""
        return (
            f"batches: {len(self._steps.shapes)} shapes, {found:.0%} useful pixels "
            f"(random batches: {random:.0%}{advice})"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; the images that do not fill a last one are left out."""
        return len(self._steps)

    def image_ids(self, epoch: int, step: int) -> list[int]:
        """Return the ids of a step's images, those of all processes; nothing is loaded."""
        if isinstance(self._steps, BucketSampler):
            count = self._total // self._micro
            rows = np.concatenate([part for part, _ in self._steps.plan(epoch)[step * count : (step + 1) * count]])
        else:
            rows = epoch_order(len(self._dataset), self._seed, epoch)[step * self._total : (step + 1) * self._total]
        return [int(self._dataset.image_ids[row]) for row in rows]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield this process's micro-batches of steps ``start_step``, ``start_step + 1``, ... of an epoch.

        Only one epoch can be under way: a new one ends the earlier iterator.

        Raises:
            DataError: an image cannot be used: see `decode_image`.
        """
        self._steps.set_epoch(epoch, start_step)
        micro_batches = self._batches()
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(micro_batches) for _ in range(self._micro_per_step)]


class EvalLoader(_Loader):
    """All images in the order of the annotation file; the last batch may be smaller. See `TrainLoader`.

    Each process loads its shard of the batches. All load equally many: those that would have one less repeat the last.
    """

    def __init__(
        self, dataset: DetectionDataset, *, batch: int, workers: int, pin_memory: bool, shard: Shard = SINGLE_SHARD
    ) -> None:
        self._steps = EpochSampler(len(dataset), batch, 0, shuffle=False)
        self._ranks = shard.ranks
        batches = list(_MicroSampler(self._steps, batch))
        batches += batches[-1:] * (-len(batches) % shard.ranks)
        super().__init__(dataset, batches, shard, workers, pin_memory)

    def __len__(self) -> int:
        """Return the batches of this process."""
        return -(-len(self._steps) // self._ranks)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


class _Sharded(Sampler[MicroBatch]):
    """The micro-batches of one process."""

    def __init__(self, micro_batches: Iterable[MicroBatch], shard: Shard) -> None:
        self.micro_batches, self.shard = micro_batches, shard

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(self.micro_batches, self.shard.rank, None, self.shard.ranks)


class _MicroSampler(Sampler[MicroBatch]):
    """The micro-batches of random steps, each padded to its own largest image."""

    def __init__(self, steps: EpochSampler, micro: int) -> None:
        self.steps, self.micro = steps, micro

    def __iter__(self) -> Iterator[MicroBatch]:
        for keys in self.steps:
            yield from (MicroBatch(part, None) for part in cut_step(keys, self.micro))


class _BatchDataset(Dataset[Batch | DataError]):
    """The batch of each `MicroBatch`. A DataError is returned: raised in a worker it would become a traceback."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset, self.max_objects = dataset, dataset.max_objects

    def __getitem__(self, micro: MicroBatch) -> Batch | DataError:
        try:
            return collate(self.dataset.load(micro.keys), self.max_objects, micro.shape)
        except DataError as error:
            return DataError(*error.args)


@contextmanager
def _no_warning_about_workers() -> Iterator[None]:
    """Ignore torch's warning about more workers than cores: that is the recipe's choice, slower but not wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGINT and SIGTERM here and in workers that start within, until these ignore them by themselves.

    Before they do, torch sets a handler of its own in a worker, which ends it at a SIGTERM to the group.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _identity(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Ignore SIGINT and SIGTERM, which the main process gets as well, and end with that process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
    # DataLoader watches its direct parent only, which under forkserver outlives a killed main process.
    threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _close_if_alive(reference: weakref.ref[_Loader]) -> None:
    loader = reference()
    if loader is not None:
        loader.close()
