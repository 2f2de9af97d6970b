"""Augmentation: hand-computed boxes, the size rule, and boxes that follow the pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from samdetr.data import transforms
from samdetr.data.planning import plan_images
from samdetr.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    TrainTransform,
    build_eval_transform,
    build_train_transform,
    crop,
    flip,
    normalise,
    resize,
    resized_sides,
)
from samdetr.recipe import AugmentSection

TRAIN = TrainTransform(
    flip=0.5, sizes=(48, 56, 64), max_size=107, crop=0.5, crop_resize_sizes=(40, 50), crop_min=30, crop_max=44
)


def augmented(
    transform: TrainTransform, image: Tensor, boxes: Tensor, labels: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of the transform as planned under a seed."""
    height, width = (np.array([side]) for side in image.shape[-2:])
    plan = plan_images(transform, height, width, seed=seed, epoch=0, rows=np.array([0])).row(0)
    return transform.apply(plan, image, boxes, labels)


def boxes_of(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def image_of(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("height", "width", "size", "max_size", "want"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, cut
        (640, 480, 800, 1333, (1066, 800)),
        (427, 640, 800, 1333, (800, 1199)),  # 1199.06
        (300, 1000, 800, 1333, (400, 1333)),  # 1333 * 0.3 = 399.9 -> 400; 400 * 10 / 3 = 1333.3
        (1000, 300, 800, 1333, (1333, 400)),
        (375, 500, 375, 1333, (375, 500)),
        (375, 500, 400, None, (400, 533)),  # 533.33
        (500, 500, 480, 1333, (480, 480)),
        (480, 899, 800, 1333, (712, 1333)),  # 1333 * 480 / 899 = 711.7 -> 712; 712 * 899 / 480 = 1333.5
        (1, 10_000, 800, 1333, (1, 1333)),
        (100, 2000, 800, 1333, (67, 1340)),  # published: rounding of the short side may exceed the maximum
    ],
)
def test_size_rule(height: int, width: int, size: int, max_size: int | None, want: tuple[int, int]) -> None:
    assert resized_sides(height, width, size, max_size) == want


def test_resize_scales_by_the_exact_ratio() -> None:
    image, boxes = resize(image_of(480, 640), boxes_of((10, 20, 110, 60), (0, 0, 640, 480)), 800, 1333)
    assert image.shape == (3, 800, 1066) and image.dtype == torch.uint8
    want = boxes_of((10 * 1066 / 640, 20 * 800 / 480, 110 * 1066 / 640, 60 * 800 / 480), (0, 0, 1066, 800))
    assert (boxes - want).abs().max() < 1e-6


def test_flip_by_hand() -> None:
    image = image_of(4, 10)
    flipped, boxes = flip(image, boxes_of((1, 0, 3.5, 4), (0, 1, 10, 2)))
    assert boxes.tolist() == [[6.5, 0, 9, 4], [0, 1, 10, 2]]
    assert torch.equal(flipped, image[:, :, range(9, -1, -1)])


def test_crop_by_hand() -> None:
    image = image_of(50, 60)
    boxes = boxes_of(
        (5, 5, 15, 12),  # overlaps the corner
        (20, 20, 25, 30),  # inside
        (0, 0, 60, 50),  # around the region
        (0, 0, 10, 40),  # touches the left edge: no area
        (31, 0, 60, 50),  # right of it
        (12, 44, 20, 50),  # below
    )
    region, kept, labels = crop(image, boxes, torch.arange(6), 10, 10, 30, 20)
    assert kept.tolist() == [[0, 0, 5, 2], [10, 10, 15, 20], [0, 0, 20, 30]]
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(region, image[:, 10:40, 10:30])


def test_normalise_by_hand() -> None:
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1).expand(3, 20, 40)
    pixels, boxes, labels = normalise(image, boxes_of((10, 5, 30, 15), (3, 3, 3, 9)), torch.tensor([4, 5]))
    values = zip((0, 128, 255), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    want = [(value / 255 - mean) / std for value, mean, std in values]
    assert pixels.dtype == torch.float32 and pixels[:, 7, 3].tolist() == pytest.approx(want, abs=1e-6)
    assert boxes.dtype == torch.float32 and boxes.tolist() == [[0.5, 0.5, 0.5, 0.5]]
    assert labels.tolist() == [4]


def test_whole_training_transform_by_hand() -> None:
    fixed = TrainTransform(
        flip=1.0, sizes=(60,), max_size=1000, crop=1.0, crop_resize_sizes=(40,), crop_min=500, crop_max=600
    )
    image, boxes, labels = augmented(fixed, image_of(20, 50), boxes_of((5, 4, 15, 14)), torch.tensor([3]), 0)
    # Flip: x 35..45. To 40 x 100: x 70..90, y 8..28. The crop is the whole picture.
    # To 60 x 150: x 105..135, y 12..42.
    assert image.shape == (3, 60, 150)
    assert boxes[0].tolist() == pytest.approx([120 / 150, 27 / 60, 30 / 150, 30 / 60], abs=1e-6)
    assert labels.tolist() == [3]


def test_evaluation_transform_by_hand() -> None:
    image, boxes, _ = EvalTransform(size=30, max_size=60)(image_of(20, 50), boxes_of((5, 4, 15, 14)), torch.tensor([3]))
    assert image.shape == (3, 24, 60)
    assert boxes[0].tolist() == pytest.approx([0.2, 0.45, 0.2, 0.5], abs=1e-6)


def test_agrees_with_tv_tensors() -> None:
    image = image_of(37, 61)
    boxes = boxes_of((3.25, 4.5, 30.75, 20.125), (40, 0.5, 60.5, 36))
    oracle = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(37, 61), dtype=torch.float64)
    resized, scaled = resize(image, boxes, 50, None)
    size = list(resized.shape[-2:])
    assert torch.equal(resized, F.resize(tv_tensors.Image(image), size, antialias=True))
    assert (scaled - F.resize(oracle, size)).abs().max() < 1e-4
    assert (flip(image, boxes)[1] - F.horizontal_flip(oracle)).abs().max() < 1e-9
    assert (crop(image, boxes, torch.zeros(2), 2, 5, 30, 50)[1] - F.crop(oracle, 2, 5, 30, 50)).abs().max() < 1e-9


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_the_pixels(seed: int) -> None:
    image = torch.zeros(3, 60, 90, dtype=torch.uint8)
    image[:, 12:40, 20:70] = 255
    pixels, boxes, labels = augmented(TRAIN, image, boxes_of((20, 12, 70, 40)), torch.tensor([1]), seed)
    height, width = pixels.shape[1:]
    bright = (pixels[0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) > 0.5
    assert len(boxes) == len(labels) == int(bright.any())
    if len(boxes):
        rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
        seen = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        cx, cy, w, h = boxes[0].tolist()
        got = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
        assert got == pytest.approx(seen, abs=1.5)


def test_draws_cover_the_published_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    crops: list[tuple[int, ...]] = []
    resizes: list[tuple[int, int | None]] = []

    def watched_crop(image: Tensor, boxes: Tensor, labels: Tensor, *region: int) -> tuple[Tensor, Tensor, Tensor]:
        crops.append((*image.shape[1:], *region))
        return crop(image, boxes, labels, *region)

    def watched_resize(image: Tensor, boxes: Tensor, size: int, max_size: int | None) -> tuple[Tensor, Tensor]:
        resizes.append((size, max_size))
        return resize(image, boxes, size, max_size)

    monkeypatch.setattr(transforms, "crop", watched_crop)
    monkeypatch.setattr(transforms, "resize", watched_resize)
    for seed in range(600):
        augmented(TRAIN, image_of(60, 45), boxes_of(), torch.zeros(0), seed)
    assert 240 < len(crops) < 360
    assert {size for size, limit in resizes if limit is None} == {40, 50}
    assert {size for size, limit in resizes if limit == 107} == {48, 56, 64}
    assert len(resizes) == 600 + len(crops)
    assert {height for *_, height, _ in crops} == set(range(30, 45)) == {width for *_, width in crops}
    assert any(height != width for *_, height, width in crops)
    assert all(top + height <= rows and left + width <= columns for rows, columns, top, left, height, width in crops)
    assert any(top + height == rows for rows, _, top, _, height, _ in crops)
    assert any(left + width == columns for _, columns, _, left, _, width in crops)


def test_probabilities_of_zero_and_one() -> None:
    image = image_of(48, 60)
    still = dataclasses.replace(TRAIN, flip=0.0, crop=0.0, sizes=(48,))
    pixels, _, _ = augmented(still, image, boxes_of(), torch.zeros(0), 0)
    mirrored, _, _ = augmented(dataclasses.replace(still, flip=1.0), image, boxes_of(), torch.zeros(0), 0)
    assert torch.equal(mirrored, pixels.flip(-1))
    assert torch.equal(pixels, EvalTransform(size=48, max_size=100)(image, boxes_of(), torch.zeros(0))[0])


def test_recipe_section_is_passed_on() -> None:
    section = AugmentSection()
    assert build_eval_transform(section) == EvalTransform(size=800, max_size=1333)
    assert build_train_transform(section) == TrainTransform(
        flip=0.5,
        sizes=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_size=1333,
        crop=0.5,
        crop_resize_sizes=(400, 500, 600),
        crop_min=384,
        crop_max=600,
    )
