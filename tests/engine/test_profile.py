"""A profile of made-up kernels: what it says, which steps it takes, and where a run leaves it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from samdetr.engine.run.profile import Gap, Interval, StepProfiler, find_gaps, gap_table, top_table
from samdetr.engine.train import train
from tests.engine.runs import MakeRecipe

# two streams: "b" overlaps "a" and "c", then the device waits 10 and 200 us
KERNELS = [
    Interval(0.0, 10.0, "a"),
    Interval(5.0, 12.0, "b"),
    Interval(6.0, 8.0, "within"),
    Interval(12.0, 20.0, "c"),
    Interval(30.0, 40.0, "d"),
    Interval(240.0, 250.0, "e"),
]


def recorded(folder: Path) -> list[str]:
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_gaps_are_where_no_stream_has_a_kernel() -> None:
    assert find_gaps(KERNELS[::-1]) == [Gap(10.0, "c", "d"), Gap(200.0, "d", "e")]
    assert find_gaps([]) == find_gaps(KERNELS[:4]) == []


def test_gap_table() -> None:
    lines = gap_table(KERNELS, steps=2).splitlines()
    assert lines[0] == "gaps: 1 and 0.105 ms a step, 84.0% of the time"
    found = {line.split("  ")[-1]: line.split()[:2] for line in lines[2:7]}
    assert found["5 to 20 us"] == ["0.005", "0.5"] and found["100 to 1000 us"] == ["0.100", "0.5"]
    assert found["0 to 5 us"] == found["20 to 100 us"] == found["1000 to inf us"] == ["0.000", "0.0"]
    assert [line.split() for line in lines[8:]] == [["200.0", "d,", "e"], ["10.0", "c,", "d"]]


def test_top_table_sums_by_name() -> None:
    lines = top_table("kernel", [("a", 1000.0), ("b", 3000.0), ("a", 5000.0)], steps=3).splitlines()
    assert lines[0] == "3 steps; 3.000 ms and 1 calls a step"
    assert [line.split() for line in lines[2:]] == [["2.000", "66.7%", "0.7", "a"], ["1.000", "33.3%", "0.3", "b"]]


def test_only_the_wanted_steps_are_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    work = (torch.sin, torch.cos, torch.tan, torch.exp, torch.log, torch.sqrt)
    with StepProfiler(tmp_path / "p", said.append, first=3, last=4) as profiler:
        for function in work:
            function(torch.ones(4))
            profiler.step()
    names = recorded(tmp_path / "p")
    assert [names.count(f"aten::{f.__name__}") for f in work] == [0, 0, 1, 1, 0, 0]
    assert said == [f"profile: steps 3 to 4 are in {tmp_path / 'p'}"]
    text = (tmp_path / "p" / "profile.txt").read_text()
    assert text == profiler.report and text.startswith("2 steps; ") and "aten::exp" in text
    assert "Gaps need a GPU" in text or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("steps", "said"), [(1, "profile: none, the run ended before step 3"), (3, "profile: steps 3 to 3")]
)
def test_a_short_run(steps: int, said: str, tmp_path: Path) -> None:
    notes: list[str] = []
    with StepProfiler(tmp_path / "p", notes.append, first=3, last=9) as profiler:
        for _ in range(steps):
            torch.ones(4).sin()
            profiler.step()
    assert len(notes) == 1 and notes[0].startswith(said)
    assert (tmp_path / "p" / "trace.json.gz").exists() == (steps == 3)


def test_without_a_folder_nothing_is_profiled(tmp_path: Path) -> None:
    notes: list[str] = []
    with StepProfiler(None, notes.append, first=1, last=1) as profiler:
        profiler.step()
    assert notes == [] and profiler.report == ""


@pytest.mark.slow
def test_a_run_is_profiled(make_recipe: MakeRecipe, capfd: pytest.CaptureFixture[str]) -> None:
    run = train(make_recipe("train.epochs=1", "train.total_batch=2", "train.micro_batch=2"), profile=True)  # 12 steps
    assert f"profile: steps 10 to 12 are in {run / 'profile'}" in capfd.readouterr().out.replace("\n", " ")
    names = recorded(run / "profile")
    assert sum(name.startswith("Optimizer.step#") for name in names) == 3
    assert (run / "profile" / "profile.txt").read_text().startswith("3 steps; ")
