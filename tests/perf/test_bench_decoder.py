"""perf/bench_decoder.py: agreement before any speed, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import bench_decoder
from samdetr.structures import Losses
from tests.perf.test_train_step import RECIPE, small

SIZE = ["--batch", "2", "--height", "4", "--width", "6", "--device", "cpu", "--turns", "2"]


def test_both_sides_agree_and_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "decoder.json"
    assert bench_decoder.main([str(RECIPE), *SIZE, *small("compute.precision=fp32"), "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    found = written["gates"][0]["relative_difference"]
    assert found.keys() == {"loss", "memory"} and max(found.values()) < bench_decoder.NOISE
    baseline, ours = written["rows"]
    assert (baseline["variant"], ours["variant"]) == ("baseline", "ours")
    assert baseline["times_faster"] == 1.0 and ours["times_faster"] > 0
    assert ours["launches"] < baseline["launches"] and ours["peak_mb"] > 0


def test_no_speed_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = bench_decoder.build_criterion

    def wrong(recipe: object) -> object:
        criterion = build(recipe)  # type: ignore[arg-type]

        def loss(*arguments: object) -> Losses:
            losses: Losses = criterion(*arguments)
            return losses._replace(total=losses.total * 1.001)

        return loss

    monkeypatch.setattr(bench_decoder, "build_criterion", wrong)
    file = tmp_path / "decoder.json"
    assert bench_decoder.main([str(RECIPE), *SIZE, *small("compute.precision=fp32"), "--json", str(file)]) == 1
    assert "RED" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"] == []
