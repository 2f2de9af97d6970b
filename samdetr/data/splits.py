"""Both splits of a recipe's data set, read and checked."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samdetr.data.batching import Shape
from samdetr.data.buckets import choose_buckets, largest_random_shape
from samdetr.data.checks import CheckReport, check_data
from samdetr.data.datasets import CocoData, DetectionDataset, Split, make_categories, read_coco
from samdetr.data.shapes import ensure_shapes
from samdetr.data.transforms import build_eval_transform, build_train_transform
from samdetr.errors import DataError
from samdetr.structures import Categories

if TYPE_CHECKING:
    from samdetr.recipe import AugmentSection, DataSection


@dataclass(frozen=True)
class Splits:
    """A data set ready for training and evaluation, with the findings of its checks."""

    train: CocoData
    val: CocoData
    categories: Categories
    reports: tuple[CheckReport, CheckReport]

    def fingerprint(self) -> str:
        """Hash the classes and the training split's images and boxes: a run continues on data of the same hash only."""
        content = hashlib.sha256(repr(self.categories).encode())
        for column in (self.train.image_ids, self.train.ann_image, self.train.ann_category, self.train.ann_boxes):
            content.update(column.tobytes())
        return content.hexdigest()


def load_splits(section: DataSection, *, num_queries: int | None, num_classes: int, no_object: bool = False) -> Splits:
    """Read and check the train and val split; the shapes data set is generated on first use.

    Findings are in ``reports``; `samdetr.data.checks.raise_for_errors` turns errors among them into a DataError.

    Raises:
        DataError: a file cannot be read, or the categories do not fit ``num_classes`` (see `make_categories`).
    """
    _require_paths(section, "train", "val")
    train = read_split(section, "train")
    val = read_split(section, "val")
    categories = make_categories(train, section.class_index, num_classes, no_object=no_object)
    checked_train, train_report = check_data(train, num_queries=num_queries, on_bad=section.on_bad, against=None)
    checked_val, val_report = check_data(
        val,
        num_queries=num_queries,
        on_bad=section.on_bad,
        against=dict(zip(train.category_ids, train.category_names, strict=True)),
    )
    return Splits(checked_train, checked_val, categories, (train_report, val_report))


def read_split(section: DataSection, split: Split) -> CocoData:
    """Read one split as it stands in its file, unchecked (DataError: it cannot be read)."""
    if section.format == "shapes":
        shapes = section.shapes
        paths = ensure_shapes(
            folder=shapes.folder,
            train_images=shapes.train_images,
            val_images=shapes.val_images,
            image_size=shapes.image_size,
            max_objects=shapes.max_objects,
            seed=shapes.seed,
        )
        images, annotations = getattr(paths, f"{split}_images"), getattr(paths, f"{split}_annotations")
    else:
        _require_paths(section, split)
        images, annotations = getattr(section, f"{split}_images"), getattr(section, f"{split}_annotations")
    return read_coco(Path(images).expanduser(), Path(annotations).expanduser(), split)


def _require_paths(section: DataSection, *splits: Split) -> None:
    """Raise one DataError that names all paths of the splits that are not set or not there."""
    if section.format == "shapes":
        return
    missing = []
    for key, what, exists in (("images", "folder", os.path.isdir), ("annotations", "file", os.path.exists)):
        for split in splits:
            value: str = getattr(section, f"{split}_{key}")
            path = Path(value).expanduser().absolute()
            if not value:
                missing.append(f"  data.{split}_{key} is empty")
            elif not exists(path):
                missing.append(f"  data.{split}_{key}: there is no {what} {path}")
    if missing:
        raise DataError(
            "the data is not there:\n" + "\n".join(missing) + "\n"
            "Set these keys (a relative path begins at the current folder), or for a COCO recipe link it at data/coco."
        )


def build_dataset(
    data: CocoData,
    categories: Categories,
    section: DataSection,
    augment: AugmentSection,
    *,
    seed: int,
    training: bool,
) -> DetectionDataset:
    """Build the samples of a split, augmented as the recipe says for training or evaluation."""
    build_transform = build_train_transform if training else build_eval_transform
    return DetectionDataset(
        data,
        categories,
        build_transform(augment, raw=section.pixels == "fast"),
        seed=seed,
        max_pixels=section.max_pixels,
        pixels=section.pixels,
    )


def bucket_shapes(dataset: DetectionDataset, section: DataSection) -> tuple[Shape, ...] | None:
    """Choose the padded shapes of a recipe's training batches; None for random batches."""
    if section.batching == "random":
        return None
    return choose_buckets(
        dataset.train_transform(),
        dataset.heights,
        dataset.widths,
        count=section.buckets,
        grid=section.bucket_grid,
    )


def largest_shape(dataset: DetectionDataset, section: DataSection, images: int) -> Shape:
    """Return the padded shape with the most pixels that a training batch of so many images can have."""
    shapes = bucket_shapes(dataset, section)
    if shapes is None:
        return largest_random_shape(dataset.train_transform(), dataset.heights, dataset.widths, images)
    return max(shapes, key=math.prod)
