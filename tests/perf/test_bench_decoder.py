"""perf/bench_decoder.py: agreement before any speed, and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import bench_decoder
from samdetr.structures import Losses
from tests.perf.test_train_step import RECIPE, small

SIZE = ["--batch", "2", "--height", "4", "--width", "6", "--device", "cpu", "--turns", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_agree_and_are_timed(precision: str, tmp_path: Path) -> None:
    file = tmp_path / "decoder.json"
    assert bench_decoder.main([str(RECIPE), *SIZE, *small(f"compute.precision={precision}"), "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    exact, *others = written["gates"]
    assert max(exact["relative_difference"].values()) < 1e-4 and exact["way"] == "float32"
    assert [gate["way"] for gate in others] == (["bfloat16"] if precision == "bf16" else [])
    assert all(1e-6 < gate["relative_difference"]["memory"] < 0.15 for gate in others)
    baseline, ours = written["rows"]
    assert (baseline["variant"], ours["variant"]) == ("baseline", "ours")
    assert baseline["times_faster"] == 1.0 and ours["times_faster"] > 0
    assert ours["launches"] < baseline["launches"] and ours["peak_mb"] > 0


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.001), ("bf16", 1.05)])
def test_no_speed_where_they_differ(
    precision: str,
    factor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = bench_decoder.build_criterion
    built: list[object] = []
    spoiled = 2 if precision == "bf16" else 1  # of ours only the one in the precision that is timed

    def wrong(recipe: object) -> object:
        criterion = build(recipe)  # type: ignore[arg-type]
        built.append(criterion)

        def loss(*arguments: object) -> Losses:
            losses: Losses = criterion(*arguments)
            return losses._replace(total=losses.total * (factor if len(built) == spoiled else 1))

        return loss

    monkeypatch.setattr(bench_decoder, "build_criterion", wrong)
    file = tmp_path / "decoder.json"
    assert bench_decoder.main([str(RECIPE), *SIZE, *small(f"compute.precision={precision}"), "--json", str(file)]) == 1
    assert "RED" in capsys.readouterr().out
    assert json.loads(file.read_text())["rows"] == []
