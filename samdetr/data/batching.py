"""From samples to padded batches, and the order in which images are visited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from samdetr.errors import DataError
from samdetr.structures import Batch, Targets

Key = tuple[int, int]  # (epoch, row of the image)
Shape = tuple[int, int]  # padded (height, width) of a batch, pixels


class MicroBatch(NamedTuple):
    """The images of one forward pass, not loaded yet."""

    keys: list[Key]
    shape: Shape | None  # what they are padded to; None: their own largest sides


class Sample(NamedTuple):
    """One image after the transform, with its objects."""

    image: Tensor  # [3, h, w] float32, normalised; or uint8 pixels
    boxes: Tensor  # [n, 4] float32 (cx, cy, w, h) in [0, 1] of ``image``
    labels: Tensor  # [n] int64, index of the class logit
    image_id: int
    original_size: tuple[int, int]  # (height, width) of the decoded photo


def collate(samples: Sequence[Sample], max_objects: int, shape: Shape | None = None) -> Batch:
    """Pad images with zeros at the bottom and right, and targets to T = ``max_objects``.

    Images become ``shape``, or as large as the largest of their sides. float32 images stay so; uint8 images are
    padded as uint8 with channels-last strides. No sample may have more than ``max_objects`` boxes.

    Raises:
        DataError: an image is larger than ``shape``.
    """
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    if shape is not None:
        if height > shape[0] or width > shape[1]:
            raise DataError(
                f"image ids {', '.join(str(sample.image_id) for sample in samples)}: {height} x {width} pixels were "
                f"planned to fit {shape[0]} x {shape[1]}, which is a fault of samdetr.data.planning: report it, and "
                'set data.batching = "random" to go on without such plans.'
            )
        height, width = shape
    if samples[0].image.dtype == torch.uint8:
        images = _zeros(len(samples) * height * width * 3).view(len(samples), height, width, 3).permute(0, 3, 1, 2)
    else:
        images = torch.zeros(len(samples), 3, height, width)
    labels = torch.zeros(len(samples), max_objects, dtype=torch.int64)
    boxes = torch.zeros(len(samples), max_objects, 4)
    for row, sample in enumerate(samples):
        images[row, :, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
        labels[row, : len(sample.labels)] = sample.labels
        boxes[row, : len(sample.boxes)] = sample.boxes
    counts = torch.tensor([len(sample.labels) for sample in samples], dtype=torch.int64)
    return Batch(
        images=images,
        image_sizes=torch.tensor(sizes, dtype=torch.int64),
        targets=Targets(labels=labels, boxes=boxes, counts=counts),
        image_ids=torch.tensor([sample.image_id for sample in samples], dtype=torch.int64),
        original_sizes=torch.tensor([sample.original_size for sample in samples], dtype=torch.int64),
    )


def _zeros(count: int) -> Tensor:
    """Allocate zero bytes; a loader process takes them from shared memory (zero at first), and sends them uncopied."""
    if get_worker_info() is None:
        return torch.from_numpy(np.zeros(count, np.uint8))
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(count))


def cut_step(keys: Sequence[Key], micro: int) -> list[list[Key]]:
    """Cut the keys of one optimizer step into micro-batches of ``micro`` (the last may be smaller)."""
    return [list(keys[start : start + micro]) for start in range(0, len(keys), micro)]


def epoch_order(num_images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of the rows, int64 [num_images]: a function of (seed, epoch) alone.

    Sorting raw Philox output does not depend on the shuffling algorithm of a numpy version.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_images)
    return np.argsort(raw, kind="stable").astype(np.int64)


class EpochSampler:
    """Batches of (epoch, row) keys, with no state but the epoch and the first step.

    With ``shuffle`` (training) the order is `epoch_order` and an incomplete last batch is left out, as
    published; without (evaluation) the rows come in order and the last batch may be smaller.

    Raises:
        DataError: training on fewer images than one batch.
    """

    def __init__(self, num_images: int, batch: int, seed: int, *, shuffle: bool) -> None:
        if shuffle and num_images < batch:
            raise DataError(
                f"the training split has {num_images} images, fewer than one batch of {batch}: "
                f"set train.total_batch to {max(num_images, 1)} or less, or add images"
            )
        self.num_images, self.batch, self.seed, self.shuffle = num_images, batch, seed, shuffle
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration yield the batches of ``epoch`` from ``start_step`` on."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self.num_images // self.batch if self.shuffle else -(-self.num_images // self.batch)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, count = self.epoch, self.num_images
        rows = epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)
        for step in range(self.start_step, len(self)):
            yield [(epoch, int(row)) for row in rows[step * self.batch : (step + 1) * self.batch]]
