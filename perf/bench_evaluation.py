"""Times of evaluating a split, after a comparison of every number: detections become columns, columns become AP.

The split is synthetic: 80 classes, boxes of COCO's number and sizes, crowds; 100 detections an image, partly objects
found more or less well, partly noise. pycocotools takes minutes for all of it, so it is compared on fewer images
unless ``--oracle-images`` says otherwise. Everything runs on the CPU, where detections of a GPU end too.

    python perf/bench_evaluation.py --oracle-images 5000 --out perf/records/DATE_cpu_evaluation
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from perf.harness import Timing, measure
from perf.report import Report, Row, environment, table
from samdetr.data.datasets import CocoData
from samdetr.engine.coco import CocoDetections, Evaluation, Evaluator, coco_detections, coco_evaluate
from samdetr.structures import Categories, Detections

CPU = torch.device("cpu")
CLASSES, PER_IMAGE = 80, 100
WIDTH, HEIGHT = 640, 480
OBJECTS = 7.3  # mean of an image, as in val2017
CROWDS, EMPTY = 0.012, 0.01  # of objects, of images


class Split(NamedTuple):
    """What an evaluation starts from, once the model has seen all images."""

    data: CocoData
    found: Detections  # [N, 100]
    categories: Categories

    @property
    def name(self) -> str:
        return f"{len(self.data.image_ids)} images, {self.found.scores.numel()} detections"


def synthetic_split(images: int, seed: int = 0) -> Split:
    """The same split for the same arguments."""
    rng = np.random.default_rng(seed)
    ids = tuple(np.sort(rng.permutation(90)[:CLASSES] + 1).tolist())
    categories = Categories(ids, tuple(f"class {number}" for number in ids), ids)
    image_ids = np.sort(rng.permutation(100 * images)[:images])
    image = np.repeat(np.arange(images), rng.geometric(1 / OBJECTS, images) * (rng.random(images) > EMPTY))
    frequency = 1 / (3 + np.arange(CLASSES))
    labels = rng.choice(ids, len(image), p=frequency / frequency.sum())
    boxes = _boxes(rng, len(image))
    data = CocoData(
        split="val",
        image_root=Path("photos"),
        annotation_file=Path("val.json"),
        category_ids=ids,
        category_names=categories.names,
        image_ids=image_ids,
        file_names=[f"{number}.jpg" for number in image_ids.tolist()],
        widths=np.full(images, WIDTH),
        heights=np.full(images, HEIGHT),
        ann_ids=np.arange(len(image)),
        ann_image=image,
        ann_image_id=image_ids[image],
        ann_category=labels,
        ann_boxes=boxes,
        ann_crowd=rng.random(len(image)) < CROWDS,
        ann_area=boxes[:, 2] * boxes[:, 3] * rng.uniform(0.4, 0.9, len(image)),
    )
    starts = np.searchsorted(image, np.arange(images + 1))
    parts = [_detections(rng, data, slice(*starts[row : row + 2])) for row in range(images)]
    scores, labels, corners = (torch.from_numpy(np.stack(column)) for column in zip(*parts, strict=True))
    return Split(data, Detections(scores, labels, corners), categories)


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(x, y, w, h) [count, 4] inside the image, sizes spread evenly over the orders of magnitude."""
    side = np.exp(rng.uniform(np.log(8), np.log(400), count))
    ratio = np.exp(rng.normal(0, 0.4, count))
    sizes = np.minimum(np.stack((side * ratio, side / ratio), axis=1), (WIDTH, HEIGHT))
    return np.concatenate((rng.random((count, 2)) * ((WIDTH, HEIGHT) - sizes), sizes), axis=1)


def _detections(rng: np.random.Generator, data: CocoData, objects: slice) -> tuple[np.ndarray[Any, Any], ...]:
    """Scores, labels and corners of an image, best first: up to three for an object, then noise; some scores tie."""
    truth, wanted = data.ann_boxes[objects], data.ann_category[objects]
    chosen = np.repeat(np.arange(len(truth)), rng.integers(0, 4, len(truth)))[:PER_IMAGE]
    hits = truth[chosen] + rng.normal(0, 0.06, (len(chosen), 4)) * np.tile(truth[chosen, 2:], 2)
    hits[:, 2:] = hits[:, 2:].clip(min=1)
    boxes = np.concatenate((hits, _boxes(rng, PER_IMAGE - len(hits))))
    labels = rng.choice(data.category_ids, PER_IMAGE)
    right = rng.random(len(chosen)) < 0.85
    labels[: len(chosen)][right] = wanted[chosen][right]
    scores = np.concatenate((rng.beta(4, 3, len(chosen)), rng.beta(1, 8, PER_IMAGE - len(chosen))))
    scores = scores.round(2 if rng.random() < 0.3 else 7).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1).astype(np.float32)
    return scores[order], labels[order], corners[order]


