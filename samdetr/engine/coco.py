"""Detections as columns, and their COCO numbers: by hotcoco, or by pycocotools, which defines them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samdetr.data.datasets import CocoData, Floats, Ints, positions
from samdetr.errors import NonFiniteError, RecipeError
from samdetr.structures import Categories, Detections

Evaluator = Literal["hotcoco", "pycocotools"]
STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoDetections:
    """D lines of a COCO results file as columns, in order of the images, the best of an image first."""

    image_ids: Ints  # [D]
    category_ids: Ints  # [D]
    boxes: Floats  # [D, 4] (x, y, w, h) in pixels of the original image
    scores: Floats  # [D]

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, chosen: NDArray[np.bool_] | Ints) -> CocoDetections:
        """Select detections. chosen: a mask [D], or positions in a new order."""
        return CocoDetections(
            self.image_ids[chosen], self.category_ids[chosen], self.boxes[chosen], self.scores[chosen]
        )

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of a results file: image_id, category_id, bbox and score of each detection."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]


class Evaluation(NamedTuple):
    """The result of an evaluation; numbers that the data cannot define (no small objects, ...) are -1."""

    stats: dict[str, float]  # the twelve COCO numbers, named as in STAT_NAMES
    per_class: dict[str, float]  # AP by category name


def coco_detections(found: Detections, image_ids: Sequence[int], categories: Categories) -> CocoDetections:
    """Copy the detections of B images to the host in one transfer, as columns.

    Logits without a category are left out, and scores of 0 of boxes at 0, which fill up an image that has fewer.
    """
    scores, labels, corners = (part.cpu() for part in found)
    boxes = torch.cat((corners[..., :2], corners[..., 2:] - corners[..., :2]), dim=-1)
    places = positions(categories.indices, labels.flatten().numpy())
    filling = (scores == 0) & (boxes == 0).all(dim=-1)
    known = (places >= 0) & ~filling.flatten().numpy()
    return CocoDetections(
        np.repeat(np.array(image_ids, dtype=np.int64), scores.shape[1])[known],
        np.array(categories.ids, dtype=np.int64)[places[known]],
        boxes.reshape(-1, 4).double().numpy()[known],
        scores.flatten().double().numpy()[known],
    )


def choose_evaluator(wanted: Literal["auto", "fast", "pycocotools"]) -> Evaluator:
    """Return what computes the numbers, by the key eval.evaluator. Raises RecipeError where hotcoco is missing."""
    if wanted == "pycocotools":
        return "pycocotools"
    try:
        import hotcoco  # noqa: F401
    except ImportError as error:
        if wanted == "fast":
            raise RecipeError(
                f'eval.evaluator = "fast" needs hotcoco, which cannot be imported ({error}): '
                "run python3 -m pip install 'hotcoco>=1.3,<2', or set eval.evaluator = \"auto\"."
            ) from error
        return "pycocotools"
    return "hotcoco"


def coco_evaluate(data: CocoData, results: CocoDetections, *, evaluator: Evaluator) -> Evaluation:
    """Compute the twelve COCO numbers and AP per class, the same to the last bit by either evaluator.

    Crowds are handled, and detections with equal scores ordered, as pycocotools does. Raises NonFiniteError when
    a score or box is not finite.
    """
    _check_finite(results, data.split)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = (_by_hotcoco if evaluator == "hotcoco" else _by_pycocotools)(data, results)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: [IoU thresholds, recalls, categories, areas, most detections]
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    per_class = {}
    for column, name in enumerate(data.category_names):
        values = precision[:, :, column]
        values = values[values > -1]
        per_class[name] = float(values.mean()) if values.size else -1.0
    return Evaluation(dict(zip(STAT_NAMES, map(float, evaluation.stats), strict=True)), per_class)


def _check_finite(results: CocoDetections, split: str) -> None:
    """Refuse NaN among the scores: the evaluators would disagree about it, or stop."""
    bad = ~(np.isfinite(results.scores) & np.isfinite(results.boxes).all(axis=1))
    if bad.any():
        ids = np.unique(results.image_ids[bad]).tolist()
        named = ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")
        raise NonFiniteError(
            f"the model's predictions are not finite in {len(ids)} images of the {split} split (image ids {named}): "
            "its weights are damaged or have overflowed; continue from an earlier checkpoint with a lower optim.lr."
        )


def _by_hotcoco(data: CocoData, results: CocoDetections) -> Any:
    """Evaluate with images and categories numbered by rank: results are floats, in which large ids are not exact.

    Ranks keep the order of the ids, by which equal scores of different images are ordered.
    """
    import hotcoco

    image_ids = np.unique(data.image_ids)
    ann_image, ann_category = positions(image_ids, data.ann_image_id), positions(data.category_ids, data.ann_category)
    image, category = positions(image_ids, results.image_ids), positions(data.category_ids, results.category_ids)
    # what the file does not list is left out, as pycocotools does
    listed, known = (ann_image >= 0) & (ann_category >= 0), (image >= 0) & (category >= 0)
    truth = hotcoco.COCO.from_arrays(
        [{"id": rank} for rank in range(len(image_ids))],
        [{"id": rank, "name": name} for rank, name in enumerate(data.category_names)],
        ann_image[listed],
        ann_category[listed],
        data.ann_boxes[listed],
        area=data.ann_area[listed],
        iscrowd=data.ann_crowd[listed],
    )
    rows = np.column_stack((image, results.boxes, results.scores, category))[known]
    return hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")


def _by_pycocotools(data: CocoData, results: CocoDetections) -> Any:
    truth = COCO()
    truth.dataset = _coco_dataset(data)
    truth.createIndex()
    if len(results):
        found = truth.loadRes(results.lines())
    else:  # which loadRes cannot take
        found = COCO()
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    return COCOeval(truth, found, "bbox")


def _coco_dataset(data: CocoData) -> dict[str, object]:
    """Build the ground truth with annotation ids from 1: pycocotools takes an id of 0 for "unmatched"."""
    columns = zip(
        data.ann_image_id.tolist(),
        data.ann_category.tolist(),
        data.ann_boxes.tolist(),
        data.ann_area.tolist(),
        data.ann_crowd.tolist(),
        strict=True,
    )
    return {
        "info": {},
        "images": [
            {"id": number, "width": width, "height": height}
            for number, width, height in zip(
                data.image_ids.tolist(), data.widths.tolist(), data.heights.tolist(), strict=True
            )
        ],
        "categories": [
            {"id": number, "name": name} for number, name in zip(data.category_ids, data.category_names, strict=True)
        ],
        "annotations": [
            {
                "id": row,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for row, (image, category, box, area, crowd) in enumerate(columns, start=1)
        ],
    }
