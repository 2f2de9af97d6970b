"""COCO-format files as columns, the class of each category, and the data set that decodes and augments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from samdetr.data.batching import Key, Sample
from samdetr.data.decode import Pixels, decode_image
from samdetr.data.planning import Plans, plan_images
from samdetr.data.transforms import EvalTransform, Ints, TrainTransform, Transform
from samdetr.errors import DataError
from samdetr.structures import Categories

Floats = NDArray[np.float64]
Split = Literal["train", "val"]
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_NOT_NUMBERS = (b"NaN", b"nan", b"Infinity", b"inf")


class _Image(msgspec.Struct, gc=False):
    id: _Id
    file_name: str
    width: _Id
    height: _Id


class _Annotation(msgspec.Struct, gc=False):
    id: _Id
    image_id: _Id
    category_id: _Id
    bbox: tuple[float, float, float, float]
    iscrowd: int | bool | None = 0
    area: float | None = None


class _Category(msgspec.Struct, gc=False):
    id: _Id
    name: str


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class _RawFile(msgspec.Struct):
    images: list[msgspec.Raw] = []
    annotations: list[msgspec.Raw] = []
    categories: list[msgspec.Raw] = []


class _OnlyId(msgspec.Struct):
    id: int


@dataclass(frozen=True)
class CocoData:
    """One split as plain columns: N images, M annotations in the order of the file."""

    split: str  # "train" or "val"
    image_root: Path
    annotation_file: Path
    category_ids: tuple[int, ...]  # ascending
    category_names: tuple[str, ...]
    image_ids: Ints  # [N]
    file_names: list[str]  # N, relative to image_root
    widths: Ints  # [N] pixels
    heights: Ints  # [N] pixels
    ann_ids: Ints  # [M]
    ann_image: Ints  # [M] row of the image, -1 if the file does not list it
    ann_image_id: Ints  # [M]
    ann_category: Ints  # [M] category id
    ann_boxes: Floats  # [M, 4] (x, y, w, h) in pixels, as in the file
    ann_crowd: NDArray[np.bool_]  # [M]
    ann_area: Floats  # [M] square pixels; w * h where the file has none


def read_coco(image_root: Path | str, annotation_file: Path | str, split: Split) -> CocoData:
    """Read one split. Unknown fields are ignored, segmentations are not decoded, images are not opened.

    Raises:
        DataError: the folder or file is missing, the JSON is broken or not COCO's, or lists no image.
    """
    root, file = Path(image_root), Path(annotation_file)
    parsed = _parse(file, split)
    if not root.is_dir():
        raise DataError(f"{root}: the {split} split's image folder does not exist: set data.{split}_images")
    if not parsed.images:
        raise DataError(f"{file}: the {split} split has no images: set data.{split}_annotations")
    images, annotations = parsed.images, parsed.annotations
    categories = sorted(parsed.categories, key=lambda category: category.id)
    image_ids = _ints([image.id for image in images])
    ann_image_id = _ints([annotation.image_id for annotation in annotations])
    boxes = np.array([annotation.bbox for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    area = np.array([np.nan if ann.area is None else ann.area for ann in annotations], dtype=np.float64)
    with np.errstate(over="ignore"):
        area = np.where(np.isnan(area), boxes[:, 2] * boxes[:, 3], area)
    return CocoData(
        split=split,
        image_root=root,
        annotation_file=file,
        category_ids=tuple(category.id for category in categories),
        category_names=tuple(category.name for category in categories),
        image_ids=image_ids,
        file_names=[image.file_name for image in images],
        widths=_ints([image.width for image in images]),
        heights=_ints([image.height for image in images]),
        ann_ids=_ints([annotation.id for annotation in annotations]),
        ann_image=positions(image_ids, ann_image_id),
        ann_image_id=ann_image_id,
        ann_category=_ints([annotation.category_id for annotation in annotations]),
        ann_boxes=boxes,
        ann_crowd=np.array([bool(annotation.iscrowd) for annotation in annotations], dtype=np.bool_),
        ann_area=area,
    )


def positions(known: Ints | Sequence[int], wanted: Ints) -> Ints:
    """Return the first position of each wanted id among the known ids, int64 [len(wanted)]; -1 where there is none."""
    known = np.asarray(known, dtype=np.int64)
    if len(known) == 0:
        return np.full(len(wanted), -1, dtype=np.int64)
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)
    found: Ints = np.where(known[order[place]] == wanted, order[place], -1).astype(np.int64)
    return found


def make_categories(
    train: CocoData, class_index: Literal["category_id", "contiguous"], num_classes: int, *, no_object: bool = False
) -> Categories:
    """Map every category of the training split to a class logit: its raw id, or its rank among the ids.

    no_object: whether the last of the ``num_classes`` logits stands for no object.

    Raises:
        DataError: there are no categories, or they do not fit ``num_classes`` logits.
    """
    ids, file = train.category_ids, train.annotation_file
    if not ids:
        raise DataError(f"{file}: the file lists no categories")
    beside = int(no_object)
    also = ' and, with loss.classification = "softmax", no object' if no_object else ""
    if class_index == "contiguous":
        if len(ids) + beside != num_classes:
            raise DataError(
                f"{file}: {len(ids)} categories{also} do not fit model.num_classes = {num_classes} with "
                f'data.class_index = "contiguous": set model.num_classes = {len(ids) + beside}'
            )
        return Categories(ids=ids, names=train.category_names, indices=tuple(range(len(ids))))
    contiguous = f'data.class_index = "contiguous" with model.num_classes = {len(ids) + beside}'
    if ids[0] < 0:
        raise DataError(f"{file}: category id {ids[0]} is negative, which no class logit is: set {contiguous}")
    if ids[-1] + beside >= num_classes:
        raise DataError(
            f"{file}: category id {ids[-1]} ({train.category_names[-1]}){also} does not fit model.num_classes = "
            f"{num_classes}: set model.num_classes = {ids[-1] + 1 + beside}, or {contiguous}"
        )
    return Categories(ids=ids, names=train.category_names, indices=ids)


class DetectionDataset(Dataset[Sample]):
    """Decoded, augmented samples; all images are kept, also those without objects.

    Crowd regions are not objects and are no targets; evaluation reads them from `CocoData`. Boxes are clamped
    to the image, and those without area are left out. A sample is a function of (seed, epoch, row) alone; with an
    `EvalTransform` of the row alone.

    Raises:
        DataError: when built: an annotation of an unknown image or category, or an image larger than
            ``max_pixels`` pixels; when indexed: see `decode_image`.
    """

    def __init__(
        self,
        data: CocoData,
        categories: Categories,
        transform: TrainTransform | EvalTransform,
        *,
        seed: int,
        max_pixels: int,
        pixels: Pixels = "published",
    ) -> None:
        large = np.flatnonzero(data.widths.astype(np.float64) * data.heights > max_pixels)
        if len(large):
            path = data.image_root / data.file_names[large[0]]
            raise DataError(
                f"{path}: more than data.max_pixels = {max_pixels} pixels, as {len(large)} image(s) of the "
                f"{data.split} split have: shrink them or raise data.max_pixels"
            )
        self.transform, self.seed = transform, seed
        self.max_pixels, self.pixels = max_pixels, pixels
        self.image_root, self.file_names = data.image_root, data.file_names
        self.image_ids, self.widths, self.heights = data.image_ids, data.widths, data.heights
        self._boxes, self._labels, self._starts = _objects_by_image(data, categories)

    @property
    def max_objects(self) -> int:
        """The most objects of an image, at least 1: the T of the padded targets."""
        return max(1, int(np.diff(self._starts).max()))

    def train_transform(self) -> TrainTransform:
        """Return the training augmentation, which can be planned (TypeError: the transform is another)."""
        if not isinstance(self.transform, TrainTransform):
            raise TypeError(f"the sizes that {type(self.transform).__name__} gives cannot be planned")
        return self.transform

    def plan(self, epoch: int, rows: Ints) -> Plans:
        """Plan the augmentation of the images ``rows`` [n] in an epoch; nothing is decoded."""
        transform = self.train_transform()
        return plan_images(transform, self.heights, self.widths, seed=self.seed, epoch=epoch, rows=rows)

    def planned_sizes(self, epoch: int, rows: Ints) -> Ints:
        """Return the (height, width) that the images ``rows`` [n] will have in an epoch, int64 [n, 2]."""
        return self.plan(epoch, rows).shape

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, key: Key) -> Sample:
        return self.load([key])[0]

    def load(self, keys: Sequence[Key]) -> list[Sample]:
        """Decode and transform images of one epoch, planned together, which is faster than one by one.

        Raises ValueError where the keys are of several epochs.
        """
        rows, epochs = [row for _, row in keys], {epoch for epoch, _ in keys}
        if len(epochs) != 1:
            raise ValueError(f"the images to load must be of one epoch (got those of {sorted(epochs)})")
        epoch = epochs.pop()
        if isinstance(self.transform, EvalTransform):
            return [self._sample(row, self.transform) for row in rows]
        plans = self.plan(epoch, np.array(rows))
        planned = [partial(self.transform.apply, plans.row(place)) for place in range(len(rows))]
        return [self._sample(row, transform) for row, transform in zip(rows, planned, strict=True)]

    def _sample(self, row: int, transform: Transform) -> Sample:
        height, width = int(self.heights[row]), int(self.widths[row])
        path = self.image_root / self.file_names[row]
        image = decode_image(path, width=width, height=height, max_pixels=self.max_pixels, pixels=self.pixels)
        objects = slice(self._starts[row], self._starts[row + 1])
        boxes, labels = torch.from_numpy(self._boxes[objects]), torch.from_numpy(self._labels[objects])
        image, boxes, labels = transform(image, boxes, labels)
        return Sample(image, boxes, labels, int(self.image_ids[row]), (height, width))


def _objects_by_image(data: CocoData, categories: Categories) -> tuple[Floats, Ints, Ints]:
    """Return boxes [n, 4] xyxy pixels inside the image, labels [n], and the first object of each image [N + 1]."""
    kept = np.flatnonzero(~data.ann_crowd)
    image, place = data.ann_image[kept], positions(categories.ids, data.ann_category[kept])
    bad = np.flatnonzero((image < 0) | (place < 0))
    if len(bad):
        row = kept[bad[0]]
        ids = f"image id {data.ann_image_id[row]} and category id {data.ann_category[row]}"
        raise DataError(
            f"{data.annotation_file}: annotation {data.ann_ids[row]} has {ids}, of which one is unknown: "
            'correct it, or set data.on_bad = "drop"'
        )
    sides = np.stack([data.widths, data.heights, data.widths, data.heights], axis=1)[image]
    corners = data.ann_boxes[kept]
    corners[:, 2:] += corners[:, :2]
    corners = np.clip(corners, 0, sides)
    valid = np.flatnonzero((corners[:, 2:] > corners[:, :2]).all(axis=1))
    order = valid[np.argsort(image[valid], kind="stable")]
    starts = np.searchsorted(image[order], np.arange(len(data.file_names) + 1))
    labels = np.array(categories.indices, dtype=np.int64)[place[order]]
    return corners[order], labels, starts.astype(np.int64)


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _parse(file: Path, split: str) -> _File:
    """Read an annotation file (DataError: it is missing or broken; names the file and the place)."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: the annotation file of the {split} split does not exist: set data.{split}_annotations"
        ) from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): set data.{split}_annotations") from error
    if raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]
    try:
        return msgspec.json.decode(raw, type=_File)
    except msgspec.ValidationError as error:
        place = _entry_name(raw, str(error))
        raise DataError(f"{file}: not a COCO annotation file: {error}{place}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}: broken JSON: {error}{_surroundings(raw, str(error))}") from error


