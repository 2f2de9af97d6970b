"""Plans of many images are those of each, with the numbers that torch's generator gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from samdetr.data.planning import plan_images, sample_seed
from samdetr.data.transforms import Plan, TrainTransform, build_train_transform, resized_sides
from samdetr.recipe import AugmentSection
from tests.data.mixes import coco_like
from tests.data.test_transforms import augmented

PUBLISHED = build_train_transform(AugmentSection())
ODD = TrainTransform(flip=0.3, sizes=(7, 33), max_size=40, crop=0.7, crop_resize_sizes=(5, 60), crop_min=9, crop_max=70)


def integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def choice(values: Sequence[int]) -> int:
    return values[integer(0, len(values) - 1)]


def sides_by_hand(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """The published rounding rule, of integers."""
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
        if size == 0:
            return (1, max_size) if height < width else (max_size, 1)
    if short == size:
        return height, width
    long = int(size * long / short)
    return (long, size) if width < height else (size, long)


def planned(transform: TrainTransform, height: int, width: int, *key: int) -> Plan:
    """The published draws of one image after the other, from torch's generator."""
    torch.manual_seed(sample_seed(*key))
    mirrored, cropped = (float(torch.rand(())) < share for share in (transform.flip, transform.crop))
    first, region = 0, (0, 0, height, width)
    if cropped:
        first = choice(transform.crop_resize_sizes)
        rows, columns = sides_by_hand(height, width, first, None)
        width = integer(min(transform.crop_min, columns), min(transform.crop_max, columns))
        height = integer(min(transform.crop_min, rows), min(transform.crop_max, rows))
        top, left = integer(0, rows - height), integer(0, columns - width)
        region = (top, left, height, width)
    size = choice(transform.sizes)
    return Plan(mirrored, first, region, size, sides_by_hand(height, width, size, transform.max_size))


@pytest.mark.parametrize(
    "transform",
    [PUBLISHED, ODD, dataclasses.replace(ODD, crop=0.0), dataclasses.replace(PUBLISHED, crop=1.0)],
    ids=["published", "odd", "no crop", "always crop"],
)
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 5])
def test_plans_of_many_are_the_published_draws_of_each(transform: TrainTransform, seed: int) -> None:
    heights, widths = coco_like(150)
    extreme = np.array([1, 1, 500, 9, 4, 2000, 40, 33])  # with every other one of themselves
    heights = np.concatenate([heights, extreme.repeat(8)])
    widths = np.concatenate([widths, np.tile(extreme, 8)])
    rows = np.arange(len(heights))[::-1]
    plans = plan_images(transform, heights, widths, seed=seed, epoch=3, rows=rows)
    want = [planned(transform, int(heights[row]), int(widths[row]), seed, 3, int(row)) for row in rows]
    assert [plans.row(place) for place in range(len(rows))] == want
    alone = plan_images(transform, heights, widths, seed=seed, epoch=3, rows=rows[5:6])
    assert alone.row(0) == want[5]


def test_the_seed_of_a_sample_never_changes_between_versions() -> None:
    assert sample_seed(42, 3, 7) == 5122231805094739018


def test_the_size_rule_of_arrays_is_that_of_numbers() -> None:
    rng = np.random.default_rng(0)
    height, width, size = rng.integers(1, 1500, (3, 3000))
    height[:1000] = rng.integers(1, 9, 1000)
    for longest in (None, 40, 1333):
        got = np.stack(resized_sides(height, width, size, longest), axis=1)
        each = list(zip(height.tolist(), width.tolist(), size.tolist(), strict=True))
        assert [tuple(pair) for pair in got.tolist()] == [sides_by_hand(*one, longest) for one in each]
        assert resized_sides(*each[0], longest) == sides_by_hand(*each[0], longest)


def test_the_result_has_the_planned_size() -> None:
    sides = np.full(30, 31), np.full(30, 47)
    for seed in range(30):
        plan = plan_images(ODD, *sides, seed=seed, epoch=0, rows=np.array([0])).row(0)
        photo = torch.zeros(3, 31, 47, dtype=torch.uint8)
        image, _, _ = augmented(ODD, photo, torch.zeros(0, 4), torch.zeros(0), seed)
        assert image.shape == (3, *plan.shape)
