"""The bench of saving at a small size: its gate, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from perf import bench_checkpoint
from perf.bench_checkpoint import main
from samdetr.engine.checkpoint.format import Checkpoint, load_checkpoint
from tests.engine.runs import TINY


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    return [str(recipe), "--device", "cpu", "--repeats", "3", "--folder", str(tmp_path), "--out", str(tmp_path / "out")]


def test_what_is_written(arguments: list[str], tmp_path: Path) -> None:
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert report["complete"] and not report["failed"]
    (gate,) = report["gates"]
    assert gate["unequal"] == [] and gate["tensors"] > 300
    assert [(row["variant"], row["repeats"]) for row in report["rows"]] == [
        ("torch.save in place", 3),
        ("ours, waited for", 3),
        ("ours, beside the steps", 3),
        ("verified and whole, on the CPU", 3),
    ]
    assert all(row["ms"] > 0 for row in report["rows"])
    assert "MB in 3 files: model " in report["notes"][0]
    assert {entry.name for entry in tmp_path.iterdir()} == {"tiny.toml", "out"}


def test_a_changed_bit_is_red_and_has_no_speed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(path: Path, *, with_optimizer: bool) -> Checkpoint:
        loaded = load_checkpoint(path, with_optimizer=with_optimizer)
        name = "decoder.class_heads.0.weight:exp_avg"
        loaded.optimizer[name] = torch.nextafter(loaded.optimizer[name], torch.tensor(9.0))
        return loaded

    monkeypatch.setattr(bench_checkpoint, "load_checkpoint", changed)
    assert main(arguments) == 1
    report = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    assert report["rows"] == [] and report["gates"][0]["unequal"] == ["decoder.class_heads.0.weight:exp_avg"]
