"""A few turns of each script of this folder; all turns, as docs/reliability.md gives their figures, are marked long."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from samdetr.engine.checkpoint.folder import load_newest
from samdetr.engine.distributed.world import ALONE
from tests.reliability.flip_bytes import Noticed, damage
from tests.reliability.kill_saves import kill_saves
from tests.reliability.random_resume import resumed_equal
from tests.reliability.signals import Turn, launch, lines, stop_and_go_on, stopped, turns, wait_until

LONG = pytest.mark.long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "processes"), [(1, 1), pytest.param(20, 1, marks=LONG), pytest.param(20, 2, marks=LONG)]
)
def test_a_stopped_run_comes_to_the_same_numbers(tmp_path: Path, count: int, processes: int) -> None:
    assert resumed_equal(tmp_path, count=count, processes=processes, seed=1) == count


@pytest.mark.parametrize(
    ("count", "processes"), [(2, 1), pytest.param(50, 1, marks=LONG), pytest.param(20, 2, marks=LONG)]
)
def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path: Path, count: int, processes: int) -> None:
    found = kill_saves(tmp_path, count=count, processes=processes, seed=1)
    assert (found.kills, found.resumable, found.before) == (count, count, count)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "processes"), [(5, 1), pytest.param(100, 2, marks=LONG)])
def test_every_damage_is_noticed(tmp_path: Path, count: int, processes: int) -> None:
    found = damage(tmp_path, count=count, processes=processes, seed=1)
    assert found == Noticed(count, count, found.files, found.files, found.files)
    assert found.files == 1 + 3 * processes


@pytest.mark.slow
def test_a_signal_to_torchrun_in_an_evaluation_is_answered_by_all(tmp_path: Path) -> None:
    turn, found = Turn("evaluation", signal.SIGTERM, torchrun=True), None
    for place in ("once", "again"):  # it may come too late on a busy machine
        found = found or stopped(tmp_path / place, turn, 2, random.Random(0))
    assert found is not None and found[1] == []


@LONG
def test_signals_through_launchers(tmp_path: Path) -> None:
    assert stop_and_go_on(tmp_path, turns(10), processes=2, seed=1) == 10


SLOW_SAVE = """
import os
if "RANK" in os.environ:
    import time, samdetr.engine.checkpoint.saving as saving
    save = saving.save_checkpoint
    def slow(*arguments, **options):
        if options["progress"].step > 4:
            time.sleep(60)
        return save(*arguments, **options)
    saving.save_checkpoint = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=LONG)])
def test_a_second_signal_to_the_launcher_ends_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """While both processes save what the first one asked for; the checkpoint before is whole."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_SAVE)
    process = launch(tmp_path, "training", 2, before=tmp_path)
    run = tmp_path / "runs" / "tiny" / "1"
    wait_until(process, lambda: len(lines(run, "train")) >= 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert time.monotonic() - begin < 5
    assert len(children) >= 2
    assert [child for child in children if os.path.exists(f"/proc/{child}")] == []
    assert "stopped at once; what came after the last checkpoint is lost" in (tmp_path / "output").read_text()
    assert load_newest(run / "checkpoints", ALONE, pytest.fail).progress.step == 4
