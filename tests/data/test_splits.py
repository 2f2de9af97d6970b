"""Both splits of a recipe: where they come from, and what counts as the same data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samdetr.data.splits import Splits, load_splits
from samdetr.errors import DataError
from samdetr.recipe import load_recipe


def splits(tmp_path: Path, *overrides: str) -> Splits:
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[data]\nformat = "shapes"\nclass_index = "contiguous"\n'
        f"[data.shapes]\nfolder = '{tmp_path}'\ntrain_images = 4\nval_images = 2\nimage_size = 64\n"
    )
    return load_splits(load_recipe(recipe, overrides).data, num_queries=20, num_classes=8)


def test_shapes_go_the_way_of_coco(tmp_path: Path) -> None:
    found = splits(tmp_path)
    assert (len(found.train.image_ids), len(found.val.image_ids)) == (4, 2)
    assert found.categories.ids == tuple(range(1, 9))
    assert found.categories.indices == tuple(range(8))
    assert [report.findings for report in found.reports] == [(), ()]


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    found = splits(tmp_path)
    assert splits(tmp_path).fingerprint() == found.fingerprint()
    moved = replace(found.train, image_root=Path("/moved"))
    assert replace(found, train=moved).fingerprint() == found.fingerprint()
    boxes = found.train.ann_boxes.copy()
    boxes[0, 0] += 1
    others = [
        replace(found, train=replace(found.train, ann_boxes=boxes)),
        replace(found, train=replace(found.train, image_ids=np.flip(found.train.image_ids))),
        replace(found, categories=replace(found.categories, names=found.categories.names[::-1])),
        splits(tmp_path, "data.shapes.seed=1"),
    ]
    assert len({other.fingerprint() for other in [found, *others]}) == 5


@pytest.mark.parametrize("key", ["train_images", "train_annotations", "val_images", "val_annotations"])
def test_an_empty_path_is_named(tmp_path: Path, key: str) -> None:
    keys = [f"data.{name}='{tmp_path}'" for name in ("train_images", "val_images")]
    keys += [f"data.{name}='{tmp_path / 'a.json'}'" for name in ("train_annotations", "val_annotations")]
    (tmp_path / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "annotations": [], "categories": []}'
    )
    with pytest.raises(DataError, match=rf"data\.{key} is empty"):
        splits(tmp_path, "data.format=coco", *keys, f"data.{key}=''")
