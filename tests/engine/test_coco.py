"""COCO numbers: both evaluators equal pycocotools on a JSON file, and each other to the last digit."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from samdetr.data.datasets import CocoData, make_categories, read_coco
from samdetr.engine.coco import STAT_NAMES, CocoDetections, Evaluator, choose_evaluator, coco_detections, coco_evaluate
from samdetr.errors import NonFiniteError, RecipeError
from samdetr.structures import Categories, Detections
from tests.engine.runs import Command, sentence

EVALUATORS: tuple[Evaluator, ...] = ("hotcoco", "pycocotools")
Line = dict[str, Any]


def write_coco(tmp_path: Path, content: dict[str, Any]) -> CocoData:
    (tmp_path / "photos").mkdir(exist_ok=True)
    file = tmp_path / "val.json"
    file.write_text(json.dumps(content))
    return read_coco(tmp_path / "photos", file, "val")


def columns(lines: Sequence[Line]) -> CocoDetections:
    return CocoDetections(
        np.array([line["image_id"] for line in lines], dtype=np.int64),
        np.array([line["category_id"] for line in lines], dtype=np.int64),
        np.array([line["bbox"] for line in lines], dtype=np.float64).reshape(-1, 4),
        np.array([line["score"] for line in lines], dtype=np.float64),
    )


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


def random_detections(content: dict[str, Any]) -> list[Line]:
    """Shifted objects, wrong classes and noise with tied scores; more than 100 in some images."""
    rng = np.random.default_rng(6)
    found = []
    for annotation in content["annotations"]:
        for _ in range(rng.integers(0, 3)):
            shift = rng.normal(0, 0.08, 4) * annotation["bbox"][2]
            box = (np.array(annotation["bbox"]) + shift * (1, 1, 0.5, 0.5)).tolist()
            category = annotation["category_id"] if rng.random() < 0.8 else 3
            found.append(line(annotation["image_id"], category, box, round(float(rng.random()), 1)))
    for image in content["images"][::7]:
        for _ in range(150):
            box = rng.uniform(1, 150, 4).tolist()
            score = round(float(rng.random()) / 2, 1)
            found.append(line(image["id"], int(rng.choice([3, 17])), box, score))
    return found


def line(image: int, category: int, box: list[float], score: float) -> Line:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def oracle(file: Path, lines: list[Line], category: int | None = None) -> list[float]:
    """The twelve numbers of pycocotools, used as its own examples do."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        evaluation = COCOeval(truth, truth.loadRes([dict(one) for one in lines]), "bbox")
        if category is not None:
            evaluation.params.catIds = [category]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def perfect(content: dict[str, Any]) -> CocoDetections:
    objects = [one for one in content["annotations"] if not one["iscrowd"]]
    return columns([line(one["image_id"], one["category_id"], one["bbox"], 1.0) for one in objects])


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_equal_to_pycocotools(tmp_path: Path, evaluator: Evaluator) -> None:
    content = random_coco()
    data, lines = write_coco(tmp_path, content), random_detections(content)
    results = columns(lines)
    assert results.lines() == lines
    assert np.unique(results.image_ids, return_counts=True)[1].max() > 100
    evaluation = coco_evaluate(data, results, evaluator=evaluator)
    assert tuple(evaluation.stats) == STAT_NAMES
    expected = oracle(data.annotation_file, lines)
    assert list(evaluation.stats.values()) == expected
    assert 0.05 < expected[0] < 0.9 and min(expected) > 0
    per_class = {f"class {number}": oracle(data.annotation_file, lines, number)[0] for number in (3, 17, 40, 90)}
    assert evaluation.per_class == pytest.approx(per_class, abs=1e-12)
    assert list(evaluation.per_class) == ["class 3", "class 17", "class 40", "class 90"]
    assert per_class["class 40"] == -1


