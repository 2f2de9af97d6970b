"""Pictures of detections: one photo, or a grid of them beside the ground truth."""

from __future__ import annotations

import colorsys
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from samdetr.errors import SamdetrError

Colour = tuple[int, int, int]

READABLE_SIDE = 320  # pixels of the short side from which labels can be read
LARGEST_SIDE = 1600  # pixels; nothing is enlarged beyond it
TILE = 360  # pixels of a tile of the grid
GAP = 6  # pixels between tiles
CAPTION = 24  # pixels of the line below them
GRID_ITEMS, GRID_COLUMNS = 12, 4


class GridItem(NamedTuple):
    """One photo of the grid; boxes are (x0, y0, x1, y1) in its pixels."""

    image: Tensor  # [3, H, W] uint8
    boxes_xyxy: Tensor  # [n, 4] detections
    labels: Sequence[str]  # n class names
    scores: Sequence[float]  # n scores in [0, 1]
    target_boxes_xyxy: Tensor  # [t, 4] ground truth
    target_labels: Sequence[str]  # t class names


def class_colours(names: Iterable[str]) -> dict[str, Colour]:
    """Choose a bright colour for each name: hues spread evenly over the distinct names, in their order."""
    distinct = list(dict.fromkeys(names))
    colours = {}
    for k, name in enumerate(distinct):
        value = 1.0 if k % 2 == 0 else 0.8
        red, green, blue = colorsys.hsv_to_rgb(k / len(distinct), 0.75, value)
        colours[name] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def _readable_scale(height: int, width: int) -> float:
    """Return the factor that makes labels readable; 1 if the photo is large enough as it is."""
    return max(1.0, min(READABLE_SIDE / min(height, width), LARGEST_SIDE / max(height, width)))


def _scaled(image: Tensor, scale: float) -> Tensor:
    """Scale both sides of ``image`` [3, H, W], to at least one pixel."""
    if scale == 1.0:
        return image.clone()
    size = [max(1, round(scale * side)) for side in image.shape[-2:]]
    resized: Tensor = F.resize(image, size, antialias=True)
    return resized


