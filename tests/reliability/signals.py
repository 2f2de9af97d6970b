"""Runs of two processes whose launcher gets a signal: all save at one step and end, wherever it comes.

    PYTHONPATH=.:kernels python -m tests.reliability.signals --count 10 [--processes 2]

In turn the signal comes in training, in an evaluation, in a save and while the step is compiled; four of five are
SIGTERM, the fifth is SIGINT; two of three go to samdetr-train's launcher, the third to torchrun. A turn is good when
the launcher ends with 143 or 130 (torchrun always with 1), one sentence names the step, the checkpoint is of that step,
and the run that goes on from it comes to the numbers of the one that nothing stopped, to the last bit. A signal that
came too late for its place is not counted, and sent again in another run.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from samdetr.engine.checkpoint.format import read_meta
from tests.engine.runs import ROOT, TINY, metrics
from tests.reliability.children import KEYS, LIMIT, options
from tests.reliability.random_resume import same

PLACES = ("training", "evaluation", "save", "compile")
COMPILED = ("compute.compile=on", "data.batching=buckets", "data.buckets=2", "data.bucket_grid=16", "data.pixels=fast")
GRACE = "120"  # seconds that a launcher waits: a shape may compile for longer than torch's 30 on a busy machine


class Turn(NamedTuple):
    """Where, what and to whom a signal is sent."""

    place: str
    number: signal.Signals
    torchrun: bool


def turns(count: int) -> list[Turn]:
    """The turns of a whole run of the script."""
    return [
        Turn(PLACES[n % 4], signal.SIGINT if n % 5 == 4 else signal.SIGTERM, torchrun=n % 3 == 2) for n in range(count)
    ]


def stop_and_go_on(folder: Path, wanted: Sequence[Turn], *, processes: int, seed: int) -> int:
    """How many of the turns were good."""
    draw, good = random.Random(seed), 0
    straight: dict[bool, Path] = {}
    for number, turn in enumerate(wanted):
        compiled = turn.place == "compile"
        if compiled not in straight:
            straight[compiled] = _finished(folder / f"straight-{compiled}", turn.place, processes)
        while (found := stopped(folder / f"turn-{number}", turn, processes, draw)) is None:
            shutil.rmtree(folder / f"turn-{number}")
        run, problems = found
        if not problems:
            _finished(run.parents[2], turn.place, processes, resume=run)
            problems += [] if same(run, straight[compiled]) else ["goes on with other numbers"]
        good += not problems
        to = "torchrun" if turn.torchrun else "samdetr-train"
        print(f"{turn.number.name} to {to} in {turn.place}: {'; '.join(problems) or 'good'}", flush=True)
        shutil.rmtree(run.parents[2])
    return good


def launch(
    folder: Path,
    place: str,
    processes: int,
    *,
    resume: Path | None = None,
    torchrun: bool = False,
    before: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a run under ``folder``, or go on with it; what is printed goes to ``folder``/output.

    before: a folder with a sitecustomize.py, which all processes run first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.toml"
    file.write_text(TINY)
    keys = [*KEYS, "data.shapes.val_images=150", "data.workers=1", f"run.folder={folder / 'runs'}"]
    keys += [f"data.shapes.folder={folder.parent / 'shapes'}", f"checkpoint.every={1 if place == 'save' else 4}"]
    keys += COMPILED if place == "compile" else ()
    arguments = ["train", str(file), *(word for key in keys for word in ("--set", key))]
    arguments += [] if resume is None else ["--resume", str(resume)]
    command = ["-m", "samdetr", *arguments, "--nproc", str(processes)]
    if torchrun:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "samdetr", *arguments]
    paths = os.pathsep.join(str(path) for path in (*([before] if before else []), ROOT, ROOT / "kernels"))
    own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **own, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": GRACE},
            stdout=output,
            stderr=output,
        )


def wait_until(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    """Return when ``holds``, or when the process has ended. Raises TimeoutError."""
    end = time.monotonic() + LIMIT
    while not holds() and process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise TimeoutError(f"nothing to signal within {LIMIT:.0f} s")
        time.sleep(0.001)


def _finished(folder: Path, place: str, processes: int, *, resume: Path | None = None) -> Path:
    """The run, gone through to its end; another one's numbers are compared with its."""
    process = launch(folder, place, processes, resume=resume)
    if process.wait(3 * LIMIT):
        raise RuntimeError((folder / "output").read_text()[-2000:])
    return folder / "runs" / "tiny" / "1"


def stopped(folder: Path, turn: Turn, processes: int, draw: random.Random) -> tuple[Path, list[str]] | None:
    """A run that got the turn's signal, and what was wrong with its end; None where the signal came too late."""
    run, resume = folder / "runs" / "tiny" / "1", None
    if turn.place == "compile":  # with steps that can be lost
        first = launch(folder, turn.place, processes)
        wait_until(first, lambda: len(lines(run, "train")) >= 2)
        first.send_signal(signal.SIGTERM)
        first.wait(LIMIT)
        resume = run
    before = len(lines(run, "train"))
    process = launch(folder, turn.place, processes, resume=resume, torchrun=turn.torchrun)
    steps = draw.randint(2, 9)
    wait_until(process, lambda: reached(run, turn.place, steps=steps, output=folder / "output"))
    time.sleep(draw.uniform(0, {"evaluation": 0.1, "compile": 2.0}.get(turn.place, 0.0)))
    process.send_signal(turn.number)
    code = process.wait(LIMIT)
    said = re.findall(r"stopped after step (\d+); continue with", (folder / "output").read_text())
    meta = read_meta(run / "checkpoints" / "last" / "meta.json")["progress"]
    late = {"evaluation": not meta["evaluation_due"], "compile": len(lines(run, "train")) > before}
    if late.get(turn.place, False) or meta["finished"]:
        return None
    problems = [] if code == (1 if turn.torchrun else 128 + turn.number) else [f"exit code {code}"]
    problems += [] if said == [str(meta["step"])] else [f"said {said}, saved at {meta['step']}"]
    steps_logged = [line["step"] for line in lines(run, "train")]
    problems += [] if steps_logged[-1:] == [meta["step"]] else [f"logged to {steps_logged[-1:]}"]
    return run, problems


def reached(run: Path, place: str, *, steps: int, output: Path) -> bool:
    """Whether a run is where the signal is to come."""
    if place == "training":
        return len(lines(run, "train")) >= steps
    if place == "evaluation":
        return len(lines(run, "epoch")) > len(lines(run, "eval"))
    if place == "save":
        return len(lines(run, "train")) >= steps and any((run / "checkpoints").glob(".step-*"))
    return "\nrun: " in output.read_text()


def lines(run: Path, kind: str) -> list[dict[str, object]]:
    """Read metrics.jsonl as it is by now; without a last line that is still being written."""
    file = run / "metrics.jsonl"
    if not file.is_file() or not file.read_text().endswith("\n"):
        return []
    return metrics(run, kind)


def main() -> None:
    """The figures, and exit code 1 where they are not what is promised."""
    given = options(__doc__ or "", 10, processes=2)
    with tempfile.TemporaryDirectory() as folder:
        good = stop_and_go_on(Path(folder), turns(given.count), processes=given.processes, seed=given.seed)
    print(
        f"torch {torch.__version__}, {given.processes} processes: {good}/{given.count} signals through a launcher: all "
        "processes saved at one step, exit code 143 or 130 (of torchrun 1), and went on to the same numbers"
    )
    sys.exit(good != given.count)


if __name__ == "__main__":
    main()
