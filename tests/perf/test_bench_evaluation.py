"""The bench of the evaluation at a small size: its split, its gate, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from perf import bench_evaluation
from perf.bench_evaluation import columns_of, lines_of_images, main, synthetic_split
from samdetr.engine.coco import Evaluation

SMALL = ["--oracle-images", "12", "--images", "20", "--repeats", "2"]


def test_the_split_is_the_same_each_time_and_has_every_hard_case() -> None:
    split, again = synthetic_split(150), synthetic_split(150)
    data, results = split.data, columns_of(split)
    assert results.lines() == columns_of(again).lines() == lines_of_images(split)
    assert (data.ann_boxes == again.data.ann_boxes).all() and len(results) == 150 * 100
    assert 5 < len(data.ann_image) / 150 < 10
    assert 0 < data.ann_crowd.mean() < 0.05
    assert len(np.unique(data.ann_image)) < 150
    assert len(np.unique(results.scores)) < 0.9 * len(results)
    scores = results.scores.reshape(150, 100)
    assert (scores[:, 1:] <= scores[:, :-1]).all() and scores.min() >= 0 and scores.max() <= 1
    corners = np.concatenate((data.ann_boxes[:, :2], data.ann_boxes[:, :2] + data.ann_boxes[:, 2:]), axis=1)
    assert corners.min() >= 0 and (corners <= np.tile((640 + 1e-9, 480 + 1e-9), 2)).all()


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["complete"] and not report["failed"] and report["notes"] == []
    (gate,) = report["gates"]
    assert (gate["case"], gate["numbers_compared"], gate["unequal"]) == ("12 images, 1200 detections", 92, [])
    assert 0.1 < gate["AP"] < 0.7
    rows = [(row["case"].split()[0], row["direction"], row["variant"], row["repeats"]) for row in report["rows"]]
    assert rows == [
        ("12", "columns", "lines of images", 2),
        ("12", "columns", "ours", 2),
        ("12", "columns and numbers", "pycocotools", 1),
        ("12", "columns and numbers", "ours, hotcoco", 2),
        ("20", "columns", "lines of images", 2),
        ("20", "columns", "ours", 2),
        ("20", "columns and numbers", "ours, hotcoco", 2),
    ]
    assert all(row["ms"] > 0 and row["problem"] is None for row in report["rows"])
    assert {"pycocotools", "hotcoco"} <= report["environment"].keys()
    assert "all 92 numbers equal pycocotools'" in capsys.readouterr().out


def test_one_wrong_digit_is_red_and_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_evaluation.coco_evaluate

    def last_digit(data: object, results: object, *, evaluator: str) -> Evaluation:
        found = right(data, results, evaluator=evaluator)  # type: ignore[arg-type]
        if evaluator == "hotcoco":
            found.stats["AR10"] = float(np.nextafter(found.stats["AR10"], 1))
        return found

    monkeypatch.setattr(bench_evaluation, "coco_evaluate", last_digit)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["failed"] and report["rows"] == [] and report["gates"][0]["unequal"] == ["AR10"]
    table = capsys.readouterr().out.split("\n\n", 1)[1]  # the command line stands above it
    assert "not equal to pycocotools: AR10; no speed" in table and "faster" not in table
