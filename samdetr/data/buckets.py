"""Batches of a few fixed shapes: the shapes, the images that go together, and the share of padding.

The rule, a function of (seed, epoch) alone:
1. The epoch has the images of the published batches: the first ``steps * total_batch`` of `epoch_order`. What is left
   out is the tail of a random permutation, whatever the images' sizes.
2. Each image goes to the smallest shape that holds it, by the size its augmentation will give it.
3. The images of a shape, in the epoch's order, are cut into micro-batches. What is missing in a shape's last one comes
   from the smaller shapes, the largest that fit first: every micro-batch is full, every image appears once.
4. The micro-batches are shuffled, so that a step mixes shapes; the next ``total_batch / micro_batch`` are its own.

Compared with random batches the images of a micro-batch are alike in size and aspect, the distribution of single images
is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from samdetr.data.batching import EpochSampler, MicroBatch, Shape, epoch_order
from samdetr.data.planning import plan_images
from samdetr.data.transforms import Ints, TrainTransform

_SAMPLE = 20_000  # augmented sizes that the shapes are chosen from
_ROUNDS = 20  # of exchanging shapes; it ends earlier where no exchange helps


def choose_buckets(
    transform: TrainTransform, heights: Ints, widths: Ints, *, count: int, grid: int
) -> tuple[Shape, ...]:
    """Choose at most ``count`` padded (height, width), multiples of ``grid``, of least expected area; smallest first.

    heights, widths: [N] of the data set's images. Deterministic: sizes are drawn with a seed of its own. Two of the
    shapes (one, where images and crops are square) are those that hold every size the transform can give.
    """
    sizes = _sampled_sizes(transform, heights, widths)
    short, tallest, widest = _bounds(transform, heights, widths)
    must = {_on_grid((tallest, min(short, widest)), grid), _on_grid((min(short, tallest), widest), grid)}
    cells, weights = np.unique(-(-sizes // grid) * grid, axis=0, return_counts=True)
    sides = [np.unique(np.append(cells[:, axis], [shape[axis] for shape in must])) for axis in (0, 1)]
    candidates = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    areas = np.where((cells[:, None] <= candidates).all(axis=-1), candidates.prod(axis=1), np.inf)
    fixed = [int(np.flatnonzero((candidates == shape).all(axis=1))[0]) for shape in sorted(must)]
    chosen = _fewest_pixels(areas, weights, fixed, count)
    return tuple(
        sorted(((int(h), int(w)) for h, w in candidates[chosen]), key=lambda shape: (shape[0] * shape[1], shape))
    )


def _fewest_pixels(areas: NDArray[np.float64], weights: Ints, fixed: list[int], count: int) -> list[int]:
    """Choose columns of ``areas`` [cells, candidates]: one more at a time, then exchange one by one while it helps."""
    chosen = list(fixed)
    best = areas[:, chosen].min(axis=1)
    while len(chosen) < count:
        totals = weights @ np.minimum(areas, best[:, None])
        if totals.min() >= weights @ best:
            break
        chosen.append(int(totals.argmin()))
        best = np.minimum(best, areas[:, chosen[-1]])
    for _ in range(_ROUNDS):
        before = list(chosen)
        for place in range(len(fixed), len(chosen)):
            others = areas[:, chosen[:place] + chosen[place + 1 :]].min(axis=1)
            totals = weights @ np.minimum(areas, others[:, None])
            if totals.min() < totals[chosen[place]]:
                chosen[place] = int(totals.argmin())
        if chosen == before:
            break
    return chosen


def _sampled_sizes(transform: TrainTransform, heights: Ints, widths: Ints) -> Ints:
    """Plan about ``_SAMPLE`` augmented (height, width), spread evenly over the images: int64 [n, 2]."""
    rows = np.unique(np.linspace(0, len(heights) - 1, min(len(heights), _SAMPLE)).astype(np.int64))
    epochs = min(-(-_SAMPLE // len(rows)), 50)
    return np.concatenate(
        [plan_images(transform, heights, widths, seed=0, epoch=epoch, rows=rows).shape for epoch in range(epochs)]
    )


def _bounds(transform: TrainTransform, heights: Ints, widths: Ints) -> tuple[int, int, int]:
    """Return the longest short side, height and width that the transform can give to any of the images."""
    short = max(transform.sizes)
    aspects = [(heights / widths).max(), (widths / heights).max()]
    if transform.crop:
        least = min(transform.crop_min, *transform.crop_resize_sizes)
        aspects = [max(aspect, transform.crop_max / least) for aspect in aspects]
    # The published rounding of the short side can take the long one beyond max_size by half the aspect.
    tallest, widest = (int(min(short * max(a, 1), transform.max_size + max(a, 1) / 2)) for a in aspects)
    return short, tallest, widest


def largest_random_shape(transform: TrainTransform, heights: Ints, widths: Ints, images: int) -> Shape:
    """Return the largest shape that a random batch of so many images can have: one image is high, another one wide."""
    short, tallest, widest = _bounds(transform, heights, widths)
    if images > 1:
        return tallest, widest
    return (tallest, short) if tallest > widest else (short, widest)


def _on_grid(sides: Shape, grid: int) -> Shape:
    return -(-sides[0] // grid) * grid, -(-sides[1] // grid) * grid


class BucketSampler:
    """Micro-batches of ``shapes`` by the rule above, with no state but the epoch and the first step.

    sizes_of: (epoch, rows [n]) -> augmented (height, width), int64 [n, 2]. ``micro`` divides ``batch``. If an epoch's
    last images fit together in none of the shapes (only a data set of few images has that), they take one as high as
    the highest and as wide as the widest.

    Raises:
        DataError: fewer images than one batch.
    """

    def __init__(
        self,
        sizes_of: Callable[[int, Ints], Ints],
        num_images: int,
        shapes: Sequence[Shape],
        *,
        batch: int,
        micro: int,
        seed: int,
    ) -> None:
        self.sizes_of, self.num_images, self.shapes = sizes_of, num_images, tuple(shapes)
        self.batch, self.micro, self.seed = batch, micro, seed
        self._steps = EpochSampler(num_images, batch, seed, shuffle=True)
        self._planned: tuple[int, list[tuple[Ints, Shape]]] = (-1, [])

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration yield the micro-batches of ``epoch`` from ``start_step`` on."""
        self._steps.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        """Return the steps of a whole epoch, of ``batch / micro`` micro-batches each."""
        return len(self._steps)

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch, first = self._steps.epoch, self._steps.start_step * (self.batch // self.micro)
        for rows, shape in self.plan(epoch)[first:]:
            yield MicroBatch([(epoch, row) for row in rows.tolist()], shape)

    def plan(self, epoch: int) -> list[tuple[Ints, Shape]]:
        """Return rows [micro] and shape of every micro-batch of an epoch; about two seconds for 118,000 images."""
        if self._planned[0] != epoch:
            rows = epoch_order(self.num_images, self.seed, epoch)[: len(self) * self.batch]
            groups = group_by_shape(self.sizes_of(epoch, rows), self.shapes, self.micro)
            raw = np.random.Philox(np.random.SeedSequence([self.seed, epoch, 1])).random_raw(len(groups))
            order = np.argsort(raw, kind="stable").tolist()
            self._planned = (epoch, [(rows[groups[place][0]], groups[place][1]) for place in order])
        return self._planned[1]


def group_by_shape(sizes: Ints, shapes: Sequence[Shape], micro: int) -> list[tuple[Ints, Shape]]:
    """Cut images of ``sizes`` [n, 2] into full micro-batches: positions [micro] and the shape that holds them.

    ``micro`` divides n. Each image is in exactly one; images of a shape stay in order.
    """
    table = np.array(sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape)))
    fits: NDArray[np.bool_] = np.all(sizes[:, None] <= table, axis=-1)
    home = np.where(fits.any(axis=1), fits.argmax(axis=1), len(table))
    members = [np.flatnonzero(home == place).tolist() for place in range(len(table))]
    groups: list[tuple[Ints, Shape]] = []
    rest = np.flatnonzero(home == len(table)).tolist()
    for place in reversed(range(len(table))):
        own = members[place]
        missing = -len(own) % micro
        for smaller in reversed(range(place)):
            taken = [row for row in reversed(members[smaller]) if fits[row, place]][:missing]
            missing -= len(taken)
            own = own + taken
            members[smaller] = [row for row in members[smaller] if row not in taken]
            if not missing:
                break
        whole = len(own) - len(own) % micro
        shape = (int(table[place][0]), int(table[place][1]))
        groups += [(np.array(own[start : start + micro]), shape) for start in range(0, whole, micro)]
        rest += own[whole:]
    for start in range(0, len(rest), micro):
        rows = np.array(rest[start : start + micro])
        high, wide = sizes[rows].max(axis=0)
        holding = table[(table >= (high, wide)).all(axis=1)]
        high, wide = holding[0] if len(holding) else (table[:, 0].max().clip(high), table[:, 1].max().clip(wide))
        groups.append((rows, (int(high), int(wide))))
    return groups


def useful_pixels(sizes: Ints, shapes: Ints) -> float:
    """Return the share of pixels that are no padding.

    sizes: (height, width) of the images [batches * micro, 2], batch by batch. shapes: what the batches are padded to
    [batches, 2].
    """
    micro = len(sizes) // len(shapes)
    return float(sizes.prod(axis=1).sum() / (micro * shapes.prod(axis=1).sum()))
