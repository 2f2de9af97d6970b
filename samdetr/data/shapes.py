"""The synthetic data set: pictures of textured shapes, written as an ordinary COCO folder on first use.

Picture i of a split is a pure function of (seed, split, i, image_size, max_objects). Only exactly rounded
arithmetic (no BLAS, no drawing library) makes the pixels, so they do not depend on the machine.
Legend: H, W pixels of the picture; N objects of the picture; h, w pixels of an object's window.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from samdetr.errors import DataError

GENERATOR_VERSION = 1
SPLITS = ("train", "val")
MIN_VISIBLE = 0.38  # share of an object's own pixels that must stay in sight
SMALLEST_SIDE, LARGEST_SIDE = 0.14, 0.6  # diameter of the circumscribed circle / longer side of the picture
SMALLEST_PIXELS = 10.0  # below this diameter the classes cannot be told apart
PLACEMENT_TRIES = 12
MIN_CONTRAST = 75.0  # RGB distance between an object and what lies under it

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


class ShapesPaths(NamedTuple):
    """The four paths of the generated data set, as a COCO recipe would name them."""

    train_images: Path
    train_annotations: Path
    val_images: Path
    val_annotations: Path


class Scene(NamedTuple):
    """One picture with its ground truth."""

    image: NDArray[np.uint8]  # [H, W, 3]
    labels: list[int]  # N indices into CLASS_NAMES
    masks: list[Mask]  # N x [H, W], the whole object inside the picture, as if nothing lay over it
    visible: list[Mask]  # N x [H, W], the part that nothing covers


def _circle(u: Array, v: Array) -> Array:
    return np.sqrt(u * u + v * v) - np.float32(0.95)


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.7)


def _triangle(u: Array, v: Array) -> Array:
    slope = np.float32(0.8660254) * np.abs(u) - np.float32(0.5) * v
    return np.maximum(slope, v) - np.float32(0.5)


def _star(u: Array, v: Array) -> Array:
    # A pentagram is where at least four of its five half-planes hold: the second largest distance.
    turns = [_cos_sin(2.0 * math.pi * k / 5.0) for k in range(5)]
    planes = np.stack([u * np.float32(s) + v * np.float32(c) for c, s in turns])
    fourth: Array = np.partition(planes, 3, axis=0)[3] - np.float32(0.34)
    return fourth


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(a, b) - np.float32(0.92), np.minimum(a, b) - np.float32(0.27))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.75)) - np.float32(0.22)


def _crescent(u: Array, v: Array) -> Array:
    shifted = u - np.float32(0.5)
    outline: Array = np.maximum(_circle(u, v), np.float32(0.72) - np.sqrt(shifted * shifted + v * v))
    return outline


def _heart(u: Array, v: Array) -> Array:
    a = np.float32(0.54)
    x, y = u + np.float32(0.3) * a, v + np.float32(0.3) * a
    right, top = np.sqrt((x - a) ** 2 + y * y) - a, np.sqrt(x * x + (y - a) ** 2) - a
    outline: Array = np.minimum(np.maximum(np.abs(x), np.abs(y)) - a, np.minimum(right, top))
    return outline


# Each takes local coordinates in the unit disc and gives about the signed distance to the outline.
_OUTLINES: tuple[tuple[str, Callable[[Array, Array], Array]], ...] = (
    ("circle", _circle),
    ("square", _square),
    ("triangle", _triangle),
    ("star", _star),
    ("cross", _cross),
    ("ring", _ring),
    ("crescent", _crescent),
    ("heart", _heart),
)
CLASS_NAMES = tuple(name for name, _ in _OUTLINES)


def _cos_sin(angle: float) -> tuple[float, float]:
    """Return cosine and sine, rounded so that the last bit of the C library does not matter."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _pick(rng: np.random.Generator, count: int) -> int:
    """Draw an integer in [0, count), from ``random``, whose stream numpy does not change."""
    return min(int(rng.random() * count), count - 1)


