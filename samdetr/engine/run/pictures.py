"""The picture val_predictions.png of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from samdetr.data.decode import decode_image
from samdetr.visualize.predictions import GridItem, prediction_grid

if TYPE_CHECKING:
    from samdetr.data.datasets import CocoData, Floats
    from samdetr.engine.coco import CocoDetections
    from samdetr.structures import Categories

PICTURES = 12


def draw_validation(
    path: Path, data: CocoData, results: CocoDetections, categories: Categories, *, max_pixels: int
) -> None:
    """Draw the first photos of a split with their detections and, dashed, their ground truth."""
    names = dict(zip(categories.ids, categories.names, strict=True))
    items = []
    for row, image_id in enumerate(data.image_ids[:PICTURES].tolist()):
        image = decode_image(
            data.image_root / data.file_names[row],
            width=int(data.widths[row]),
            height=int(data.heights[row]),
            max_pixels=max_pixels,
        )
        found = results.where(results.image_ids == image_id)
        wanted = np.flatnonzero(data.ann_image == row)
        items.append(
            GridItem(
                image,
                _corners(found.boxes),
                [names[number] for number in found.category_ids.tolist()],
                found.scores.tolist(),
                _corners(data.ann_boxes[wanted]),
                [names[number] for number in data.ann_category[wanted].tolist()],
            )
        )
    prediction_grid(path, items)


def _corners(boxes: Floats) -> Tensor:
    """Convert rows (x, y, w, h) to float32 [N, 4] (x0, y0, x1, y1)."""
    tensor = torch.from_numpy(boxes).float()
    return torch.cat((tensor[:, :2], tensor[:, :2] + tensor[:, 2:]), dim=-1)
