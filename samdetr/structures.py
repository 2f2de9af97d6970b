"""The typed, fixed-shape values that flow between data, models, loss and engine.

Dimension names used across the project:
B images in a batch, L decoder layers, Q object queries, K class logits, T padded targets of an image.
Boxes are (cx, cy, w, h) in [0, 1] of the *valid* image unless a name says ``xyxy`` (absolute pixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

GEOMETRY = 11  # numbers that say how a photo is augmented
ALIGNED = 16  # int64 numbers; compiled code copies what does not begin at a multiple of 16 bytes


class Targets(NamedTuple):
    """Ground truth of a batch, padded to a fixed T. Rows at or beyond ``counts`` are zero."""

    labels: Tensor  # [B, T] int64, index of the class logit
    boxes: Tensor  # [B, T, 4] float32 (cx, cy, w, h) in [0, 1] of the valid image
    counts: Tensor  # [B] int64, number of valid rows


class Resample(NamedTuple):
    """Sizes of what is still to be done to a batch's photos: `samdetr.data.resample` makes and reads them."""

    height: int  # padded, of the result
    width: int
    rows: int  # most that are left of an image by its crop
    columns: int


class Batch(NamedTuple):
    """What the model sees of a few images in one forward pass. `Batch.of` makes one."""

    images: Tensor  # [B, 3, H, W] float32, normalised, zero-padded at the bottom and right; or, from a loader with
    # data.pixels = "fast", uint8 pixels (strides channels-last) that `samdetr.data.prefetch.finish` makes into these
    numbers: Tensor  # int64 [N]: all else that is read on the device, so that one copy moves it
    max_objects: int  # T
    image_ids: Tensor  # [B] int64, the ids of the annotation file; stays on the host
    original_sizes: Tensor  # [B, 2] int64, (height, width) of the decoded photo, before augmentation; on the host
    resample: Resample | None = None  # if set, ``images`` are whole photos, zero-padded, that `finish` augments first

    @classmethod
    def of(
        cls,
        images: Tensor,
        image_sizes: Tensor,
        targets: Targets,
        image_ids: Tensor,
        original_sizes: Tensor,
        resample: Resample | None = None,
        geometry: Tensor | None = None,
    ) -> Batch:
        """The batch of these parts, all on one device; they are described at the fields and properties."""
        count, objects = targets.labels.shape
        parts = [image_sizes, targets.counts, targets.labels, targets.boxes.float().contiguous().view(torch.int64)]
        parts += [] if geometry is None else [geometry]
        places = _places(count, objects)
        numbers = images.new_zeros(places[len(parts) - 1].stop, dtype=torch.int64)
        for place, part in zip(places, parts, strict=False):
            numbers[place] = part.flatten()
        return cls(images, numbers, objects, image_ids, original_sizes, resample)

    def _part(self, index: int) -> Tensor:
        return self.numbers[_places(len(self.images), self.max_objects)[index]]

    @property
    def image_sizes(self) -> Tensor:
        """[B, 2] int64, (height, width) of the valid pixels."""
        return self._part(0).view(-1, 2)

    @property
    def targets(self) -> Targets:
        """The ground truth."""
        labels, boxes = self._part(2).view(-1, self.max_objects), self._part(3).view(torch.float32)
        return Targets(labels, boxes.view(-1, self.max_objects, 4), self._part(1))

    @property
    def geometry(self) -> Tensor:
        """[B, 11] int64, how each photo is augmented, where ``resample`` is set."""
        return self._part(4).view(-1, GEOMETRY)

    def to(self, device: torch.device) -> Batch:
        """The same batch with what the model and the loss read on ``device``, in two copies."""
        images, numbers = (part.to(device, non_blocking=True) for part in (self.images, self.numbers))
        return self._replace(images=images, numbers=numbers)


@cache
def _places(images: int, objects: int) -> tuple[slice, ...]:
    """Where in `Batch.numbers` sizes, counts, labels, boxes (two float32 each) and geometry are."""
    places, start = [], 0
    for width in (2, 1, objects, 2 * objects, GEOMETRY):
        places.append(slice(start, start + images * width))
        start += -(-images * width // ALIGNED) * ALIGNED
    return tuple(places)


class Proposals(NamedTuple):
    """Predictions of every one of S map cells, before the decoder; the first logit says whether there is an object."""

    logits: Tensor  # [B, S, K]
    boxes: Tensor  # [B, S, 4] as of Outputs


class Outputs(NamedTuple):
    """Predictions of every decoder layer; index -1 of the first axis is the final one."""

    logits: Tensor  # [L, B, Q, K] raw class logits
    boxes: Tensor  # [L, B, Q, 4] (cx, cy, w, h) in [0, 1] of the valid image
    proposals: Proposals | None = None  # of a system with two stages


class RegionLosses(NamedTuple):
    """What Faster R-CNN's forward pass gives in training: scalars, means over what it draws of a micro-batch."""

    loss_objectness: Tensor  # anchors: object or not
    loss_rpn_box_reg: Tensor  # anchors: boxes
    loss_classifier: Tensor  # proposals: classes
    loss_box_reg: Tensor  # proposals: boxes
    class_error: Tensor  # percentage of the proposals with an object whose class is wrong


class Losses(NamedTuple):
    """Result of a criterion."""

    total: Tensor  # scalar, the weighted sum that is differentiated
    terms: dict[str, Tensor]  # unweighted scalars: loss_ce, loss_bbox, loss_giou (final layer), loss_ce_0, ...


class Detections(NamedTuple):
    """The best scores of each image, sorted descending."""

    scores: Tensor  # [B, N] float32 in [0, 1]
    labels: Tensor  # [B, N] int64, index of the class logit
    boxes_xyxy: Tensor  # [B, N, 4] float32, absolute pixels of the original image


@dataclass(frozen=True)
class Categories:
    """The mapping between category ids of a data set and class logits, stored in every checkpoint."""

    ids: tuple[int, ...]  # category ids, ascending
    names: tuple[str, ...]
    indices: tuple[int, ...]  # the class logit of each category

    def index_of(self, category_id: int) -> int:
        """The class logit of a category id (KeyError if the id is unknown)."""
        return dict(zip(self.ids, self.indices, strict=True))[category_id]

    def by_index(self) -> dict[int, tuple[int, str]]:
        """Class logit -> (category id, name). Logits that no category uses are absent."""
        return {i: (c, n) for c, n, i in zip(self.ids, self.names, self.indices, strict=True)}

    def to_json(self) -> list[dict[str, object]]:
        """A JSON value that `from_json` reads back."""
        return [{"id": c, "name": n, "index": i} for c, n, i in zip(self.ids, self.names, self.indices, strict=True)]

    @classmethod
    def from_json(cls, value: list[dict[str, object]]) -> Categories:
        """The inverse of `to_json`."""
        return cls(
            ids=tuple(int(row["id"]) for row in value),  # type: ignore[call-overload]
            names=tuple(str(row["name"]) for row in value),
            indices=tuple(int(row["index"]) for row in value),  # type: ignore[call-overload]
        )