def lines_of_images(split: Split) -> list[dict[str, Any]]:
    """The published way: a dict for each detection, image by image."""
    names, lines = split.categories.by_index(), []
    for row, image in enumerate(split.data.image_ids.tolist()):
        corners = split.found.boxes_xyxy[row].cpu()
        boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=-1).tolist()
        labels, scores = split.found.labels[row].tolist(), split.found.scores[row].tolist()
        lines += [
            {"image_id": image, "category_id": names[label][0], "bbox": box, "score": score}
            for label, box, score in zip(labels, boxes, scores, strict=True)
            if label in names
        ]
    return lines


def columns_of(split: Split) -> CocoDetections:
    return coco_detections(split.found, split.data.image_ids.tolist(), split.categories)


def evaluate(split: Split, evaluator: Evaluator) -> Evaluation:
    """What a run does after its last batch."""
    return coco_evaluate(split.data, columns_of(split), evaluator=evaluator)


def unequal(one: Evaluation, other: Evaluation) -> list[str]:
    """Names of the numbers that differ in any digit."""
    first, second = ({**evaluation.stats, **evaluation.per_class} for evaluation in (one, other))
    return [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]


def check(split: Split, report: Report) -> float | None:
    """Compare with pycocotools and the published columns; milliseconds of pycocotools, None where they differ."""
    start = time.perf_counter()
    expected = evaluate(split, "pycocotools")
    taken = 1e3 * (time.perf_counter() - start)
    wrong = unequal(evaluate(split, "hotcoco"), expected)
    if columns_of(split).lines() != lines_of_images(split):
        wrong.append("columns")
    compared = len(expected.stats) + len(expected.per_class)
    report.gates.append(
        {"case": split.name, "numbers_compared": compared, "unequal": wrong, "AP": expected.stats["AP"]}
    )
    if wrong:
        report.failed = True
        report.note(f"RED {report.op}  {split.name}: not equal to pycocotools: {', '.join(sorted(wrong))}; no speed")
        return None
    print(f"{split.name}: all {compared} numbers equal pycocotools' (AP {expected.stats['AP']:.6f})\n", flush=True)
    return taken


def add_rows(split: Split, report: Report, repeats: int, oracle_ms: float | None) -> None:
    """Times of the split: each way to columns, then everything from detections to numbers."""
    columns: dict[str, Callable[[int], object]] = {
        "lines of images": lambda turn: lines_of_images(split),
        "ours": lambda turn: columns_of(split),
    }
    rows = _rows(split, report, "columns", measure(columns, CPU, repeats))
    print(table(rows) + "\n", flush=True)
    calls = {"ours, hotcoco": partial(_evaluate_in_turn, split)}
    timings = measure(calls, CPU, repeats)
    if oracle_ms is not None:
        timings = {"pycocotools": Timing(oracle_ms, oracle_ms, oracle_ms, None, None, 1), **timings}
    print(table(_rows(split, report, "columns and numbers", timings)) + "\n", flush=True)


def _evaluate_in_turn(split: Split, turn: int) -> Evaluation:
    return evaluate(split, "hotcoco")


def _rows(split: Split, report: Report, stage: str, timings: dict[str, Timing | str]) -> list[Row]:
    rows = []
    first = next(iter(timings.values()))
    for variant, timing in timings.items():
        row = Row(report.op, split.name, "float64", stage, variant)
        if isinstance(timing, str):
            row.problem, report.failed = timing, True
        else:
            row.ms, row.p20, row.p80, row.host_ms, row.peak_mb, row.repeats = timing
            row.times_faster = None if isinstance(first, str) else first.ms / timing.ms
        rows.append(row)
    report.rows += rows
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns its exit code: 1 if a number differs from pycocotools' or something failed."""
    parser = argparse.ArgumentParser(description="Times of an evaluation, after a comparison with pycocotools.")
    parser.add_argument("--images", type=int, default=5000, help=f"images to time, {PER_IMAGE} detections each")
    parser.add_argument("--oracle-images", type=int, default=250, help="images to compare with pycocotools on")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls; pycocotools has one")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json")
    given = parser.parse_args(argv)
    report = Report("evaluation", environment("cpu"))
    print(" ".join(f"{key}={value}" for key, value in report.environment.items()) + "\n")
    split = synthetic_split(given.oracle_images)
    oracle_ms = check(split, report)
    if oracle_ms is not None:
        add_rows(split, report, given.repeats, oracle_ms)
        if given.images != given.oracle_images:
            add_rows(synthetic_split(given.images), report, given.repeats, None)
    report.complete = True
    report.write(given.out)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