def _pixel_corners(boxes_xyxy: Tensor, scale: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the first and last pixel of each scaled box inside the picture, int64 [m, 4], and the boxes' rows [m].

    Boxes that are not finite, empty, or outside the picture are left out.
    """
    boxes = boxes_xyxy.detach().to("cpu", torch.float64).reshape(-1, 4) * scale
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    boxes = boxes.clamp(min=torch.zeros(4, dtype=torch.float64), max=limit)
    drawn = boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    kept = torch.nonzero(drawn).flatten()
    first = boxes[kept, :2].floor().minimum(limit[:2] - 1)
    last = (boxes[kept, 2:].ceil() - 1).maximum(first)
    return torch.cat([first, last], dim=1).long(), kept


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Load the font that comes with matplotlib, or Pillow's own (fewer letters) where it was removed."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size) if path.is_file() else ImageFont.load_default(size)


def _draw_texts(canvas: Tensor, corners: Tensor, texts: Sequence[str], colours: Sequence[Colour]) -> Tensor:
    """Write each text on its colour above its box, or inside where there is no room above."""
    picture = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy())
    draw = ImageDraw.Draw(picture)
    size = max(10, min(picture.size) // 32)
    font, line = _font(size), size + 3
    for (x0, y0, _, _), text, colour in zip(corners.tolist(), texts, colours, strict=True):
        width = math.ceil(draw.textlength(text, font=font)) + 3
        x = max(0, min(x0, picture.width - width))
        y = y0 - line if y0 >= line else y0
        red, green, blue = colour
        bright = 0.3 * red + 0.6 * green + 0.1 * blue > 110
        draw.rectangle((x, y, x + width - 1, y + line - 1), fill=colour)
        draw.text((x + 1, y + line // 2), text, fill="black" if bright else "white", font=font, anchor="lm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _check(image: Tensor, boxes_xyxy: Tensor, labels: Sequence[str], scores: Sequence[float] | None) -> None:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    count = boxes_xyxy.numel() // 4
    if len(labels) != count or (scores is not None and len(scores) != count):
        scored = "no" if scores is None else len(scores)
        raise ValueError(f"{count} boxes, {len(labels)} labels and {scored} scores do not belong together")


def draw_detections(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    scale: float | None = None,
    colours: Mapping[str, Colour] | None = None,
) -> Tensor:
    """Draw boxes with their class and score; the best score lies on top.

    Args:
        image: uint8 [3, H, W].
        boxes_xyxy: [n, 4] pixels of ``image``; boxes outside it, empty or not finite are left out.
        labels: n class names.
        scores: n scores in [0, 1], or None.
        scale: factor of the result's size; None enlarges small photos until labels can be read.
        colours: colour of each class name (see `class_colours`); None spreads over the names in ``labels``.
    Returns:
        uint8 [3, scale * H, scale * W] on the CPU; ``image`` itself is not changed.
    Raises:
        ValueError: shapes or lengths that do not belong together.
    """
    _check(image, boxes_xyxy, labels, scores)
    factor = _readable_scale(*image.shape[-2:]) if scale is None else scale
    canvas = _scaled(image.detach().cpu(), factor)
    height, width = canvas.shape[-2:]
    corners, kept = _pixel_corners(boxes_xyxy, factor, height, width)
    order = list(range(len(kept)))
    if scores is not None:
        order.sort(key=lambda row: scores[int(kept[row])])
    if not order:
        return canvas
    sources = [int(kept[row]) for row in order]
    palette = class_colours(sorted(set(labels))) if colours is None else colours
    box_colours = [palette[labels[k]] for k in sources]
    names = [" ".join(labels[k].split()) for k in sources]
    texts = names if scores is None else [f"{n} {scores[k]:.2f}" for n, k in zip(names, sources, strict=True)]
    line = max(2, min(height, width) // 200)
    drawn = draw_bounding_boxes(canvas, corners[order], colors=box_colours, width=line)
    return _draw_texts(drawn, corners[order], texts, box_colours)


def _draw_dashed(canvas: Tensor, corners: Tensor, thickness: int = 2, dash: int = 6) -> None:
    """Draw black and white dashes along the boxes ``corners`` [m, 4] (first and last pixel), in place."""
    height, width = canvas.shape[-2:]
    along_x = ((torch.arange(width) // dash) % 2 * 255).to(canvas.dtype)
    along_y = ((torch.arange(height) // dash) % 2 * 255).to(canvas.dtype)
    for x0, y0, x1, y1 in corners.tolist():
        for y in (slice(y0, y0 + thickness), slice(max(y1 + 1 - thickness, 0), y1 + 1)):
            canvas[:, y, x0 : x1 + 1] = along_x[x0 : x1 + 1]
        for x in (slice(x0, x0 + thickness), slice(max(x1 + 1 - thickness, 0), x1 + 1)):
            canvas[:, y0 : y1 + 1, x] = along_y[y0 : y1 + 1, None]


def _tile(item: GridItem, min_score: float, colours: Mapping[str, Colour]) -> Tensor:
    """Draw one photo, scaled, in a white square: uint8 [3, TILE, TILE]."""
    scale = TILE / max(item.image.shape[-2:])
    image = _scaled(item.image.detach().cpu(), scale)
    height, width = image.shape[-2:]
    _draw_dashed(image, _pixel_corners(item.target_boxes_xyxy, scale, height, width)[0])
    chosen = [k for k, score in enumerate(item.scores) if score >= min_score]
    drawn = draw_detections(
        image,
        item.boxes_xyxy.detach().cpu().reshape(-1, 4)[chosen] * scale,
        [item.labels[k] for k in chosen],
        [item.scores[k] for k in chosen],
        scale=1.0,
        colours=colours,
    )
    tile = torch.full((3, TILE, TILE), 255, dtype=torch.uint8)
    tile[:, :height, :width] = drawn
    return tile


def prediction_grid(path: Path, items: Sequence[GridItem], *, min_score: float = 0.3) -> None:
    """Save up to 12 photos as one PNG: detections coloured by class, the ground truth as black-white dashes.

    A line below them names the score threshold and how many detections reach it.

    Args:
        path: the PNG to write, atomically.
        items: the photos; those after the twelfth are not drawn.
        min_score: detections below it are not drawn.
    Raises:
        ValueError: no photo, or an item whose parts do not belong together.
        SamdetrError: the file cannot be written.
    """
    if not items:
        raise ValueError("a grid needs at least one photo")
    shown = items[:GRID_ITEMS]
    colours = class_colours(sorted({name for item in shown for name in (*item.labels, *item.target_labels)}))
    columns = min(GRID_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    step = TILE + GAP
    grid = torch.full((3, rows * step + GAP + CAPTION, columns * step + GAP), 255, dtype=torch.uint8)
    for k, item in enumerate(shown):
        _check(item.image, item.boxes_xyxy, item.labels, item.scores)
        y, x = GAP + k // columns * step, GAP + k % columns * step
        grid[:, y : y + TILE, x : x + TILE] = _tile(item, min_score, colours)
    count = sum(score >= min_score for item in shown for score in item.scores)
    save_png(path, _captioned(grid, f"detections with score ≥ {min_score:g}: {count}; dashed: ground truth"))


def _captioned(grid: Tensor, text: str) -> Tensor:
    """Write the text into the last CAPTION rows of the grid."""
    picture = Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy())
    place = (GAP, picture.height - CAPTION // 2 - GAP // 2)
    ImageDraw.Draw(picture).text(place, text, fill="black", font=_font(13), anchor="lm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def save_png(path: Path, image: Tensor) -> None:
    """Write ``image`` (uint8 [3, H, W]) as PNG; ``path`` holds the old picture or the whole new one.

    Raises:
        SamdetrError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        Image.fromarray(image.detach().cpu().permute(1, 2, 0).contiguous().numpy()).save(unfinished, format="PNG")
        os.replace(unfinished, path)
    except OSError as error:
        raise SamdetrError(
            f"{path}: the picture cannot be written ({error.strerror or error}); "
            "check that the folder exists, that you may write there, and the free space."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