def _value_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Array:
    """Draw values every ``cell`` pixels and interpolate linearly: float32 [height, width] in [0, 1]."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    grid = rng.random((rows, columns)).astype(np.float32)
    y = np.arange(height, dtype=np.float32) / np.float32(cell)
    x = np.arange(width, dtype=np.float32) / np.float32(cell)
    top, left = y.astype(np.int64), x.astype(np.int64)
    fy, fx = (y - np.floor(y))[:, None], (x - np.floor(x))[None, :]
    across = grid[:, left] * (1 - fx) + grid[:, left + 1] * fx
    values: Array = across[top] * (1 - fy) + across[top + 1] * fy
    return values


def _wave(rng: np.random.Generator, height: int, width: int, period: float, angle: float) -> Array:
    """Draw a triangle wave of ``period`` pixels along ``angle``, float32 [height, width] in [0, 1]."""
    c, s = _cos_sin(angle)
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(s / period)
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(c / period)
    phase = y + x + np.float32(rng.random())
    wave: Array = np.abs(np.float32(2) * (phase - np.floor(phase)) - np.float32(1))
    return wave


def _steep(wave: Array) -> Array:
    """Flatten a wave to two values with short ramps between them."""
    ramps: Array = np.clip((wave - np.float32(0.5)) * np.float32(4) + np.float32(0.5), 0, 1)
    return ramps


def _texture(rng: np.random.Generator, height: int, width: int, unit: float) -> Array:
    """Draw a pattern whose details are about ``unit`` pixels, float32 [height, width] in [0, 1]."""
    kind = _pick(rng, 6)
    angle = _between(rng, 0.0, math.pi)
    if kind == 0:
        return _wave(rng, height, width, 2.0 * max(height, width), angle)
    if kind == 1:
        return _steep(_wave(rng, height, width, unit * _between(rng, 0.5, 1.5), angle))
    if kind == 2:
        period = unit * _between(rng, 0.8, 2.0)
        first = _steep(_wave(rng, height, width, period, angle))
        second = _steep(_wave(rng, height, width, period, angle + math.pi / 2))
        return first + second - np.float32(2) * first * second
    if kind == 3:
        return _value_noise(rng, height, width, max(1.5, 0.12 * unit))
    coarse = _value_noise(rng, height, width, max(2.0, unit * _between(rng, 1.0, 2.5)))
    if kind == 4:
        return coarse
    middle = _value_noise(rng, height, width, max(2.0, 0.5 * unit))
    fine = _value_noise(rng, height, width, max(1.5, 0.2 * unit))
    pattern: Array = np.float32(0.55) * coarse + np.float32(0.28) * middle + np.float32(0.17) * fine
    return pattern


def _colour(rng: np.random.Generator) -> Array:
    return (rng.random(3) * 225.0 + 15.0).astype(np.float32)


def _paint(rng: np.random.Generator, texture: Array, colour: Array, depth: float) -> Array:
    """Paint a texture in two colours, ``colour`` +- at most ``depth`` a channel: float32 [h, w, 3]."""
    swing = (rng.random(3).astype(np.float32) * 2 - 1) * np.float32(depth)
    return colour + (texture - np.float32(0.5))[:, :, None] * (2 * swing)


def _distinct_colour(rng: np.random.Generator, under: Array) -> Array:
    """Draw a colour at least MIN_CONTRAST from ``under`` [3]; the farthest of eight if none is."""
    tries = [_colour(rng) for _ in range(8)]
    gaps = [math.sqrt(sum(float(a - b) ** 2 for a, b in zip(colour, under, strict=True))) for colour in tries]
    for colour, gap in zip(tries, gaps, strict=True):
        if gap >= MIN_CONTRAST:
            return colour
    return tries[max(range(len(tries)), key=lambda k: gaps[k])]


class _Window(NamedTuple):
    """An object's coverage inside the picture."""

    rows: slice
    columns: slice
    distance: Array  # [h, w] pixels to the outline, negative inside
    inside: Mask  # [h, w] pixels at least half covered
    whole: int  # pixels of the object, those outside the picture too


