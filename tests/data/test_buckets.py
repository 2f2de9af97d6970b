"""The shapes, which images go together, and the share of pixels that is not padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from samdetr.data.batching import epoch_order
from samdetr.data.buckets import BucketSampler, choose_buckets, group_by_shape, useful_pixels
from samdetr.data.planning import plan_images
from samdetr.data.transforms import Ints, TrainTransform, build_train_transform
from samdetr.errors import DataError
from samdetr.recipe import AugmentSection, DataSection
from tests.data.mixes import coco_like

PUBLISHED = build_train_transform(AugmentSection())
SMALL = TrainTransform(
    flip=0.5, sizes=(16, 20, 24), max_size=40, crop=0.5, crop_resize_sizes=(20, 30), crop_min=10, crop_max=20
)


def sampler_of(
    heights: Ints, widths: Ints, transform: TrainTransform, *, count: int, grid: int, batch: int, micro: int
) -> BucketSampler:
    def sizes_of(epoch: int, rows: Ints) -> Ints:
        return plan_images(transform, heights, widths, seed=5, epoch=epoch, rows=rows).shape

    shapes = choose_buckets(transform, heights, widths, count=count, grid=grid)
    return BucketSampler(sizes_of, len(heights), shapes, batch=batch, micro=micro, seed=5)


def small_sampler(count: int = 5, images: int = 203) -> BucketSampler:
    rng = np.random.default_rng(1)
    return sampler_of(*rng.integers(12, 60, (2, images)), SMALL, count=count, grid=4, batch=8, micro=4)


def test_useful_pixels_of_coco_like_sizes() -> None:
    """The published augmentation at 16 images a batch, with the default number of shapes and grid."""
    section = DataSection()
    sampler = sampler_of(
        *coco_like(16_000), PUBLISHED, count=section.buckets, grid=section.bucket_grid, batch=16, micro=16
    )
    plan = sampler.plan(0)
    shapes = [shape for _, shape in plan]
    assert len(set(shapes)) == len(sampler.shapes) == 16
    assert useful_pixels(sampler.sizes_of(0, np.concatenate([rows for rows, _ in plan])), np.array(shapes)) >= 0.87
    sizes = sampler.sizes_of(0, epoch_order(16_000, 5, 0))
    assert useful_pixels(sizes, sizes.reshape(-1, 16, 2).max(axis=1)) < 0.52  # random batches


def test_useful_pixels_by_hand() -> None:
    sizes = np.array([(2, 3), (4, 5), (1, 1), (6, 2)])
    assert useful_pixels(sizes, np.array([(4, 6), (6, 4)])) == (6 + 20 + 1 + 12) / (2 * 24 + 2 * 24)


def test_shapes_are_few_on_the_grid_and_the_same_each_time() -> None:
    heights, widths = coco_like(500)
    for count, grid in ((2, 64), (7, 32), (16, 32)):
        shapes = choose_buckets(PUBLISHED, heights, widths, count=count, grid=grid)
        assert len(shapes) == len(set(shapes)) == count
        assert all(side % grid == 0 for shape in shapes for side in shape)
        assert [h * w for h, w in shapes] == sorted(h * w for h, w in shapes)
        assert shapes == choose_buckets(PUBLISHED, heights, widths, count=count, grid=grid)


def test_more_shapes_are_never_worse() -> None:
    heights, widths = coco_like(2000)
    rows = np.arange(2000)
    sizes = plan_images(PUBLISHED, heights, widths, seed=9, epoch=0, rows=rows).shape
    areas = []
    for count in (2, 4, 8, 16, 32):
        table = np.array(choose_buckets(PUBLISHED, heights, widths, count=count, grid=32))
        fits = (sizes[:, None] <= table).all(axis=-1)
        areas.append(np.where(fits, table.prod(axis=1), np.inf).min(axis=1).sum())
    assert areas == sorted(areas, reverse=True) and areas[-1] < 0.7 * areas[0]


@pytest.mark.parametrize("crop", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("transform", [PUBLISHED, SMALL], ids=["published", "small"])
def test_every_size_fits_in_a_shape(transform: TrainTransform, crop: float) -> None:
    """Also those of images that the shapes were not chosen from, of any aspect."""
    transform = dataclasses.replace(transform, crop=crop)
    sides = np.array([1, 3, 20, 40, 333, 1000])
    heights, widths = sides.repeat(6), np.tile(sides, 6)
    shapes = np.array(choose_buckets(transform, heights, widths, count=3, grid=8))
    for seed in range(5):
        sizes = plan_images(transform, heights, widths, seed=seed, epoch=7, rows=np.arange(36)).shape
        assert (sizes[:, None] <= shapes).all(axis=-1).any(axis=1).all()


def test_pictures_of_one_size_need_one_shape() -> None:
    transform = dataclasses.replace(SMALL, sizes=(128,), max_size=128, crop=0.0)
    sides = np.full(10, 128)
    assert choose_buckets(transform, sides, sides, count=16, grid=32) == ((128, 128),)


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_full_hold_their_images_and_take_each_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [(20, 20), (20, 40), (40, 20), (40, 64), (64, 40)]
    for images in (4, 8, 40, 400):
        sizes = rng.integers(1, 41, (images, 2))
        sizes[rng.random(images) < 0.1, 0] = 60
        sizes[(sizes[:, 0] < 41) & (rng.random(images) < 0.1), 1] = 60
        groups = group_by_shape(sizes, shapes, 4)
        assert all(len(rows) == 4 and (sizes[rows] <= shape).all() for rows, shape in groups)
        assert sorted(np.concatenate([rows for rows, _ in groups]).tolist()) == list(range(images))
        if images == 400:
            assert {shape for _, shape in groups} == set(shapes)


def test_a_last_batch_is_filled_with_the_largest_smaller_images_that_fit() -> None:
    shapes = [(10, 10), (10, 20), (20, 10), (20, 30)]
    #        0         1         2        3        4        5         6        7
    sizes = [(20, 30), (10, 18), (9, 20), (8, 19), (5, 20), (19, 10), (4, 4), (18, 9)]
    groups = group_by_shape(np.array(sizes), shapes, 2)
    # The largest shape lacks one: (20, 10) is the largest smaller shape, and 7 its last image. That lacks one then,
    # which no image of (10, 20) can be, but 6 can.
    assert [(rows.tolist(), shape) for rows, shape in groups] == [
        ([0, 7], (20, 30)),
        ([5, 6], (20, 10)),
        ([1, 2], (10, 20)),
        ([3, 4], (10, 20)),
    ]


def test_images_that_fit_together_nowhere_take_a_shape_of_their_own() -> None:
    groups = group_by_shape(np.array([(9, 30), (30, 9)]), [(10, 40), (32, 10)], 2)
    assert [(sorted(rows.tolist()), shape) for rows, shape in groups] == [([0, 1], (32, 40))]


def test_an_epoch_has_the_images_of_the_published_batches() -> None:
    sampler = small_sampler()
    assert len(sampler) == 203 // 8 == 25
    for epoch in (0, 4):
        sampler.set_epoch(epoch)
        micro_batches = list(sampler)
        assert len(micro_batches) == 50 and {len(micro.keys) for micro in micro_batches} == {4}
        assert {micro.shape for micro in micro_batches} <= set(sampler.shapes)
        keys = [key for micro in micro_batches for key in micro.keys]
        assert {number for number, _ in keys} == {epoch}
        assert sorted(row for _, row in keys) == sorted(epoch_order(203, 5, epoch)[:200].tolist())
        sizes = sampler.sizes_of(epoch, np.array([row for _, row in keys])).reshape(50, 4, 2)
        assert (sizes <= np.array([micro.shape for micro in micro_batches])[:, None]).all()


def test_an_epoch_resumes_at_any_step() -> None:
    sampler = small_sampler()
    sampler.set_epoch(3)
    whole = list(sampler)
    for step in (0, 1, 13, 24, 25):
        fresh = small_sampler()
        fresh.set_epoch(3, step)
        assert list(fresh) == whole[2 * step :]
    sampler.set_epoch(4)
    assert list(sampler) != whole


def test_steps_mix_shapes_over_the_whole_epoch() -> None:
    sampler = small_sampler(images=2000)
    shapes = [shape for _, shape in sampler.plan(0)]
    mixed = sum(first != second for first, second in zip(shapes[::2], shapes[1::2], strict=True)) / len(sampler)
    shares = np.array([shapes.count(shape) for shape in sampler.shapes]) / len(shapes)
    assert mixed == pytest.approx(1 - (shares**2).sum(), abs=0.1)
    areas = np.array([high * wide for high, wide in shapes])
    assert abs(np.corrcoef(np.arange(len(areas)), areas)[0, 1]) < 0.12


def test_too_few_images_is_an_error() -> None:
    with pytest.raises(DataError, match=r"has 7 images.*batch of 8.*train\.total_batch to 7"):
        small_sampler(images=7)
    assert len(small_sampler(images=8)) == 1
