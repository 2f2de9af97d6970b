"""Inputs that the benches share: shapes of training, boxes of detection, ragged maps. All random, never zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from samdetr.recipe import Recipe
from samdetr.structures import Batch, Targets

QUERIES, WIDTH, HEADS = 300, 256, 8
LAYERS = 6
MAX_TARGETS = 93  # of an image of COCO train2017


class Shape(NamedTuple):
    """One map size and batch."""

    height: int
    width: int
    batch: int
    queries: int = QUERIES

    def __str__(self) -> str:
        return f"{self.height}x{self.width} batch {self.batch} queries {self.queries}"


SHAPES = {  # the benches compile at the first only
    "gpu": (Shape(25, 38, 4), Shape(25, 38, 16), Shape(50, 76, 4), Shape(50, 76, 16)),
    "cpu": (Shape(25, 38, 2),),
    "small": (Shape(7, 5, 2, 6),),
}


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a seeded generator of the device's own random numbers."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw standard normal numbers, rounded to ``dtype``."""
    return torch.randn(shape, generator=random, device=random.device).to(dtype)


def uniform(random: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers in [0, 1) in fp32."""
    return torch.rand(shape, generator=random, device=random.device)


def boxes_in_cells(random: torch.Generator, shape: Shape) -> Tensor:
    """Draw boxes [B, N, 4] (x0, y0, x1, y1), most of them small, some as large as the map or reaching outside it."""
    size = torch.tensor([shape.width, shape.height], device=random.device, dtype=torch.float32)
    centre = uniform(random, shape.batch, shape.queries, 2) * size
    side = (0.02 + 0.9 * uniform(random, shape.batch, shape.queries, 2).square()) * size
    return torch.cat((centre - side / 2, centre + side / 2), dim=-1)


def between_kinks(position: Tensor) -> Tensor:
    """Move positions at least 0.05 away from every integer, where bilinear sampling has another slope on either side.

    So near a kink the gradient is decided by rounding, and the gate would compare one side with the other.
    """
    whole = position.floor()
    return whole + 0.05 + 0.9 * (position - whole)


def points_in_boxes(random: torch.Generator, shape: Shape, points: int, bins: int) -> Tensor:
    """Draw points [B, N, P, 2] (x, y) in [-1, 1] of the box, none at the centre of a bin."""
    position = uniform(random, shape.batch, shape.queries, points, 2) * (bins - 1)
    return (2 * between_kinks(position) + 1) / bins - 1


def covered(boxes: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Count the cells of the map that each box covers along (y, x), at least 1: [B, N] each."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    rows = y1.clamp(0, shape.height) - y0.clamp(0, shape.height)
    columns = x1.clamp(0, shape.width) - x0.clamp(0, shape.width)
    return rows.clamp(min=1), columns.clamp(min=1)


def valid_sizes(random: torch.Generator, shape: Shape) -> Tensor:
    """Draw [B, 2] int64 (h, w) between 60 % and all of the map; the first image fills it."""
    size = torch.tensor([shape.height, shape.width], device=random.device)
    sizes = ((0.6 + 0.4 * uniform(random, shape.batch, 2)) * size).ceil().long()
    sizes[0] = size
    return sizes


def element_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of one element."""
    return torch.finfo(dtype).bits // 8


def to_fp32(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast every floating tensor to fp32, the published model's dtype."""
    return cast(args, torch.float32)


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Cast every floating tensor to ``dtype``."""
    return tuple(arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def object_classes(recipe: Recipe) -> int:
    """Return how many of a recipe's class logits are objects: with softmax the last one is none."""
    return recipe.model.num_classes - int(recipe.loss.classification == "softmax")


def training_batch(images: int, height: int, width: int, *, classes: int, seed: int = 0, least: float = 0.8) -> Batch:
    """Make a batch on the host, padded to height x width, with about 7 objects an image, padded to `MAX_TARGETS`.

    Sides are ``least`` to all of the padded ones; the first image fills it. At least one object in every image.
    classes: that an object can have, of a recipe its `object_classes`.
    """
    random = generator(seed, torch.device("cpu"))
    full = torch.tensor([height, width])
    sizes = ((least + (1 - least) * uniform(random, images, 2)) * full).ceil().long()
    sizes[0] = full
    pixels = normal(random, images, 3, height, width)
    for row, (valid_height, valid_width) in enumerate(sizes.tolist()):
        pixels[row, :, valid_height:] = 0
        pixels[row, :, :, valid_width:] = 0
    counts = (7 * normal(random, images).mul(0.8).exp()).long().clamp(1, MAX_TARGETS)
    valid = torch.arange(MAX_TARGETS) < counts[:, None]
    sides = 0.02 + 0.6 * uniform(random, images, MAX_TARGETS, 2).square()
    centres = sides / 2 + (1 - sides) * uniform(random, images, MAX_TARGETS, 2)
    targets = Targets(
        labels=torch.randint(0, classes, (images, MAX_TARGETS), generator=random) * valid,
        boxes=torch.cat((centres, sides), -1) * valid[..., None],
        counts=counts,
    )
    return Batch(pixels, sizes, targets, image_ids=torch.arange(images), original_sizes=sizes.clone())