def _place(rng: np.random.Generator, label: int, side: float, height: int, width: int) -> _Window:
    """Place a shape at a random position and rotation, cut at the picture's border."""
    radius = 0.5 * side
    margin = 0.3 * side
    cx, cy = _between(rng, margin, width - margin), _between(rng, margin, height - margin)
    c, s = _cos_sin(_between(rng, 0.0, 2.0 * math.pi))
    x0, y0 = math.floor(cx - radius) - 1, math.floor(cy - radius) - 1
    size = math.ceil(side) + 4
    x = ((np.arange(x0, x0 + size) + 0.5 - cx) / radius).astype(np.float32)[None, :]
    y = ((np.arange(y0, y0 + size) + 0.5 - cy) / radius).astype(np.float32)[:, None]
    u, v = x * np.float32(c) + y * np.float32(s), y * np.float32(c) - x * np.float32(s)
    distance = _OUTLINES[label][1](u, v) * np.float32(radius)
    inside = distance <= 0
    rows, columns = slice(max(y0, 0), min(y0 + size, height)), slice(max(x0, 0), min(x0 + size, width))
    cut = (slice(rows.start - y0, rows.stop - y0), slice(columns.start - x0, columns.stop - x0))
    return _Window(rows, columns, distance[cut], inside[cut], int(np.count_nonzero(inside)))


def _hides_too_much(window: _Window, visible: list[Mask], wholes: list[int]) -> bool:
    """Return whether the object, or one that it would cover, keeps less than MIN_VISIBLE of its pixels."""
    if np.count_nonzero(window.inside) < MIN_VISIBLE * window.whole:
        return True
    for mask, whole in zip(visible, wholes, strict=True):
        lost = np.count_nonzero(mask[window.rows, window.columns] & window.inside)
        if lost and np.count_nonzero(mask) - lost < MIN_VISIBLE * whole:
            return True
    return False


def _blend(rng: np.random.Generator, canvas: Array, window: _Window, side: float) -> None:
    """Paint the object over ``canvas`` [H, W, 3] in place, with antialiased edges."""
    region = canvas[window.rows, window.columns]
    height, width = region.shape[:2]
    sums = region[window.inside].astype(np.int64).sum(axis=0)
    under = (sums / max(int(np.count_nonzero(window.inside)), 1)).astype(np.float32)
    colour = _distinct_colour(rng, under)
    paint = _paint(rng, _texture(rng, height, width, max(4.0, 0.3 * side)), colour, _between(rng, 0.0, 45.0))
    if rng.random() < 0.25:
        shade = np.float32(0.5 if rng.random() < 0.5 else 1.6)
        border = np.clip(window.distance + np.float32(max(1.5, 0.05 * side)), 0, 1)[:, :, None]
        paint = paint * (1 - border + border * shade)
    alpha = np.clip(np.float32(0.5) - window.distance, 0, 1)[:, :, None]
    region[...] = region * (1 - alpha) + np.clip(paint, 0, 255) * alpha


def draw_scene(rng: np.random.Generator, image_size: int, max_objects: int) -> Scene:
    """Draw one picture with 1..max_objects objects; its longer side is ``image_size`` pixels."""
    shorter = round(image_size * _between(rng, 0.75, 1.0))
    height, width = (image_size, shorter) if rng.random() < 0.5 else (shorter, image_size)
    background = _texture(rng, height, width, 0.16 * image_size)
    canvas = np.clip(_paint(rng, background, _colour(rng), _between(rng, 15.0, 60.0)), 0, 255)
    wanted = 1 + _pick(rng, max_objects)
    smallest = max(SMALLEST_SIDE * image_size, SMALLEST_PIXELS)
    largest = max(LARGEST_SIDE * image_size * min(1.0, math.sqrt(6.0 / wanted)), smallest)
    labels: list[int] = []
    wholes: list[int] = []
    masks: list[Mask] = []
    visible: list[Mask] = []
    for _ in range(wanted):
        label = _pick(rng, len(CLASS_NAMES))
        # Squared: many small objects, few large ones, about as in photos.
        draw = rng.random()
        side = smallest + (largest - smallest) * draw * draw
        for _ in range(PLACEMENT_TRIES):
            window = _place(rng, label, side, height, width)
            if not _hides_too_much(window, visible, wholes):
                break
        else:
            continue
        _blend(rng, canvas, window, side)
        for mask in visible:
            mask[window.rows, window.columns] &= ~window.inside
        own = np.zeros((height, width), dtype=np.bool_)
        own[window.rows, window.columns] = window.inside
        labels.append(label)
        wholes.append(window.whole)
        masks.append(own)
        visible.append(own.copy())
    grain = (rng.random((height, width, 1)).astype(np.float32) - np.float32(0.5)) * np.float32(_between(rng, 0.0, 24.0))
    image = np.clip(canvas + grain + np.float32(0.5), 0, 255).astype(np.uint8)
    return Scene(image, labels, masks, visible)


