"""Evaluation on COCO-format data with pycocotools, during training and for saved checkpoints."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from samdetr.data.checks import check_data, raise_for_errors
from samdetr.data.datasets import CocoData, make_categories
from samdetr.data.loader import EvalLoader, build_eval_loader
from samdetr.data.prefetch import prefetch
from samdetr.data.splits import build_dataset, read_split
from samdetr.engine.log import STAT_NAMES, print_evaluation, print_findings, print_per_class
from samdetr.engine.setup import choose_device, load_trained
from samdetr.errors import RecipeError
from samdetr.loss.boxes import cxcywh_to_xyxy
from samdetr.models import build_model
from samdetr.models.official import load_official, read_official
from samdetr.recipe import override_recipe
from samdetr.structures import Categories, Detections, Outputs

if TYPE_CHECKING:
    from samdetr.models import SAMDETR
    from samdetr.recipe import Recipe


class CocoDetection(NamedTuple):
    """One line of a COCO results file."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]  # x, y, w, h in pixels of the original image
    score: float


class Evaluation(NamedTuple):
    """The result of an evaluation; numbers that the data cannot define (no small objects, ...) are -1."""

    stats: dict[str, float]  # the twelve COCO numbers, named as in STAT_NAMES
    per_class: dict[str, float]  # AP by category name


def best_detections(outputs: Outputs, original_sizes: Tensor, top_k: int) -> Detections:
    """The ``top_k`` best of all query-class scores of the final layer, in pixels of the original images.

    original_sizes: [B, 2] (h, w). Returns N = min(top_k, Q * K) detections an image, best first.
    """
    logits, boxes = outputs.logits[-1].float(), outputs.boxes[-1].float()
    classes = logits.shape[-1]
    scores, index = logits.sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
    chosen = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
    scale = original_sizes.flip(-1).repeat(1, 2)[:, None].to(chosen)
    return Detections(scores, index % classes, cxcywh_to_xyxy(chosen) * scale)


@torch.no_grad()
def detect(
    model: nn.Module,
    loader: EvalLoader,
    categories: Categories,
    *,
    device: torch.device,
    top_k: int,
    after_batch: Callable[[int], None] | None = None,
) -> list[CocoDetection]:
    """Run the model in evaluation mode over all images; logits without a category are left out.

    ``after_batch`` is called with the number of batches done and may raise to stop.
    """
    names = categories.by_index()
    results: list[CocoDetection] = []
    was_training = model.training
    model.eval()
    try:
        for done, (batch,) in enumerate(prefetch(([batch] for batch in loader), device), start=1):
            outputs = model(batch.images, batch.image_sizes)
            found = best_detections(outputs, batch.original_sizes.to(device), top_k)
            for row, image_id in enumerate(batch.image_ids.tolist()):
                results += coco_detections(Detections(*(part[row : row + 1].cpu() for part in found)), image_id, names)
            if after_batch:
                after_batch(done)
    finally:
        model.train(was_training)
    return results


def coco_detections(found: Detections, image_id: int, names: dict[int, tuple[int, str]]) -> list[CocoDetection]:
    """The detections of one image (batch of 1) as COCO results. names: `Categories.by_index`."""
    corners = found.boxes_xyxy[0]
    boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=-1).tolist()
    return [
        CocoDetection(image_id, names[label][0], tuple(box), score)
        for score, label, box in zip(found.scores[0].tolist(), found.labels[0].tolist(), boxes, strict=True)
        if label in names
    ]


def coco_evaluate(data: CocoData, results: list[CocoDetection]) -> Evaluation:
    """The twelve COCO numbers and AP per class, crowds handled as pycocotools does.

    Annotation ids are renumbered from 1: pycocotools takes an id of 0 for "unmatched".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = _coco_dataset(data)
        truth.createIndex()
        if results:
            found = truth.loadRes([{**one._asdict(), "bbox": list(one.bbox)} for one in results])
        else:  # which loadRes cannot take
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
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


def _coco_dataset(data: CocoData) -> dict[str, object]:
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


def evaluate_checkpoint(path: str, *, overrides: list[str]) -> None:
    """Evaluate a run or checkpoint on the val split of its recipe, changed by ``overrides``, and print tables.

    Raises RecipeError when the overrides are wrong or change the model.
    """
    trained = load_trained(path)
    recipe = override_recipe(trained.recipe, overrides) if overrides else trained.recipe
    if recipe.model != trained.recipe.model:
        raise RecipeError(f"--set model...: the model of {trained.path} is as it was trained and cannot be changed")
    data = read_split(recipe.data, "val")
    _evaluate_and_print(trained.model, recipe, data, trained.categories, title=f"{trained.path}")


def evaluate_official(path: str, recipe: Recipe) -> None:
    """Evaluate a published checkpoint with a recipe's model and val split, and print tables."""
    state = read_official(path)
    data = read_split(recipe.data, "val")
    categories = make_categories(data, recipe.data.class_index, recipe.model.num_classes)
    model = build_model(recipe.model)
    load_official(model, state)
    _evaluate_and_print(model, recipe, data, categories, title=path)


def _evaluate_and_print(model: SAMDETR, recipe: Recipe, raw: CocoData, categories: Categories, *, title: str) -> None:
    """raw: the val split, unchecked."""
    console = Console()
    device = choose_device(recipe.run.device, recipe.run.kernels)
    data, report = check_data(
        raw,
        num_queries=recipe.model.num_queries,
        on_bad=recipe.data.on_bad,
        against=dict(zip(categories.ids, categories.names, strict=True)),
    )
    print_findings(console, report.rows())
    raise_for_errors([report])
    dataset = build_dataset(data, categories, recipe.data, recipe.augment, seed=recipe.run.seed, training=False)
    loader = build_eval_loader(
        dataset, batch=recipe.eval.batch, workers=recipe.data.workers, pin_memory=device.type == "cuda"
    )
    model.to(device)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=len(loader))
        results = detect(
            model,
            loader,
            categories,
            device=device,
            top_k=recipe.eval.top_k,
            after_batch=lambda done: bar.update(task, completed=done),
        )
    loader.close()
    evaluation = coco_evaluate(data, results)
    print_evaluation(console, evaluation.stats, title)
    print_per_class(console, evaluation.per_class)
