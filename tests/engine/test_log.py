"""The lines that a person reads during a run, and the lines of metrics.jsonl."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from samdetr.engine.checkpoint.format import Progress
from samdetr.engine.run.log import (
    STAT_NAMES,
    RunLog,
    duration,
    print_evaluation,
    print_findings,
    print_per_class,
)
from samdetr.engine.run.metrics import step_values
from samdetr.engine.state import Meter
from samdetr.errors import SamdetrError
from samdetr.loss import SetCriterion

STEP_VALUES = step_values(SetCriterion.logged)
MEANS = {"loss": 123.4567, "loss_ce": 1.0, "loss_bbox": 0.25, "loss_giou": 0.5, "class_error": 88.0, "grad_norm": 9.5}
STATS = {name: 0.101 + 0.01 * place for place, name in enumerate(STAT_NAMES)}


def console_of(*, terminal: bool) -> tuple[Console, io.StringIO]:
    """A console of 80 columns."""
    stream = io.StringIO()
    return Console(file=stream, width=80, force_terminal=terminal, color_system=None), stream


def log_of(folder: Path, console: Console, progress: Progress | None = None) -> RunLog:
    return RunLog(folder, epochs=50, steps=366_500, evaluations=50, progress=progress or Progress(), console=console)


def take_steps(log: RunLog, count: int, *, epoch: int = 0) -> None:
    for _ in range(count):
        log.step(epoch, seconds=0.5, waited=0.1, images=16)


def test_meter() -> None:
    meter = Meter(STEP_VALUES)
    assert meter.means() == {}
    for value in (1.0, 2.0, 6.0):
        meter.add([value] * 6)
    assert meter.means() == dict.fromkeys(STEP_VALUES, 3.0)
    again = Meter.from_json(STEP_VALUES, json.loads(json.dumps(meter.to_json())))
    for one in (meter, again):
        one.add([0.1] * 6)
    assert again.means() == meter.means()
    assert (
        Meter.from_json(STEP_VALUES, None).means()
        == Meter.from_json(STEP_VALUES, Meter(STEP_VALUES).to_json()).means()
        == {}
    )


def test_plain_lines_do_not_wrap(tmp_path: Path) -> None:
    console, stream = console_of(terminal=False)
    with log_of(tmp_path / "", console) as log:
        take_steps(log, 50, epoch=11)
        log.interval(11, log.done, MEANS, 1e-4)
        log.epoch(11, MEANS)
        log.note("x" * 200)
    first, interval, epoch, note = stream.getvalue().splitlines()
    assert first.startswith("first step done after ")
    for text in (
        "epoch 12/50",
        "step 50/366500",
        "loss 123.457",
        "lr 1.0e-04",
        "32.0 img/s",
        "data 20%",
        " GiB",
        "ETA 50:",
    ):
        assert text in interval, interval
    assert len(interval) > 80
    assert epoch.startswith("epoch 12/50  loss 123.457  class 1.000  L1 0.250  GIoU 0.500  ETA ")
    assert note == "x" * 200


def test_the_bar_fits_80_columns(tmp_path: Path) -> None:
    console, stream = console_of(terminal=True)
    log = log_of(tmp_path, console)
    take_steps(log, 100_000, epoch=13)
    log.interval(13, log.done, MEANS, 1e-4)
    console.print(log._picture())
    bar, status = stream.getvalue().splitlines()
    assert "epoch 14/50" in bar and "27 %  step 100000/366500  ETA 37:00:" in bar
    for text in ("loss 123.457", "lr 1.0e-04", "32.0 img/s", "data 20%", " GiB"):
        assert text in status
    assert max(len(bar), len(status)) <= 80 and "…" not in bar + status


def test_speeds_are_shown_before_the_first_interval(tmp_path: Path) -> None:
    console, stream = console_of(terminal=True)
    log = log_of(tmp_path, console)
    take_steps(log, 1)
    console.print(log._picture())
    assert "32.0 img/s  data 20%" in stream.getvalue()
    assert "ETA 50:54:" in stream.getvalue()
    log.evaluating(0, 3, 20)
    console.print(log._picture())
    assert "epoch 1/50 evaluation 3/20" in stream.getvalue()


def test_eta_forgets_the_first_step_and_counts_evaluations(tmp_path: Path) -> None:
    log = RunLog(
        tmp_path, epochs=2, steps=100, evaluations=2, progress=Progress(step=10), console=console_of(terminal=False)[0]
    )
    log.step(0, seconds=30.0, waited=29.0, images=4)
    for _ in range(9):
        log.step(0, seconds=1.0, waited=0.0, images=4)
    assert log.eta() == "0:01:20"
    log.evaluation(0, STATS, {}, evaluator="hotcoco", seconds=15.0, best=True)
    assert log.eta() == "0:01:35"  # the other one is to come


@pytest.mark.parametrize("terminal", [True, False])
def test_every_number_of_the_table_is_readable_at_80_columns(terminal: bool) -> None:
    console, stream = console_of(terminal=terminal)
    print_evaluation(console, {**STATS, "APl": -1.0}, "a title " * 12)
    *_, names, numbers = stream.getvalue().splitlines()
    assert names.split() == list(STAT_NAMES)
    assert numbers.split() == ["-" if name == "APl" else f"{STATS[name]:.3f}" for name in STAT_NAMES]
    assert len(numbers) <= 80


def test_tables_of_classes_and_findings() -> None:
    console, stream = console_of(terminal=False)
    print_per_class(console, {"cat": 0.5, "dog [small]": -1.0})
    lines = [line.replace("│", " ").replace("┃", " ").split() for line in stream.getvalue().splitlines()]
    assert ["cat", "0.500"] in lines and ["dog", "[small]", "-"] in lines
    before = stream.getvalue()
    print_findings(console, [])
    assert stream.getvalue() == before
    print_findings(console, [("train", "dropped", "2", "the box has no area", "annotation 5 of 'a[b].jpg'")])
    assert "annotation 5 of" in stream.getvalue() and "[b]" in stream.getvalue()


def test_metrics_lines(tmp_path: Path) -> None:
    with log_of(tmp_path, console_of(terminal=False)[0]) as log:
        take_steps(log, 2)
        log.interval(0, log.done, {**MEANS, "grad_norm": float("inf")}, 1e-4)
        log.evaluation(0, STATS, {"cat": float("nan")}, evaluator="hotcoco", seconds=2.0, best=False)
    train, evaluation = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train["kind"] == "train" and train["step"] == 2 and train["grad_norm"] is None
    assert (train["images_per_s"], train["data_wait"]) == (32.0, pytest.approx(0.2))
    assert evaluation["AR1"] == STATS["AR1"] and evaluation["per_class"] == {"cat": None}
    assert evaluation["evaluator"] == "hotcoco"


def test_lines_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    lines = [
        {"kind": kind, "epoch": epoch, "step": step}
        for kind, epoch, step in (
            ("train", 0, 5),
            ("train", 0, 6),
            ("epoch", 0, 6),
            ("eval", 0, 6),
            ("train", 1, 7),
            ("train", 1, 12),
            ("epoch", 1, 12),
            ("eval", 1, 12),
        )
    ]

    def kept(progress: Progress) -> list[int]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kin')
        with log_of(tmp_path, console_of(terminal=False)[0], progress):
            pass
        left = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [lines.index(line) for line in left]

    assert kept(Progress(epoch=2, step=12)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert kept(Progress(epoch=1, step=12, step_in_epoch=6, evaluation_due=True)) == [0, 1, 2, 3, 4, 5, 6]
    assert kept(Progress(epoch=1, step=12, step_in_epoch=6)) == [0, 1, 2, 3, 4, 5]
    assert kept(Progress(epoch=1, step=7, step_in_epoch=1)) == [0, 1, 2, 3, 4]
    assert kept(Progress(epoch=1, step=6)) == [0, 1, 2, 3]
    assert kept(Progress(epoch=0, step=6, step_in_epoch=6, evaluation_due=True)) == [0, 1, 2]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = log_of(tmp_path, console_of(terminal=False)[0])
    with log, pytest.raises(SamdetrError, match=r"cannot write .*metrics\.jsonl \(No space left on device\)"):
        log.write("train", step=1)


def test_duration() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]
