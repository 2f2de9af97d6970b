"""Loaders: worker processes that decode and augment, and the batches of an epoch in a fixed order."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from samdetr.data.batching import EpochSampler, Key, collate, split
from samdetr.data.datasets import DetectionDataset
from samdetr.errors import DataError
from samdetr.structures import Batch


class _Loader:
    """A DataLoader over lists of keys whose workers live until `close`, or until the process ends."""

    def __init__(self, dataset: DetectionDataset, steps: EpochSampler, micro: int, workers: int, pin: bool) -> None:
        # An own generator: DataLoader draws a seed for its workers and must not advance the caller's RNG.
        with _silent_about_workers():
            self._loader: DataLoader[Batch | DataError] = DataLoader(
                _BatchDataset(dataset),
                batch_size=None,
                sampler=_MicroSampler(steps, micro),
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
        with _silent_about_workers():
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
    ) -> None:
        self._steps = EpochSampler(len(dataset), total_batch, seed, shuffle=True)
        self._micro_per_step = -(-total_batch // micro_batch)
        super().__init__(dataset, self._steps, micro_batch, workers, pin_memory)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a whole epoch; the images that do not fill a last one are left out."""
        return len(self._steps)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """The micro-batches of steps ``start_step``, ``start_step + 1``, ... of an epoch.

        Only one epoch can be under way: a new one ends the earlier iterator.

        Raises:
            DataError: an image cannot be used; the sentence is that of `decode_image`.
        """
        self._steps.set_epoch(epoch, start_step)
        micro_batches = self._batches()
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(micro_batches) for _ in range(self._micro_per_step)]


class EvalLoader(_Loader):
    """All images in the order of the annotation file; the last batch may be smaller. See `TrainLoader`."""

    def __init__(self, dataset: DetectionDataset, *, batch: int, workers: int, pin_memory: bool) -> None:
        self._steps = EpochSampler(len(dataset), batch, 0, shuffle=False)
        super().__init__(dataset, self._steps, batch, workers, pin_memory)

    def __len__(self) -> int:
        return len(self._steps)

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
) -> TrainLoader:
    """The loader of the training split (DataError: fewer images than ``total_batch``)."""
    return TrainLoader(
        dataset,
        total_batch=total_batch,
        micro_batch=micro_batch,
        workers=workers,
        seed=seed,
        pin_memory=pin_memory,
    )


def build_eval_loader(dataset: DetectionDataset, *, batch: int, workers: int, pin_memory: bool) -> EvalLoader:
    """The loader of the validation split."""
    return EvalLoader(dataset, batch=batch, workers=workers, pin_memory=pin_memory)


class _MicroSampler(Sampler[list[Key]]):
    """The keys of one forward pass after another."""

    def __init__(self, steps: EpochSampler, micro: int) -> None:
        self.steps, self.micro = steps, micro

    def __iter__(self) -> Iterator[list[Key]]:
        for keys in self.steps:
            yield from split(keys, self.micro)


class _BatchDataset(Dataset[Batch | DataError]):
    """A batch of given keys. A DataError is a value, since workers turn exceptions into tracebacks."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset, self.max_objects = dataset, dataset.max_objects

    def __getitem__(self, keys: list[Key]) -> Batch | DataError:
        try:
            return collate([self.dataset[key] for key in keys], self.max_objects)
        except DataError as error:
            return DataError(*error.args)


@contextmanager
def _silent_about_workers() -> Iterator[None]:
    """Without torch's warning about more workers than cores: the recipe says how many, it is slower, not wrong."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


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
