"""The sizes that the training augmentation will give to all images of an epoch, without decoding any.

A numpy twin of `TrainTransform.plan` under the seed of each sample, several times faster than one plan after another:
118,000 images take about a second, nearly all of it for the seeds. It repeats how torch's CPU generator (MT19937)
makes its numbers; a test holds both against each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from samdetr.data.batching import sample_seed
from samdetr.data.transforms import TrainTransform

Ints = NDArray[np.int64]
_Words = NDArray[np.uint32]
_DRAWS = 8  # the most that one plan takes


def epoch_sizes(transform: TrainTransform, heights: Ints, widths: Ints, *, seed: int, epoch: int, rows: Ints) -> Ints:
    """(height, width) after augmentation, int64 [n, 2], of the images ``rows`` [n]; heights and widths [N] of all."""
    low = [sample_seed(seed, epoch, row) & 0xFFFFFFFF for row in rows.tolist()]
    draws = _draws(np.array(low, dtype=np.uint32))
    height, width = heights[rows], widths[rows]
    cropped = (draws[1] & 0xFFFFFF) / 2**24 < transform.crop
    first = np.array(transform.crop_resize_sizes)[draws[2] % len(transform.crop_resize_sizes)]
    columns, lines = resized_sides(height, width, first, None)[::-1]
    region_width = _integer(draws[3], columns.clip(max=transform.crop_min), columns.clip(max=transform.crop_max))
    region_height = _integer(draws[4], lines.clip(max=transform.crop_min), lines.clip(max=transform.crop_max))
    height, width = np.where(cropped, region_height, height), np.where(cropped, region_width, width)
    size = np.array(transform.sizes)[np.where(cropped, draws[7], draws[2]) % len(transform.sizes)]
    return np.stack(resized_sides(height, width, size, transform.max_size), axis=1)


def resized_sides(height: Ints, width: Ints, size: Ints, max_size: int | None) -> tuple[Ints, Ints]:
    """`transforms.resized_sides` of arrays."""
    short, long = np.minimum(height, width), np.maximum(height, width)
    if max_size is not None:
        size = np.where(long / short * size > max_size, np.rint(max_size * short / long).astype(np.int64), size)
    scaled = np.where(short == size, long, (size * long / short).astype(np.int64))
    if max_size is not None:
        scaled, size = np.where(size == 0, max_size, scaled), size.clip(min=1)
    return np.where(width < height, scaled, size), np.where(width < height, size, scaled)


def _integer(draw: _Words, low: Ints, high: Ints) -> Ints:
    """As torch.randint: an integer in [low, high]."""
    return low + draw.astype(np.int64) % (high - low + 1)


def _draws(seeds: _Words) -> _Words:
    """The first numbers of an MT19937 generator for each seed, uint32 [_DRAWS, n]."""
    state, near, far = seeds, [seeds], []
    for place in range(1, 397 + _DRAWS):
        state = np.uint32(1812433253) * (state ^ (state >> np.uint32(30))) + np.uint32(place)
        if place <= _DRAWS:
            near.append(state)
        elif place >= 397:
            far.append(state)
    words = np.stack(near)
    joined: _Words = (words[:-1] & np.uint32(0x80000000)) | (words[1:] & np.uint32(0x7FFFFFFF))
    twist: _Words = (joined & np.uint32(1)) * np.uint32(0x9908B0DF)
    out: _Words = np.stack(far) ^ (joined >> np.uint32(1)) ^ twist
    out = out ^ (out >> np.uint32(11))
    out = out ^ ((out << np.uint32(7)) & np.uint32(0x9D2C5680))
    out = out ^ ((out << np.uint32(15)) & np.uint32(0xEFC60000))
    return out ^ (out >> np.uint32(18))
