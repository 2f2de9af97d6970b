"""COCO evaluation: equal to pycocotools on a JSON file, and from the model's outputs to the table."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

import samdetr.engine.evaluate
from samdetr.data.datasets import CocoData, make_categories, read_coco
from samdetr.data.loader import build_eval_loader
from samdetr.data.splits import build_dataset, load_splits
from samdetr.engine.evaluate import (
    CocoDetection,
    best_detections,
    coco_detections,
    coco_evaluate,
    detect,
    evaluate_checkpoint,
)
from samdetr.engine.log import STAT_NAMES
from samdetr.errors import RecipeError
from samdetr.models import build_model
from samdetr.models.official import to_official
from samdetr.recipe import dump_recipe
from samdetr.structures import Batch, Categories, Detections, Outputs, Targets
from tests.engine.runs import Command, MakeRecipe, metrics

CPU = torch.device("cpu")


def write_coco(tmp_path: Path, content: dict[str, Any]) -> CocoData:
    (tmp_path / "photos").mkdir(exist_ok=True)
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    return read_coco(tmp_path / "photos", file, "val")


def random_coco(*, first_id: int = 1) -> dict[str, Any]:
    """40 images, some empty, objects of all sizes in 3 sparse categories, some crowds; a fourth has no object."""
    rng = np.random.default_rng(5)
    images = [
        {"id": int(number), "file_name": f"{number}.jpg", "width": 400, "height": 300}
        for number in rng.permutation(40) * 3 + 2
    ]
    annotations: list[dict[str, Any]] = []
    for image in images:
        for _ in range(rng.integers(0, 9)):
            width, height = np.exp(rng.uniform(1.5, 5.3, 2))
            x, y = rng.uniform(0, 400 - width), rng.uniform(0, 300 - height)
            annotations.append(
                {
                    "id": first_id + len(annotations),
                    "image_id": image["id"],
                    "category_id": int(rng.choice([3, 17, 90])),
                    "bbox": [float(x), float(y), float(width), float(height)],
                    "area": float(width * height * rng.uniform(0.4, 1)),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    categories = [{"id": number, "name": f"class {number}"} for number in (90, 3, 40, 17)]
    return {"images": images, "annotations": annotations, "categories": categories}


def random_detections(content: dict[str, Any]) -> list[CocoDetection]:
    """Shifted objects, wrong classes and noise with tied scores; more than 100 in some images."""
    rng = np.random.default_rng(6)
    found = []
    for annotation in content["annotations"]:
        for _ in range(rng.integers(0, 3)):
            shift = rng.normal(0, 0.08, 4) * annotation["bbox"][2]
            box = tuple(float(value) for value in np.array(annotation["bbox"]) + shift * (1, 1, 0.5, 0.5))
            category = annotation["category_id"] if rng.random() < 0.8 else 3
            found.append(CocoDetection(annotation["image_id"], category, box, round(float(rng.random()), 1)))  # type: ignore[arg-type]
    for image in content["images"][::7]:
        for _ in range(150):
            x, y, width, height = (float(value) for value in rng.uniform(1, 150, 4))
            score = round(float(rng.random()) / 2, 1)
            found.append(CocoDetection(image["id"], int(rng.choice([3, 17])), (x, y, width, height), score))
    return found


def oracle(file: Path, results: Sequence[CocoDetection], category: int | None = None) -> list[float]:
    """The twelve numbers of pycocotools, used as its own examples do."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(
            truth, truth.loadRes([dict(one._asdict(), bbox=list(one.bbox)) for one in results]), "bbox"
        )
        if category is not None:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def perfect(content: dict[str, Any]) -> list[CocoDetection]:
    return [
        CocoDetection(one["image_id"], one["category_id"], tuple(one["bbox"]), 1.0)
        for one in content["annotations"]
        if not one["iscrowd"]
    ]


def test_equal_to_pycocotools(tmp_path: Path) -> None:
    content = random_coco()
    data, results = write_coco(tmp_path, content), random_detections(content)
    assert any(sum(one.image_id == image["id"] for one in results) > 100 for image in content["images"])
    evaluation = coco_evaluate(data, results)
    assert tuple(evaluation.stats) == STAT_NAMES
    expected = oracle(data.annotation_file, results)
    assert list(evaluation.stats.values()) == expected
    assert 0.05 < expected[0] < 0.9 and min(expected) > 0
    per_class = {f"class {number}": oracle(data.annotation_file, results, number)[0] for number in (3, 17, 40, 90)}
    assert evaluation.per_class == pytest.approx(per_class, abs=1e-12)
    assert list(evaluation.per_class) == ["class 3", "class 17", "class 40", "class 90"]
    assert per_class["class 40"] == -1


