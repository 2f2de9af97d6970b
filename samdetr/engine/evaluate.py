"""Evaluation: the model over the whole val split, in a run and for saved checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from samdetr.data.checks import check_data, raise_for_errors
from samdetr.data.datasets import CocoData, make_categories, positions
from samdetr.data.device import prefetch
from samdetr.data.loader import EvalLoader
from samdetr.data.splits import Splits, build_dataset, read_split
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.coco import CocoDetections, Evaluator, choose_evaluator, coco_detections, coco_evaluate
from samdetr.engine.compute.compile import eagerly
from samdetr.engine.compute.precision import autocast, choose_device, choose_precision
from samdetr.engine.distributed.world import World
from samdetr.engine.failures.out_of_memory import START_UP, batch_size, explain_evaluation, explain_place, note_place
from samdetr.engine.run.log import RunLog, Timer, print_evaluation, print_findings, print_per_class
from samdetr.engine.run.pictures import draw_validation
from samdetr.engine.state import TrainState
from samdetr.errors import RecipeError
from samdetr.loss.boxes import cxcywh_to_xyxy
from samdetr.models import Detector, build_model
from samdetr.models.official import load_official, read_official
from samdetr.recipe import override_recipe
from samdetr.structures import Batch, Categories, Detections, Outputs

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


def best_detections(
    outputs: Outputs, original_sizes: Tensor, top_k: int, classification: Literal["focal", "softmax"] = "focal"
) -> Detections:
    """Select the ``top_k`` best scores of the final layer, in pixels of the original images, best first.

    original_sizes: [B, 2] (h, w). "focal": of all query-class scores, N = min(top_k, Q * K) detections an image.
    "softmax": of each query's best class that is not the last, no object: N = min(top_k, Q).
    """
    logits, boxes = outputs.logits[-1].float(), outputs.boxes[-1].float()
    if classification == "softmax":
        best, classes = logits.softmax(-1)[..., :-1].max(-1)
        scores, query = best.topk(min(top_k, best.shape[1]), dim=1)
        labels = classes.gather(1, query)
    else:
        scores, index = logits.sigmoid().flatten(1).topk(min(top_k, logits[0].numel()), dim=1)
        query, labels = index // logits.shape[-1], index % logits.shape[-1]
    chosen = boxes.gather(1, query[..., None].expand(-1, -1, 4))
    scale = original_sizes.flip(-1).repeat(1, 2)[:, None].to(chosen)
    return Detections(scores, labels, cxcywh_to_xyxy(chosen) * scale)


@torch.no_grad()
def detect(
    model: nn.Module,
    batches: Iterable[Batch],
    categories: Categories,
    *,
    top_k: int,
    classification: Literal["focal", "softmax"] = "focal",
    precision: torch.dtype = torch.float32,
) -> CocoDetections:
    """Run the model in evaluation mode over all images and return its detections; logits without a category have none.

    batches: as `device_batches` yields them; each is done before the next one is asked for. The detections stay on the
    device until the last batch: nothing waits for it before.
    """
    parts: list[Detections] = []
    image_ids: list[int] = []
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            # images of any size: nothing to compile
            with note_place(batch_size(batch)), eagerly(), autocast(precision, batch.images.device):
                outputs = model(batch.images, batch.image_sizes)
            sizes = batch.original_sizes.to(outputs.boxes.device, non_blocking=True)
            parts.append(best_detections(outputs, sizes, top_k, classification))
            image_ids += batch.image_ids.tolist()
    finally:
        model.train(was_training)
    whole = Detections(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return coco_detections(whole, image_ids, categories)


def device_batches(loader: EvalLoader, device: torch.device) -> Iterator[Batch]:
    """Yield the loader's batches on the device; image ids and original sizes stay on the host."""
    return (batch for (batch,) in prefetch(([batch] for batch in loader), device))


def gather_detections(found: CocoDetections, world: World, order: NDArray[np.int64]) -> CocoDetections | None:
    """Gather the detections of all processes in the main one, in order of the images; return None in the others.

    order: ids of the images in the order of the data set. Of an image that several processes ran (`EvalLoader`
    repeats some) the detections of the lowest rank count.
    """
    if world.size == 1:
        return found
    columns = (found.image_ids, found.category_ids, found.boxes, found.scores, np.full(len(found), world.rank))
    gathered = [world.gather(torch.from_numpy(column)) for column in columns]
    if not world.is_main:
        return None
    image_ids, category_ids, boxes, scores, ranks = (column.numpy() for column in gathered if column is not None)
    places = positions(order, image_ids)
    first = np.full(len(order), world.size)
    np.minimum.at(first, places, ranks)
    kept = np.flatnonzero(ranks == first[places])
    in_order = kept[np.argsort(places[kept], kind="stable")]
    return CocoDetections(image_ids, category_ids, boxes, scores).where(in_order)


def evaluate_epoch(
    state: TrainState,
    batches: Iterable[Batch],
    splits: Splits,
    recipe: Recipe,
    folder: Path,
    *,
    evaluator: Evaluator,
    precision: torch.dtype,
    world: World,
    log: RunLog,
) -> bool:
    """Evaluate a run on the val split, report and draw it; return whether the AP is the best, and keep it then.

    batches: of this process, on the device. folder: of the run.
    """
    progress, timer = state.progress, Timer()
    with state.averaged():
        found = detect(
            state.model,
            batches,
            splits.categories,
            top_k=recipe.eval.top_k,
            classification=recipe.loss.classification,
            precision=precision,
        )
    results = gather_detections(found, world, splits.val.image_ids)

    def report() -> float:
        assert results is not None  # in the main process
        evaluation = coco_evaluate(splits.val, results, evaluator=evaluator)
        ap = evaluation.stats["AP"]
        best, seconds = ap > progress.best_ap, timer.lap()
        log.evaluation(
            progress.epoch, evaluation.stats, evaluation.per_class, evaluator=evaluator, seconds=seconds, best=best
        )
        picture, max_pixels = folder / "val_predictions.png", recipe.data.max_pixels
        draw_validation(picture, splits.val, results, splits.categories, max_pixels=max_pixels)
        return ap

    ap = world.broadcast_from_main(report)
    best = ap > progress.best_ap
    if best:
        progress.best_ap, progress.best_epoch = ap, progress.epoch
    return best


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
    categories = make_categories(
        data,
        recipe.data.class_index,
        recipe.model.num_classes,
        no_object=recipe.loss.classification == "softmax",
    )
    model = build_model(recipe.model)
    load_official(model, state)
    _evaluate_and_print(model, recipe, data, categories, title=path)


def _evaluate_and_print(model: Detector, recipe: Recipe, raw: CocoData, categories: Categories, *, title: str) -> None:
    """Evaluate a model, whose weights are loaded, and print tables. raw: the val split, unchecked."""
    console = Console()
    device = choose_device(recipe.run.device, recipe.compute.kernels)
    evaluator = choose_evaluator(recipe.eval.evaluator)
    data, report = check_data(
        raw,
        num_queries=recipe.model.most_objects,
        on_bad=recipe.data.on_bad,
        against=dict(zip(categories.ids, categories.names, strict=True)),
    )
    print_findings(console, report.rows())
    raise_for_errors([report])
    dataset = build_dataset(data, categories, recipe.data, recipe.augment, seed=recipe.run.seed, training=False)
    loader = EvalLoader(dataset, batch=recipe.eval.batch, workers=recipe.data.workers, pin_memory=device.type == "cuda")
    with explain_place(device, START_UP):
        model.to(device)
    progress = Progress(console=console, transient=True, disable=not console.is_terminal)
    with progress as bar, explain_evaluation(recipe, device):
        results = detect(
            model,
            bar.track(device_batches(loader, device), total=len(loader), description="evaluating"),
            categories,
            top_k=recipe.eval.top_k,
            classification=recipe.loss.classification,
            precision=choose_precision(recipe.compute.precision, device),
        )
    loader.close()
    evaluation = coco_evaluate(data, results, evaluator=evaluator)
    print_evaluation(console, evaluation.stats, f"{title}  evaluated by {evaluator}")
    print_per_class(console, evaluation.per_class)
