"""A maker of small COCO folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samdetr.data.datasets import CocoData, read_coco

MakeCoco = Callable[..., CocoData]


@pytest.fixture
def make_coco(tmp_path: Path) -> MakeCoco:
    """Write a COCO folder and read it back.

    ``images``: (id, file_name, width, height); ``boxes``: (annotation id, image id, category id, bbox) with
    ``crowds`` the annotation ids that are crowds. Files of random pixels are written for the ``write`` names.
    """

    def make(
        images: Sequence[tuple[int, str, int, int]],
        boxes: Sequence[tuple[int, int, int, Sequence[float]]] = (),
        *,
        categories: Sequence[int] = (1, 2),
        crowds: Sequence[int] = (),
        split: str = "train",
        write: Sequence[str] | None = None,
    ) -> CocoData:
        root = tmp_path / split
        root.mkdir(exist_ok=True)
        for number, name, width, height in images:
            if write is None or name in write:
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
        content: dict[str, Any] = {
            "images": [{"id": i, "file_name": n, "width": w, "height": h} for i, n, w, h in images],
            "annotations": [
                {"id": a, "image_id": i, "category_id": c, "bbox": list(b), "iscrowd": int(a in crowds)}
                for a, i, c, b in boxes
            ],
            "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        }
        file = tmp_path / f"{split}.json"
        file.write_text(json.dumps(content))
        return read_coco(root, file, split)

    return make
