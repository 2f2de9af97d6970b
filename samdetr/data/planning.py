"""Plans of the training augmentation: the draws and sizes of an epoch's images, before any is decoded.

The random numbers of an image are the first words of MT19937 under a seed of its own. They depend on (seed, epoch, row)
alone; torch's CPU generator gives the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from samdetr.data.transforms import Ints, Plan, TrainTransform, resized_sides

_WORDS = 8  # the most that one plan takes


class Plans(NamedTuple):
    """The fields of `Plan` for n images."""

    flip: NDArray[np.bool_]  # [n]
    first: Ints  # [n]
    region: Ints  # [n, 4]
    size: Ints  # [n]
    shape: Ints  # [n, 2]

    def row(self, index: int) -> Plan:
        """Return the plan of one image."""
        flip, first, region, size, shape = (column[index].tolist() for column in self)
        return Plan(flip, first, tuple(region), size, tuple(shape))


def plan_images(transform: TrainTransform, heights: Ints, widths: Ints, *, seed: int, epoch: int, rows: Ints) -> Plans:
    """Plan the augmentation of the images ``rows`` [n] in an epoch.

    heights, widths: sides [N] of all images of the data set, pixels. An image's plan does not depend on the other rows.
    118,000 images take about two seconds, nearly all of it for seeding.
    """
    height, width = heights[rows], widths[rows]
    words = sample_words(seed, epoch, rows).astype(np.int64)
    flip, cropped = _uniform(words[0]) < transform.flip, _uniform(words[1]) < transform.crop
    first = np.array(transform.crop_resize_sizes)[words[2] % len(transform.crop_resize_sizes)]
    lines, columns = resized_sides(height, width, first, None)
    crop_width = _integer(words[3], columns.clip(max=transform.crop_min), columns.clip(max=transform.crop_max))
    crop_height = _integer(words[4], lines.clip(max=transform.crop_min), lines.clip(max=transform.crop_max))
    top, left = _integer(words[5], 0, lines - crop_height), _integer(words[6], 0, columns - crop_width)
    whole = np.zeros_like(height), np.zeros_like(width), height, width
    region = np.where(cropped, [top, left, crop_height, crop_width], whole)
    size = np.array(transform.sizes)[np.where(cropped, words[7], words[2]) % len(transform.sizes)]
    shape = np.stack(resized_sides(region[2], region[3], size, transform.max_size), axis=1)
    return Plans(flip, np.where(cropped, first, 0), region.T, size, shape)


def sample_words(seed: int, epoch: int, rows: Ints) -> NDArray[np.uint32]:
    """Draw the random numbers of images [n] in an epoch: uint32 [8, n].

    Each image seeds an MT19937 of its own, which takes 17 us: this keeps the pictures of earlier runs, so that they can
    be continued and repeated.
    """
    generator = np.random.RandomState()  # numpy keeps its numbers the same for ever
    words = np.empty((len(rows), _WORDS), np.uint32)
    for place, row in enumerate(rows.tolist()):
        generator.seed(sample_seed(seed, epoch, row) & 0xFFFFFFFF)  # MT19937 takes 32 bits
        words[place] = generator.randint(0, 2**32, size=_WORDS, dtype=np.uint32)
    return words.T


def sample_seed(seed: int, epoch: int, row: int) -> int:
    """Return the seed of an image's augmentation in an epoch, 64 bits."""
    return int(np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)[0])


def _uniform(words: Ints) -> NDArray[np.float64]:
    """Convert words to numbers in [0, 1), as torch.rand does."""
    return (words & 0xFFFFFF) / 2**24


def _integer(words: Ints, low: Ints | int, high: Ints) -> Ints:
    """Convert words to integers in [low, high], as torch.randint does."""
    return low + words % (high - low + 1)