def _entry_name(raw: bytes, message: str) -> str:
    """Return `` (annotation id 7)`` for a message that points at `$.annotations[...]`, if the id can be read."""
    match = re.search(r"\$\.(images|annotations|categories)\[(\d+)\]", message)
    if match is None:
        return ""
    try:
        entry = getattr(msgspec.json.decode(raw, type=_RawFile), match[1])[int(match[2])]
        number = msgspec.json.decode(entry, type=_OnlyId).id
    except msgspec.MsgspecError:
        return ""
    noun = {"images": "image", "annotations": "annotation", "categories": "category"}[match[1]]
    return f" ({noun} id {number})"


def _surroundings(raw: bytes, message: str) -> str:
    """Describe the byte that a message names: its line, the text around it, and the entry of a NaN or infinity."""
    match = re.search(r"\(byte (\d+)\)", message)
    if match is None:
        return ""
    byte = int(match[1])
    near = raw[max(0, byte - 40) : byte + 20].decode("utf-8", "replace").replace("\n", " ")
    line = raw.count(b"\n", 0, byte) + 1
    place = f", line {line}, near {near!r}"
    if not raw.startswith(_NOT_NUMBERS, byte):
        return place
    entry = raw[raw.rfind(b"{", 0, byte) + 1 : raw.find(b"}", byte)]
    number = re.search(rb'"id"\s*:\s*(-?\d+)', entry)
    owner = f" of id {int(number[1])}" if number else ""
    return f"{place}: NaN or infinity in the entry{owner}, which is no number: correct or remove that box"
