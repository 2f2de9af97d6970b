"""The curves show the numbers of metrics.jsonl, also of a file that is unfinished or holds null."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from samdetr.errors import SamdetrError
from samdetr.visualize.curves import draw_curves, plot_curves

Row = dict[str, object]


def train(step: int, loss: float | None) -> Row:
    return {"kind": "train", "epoch": 0, "step": step, "loss": loss, "loss_ce": 1.0, "loss_bbox": 0.5}


def epoch(number: int, step: int, loss: float) -> Row:
    return {"kind": "epoch", "epoch": number, "step": step, "loss": loss, "loss_giou": 0.25}


def evaluation(number: int, ap: float | None) -> Row:
    return {"kind": "eval", "epoch": number, "AP": ap, "AP50": 0.5, "AP75": 0.1, "APs": 0.2, "APl": -1.0}


def write(path: Path, rows: list[Row], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def panels(path: Path) -> dict[str, Axes]:
    return {axes.get_title(): axes for axes in draw_curves(path).axes}


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))
        for line in axes.get_lines()
    }


def test_every_panel_holds_the_numbers_of_the_file(tmp_path: Path) -> None:
    rows = [train(50, 9.0), train(100, 7.0), epoch(0, 120, 8.0), evaluation(0, 0.25), evaluation(1, 0.375)]
    drawn = panels(write(tmp_path / "metrics.jsonl", rows))
    assert lines(drawn["total loss (weighted sum)"]) == {
        "log interval": [(50.0, 9.0), (100.0, 7.0)],
        "epoch mean": [(120.0, 8.0)],
    }
    assert lines(drawn["classification (focal)"]) == {"log interval": [(50.0, 1.0), (100.0, 1.0)]}
    assert lines(drawn["boxes (L1)"]) == {"log interval": [(50.0, 0.5), (100.0, 0.5)]}
    assert lines(drawn["boxes (1 - GIoU)"]) == {"epoch mean": [(120.0, 0.25)]}
    assert lines(drawn["validation AP"]) == {
        "AP 0.50:0.95": [(1.0, 0.25), (2.0, 0.375)],
        "AP 0.50": [(1.0, 0.5), (2.0, 0.5)],
        "AP 0.75": [(1.0, 0.1), (2.0, 0.1)],
    }
    assert lines(drawn["validation AP by object size"]) == {"small": [(1.0, 0.2), (2.0, 0.2)]}


def test_axes_are_labelled_and_have_a_legend(tmp_path: Path) -> None:
    drawn = panels(write(tmp_path / "metrics.jsonl", [train(50, 9.0), evaluation(0, 0.25)]))
    assert (drawn["boxes (L1)"].get_xlabel(), drawn["boxes (L1)"].get_ylabel()) == ("optimizer step", "loss")
    assert (drawn["validation AP"].get_xlabel(), drawn["validation AP"].get_ylabel()) == (
        "epochs trained",
        "AP",
    )
    assert drawn["boxes (L1)"].get_legend() is not None
    assert drawn["validation AP"].get_legend() is not None


def test_no_evaluation_yet(tmp_path: Path) -> None:
    drawn = panels(write(tmp_path / "metrics.jsonl", [train(50, 9.0)]))
    assert lines(drawn["validation AP"]) == {}
    assert [text.get_text() for text in drawn["validation AP"].texts] == ["nothing yet"]
    assert list(drawn["total loss (weighted sum)"].texts) == []


@pytest.mark.parametrize("tail", ['{"kind": "train", "epoch": 0, "ste', "\n", "[1]\n", '{"kind": "other"}\n'])
def test_lines_without_a_row_are_skipped(tmp_path: Path, tail: str) -> None:
    whole = panels(write(tmp_path / "a.jsonl", [train(50, 9.0)]))
    more = panels(write(tmp_path / "b.jsonl", [train(50, 9.0)], tail))
    assert {k: lines(v) for k, v in more.items()} == {k: lines(v) for k, v in whole.items()}


def test_a_line_cut_inside_a_letter_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", [train(50, 9.0)])
    path.write_bytes(path.read_bytes() + '{"kind": "é'.encode()[:-1])
    assert lines(panels(path)["total loss (weighted sum)"]) == {"log interval": [(50.0, 9.0)]}


def test_null_and_nan_leave_a_gap(tmp_path: Path) -> None:
    rows = [train(50, 9.0), train(100, None), train(150, math.nan), train(200, 6.0)]
    rows += [evaluation(0, None), evaluation(1, 0.5)]
    drawn = panels(write(tmp_path / "metrics.jsonl", rows))
    values = [y for _, y in lines(drawn["total loss (weighted sum)"])["log interval"]]
    np.testing.assert_array_equal(values, [9.0, math.nan, math.nan, 6.0])
    np.testing.assert_array_equal([y for _, y in lines(drawn["validation AP"])["AP 0.50:0.95"]], [math.nan, 0.5])


def test_after_a_resume_the_newer_line_counts(tmp_path: Path) -> None:
    rows = [train(50, 9.0), train(100, 8.0), train(50, 5.0)]
    drawn = panels(write(tmp_path / "metrics.jsonl", rows))
    assert lines(drawn["total loss (weighted sum)"])["log interval"] == [(50.0, 5.0), (100.0, 8.0)]


def test_the_picture_is_written_whole_and_without_pyplot(tmp_path: Path) -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    out = tmp_path / "curves.png"
    for rows in ([], [train(50, 9.0), train(100, 7.0), evaluation(0, 0.25)]):
        plot_curves(write(tmp_path / "metrics.jsonl", list(rows)), out)
        with Image.open(out) as picture:
            pixels = np.array(picture)
        assert pixels.shape == (750, 1400, 3)
    blue = (pixels[..., 2].astype(int) - pixels[..., 0] > 60).sum(axis=(0, 1))
    assert blue > 200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SamdetrError, match=r"nothing\.jsonl"):
        plot_curves(tmp_path / "nothing.jsonl", tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []
