"""The part of the data path that runs on the device: copy a batch there and normalise its pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from samdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from samdetr.errors import DataError
from samdetr.structures import Batch

T = TypeVar("T")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to ``device``, with float32 images [B, 3, H, W], normalised and zero-padded.

    uint8 images cross to the device as they are, a quarter of the bytes, and are normalised there by the operations of
    `transforms.normalise`. On a GPU images become channels-last; a CPU is faster, and computes the published bits,
    without.
    """
    moved = batch.to(device)
    layout = torch.contiguous_format if device.type == "cpu" else torch.channels_last
    if moved.images.dtype != torch.uint8:
        return moved._replace(images=moved.images.contiguous(memory_format=layout))
    images = moved.images.to(torch.float32, memory_format=layout)
    mean, std = _mean_std(device)
    rows, columns = (torch.arange(side, device=device) for side in images.shape[-2:])
    heights, widths = moved.image_sizes[:, :, None].unbind(dim=1)
    padded = (rows >= heights)[:, None, :, None] | (columns >= widths)[:, None, None]
    images = images.mul_(1 / 255).sub_(mean).div_(std).masked_fill_(padded, 0.0)
    return moved._replace(images=images)


@cache
def _mean_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return both for each channel [3, 1, 1]; copied once, since each copy from the host would wait for the device."""
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def prefetch(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield the steps with each batch on ``device``. On a GPU the next step is copied while the current one computes.

    Raises DataError where ``steps`` does, after all steps before it.
    """
    if device.type == "cuda":
        return _prefetch_cuda(steps, device)
    return ([to_device(batch, device) for batch in step] for step in steps)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield the items, each once the next one is made. A DataError is raised after all items before it."""
    source = iter(items)
    ready: list[T] = []
    failure: DataError | None = None
    while True:
        following: list[T] = []
        try:
            following = [next(source)]
        except StopIteration:
            pass
        except DataError as error:
            failure = error
        yield from ready
        if failure is not None:
            raise failure
        if not following:
            return
        ready = following


def _prefetch_cuda(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Copy and normalise on a stream of its own; copies overlap with the step if the host's tensors are pinned."""
    stream = torch.cuda.Stream(device)

    def copies() -> Iterator[tuple[list[Batch], torch.cuda.Event]]:
        for step in steps:
            with torch.cuda.stream(stream):
                batches = [to_device(batch, device) for batch in step]
                copied = stream.record_event()
            yield batches, copied

    for batches, copied in one_ahead(copies()):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for batch in batches:
            for tensor in batch.step_tensors():
                tensor.record_stream(current)  # its memory is not reused before the step has read it
        yield batches
