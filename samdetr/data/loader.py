"""Loaders: worker processes that decode and augment, and the batches of an epoch in a fixed order."""

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

from samdetr.data.batching import EpochSampler, MicroBatch, Shape, collate, epoch_order, split
from samdetr.data.buckets import BucketSampler, useful_pixels
from samdetr.data.datasets import DetectionDataset
from samdetr.errors import DataError
from samdetr.structures import Batch

_DESCRIBED = 20_000  # images whose batches `TrainLoader.describe` looks at


class Shard(NamedTuple):
    """Which micro-batches a process loads: those at ``rank``, ``rank + ranks``, ... of all."""

    rank: int = 0
    ranks: int = 1


EVERYTHING = Shard()


class _Loader:
    """A DataLoader over lists of keys whose workers live until `close`, or until the process ends."""

    def __init__(
        self, dataset: DetectionDataset, sampler: Iterable[MicroBatch], shard: Shard, workers: int, pin: bool
    ) -> None:
        # An own generator: DataLoader draws a seed for its workers and must not advance the caller's RNG.
        with _silent_about_workers():
            self._loader: DataLoader[Batch | DataError] = DataLoader(
                _BatchDataset(dataset),
                batch_size=None,
                sampler=_Sharded(sampler, shard),
                num_workers=workers,
                collate_fn=_as_is,
                pin_memory=pin and torch.cuda.is_available(),
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
                persistent_workers=workers > 0,
            )
        self._ends_at_exit = workers == 0

    def close(self) -> None:
        """End the worker processes."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _batches(self) -> Iterator[Batch]:
        with _silent_about_workers(), _signals_held_back():
            items = iter(self._loader)
        if not self._ends_at_exit:
            # Workers ignore SIGTERM: at exit they are told to end before torch and multiprocessing wait for
            # them. Hooks run last in, first out, so this one is registered after the workers have started.
            atexit.register(_close_if_alive, weakref.ref(self))
            self._ends_at_exit = True
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
    """Optimizer steps of an epoch, each a list of micro-batches that are padded on their own.

    The batches depend on (seed, epoch, step) only, not on the number of workers or on earlier iterations.
    Without ``shapes`` they are random (published); with them the rule of `samdetr.data.buckets` holds. Of a step's
    micro-batches, whose number ``shard.ranks`` divides, this process loads its shard.
    Workers live until `close`, which also runs when the process ends.
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
        shapes: Sequence[Shape] | None = None,
        shard: Shard = EVERYTHING,
    ) -> None:
        self._dataset, self._total, self._micro, self._seed = dataset, total_batch, micro_batch, seed
        self._micro_per_step = -(-total_batch // micro_batch) // shard.ranks
        self._steps: EpochSampler | BucketSampler
        if shapes is None:
            self._steps = EpochSampler(len(dataset), total_batch, seed, shuffle=True)
            super().__init__(dataset, _MicroSampler(self._steps, micro_batch), shard, workers, pin_memory)
        else:
            self._steps = BucketSampler(
                dataset.planned_sizes, len(dataset), shapes, batch=total_batch, micro=micro_batch, seed=seed
            )
            super().__init__(dataset, self._steps, shard, workers, pin_memory)

    @property
    def shapes(self) -> tuple[Shape, ...] | None:
        """The padded (height, width) that micro-batches can have; None: any."""
        return self._steps.shapes if isinstance(self._steps, BucketSampler) else None

    @property
    def max_objects(self) -> int:
        """T of all batches: the most objects of an image."""
        return self._dataset.max_objects

    def describe(self) -> str:
        """How the first epoch is batched, and how much of its batches is not padding. Nothing is decoded."""
        batches = max(1, _DESCRIBED // self._micro)
        rows = epoch_order(len(self._dataset), self._seed, 0)[: batches * self._micro]
        rows = rows[: len(rows) - len(rows) % self._micro]
        sizes = self._dataset.planned_sizes(0, rows)
        random = useful_pixels(sizes, sizes.reshape(-1, self._micro, 2).max(axis=1))
        if not isinstance(self._steps, BucketSampler):
            return f"batches: random, each padded to its largest image, {random.useful:.0%} useful pixels"
        plan = self._steps.plan(0)[:batches]
        sizes = self._dataset.planned_sizes(0, np.concatenate([rows for rows, _ in plan]))
        found = useful_pixels(sizes, np.array([shape for _, shape in plan]))
        advice = ': data.batching = "random" pads less here' if random.useful > found.useful else ""
        return (
            f"batches: {len(self._steps.shapes)} shapes, {found.useful:.0%} useful pixels "
            f"(random batches: {random.useful:.0%}{advice})"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; the images that do not fill a last one are left out."""
        return len(self._steps)

    def image_ids(self, epoch: int, step: int) -> list[int]:
        """The images of a step of an epoch, those of all processes. Nothing is loaded."""
        if isinstance(self._steps, BucketSampler):
            count = self._total // self._micro
            rows = np.concatenate([part for part, _ in self._steps.plan(epoch)[step * count : (step + 1) * count]])
        else:
            rows = epoch_order(len(self._dataset), self._seed, epoch)[step * self._total : (step + 1) * self._total]
        return [int(self._dataset.image_ids[row]) for row in rows]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This process's micro-batches of steps ``start_step``, ``start_step + 1``, ... of an epoch.

        Only one epoch can be under way: a new one ends the earlier iterator.

        Raises:
            DataError: an image cannot be used; the sentence is that of `decode_image`.
        """
        self._steps.set_epoch(epoch, start_step)
        micro_batches = self._batches()
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(micro_batches) for _ in range(self._micro_per_step)]


class EvalLoader(_Loader):
    """All images in the order of the annotation file; the last batch may be smaller. See `TrainLoader`.

    Of several processes each loads its ``share`` of the batches, and all equally many: those that would have one less
    repeat the last batch.
    """

    def __init__(
        self, dataset: DetectionDataset, *, batch: int, workers: int, pin_memory: bool, shard: Shard = EVERYTHING
    ) -> None:
        self._steps = EpochSampler(len(dataset), batch, 0, shuffle=False)
        self._ranks = shard.ranks
        batches = list(_MicroSampler(self._steps, batch))
        batches += batches[-1:] * (-len(batches) % shard.ranks)
        super().__init__(dataset, batches, shard, workers, pin_memory)

    def __len__(self) -> int:
        """Batches of this process."""
        return -(-len(self._steps) // self._ranks)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches()


def build_train_loader(
    dataset: DetectionDataset,
    *,
    total_batch: int,
    micro_batch: int,
    workers: int,
    seed: int,
    pin_memory: bool,
    shapes: Sequence[Shape] | None = None,
    shard: Shard = EVERYTHING,
) -> TrainLoader:
    """The loader of the training split (DataError: fewer images than ``total_batch``)."""
    return TrainLoader(
        dataset,
        total_batch=total_batch,
        micro_batch=micro_batch,
        workers=workers,
        seed=seed,
        pin_memory=pin_memory,
        shapes=shapes,
        shard=shard,
    )


def build_eval_loader(
    dataset: DetectionDataset, *, batch: int, workers: int, pin_memory: bool, shard: Shard = EVERYTHING
) -> EvalLoader:
    """The loader of the validation split."""
    return EvalLoader(dataset, batch=batch, workers=workers, pin_memory=pin_memory, shard=shard)


class _Sharded(Sampler[MicroBatch]):
    """A process's share of the micro-batches."""

    def __init__(self, all_of_them: Iterable[MicroBatch], shard: Shard) -> None:
        self.all_of_them, self.shard = all_of_them, shard

    def __iter__(self) -> Iterator[MicroBatch]:
        return islice(self.all_of_them, self.shard.rank, None, self.shard.ranks)


class _MicroSampler(Sampler[MicroBatch]):
    """One forward pass after another, each padded to its own largest image."""

    def __init__(self, steps: EpochSampler, micro: int) -> None:
        self.steps, self.micro = steps, micro

    def __iter__(self) -> Iterator[MicroBatch]:
        for keys in self.steps:
            yield from (MicroBatch(part, None) for part in split(keys, self.micro))


class _BatchDataset(Dataset[Batch | DataError]):
    """A batch of given keys. A DataError is a value, since workers turn exceptions into tracebacks."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset, self.max_objects = dataset, dataset.max_objects

    def __getitem__(self, micro: MicroBatch) -> Batch | DataError:
        try:
            return collate([self.dataset[key] for key in micro.keys], self.max_objects, micro.shape)
        except DataError as error:
            return DataError(*error.args)


@contextmanager
def _silent_about_workers() -> Iterator[None]:
    """Without torch's warning about more workers than cores: the recipe says how many, it is slower, not wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers that start within are deaf to signals until they ignore them; this process hears of them afterwards.

    Between the two torch has a handler of its own in the worker, which dies of a SIGTERM to the group.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    """Leave signals to the main process, which a Ctrl-C or SIGTERM of the group reaches too; end with it."""
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
