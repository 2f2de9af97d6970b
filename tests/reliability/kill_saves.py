"""Runs that SIGKILL ends at random moments of a save: each goes on, from the checkpoint before at the earliest.

    PYTHONPATH=.:kernels python -m tests.reliability.kill_saves --count 50 [--processes 2]

Saves follow each other every third step. A kill counts when the checkpoint was being written; of several processes
one is killed, by chance, and the others must end by themselves.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from samdetr.engine.checkpoint.folder import load_newest, newest_first
from samdetr.engine.distributed.world import ALONE
from tests.engine.runs import metrics
from tests.reliability.children import Saving, end, options, small_recipe, start

EVERY = 3  # steps between two saves
LONGEST = 0.15  # seconds after the beginning of a write at which it is killed at the latest; a write takes about 0.1


class Killed(NamedTuple):
    """The state found after a kill."""

    kills: int  # that met a write
    resumable: int
    steps_lost: list[int]  # of each, steps taken after the checkpoint that the run goes on from
    before: int  # how many went on from the save before the interrupted one, or a later one
    leftovers: int  # unfinished folders that stood there afterwards, all removed at the start of the next


def kill_saves(folder: Path, *, count: int, processes: int, seed: int) -> Killed:
    """Kill a run, go on, kill it again, until ``count`` kills have met a write."""
    draw = random.Random(seed)
    keys = (
        f"checkpoint.every={EVERY}",
        "train.epochs=1000",
        "data.workers=0",
        "eval.every=1000",
        "parallel.timeout=20",
    )
    recipe = small_recipe(folder, *keys)
    run = Path(recipe.run.folder) / "tiny" / "1"
    saving, resume = Saving(folder / "saving"), None
    kills = resumable = before = leftovers = 0
    lost: list[int] = []
    while kills < count:
        saving.file.unlink(missing_ok=True)
        started = start(recipe, resume=resume, processes=processes, saving=saving)
        newest = newest_first(run / "checkpoints")
        first = 1 + (int(newest[0].name.split("-")[1]) if newest else EVERY)  # a run has a checkpoint to lose
        while (saving.step() or 0) <= first + EVERY * draw.randint(0, 2):
            if any(process.exitcode is not None for process in started):
                raise RuntimeError((Path(recipe.run.folder) / "output").read_text()[-2000:])
            time.sleep(0.001)
        time.sleep(draw.uniform(0, LONGEST))
        started[draw.randrange(processes)].kill()
        step = saving.step()
        end(started)
        resume = str(run)
        if step is None:
            continue  # it was on the disk already
        kills += 1
        leftovers += len(list((run / "checkpoints").glob(".step-*")))
        done = metrics_step(run)
        checkpoint = load_newest(run / "checkpoints", ALONE, print)
        resumable += 1
        before += checkpoint.progress.step >= step - EVERY
        lost.append(done - checkpoint.progress.step)
        assert not list((run / "checkpoints").glob(".*"))
    return Killed(kills, resumable, lost, before, leftovers)


def metrics_step(run: Path) -> int:
    """The last step that metrics.jsonl has whole."""
    file = run / "metrics.jsonl"
    text = file.read_text()
    file.write_text(text[: text.rfind("\n") + 1])
    return int(metrics(run, "train")[-1]["step"])


def main() -> None:
    """The figures, and exit code 1 where they are not what is promised."""
    given = options(__doc__ or "", 50)
    with tempfile.TemporaryDirectory() as folder:
        found = kill_saves(Path(folder), count=given.count, processes=given.processes, seed=given.seed)
    print(
        f"torch {torch.__version__}, {given.processes} processes: {found.kills} kills during a save, "
        f"{found.resumable}/{found.kills} resumable, {found.before}/{found.kills} at most one save back; steps lost: "
        f"{sum(found.steps_lost) / found.kills:.1f} on average, {max(found.steps_lost)} at most, with a save every "
        f"{EVERY} steps; {found.leftovers} unfinished folders, all removed at the next start"
    )
    sys.exit(not found.kills == found.resumable == found.before)


if __name__ == "__main__":
    main()
