"""The planned sizes are those that the augmentation gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from samdetr.data import planning, transforms
from samdetr.data.batching import sample_seed
from samdetr.data.planning import epoch_sizes
from samdetr.data.transforms import TrainTransform, build_transform
from samdetr.recipe import AugmentSection
from tests.data.mixes import coco_like

PUBLISHED = build_transform(AugmentSection(), training=True)
ODD = TrainTransform(flip=0.3, sizes=(7, 33), max_size=40, crop=0.7, crop_resize_sizes=(5, 60), crop_min=9, crop_max=70)


def planned(transform: TrainTransform, height: int, width: int, *key: int) -> tuple[int, int]:
    torch.manual_seed(sample_seed(*key))
    return transform.plan(height, width).shape


@pytest.mark.parametrize(
    "transform",
    [PUBLISHED, ODD, dataclasses.replace(ODD, crop=0.0), dataclasses.replace(PUBLISHED, crop=1.0)],
    ids=["published", "odd", "no crop", "always crop"],
)
@pytest.mark.parametrize("seed", [0, 42, 2**40 + 5])
def test_sizes_of_many_are_the_plans_of_each(transform: TrainTransform, seed: int) -> None:
    heights, widths = coco_like(150)
    extreme = np.array([1, 1, 500, 9, 4, 2000, 40, 33])  # with every other one of themselves
    heights = np.concatenate([heights, extreme.repeat(8)])
    widths = np.concatenate([widths, np.tile(extreme, 8)])
    rows = np.arange(len(heights))[::-1]
    sizes = epoch_sizes(transform, heights, widths, seed=seed, epoch=3, rows=rows)
    want = [planned(transform, int(heights[row]), int(widths[row]), seed, 3, int(row)) for row in rows]
    assert [tuple(size) for size in sizes.tolist()] == want


def test_the_size_rule_of_arrays_is_that_of_numbers() -> None:
    rng = np.random.default_rng(0)
    height, width, size = rng.integers(1, 1500, (3, 3000))
    height[:1000] = rng.integers(1, 9, 1000)
    for longest in (None, 40, 1333):
        got = np.stack(planning.resized_sides(height, width, size, longest), axis=1)
        each = zip(height.tolist(), width.tolist(), size.tolist(), strict=True)
        assert [tuple(pair) for pair in got.tolist()] == [transforms.resized_sides(*one, longest) for one in each]


def test_the_result_has_the_planned_size() -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        plan = ODD.plan(31, 47)
        torch.manual_seed(seed)
        image, _, _ = ODD(torch.zeros(3, 31, 47, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0))
        assert image.shape == (3, *plan.shape)