def random_split(rng: np.random.Generator) -> CocoData:
    """Up to 29 images in any order, some empty; ids from 0 or beyond 2**53; areas also on the borders of ranges."""
    image_ids = rng.permutation(200)[: rng.integers(1, 30)] + int(rng.choice([0, 2**60]))
    category_ids = np.sort(rng.permutation(91)[: rng.integers(1, 6)])
    objects = rng.integers(0, 12, len(image_ids)) * (rng.random(len(image_ids)) < 0.8)
    image = np.repeat(np.arange(len(image_ids)), objects)
    count = len(image)
    boxes = np.concatenate((rng.uniform(0, 300, (count, 2)), np.exp(rng.uniform(1, 5.5, (count, 2)))), axis=1)
    boxes = np.where(rng.random((count, 1)) < 0.3, boxes.round(), boxes)
    area = boxes[:, 2] * boxes[:, 3] * rng.uniform(0.3, 1, count)
    area = np.where(rng.random(count) < 0.3, rng.choice([0.0, 32.0**2, 96.0**2], count), area)
    return CocoData(
        split="val",
        image_root=Path("photos"),
        annotation_file=Path("val.json"),
        category_ids=tuple(category_ids.tolist()),
        category_names=tuple(f"class {number}" for number in category_ids.tolist()),
        image_ids=image_ids,
        file_names=[f"{number}.jpg" for number in image_ids.tolist()],
        widths=np.full(len(image_ids), 400),
        heights=np.full(len(image_ids), 400),
        ann_ids=np.arange(count),
        ann_image=image,
        ann_image_id=image_ids[image],
        ann_category=rng.choice(category_ids[: max(1, len(category_ids) - 1)], count),
        ann_boxes=boxes,
        ann_crowd=rng.random(count) < 0.15,
        ann_area=area,
    )


def random_results(rng: np.random.Generator, data: CocoData) -> CocoDetections:
    """Each object up to three times, exact or shifted, some in another class; noise; float32 scores with ties."""
    row = np.repeat(np.arange(len(data.ann_image)), rng.integers(0, 4, len(data.ann_image)))
    shift = rng.normal(0, 0.1, (len(row), 4)) * data.ann_boxes[row, 2:3] * (rng.random((len(row), 1)) < 0.8)
    noise = np.repeat(
        data.image_ids, rng.integers(1, 250, len(data.image_ids)) * (rng.random(len(data.image_ids)) < 0.2)
    )
    image_ids = np.concatenate((data.ann_image_id[row], noise))
    boxes = np.concatenate((data.ann_boxes[row] + shift * (1, 1, 0.5, 0.5), rng.uniform(-20, 150, (len(noise), 4))))
    wrong = rng.choice(data.category_ids, len(image_ids))
    right = np.concatenate((data.ann_category[row], wrong[len(row) :]))
    scores = rng.random(len(image_ids)).astype(np.float32).round(int(rng.choice([1, 2, 7])))
    results = CocoDetections(
        image_ids,
        np.where(rng.random(len(image_ids)) < 0.8, right, wrong),
        boxes.astype(np.float32).astype(np.float64),
        scores.astype(np.float64),
    )
    return results.where(np.full(len(results), rng.random() < 0.95))  # once in a while nothing is found


