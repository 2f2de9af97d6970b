"""Both splits of a recipe's data set, read and checked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from samdetr.data.checks import CheckReport, check_data
from samdetr.data.datasets import CocoData, DetectionDataset, Split, make_categories, read_coco
from samdetr.data.shapes import ensure_shapes
from samdetr.data.transforms import build_transform
from samdetr.errors import DataError
from samdetr.structures import Categories

if TYPE_CHECKING:
    from samdetr.recipe import AugmentSection, DataSection


@dataclass(frozen=True)
class Splits:
    """A data set ready for training and evaluation, and what its checks found."""

    train: CocoData
    val: CocoData
    categories: Categories
    reports: tuple[CheckReport, CheckReport]

    def fingerprint(self) -> str:
        """A hash of the classes, and of the training split's images and boxes: the data a run may continue on."""
        content = hashlib.sha256(repr(self.categories).encode())
        for column in (self.train.image_ids, self.train.ann_image, self.train.ann_category, self.train.ann_boxes):
            content.update(column.tobytes())
        return content.hexdigest()


def load_splits(section: DataSection, *, num_queries: int, num_classes: int) -> Splits:
    """Read and check the train and val split, generating the shapes data set on first use.

    Findings are in ``reports``; `samdetr.data.checks.raise_for_errors` turns errors among them into a DataError.
    Raises DataError for what cannot be read, or categories that do not fit ``num_classes``.
    """
    train = read_split(section, "train")
    val = read_split(section, "val")
    categories = make_categories(train, section.class_index, num_classes)
    checked_train, train_report = check_data(train, num_queries=num_queries, on_bad=section.on_bad, against=None)
    checked_val, val_report = check_data(
        val,
        num_queries=num_queries,
        on_bad=section.on_bad,
        against=dict(zip(train.category_ids, train.category_names, strict=True)),
    )
    return Splits(checked_train, checked_val, categories, (train_report, val_report))


def read_split(section: DataSection, split: Split) -> CocoData:
    """One split as it stands in its file, unchecked. Raises DataError when it cannot be read."""
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
        images, annotations = getattr(section, f"{split}_images"), getattr(section, f"{split}_annotations")
        for key, value in ((f"{split}_images", images), (f"{split}_annotations", annotations)):
            if not value:
                raise DataError(f"data.{key} is empty: set it to the path of your {split} split.")
    return read_coco(Path(images).expanduser(), Path(annotations).expanduser(), split)


def build_dataset(
    data: CocoData,
    categories: Categories,
    section: DataSection,
    augment: AugmentSection,
    *,
    seed: int,
    training: bool,
) -> DetectionDataset:
    """The samples of a split, augmented as the recipe says for training or evaluation."""
    return DetectionDataset(
        data,
        categories,
        build_transform(augment, training),
        seed=seed,
        max_pixels=section.max_pixels,
        training=training,
    )
