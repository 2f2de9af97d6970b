"""The typed, fixed-shape values that pass between data, models, loss and engine.

Dimension names used across the project:
B images in a batch, L decoder layers, Q object queries, K class logits, T padded targets of an image.
Boxes are (cx, cy, w, h) in [0, 1] of the *valid* image unless a name says ``xyxy`` (absolute pixels).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground truth of a batch, padded to a fixed T. Rows at or beyond ``counts`` are zero."""

    labels: Tensor  # [B, T] int64, index of the class logit
    boxes: Tensor  # [B, T, 4] float32 (cx, cy, w, h) in [0, 1] of the valid image
    counts: Tensor  # [B] int64, number of valid rows


class Batch(NamedTuple):
    """A few images with their ground truth, for one forward pass."""

    images: Tensor  # [B, 3, H, W] float32, normalised, zero-padded at the bottom and right; or, from a loader with
    # data.pixels = "fast", uint8 pixels (strides channels-last), which `samdetr.data.device.to_device` normalises
    image_sizes: Tensor  # [B, 2] int64, (height, width) of the valid pixels
    targets: Targets
    image_ids: Tensor  # [B] int64, the ids of the annotation file; stays on the host
    original_sizes: Tensor  # [B, 2] int64, (height, width) of the decoded photo, before augmentation; on the host

    def step_tensors(self) -> tuple[Tensor, ...]:
        """Return what the model and the loss read: images, image sizes, labels, boxes and counts."""
        return (self.images, self.image_sizes, *self.targets)

    def with_step_tensors(self, tensors: Iterable[Tensor]) -> Batch:
        """Return the batch with these in place of its `step_tensors`."""
        images, image_sizes, *targets = tensors
        return self._replace(images=images, image_sizes=image_sizes, targets=Targets(*targets))

    def to(self, device: torch.device) -> Batch:
        """Copy the `step_tensors` to ``device``, without waiting where they are pinned."""
        return self.with_step_tensors(tensor.to(device, non_blocking=True) for tensor in self.step_tensors())

    def pin_memory(self) -> Batch:
        """Copy all tensors to page-locked memory; torch's DataLoader calls it."""
        pinned = self.with_step_tensors(tensor.pin_memory() for tensor in self.step_tensors())
        image_ids, original_sizes = self.image_ids.pin_memory(), self.original_sizes.pin_memory()
        return pinned._replace(image_ids=image_ids, original_sizes=original_sizes)


class Proposals(NamedTuple):
    """Predictions of each of S map cells before the decoder; the first logit is that of any object."""

    logits: Tensor  # [B, S, K]
    boxes: Tensor  # [B, S, 4] as of Outputs


class Outputs(NamedTuple):
    """Predictions of every decoder layer; index -1 of the first axis is the final one."""

    logits: Tensor  # [L, B, Q, K] raw class logits
    boxes: Tensor  # [L, B, Q, 4] (cx, cy, w, h) in [0, 1] of the valid image
    proposals: Proposals | None = None  # of a system with two stages


class RegionLosses(NamedTuple):
    """Losses of Faster R-CNN's forward pass in training: scalars, means over the samples drawn of a micro-batch."""

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

    def by_index(self) -> dict[int, tuple[int, str]]:
        """Return (category id, name) for each class logit that a category uses."""
        return {i: (c, n) for c, n, i in zip(self.ids, self.names, self.indices, strict=True)}

    def to_json(self) -> list[dict[str, object]]:
        """Return a JSON value that `from_json` reads back."""
        return [{"id": c, "name": n, "index": i} for c, n, i in zip(self.ids, self.names, self.indices, strict=True)]

    @classmethod
    def from_json(cls, value: list[dict[str, object]]) -> Categories:
        """Read the JSON value that `to_json` wrote."""
        return cls(
            ids=tuple(int(row["id"]) for row in value),  # type: ignore[call-overload]
            names=tuple(str(row["name"]) for row in value),
            indices=tuple(int(row["index"]) for row in value),  # type: ignore[call-overload]
        )