def test_hotcoco_equals_pycocotools_to_the_last_digit() -> None:
    seen = dict.fromkeys(("id 0", "large ids", "crowds", "ties", "many", "no results", "no objects"), 0)
    for seed in range(120):
        rng = np.random.default_rng(seed)
        data = random_split(rng)
        results = random_results(rng, data)
        assert coco_evaluate(data, results, evaluator="hotcoco") == coco_evaluate(
            data, results, evaluator="pycocotools"
        ), seed
        seen["id 0"] += 0 in data.image_ids and 0 in results.image_ids
        seen["large ids"] += bool(data.image_ids.max() > 2**53)
        seen["crowds"] += bool(data.ann_crowd.any())
        seen["ties"] += len(np.unique(results.scores)) < len(results)
        seen["many"] += len(results) > 0 and np.unique(results.image_ids, return_counts=True)[1].max() > 100
        seen["no results"] += len(results) == 0
        seen["no objects"] += len(data.ann_image) == 0
    assert min(seen.values()) >= 1, seen


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_annotation_ids_from_zero(tmp_path: Path, evaluator: Evaluator) -> None:
    """pycocotools itself takes the id 0 for no match and loses that object."""
    content = random_coco(first_id=0)
    one = {**content["annotations"][0], "iscrowd": 0, "image_id": content["images"][0]["id"]}
    content = {**content, "annotations": [one]}
    data = write_coco(tmp_path, content)
    assert coco_evaluate(data, perfect(content), evaluator=evaluator).stats["AP"] == pytest.approx(1.0)
    assert oracle(data.annotation_file, perfect(content).lines())[0] == pytest.approx(0.0)


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_perfect_detections(tmp_path: Path, evaluator: Evaluator) -> None:
    content = random_coco()
    evaluation = coco_evaluate(write_coco(tmp_path, content), perfect(content), evaluator=evaluator)
    assert [evaluation.stats[name] for name in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([1.0] * 4)
    assert evaluation.per_class == pytest.approx({"class 3": 1, "class 17": 1, "class 90": 1, "class 40": -1})


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_no_detections_and_no_objects(tmp_path: Path, evaluator: Evaluator) -> None:
    content = random_coco()
    small = [one for one in content["annotations"] if one["area"] < 32**2]
    data = write_coco(tmp_path, {**content, "annotations": small})
    evaluation = coco_evaluate(data, columns([]), evaluator=evaluator)
    zero, undefined = ("AP", "AP50", "APs", "AR100", "ARs"), ("APm", "APl", "ARm", "ARl")
    assert {evaluation.stats[name] for name in zero} == {0.0}
    assert {evaluation.stats[name] for name in undefined} == {-1.0}
    assert evaluation.per_class["class 40"] == -1.0 and evaluation.per_class["class 3"] == 0.0
    data, results = write_coco(tmp_path, {**content, "annotations": []}), columns(random_detections(content))
    assert set(coco_evaluate(data, results, evaluator=evaluator).stats.values()) == {-1.0}


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_what_the_file_does_not_list_counts_for_nothing(tmp_path: Path, evaluator: Evaluator) -> None:
    content = random_coco()
    data, results = write_coco(tmp_path, content), columns(random_detections(content))
    expected = coco_evaluate(data, results, evaluator=evaluator)
    strange = {**content["annotations"][0], "iscrowd": 0}
    more = [*content["annotations"], {**strange, "image_id": 999}, {**strange, "category_id": 5}]
    data = write_coco(tmp_path, {**content, "annotations": more})
    lines = [*results.lines(), line(strange["image_id"], 5, strange["bbox"], 1.0)]
    assert coco_evaluate(data, columns(lines), evaluator=evaluator) == expected


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_not_a_number(tmp_path: Path, evaluator: Evaluator) -> None:
    content = random_coco()
    data, results = write_coco(tmp_path, content), columns(random_detections(content))
    first, last = int(results.image_ids[0]), int(results.image_ids[-1])
    scores, boxes = results.scores.copy(), results.boxes.copy()
    scores[0], boxes[-1, 2] = np.nan, np.inf
    named = rf"not finite in 2 images .* \(image ids {min(first, last)}, {max(first, last)}\)"
    with pytest.raises(NonFiniteError, match=named):
        coco_evaluate(data, replace(results, scores=scores, boxes=boxes), evaluator=evaluator)


def test_columns_hold_what_a_loop_over_the_images_finds() -> None:
    """Logits 0 and 4 have no category; the values are those of the float32 arithmetic, not rounded again."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 50, 4, generator=generator) * 100
    labels = torch.randint(0, 6, (3, 50), generator=generator)
    found = Detections(torch.rand(3, 50, generator=generator).sort(descending=True).values, labels, corners)
    categories = Categories(ids=(2, 7, 2**60), names=("two", "seven", "large"), indices=(5, 1, 3))
    expected = []
    for row, image in enumerate((31, 2**62 + 1, 0)):
        for score, label, box in zip(found.scores[row], labels[row].tolist(), corners[row], strict=True):
            if label in categories.by_index():
                left, top, right, bottom = box
                size = [float(value) for value in (left, top, right - left, bottom - top)]
                expected.append(line(image, categories.by_index()[label][0], size, float(score)))
    columns = coco_detections(found, [31, 2**62 + 1, 0], categories)
    assert columns.lines() == expected and 0 < len(expected) < 150
    assert [column.dtype.name for column in vars(columns).values()] == ["int64", "int64", "float64", "float64"]
    assert columns.where(columns.image_ids == 0).lines() == [one for one in expected if one["image_id"] == 0]


def test_sparse_category_ids_round_trip(tmp_path: Path) -> None:
    data = write_coco(tmp_path, random_coco())
    categories = make_categories(data, "contiguous", 4)
    found = Detections(torch.ones(1, 4), torch.tensor([[0, 1, 2, 3]]), torch.zeros(1, 4, 4))
    results = coco_detections(found, [5], Categories.from_json(json.loads(json.dumps(categories.to_json()))))
    assert results.category_ids.tolist() == [3, 17, 40, 90]
    for category, name, index in zip(categories.ids, categories.names, categories.indices, strict=True):
        assert categories.by_index()[index] == (category, name)


def test_who_evaluates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_evaluator(wanted) for wanted in ("auto", "fast", "pycocotools")] == [  # type: ignore[arg-type]
        "hotcoco",
        "hotcoco",
        "pycocotools",
    ]
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    assert choose_evaluator("auto") == choose_evaluator("pycocotools") == "pycocotools"
    with pytest.raises(RecipeError, match=r'eval.evaluator = "fast" needs hotcoco, .* -m pip install'):
        choose_evaluator("fast")


def test_a_missing_evaluator_is_named_before_the_first_step(
    train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    result = train_command("--set", 'eval.evaluator="fast"')
    assert 'eval.evaluator = "fast" needs hotcoco' in sentence(result, 2)
    assert not (tmp_path / "runs").exists()
