"""The last part of the data path, on the device: from what the loader sends to what the model sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from samdetr.data.resample import resample
from samdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from samdetr.errors import DataError
from samdetr.structures import Batch

T = TypeVar("T")


def finish(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device`` with float32 images, normalised and zero-padded.

    uint8 images cross to the device as they are, a quarter of the bytes, and are normalised there by the operations of
    `transforms.normalise`. On a GPU images are channels-last; a CPU is faster, and computes the published bits,
    without. Whole photos (data.resize = "device") are augmented first.
    """
    moved = batch.to(device)
    layout = torch.contiguous_format if device.type == "cpu" else torch.channels_last
    if moved.images.dtype != torch.uint8:
        return moved._replace(images=moved.images.contiguous(memory_format=layout))
    if moved.resample is None:
        images = moved.images
    else:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        images = resample(moved.images, moved.geometry, moved.resample, dtype)
    images = images.to(torch.float32, memory_format=layout)
    mean, std = _mean_std(device)
    rows, columns = (torch.arange(side, device=device) for side in images.shape[-2:])
    heights, widths = moved.image_sizes[:, :, None].unbind(dim=1)
    padded = (rows >= heights)[:, None, :, None] | (columns >= widths)[:, None, None]
    images = images.mul_(1 / 255).sub_(mean).div_(std).masked_fill_(padded, 0.0)
    return moved._replace(images=images, resample=None)


@cache
def _mean_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Per channel [3, 1, 1], copied once: each copy from the host would wait for the device."""
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def prefetch(steps: Iterable[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The steps, each batch `finish`ed. On a GPU the next step is copied while the current one computes.

    Raises DataError as ``steps`` does, after the steps before it were given out.
    """
    if device.type == "cuda":
        return _prefetch_cuda(steps, device)
    return ([finish(batch, device) for batch in step] for step in steps)


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each given out after the next one was made. A DataError waits until the items before it are out."""
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
    """Copies and normalisation run on a stream of their own; they overlap if the host's tensors are pinned."""
    stream = torch.cuda.Stream(device)

    def copies() -> Iterator[tuple[list[Batch], torch.cuda.Event]]:
        for step in steps:
            with torch.cuda.stream(stream):
                batches = [finish(batch, device) for batch in step]
                copied = stream.record_event()
            yield batches, copied

    for batches, copied in one_ahead(copies()):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for batch in batches:
            for tensor in (batch.images, batch.numbers):
                tensor.record_stream(current)  # its memory is not reused before the step has read it
        yield batches
