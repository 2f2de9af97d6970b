"""The published augmentation and the evaluation resize, of pixels and boxes. Box arithmetic is float64.

A transform maps (image uint8 [3, H, W], boxes float [n, 4] xyxy pixels, labels int64 [n]) to
(image float32 [3, H', W'] normalised, boxes float32 [m, 4] (cx, cy, w, h) in [0, 1], labels int64 [m]).
With ``raw`` the image stays uint8 (strides channels-last): `samdetr.data.device.to_device` normalises it later.
Boxes that have no area after the crop are left out together with their labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from samdetr.recipe import AugmentSection

Ints = NDArray[np.int64]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Transform = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Plan(NamedTuple):
    """The augmentation of one image, decided before it is decoded. Pixels."""

    flip: bool
    first: int  # short side of the resize before the crop, 0 where nothing is cropped
    region: tuple[int, int, int, int]  # top, left, height, width of the crop after it
    size: int  # short side of the last resize
    shape: tuple[int, int]  # (height, width) of the result


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Flip, then a resize, or with probability ``crop`` a resize, a random crop and the resize.

    Sizes are short sides in pixels. ``max_size`` bounds the long side of the last resize only (published).
    `samdetr.data.planning` draws the plan of each image.
    """

    flip: float
    sizes: tuple[int, ...]
    max_size: int
    crop: float
    crop_resize_sizes: tuple[int, ...]
    crop_min: int
    crop_max: int

    raw: bool = False

    def apply(self, plan: Plan, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Augment an image of the planned sides."""
        boxes = boxes.to(torch.float64)
        if plan.flip:
            image, boxes = flip(image, boxes)
        if plan.first:
            image, boxes = resize(image, boxes, plan.first, None)
            image, boxes, labels = crop(image, boxes, labels, *plan.region)
            if self.raw:  # 8-bit resizes are fastest with packed channels-last pixels
                image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        image, boxes = resize(image, boxes, plan.size, self.max_size)
        return relative(image, boxes, labels) if self.raw else normalise(image, boxes, labels)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """One resize to short side ``size`` with the long side at most ``max_size``, pixels."""

    size: int
    max_size: int
    raw: bool = False

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, boxes = resize(image, boxes.to(torch.float64), self.size, self.max_size)
        return relative(image, boxes, labels) if self.raw else normalise(image, boxes, labels)


def build_train_transform(section: AugmentSection, *, raw: bool = False) -> TrainTransform:
    """Build the augmentation of a recipe's training images."""
    return TrainTransform(
        flip=section.flip,
        sizes=section.train_sizes,
        max_size=section.max_size,
        crop=section.crop,
        crop_resize_sizes=section.crop_resize_sizes,
        crop_min=section.crop_min,
        crop_max=section.crop_max,
        raw=raw,
    )


def build_eval_transform(section: AugmentSection, *, raw: bool = False) -> EvalTransform:
    """Build the resize of a recipe's evaluation images."""
    return EvalTransform(size=section.eval_size, max_size=section.eval_max_size, raw=raw)


def resized_sides(height: Ints | int, width: Ints | int, size: Ints | int, max_size: int | None) -> tuple[Ints, Ints]:
    """Return (height, width) after bringing the short side to ``size``, by the published rounding rule.

    Of one image or of arrays of them, pixels. Where the long side would exceed ``max_size``, the short side becomes
    ``max_size * short / long`` rounded.
    """
    short, long = np.minimum(height, width), np.maximum(height, width)
    if max_size is not None:
        size = np.where(long / short * size > max_size, np.rint(max_size * short / long).astype(np.int64), size)
    scaled = np.where(short == size, long, (size * long / short).astype(np.int64))
    if max_size is not None:
        scaled, size = np.where(size == 0, max_size, scaled), np.maximum(size, 1)
    return np.where(width < height, scaled, size), np.where(width < height, size, scaled)


def resize(image: Tensor, boxes: Tensor, size: int, max_size: int | None) -> tuple[Tensor, Tensor]:
    """Resize an image (antialiased bilinear) and its boxes, which scale by the exact ratio of the sides."""
    height, width = image.shape[-2:]
    new_height, new_width = (int(side) for side in resized_sides(height, width, size, max_size))
    ratio_x, ratio_y = new_width / width, new_height / height
    image = F.resize(image, [new_height, new_width], antialias=True)
    return image, boxes * boxes.new_tensor([ratio_x, ratio_y, ratio_x, ratio_y])


def flip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror an image and its boxes left and right."""
    left, top, right, bottom = boxes.unbind(-1)
    width = image.shape[-1]
    return F.horizontal_flip(image), torch.stack([width - right, top, width - left, bottom], dim=-1)


def crop(
    image: Tensor, boxes: Tensor, labels: Tensor, top: int, left: int, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out a region; boxes are clamped to it, and those without area in it are left out."""
    boxes = boxes - boxes.new_tensor([left, top, left, top])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=-1)
    return F.crop(image, top, left, height, width), boxes[keep], labels[keep]


def normalise(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the pixels with ImageNet's mean and deviation, and the boxes as `relative` does."""
    image, boxes, labels = relative(image, boxes, labels)
    image = F.normalize(F.to_dtype(image, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
    return image, boxes, labels


def relative(image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert boxes from xyxy pixels to float32 (cx, cy, w, h) in [0, 1] of the image, without those of no area."""
    height, width = image.shape[-2:]
    corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    boxes = torch.cat([corners + sides / 2, sides], dim=-1)
    boxes = (boxes / boxes.new_tensor([width, height, width, height])).to(torch.float32)
    keep = (boxes[:, 2:] > 0).all(dim=-1)
    return image, boxes[keep], labels[keep]