def scene_at(*, seed: int, split: str, index: int, image_size: int, max_objects: int) -> Scene:
    """Draw picture ``index`` (from 0) of a split, the same whatever the number of pictures."""
    bits = np.random.PCG64(np.random.SeedSequence((seed, SPLITS.index(split), index)))
    return draw_scene(np.random.Generator(bits), image_size, max_objects)


def tight_box(mask: Mask) -> tuple[int, int, int, int]:
    """Return the COCO box (x, y, width, height) in pixels around the true pixels of ``mask`` [H, W] (at least one)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _write_split(root: Path, *, split: str, images: int, image_size: int, max_objects: int, seed: int) -> None:
    """Write ``images/<split>/*.png`` and ``annotations/instances_<split>.json`` under ``root``."""
    folder = root / "images" / split
    folder.mkdir(parents=True)
    photos: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index in range(images):
        scene = scene_at(seed=seed, split=split, index=index, image_size=image_size, max_objects=max_objects)
        height, width = scene.image.shape[:2]
        photo = {"id": index + 1, "file_name": f"{index + 1:06d}.png", "height": height, "width": width}
        Image.fromarray(scene.image).save(folder / f"{index + 1:06d}.png", compress_level=1)
        photos.append(photo)
        for label, mask, seen in zip(scene.labels, scene.masks, scene.visible, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": list(tight_box(mask)),
                    "area": int(np.count_nonzero(seen)),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASS_NAMES)]
    content = {"images": photos, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def _paths(root: Path) -> ShapesPaths:
    train, val = (root / "annotations" / f"instances_{split}.json" for split in SPLITS)
    return ShapesPaths(root / "images" / "train", train, root / "images" / "val", val)


def _publish(building: Path, target: Path) -> None:
    """Rename the finished folder; if another process was first, its equal folder is kept."""
    try:
        os.rename(building, target)
    except OSError:
        if not _paths(target).val_annotations.is_file():
            raise


def ensure_shapes(
    *, folder: str, train_images: int, val_images: int, image_size: int, max_objects: int, seed: int
) -> ShapesPaths:
    """Return the data set with these parameters: generated on first use, then taken from the cache.

    Args:
        folder: the cache folder; empty means ``~/.cache/samdetr/shapes``.
        train_images: pictures of the train split.
        val_images: pictures of the val split.
        image_size: longer side of a picture, pixels.
        max_objects: most objects in a picture.
        seed: seed of the pictures.
    Raises:
        DataError: the folder cannot be written.
    """
    cache = Path(folder).expanduser() if folder else Path.home() / ".cache" / "samdetr" / "shapes"
    key = f"v{GENERATOR_VERSION}-train{train_images}-val{val_images}-size{image_size}-objects{max_objects}-seed{seed}"
    target = cache / key
    paths = _paths(target)
    if paths.train_annotations.is_file() and paths.val_annotations.is_file():
        return paths
    building = cache / f".{key}.{uuid.uuid4().hex}"
    kind = {"image_size": image_size, "max_objects": max_objects, "seed": seed}
    try:
        building.mkdir(parents=True)
        _write_split(building, split="train", images=train_images, **kind)
        _write_split(building, split="val", images=val_images, **kind)
        _publish(building, target)
    except OSError as error:
        raise DataError(
            f"{target}: the shapes data set cannot be written ({error.strerror or error}); "
            "free space there, delete a damaged folder, or set data.shapes.folder to another place."
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return paths
