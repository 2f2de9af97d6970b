"""The bench of wrapping a step at a small size: its gate, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from perf import bench_parallel
from perf.bench_parallel import Step, build_step, main
from tests.engine.runs import TINY


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    size = ("--height", "64", "--width", "96", "--repeats", "3", "--device", "cpu")
    return [str(recipe), *size, "--out", str(tmp_path / "out")]


def test_what_is_written(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "parallel.json").read_text())
    assert report["complete"] and not report["failed"]
    (gate,) = report["gates"]
    assert gate["relative_difference"]["layers computed again"] == 0.0
    assert max(gate["relative_difference"].values()) <= 1e-5
    assert [row["variant"] for row in report["rows"]] == ["plain", "ddp", "fsdp", "layers computed again"]
    assert all(row["ms"] > 0 and row["repeats"] == 3 for row in report["rows"])
    assert [note.partition(":")[0] for note in report["notes"]] == ["ddp", "fsdp", "layers computed again"]


def test_another_loss_is_red_and_has_no_speed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*inputs: object) -> Step:
        step = build_step(*inputs)  # type: ignore[arg-type]
        scale = 1.01 if inputs[2] == "fsdp" else 1.0

        def scaled(turn: int) -> Tensor:
            return step(turn) * scale

        return scaled

    monkeypatch.setattr(bench_parallel, "build_step", changed)
    assert main(arguments) == 1
    report = json.loads((tmp_path / "out" / "parallel.json").read_text())
    assert report["rows"] == [] and report["notes"][0].startswith("RED tiny 2 x 64 x 96: {'fsdp':")
