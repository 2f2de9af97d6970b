"""The bench of the data path: its table, and that it prints no speed for wrong pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from perf import bench_data
from perf.bench_data import FAST, NORMALISED, PARITY, PUBLISHED, main

QUICK = ["--images", "6", "--micro", "3", "--repeats", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make pictures an eighth as high and wide as COCO's."""
    before = torch.get_num_threads()
    monkeypatch.setattr(bench_data, "SIZES", ((60, 80), (80, 60), (53, 80)))
    yield
    torch.set_num_threads(before)


def test_times_are_written_beside_the_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "data.json").read_text())
    assert [row["variant"] for row in report["rows"]] == [PUBLISHED, PARITY, FAST, NORMALISED]
    for row in report["rows"]:
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        assert row["times_faster"] == pytest.approx(report["rows"][0]["ms"] / row["ms"])
    against_pil, against_parity = report["gates"]
    assert 0 < against_pil["most_levels"] <= 3 and against_pil["mean_levels"] < 0.5
    assert against_parity["most_levels"] <= 1
    assert "images / s" in capsys.readouterr().out


def test_wrong_pixels_have_no_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    to_device = bench_data.to_device
    monkeypatch.setattr(
        bench_data, "to_device", lambda *given: (batch := to_device(*given))._replace(images=batch.images + 0.2)
    )
    assert main([*QUICK, "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "data.json").read_text())["rows"] == []
    out = capsys.readouterr().out
    assert "RED data" in out and "images / s" not in out