def test_annotation_ids_from_zero(tmp_path: Path) -> None:
    """pycocotools itself takes the id 0 for no match and loses that object."""
    content = random_coco(first_id=0)
    one = {**content["annotations"][0], "iscrowd": 0, "image_id": content["images"][0]["id"]}
    content = {**content, "annotations": [one]}
    data = write_coco(tmp_path, content)
    assert coco_evaluate(data, perfect(content)).stats["AP"] == pytest.approx(1.0)
    assert oracle(data.annotation_file, perfect(content))[0] == pytest.approx(0.0)


def test_perfect_detections(tmp_path: Path) -> None:
    content = random_coco()
    evaluation = coco_evaluate(write_coco(tmp_path, content), perfect(content))
    assert [evaluation.stats[name] for name in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([1.0] * 4)
    assert evaluation.per_class == pytest.approx({"class 3": 1, "class 17": 1, "class 90": 1, "class 40": -1})


def test_no_detections_and_no_objects(tmp_path: Path) -> None:
    content = random_coco()
    small = [one for one in content["annotations"] if one["area"] < 32**2]
    evaluation = coco_evaluate(write_coco(tmp_path, {**content, "annotations": small}), [])
    zero, undefined = ("AP", "AP50", "APs", "AR100", "ARs"), ("APm", "APl", "ARm", "ARl")
    assert {evaluation.stats[name] for name in zero} == {0.0}
    assert {evaluation.stats[name] for name in undefined} == {-1.0}
    assert evaluation.per_class["class 40"] == -1.0 and evaluation.per_class["class 3"] == 0.0
    nothing = coco_evaluate(write_coco(tmp_path, {**content, "annotations": []}), random_detections(content))
    assert set(nothing.stats.values()) == {-1.0}


def test_best_detections_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -3.0], [4.0, 2.0]]])  # one image, three queries, two classes
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.1, 0.2, 0.2]]])
    first_layer = (torch.full_like(logits, 9.0), torch.zeros_like(boxes))
    outputs = Outputs(torch.stack((first_layer[0], logits)), torch.stack((first_layer[1], boxes)))
    found = best_detections(outputs, torch.tensor([[100, 200]]), top_k=4)
    assert found.labels.tolist() == [[0, 1, 1, 0]]
    torch.testing.assert_close(found.scores, torch.tensor([[4.0, 2.0, 2.0, 1.0]]).sigmoid())
    corners = {0: [80, 30, 120, 70], 1: [0, 0, 100, 100], 2: [160, 0, 200, 20]}
    tied = [found.boxes_xyxy[0, 1].tolist(), found.boxes_xyxy[0, 2].tolist()]
    assert found.boxes_xyxy[0, 0].tolist() == pytest.approx(corners[2], abs=1e-4)
    assert sorted(tied) == [pytest.approx(corners[0], abs=1e-4), pytest.approx(corners[2], abs=1e-4)]
    assert found.boxes_xyxy[0, 3].tolist() == pytest.approx(corners[1], abs=1e-4)


def test_top_k_beyond_all_scores() -> None:
    outputs = Outputs(torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 4))
    found = best_detections(outputs, torch.tensor([[10, 10]] * 3), top_k=100)
    assert found.scores.shape == (3, 20)
    assert sorted(found.labels[1].tolist()) == sorted([0, 1, 2, 3, 4] * 4)


def test_boxes_of_each_image_have_its_own_size() -> None:
    outputs = Outputs(torch.zeros(1, 2, 1, 1), torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(1, 2, 1, 4))
    found = best_detections(outputs, torch.tensor([[30, 40], [50, 20]]), top_k=1)
    assert found.boxes_xyxy.tolist() == [[[0, 0, 40, 30]], [[0, 0, 20, 50]]]


class Replay(nn.Module):
    """Answers each call with the next of the prepared outputs."""

    def __init__(self, outputs: Sequence[Outputs]) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        assert not self.training
        return self.outputs.pop(0)


def answers(batch: Batch, classes: int) -> Outputs:
    """The ground truth of a batch as a model's outputs."""
    labels, boxes, counts = batch.targets
    logits = torch.full((*labels.shape, classes), -20.0).scatter(2, labels[..., None], 20.0)
    padding = torch.arange(labels.shape[1]) >= counts[:, None]
    logits[padding] = -20.0
    return Outputs(logits[None], boxes[None])


@pytest.mark.parametrize(("class_index", "classes"), [("contiguous", 8), ("category_id", 12)])
def test_a_perfect_model_has_ap_1(make_recipe: MakeRecipe, class_index: str, classes: int) -> None:
    """Resizing, padding, normalised boxes, original sizes and category ids cancel out."""
    recipe = make_recipe(
        f'data.class_index="{class_index}"', f"model.num_classes={classes}", "augment.eval_size=50", "eval.batch=4"
    )
    splits = load_splits(recipe.data, num_queries=12, num_classes=classes)
    dataset = build_dataset(splits.val, splits.categories, recipe.data, recipe.augment, seed=0, training=False)
    loader = build_eval_loader(dataset, batch=4, workers=0, pin_memory=False)
    model = Replay([answers(batch, classes) for batch in loader]).train()
    results = detect(model, loader, splits.categories, device=CPU, top_k=20)
    assert model.training
    assert {one.category_id for one in results} <= set(range(1, 9))
    assert coco_evaluate(splits.val, results).stats["AP"] > 0.999


def test_logits_without_a_category_are_left_out(tmp_path: Path) -> None:
    categories = Categories(ids=(2, 7), names=("two", "seven"), indices=(2, 7))
    logits = torch.arange(9.0).expand(1, 1, 1, 9)  # class 8, which no category has, is best
    batch = Batch(
        images=torch.zeros(1, 3, 8, 8),
        image_sizes=torch.tensor([[8, 8]]),
        targets=Targets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 4), torch.tensor([0])),
        image_ids=torch.tensor([31]),
        original_sizes=torch.tensor([[10, 20]]),
    )
    model = Replay([Outputs(logits, torch.full((1, 1, 1, 4), 0.5))])
    results = detect(model, [batch], categories, device=CPU, top_k=9)  # type: ignore[arg-type]
    assert [(one.image_id, one.category_id) for one in results] == [(31, 7), (31, 2)]
    assert results[0].bbox == pytest.approx((5, 2.5, 10, 5))


def test_sparse_category_ids_round_trip(tmp_path: Path) -> None:
    data = write_coco(tmp_path, random_coco())
    categories = make_categories(data, "contiguous", 4)
    found = Detections(torch.ones(1, 4), torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 4, 4))
    results = coco_detections(found, 5, Categories.from_json(json.loads(json.dumps(categories.to_json()))).by_index())
    assert [one.category_id for one in results] == [3, 17, 40, 90]
    for category, name in zip(categories.ids, categories.names, strict=True):
        assert categories.by_index()[categories.index_of(category)] == (category, name)


def shown(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> dict[str, float]:
    """The numbers that evaluating a run or checkpoint prints."""
    tables: list[dict[str, float]] = []
    with monkeypatch.context() as patch:
        patch.setattr(samdetr.engine.evaluate, "print_evaluation", lambda console, stats, title: tables.append(stats))
        evaluate_checkpoint(str(path), overrides=list(overrides))
    return tables[0]


def test_a_run_is_evaluated_as_in_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_recipe: MakeRecipe
) -> None:
    lines = metrics(trained, "eval")
    best = max(lines, key=lambda line: line["AP"])
    assert lines[0]["AP"] != lines[1]["AP"]
    for path in (trained, trained / "checkpoints" / "best"):
        assert shown(monkeypatch, path) == {name: best[name] for name in STAT_NAMES}
    moved = tmp_path / "somewhere else"
    shutil.copytree(trained / "checkpoints" / "last", moved)
    assert shown(monkeypatch, moved) == {name: lines[-1][name] for name in STAT_NAMES}
    # another batch size changes the padding, which padding = "masked" keeps out of the numbers
    other = shown(monkeypatch, moved, "eval.batch=1", "data.workers=1")
    assert other == pytest.approx({name: lines[-1][name] for name in STAT_NAMES}, abs=1e-4)
    with pytest.raises(RecipeError, match="is as it was trained and cannot be changed"):
        shown(monkeypatch, moved, "model.dropout=0.3")


def test_the_command_prints_tables(trained: Path, samdetr_command: Command) -> None:
    result = samdetr_command("eval", str(trained))
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == str((trained / "checkpoints" / "best").resolve())
    assert lines[1].split() == list(STAT_NAMES)
    best = max(metrics(trained, "eval"), key=lambda line: line["AP"])
    assert lines[2].split() == ["-" if best[name] < 0 else f"{best[name]:.3f}" for name in STAT_NAMES]
    assert all(re.search(rf"\b{name}\b", result.out) for name in best["per_class"])


def test_a_published_checkpoint_needs_no_training_split(
    make_recipe: MakeRecipe, tmp_path: Path, samdetr_command: Command
) -> None:
    recipe = make_recipe('model.backbone.norm="frozen"')
    torch.save({"model": to_official(build_model(recipe.model))}, tmp_path / "published.pth")
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    coco = (
        'data.format="coco"',
        f'data.val_images="{splits.val.image_root}"',
        f'data.val_annotations="{splits.val.annotation_file}"',
    )
    (tmp_path / "val_only.toml").write_text(dump_recipe(make_recipe('model.backbone.norm="frozen"', *coco)))
    result = samdetr_command("eval", "--official", str(tmp_path / "published.pth"), str(tmp_path / "val_only.toml"))
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1].split() == list(STAT_NAMES)
