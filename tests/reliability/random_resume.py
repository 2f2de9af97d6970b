"""Runs that a signal stops at random steps and that go on with other workers: the same numbers to the last bit.

    PYTHONPATH=.:kernels python -m tests.reliability.random_resume --count 20 [--processes 2]

Half of the signals are SIGTERM, which saves at that step, half SIGKILL, after which the run goes on from its last save
within the epoch. It began with two loader workers and goes on with three. Compared with the run that nothing stopped:
parameters, buffers, averages and their count, the optimizer's state, every logged loss, gradient norm and rate, the AP.
"""

from __future__ import annotations

import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from samdetr.engine.checkpoint.format import load_checkpoint
from tests.engine.runs import losses, metrics, weights
from tests.reliability.children import STEPS, Signal, end, finish, options, small_recipe, start

EVERY = 3  # steps between two saves


def resumed_equal(folder: Path, *, count: int, processes: int, seed: int) -> int:
    """How many of ``count`` stopped runs came to the numbers of the one that went through."""
    draw = random.Random(seed)
    finish(small_recipe(folder / "straight", "data.workers=2"), resume=None, processes=processes)
    straight, equal = folder / "straight" / "runs" / "tiny" / "1", 0
    for turn in range(count):
        place = folder / f"turn-{turn}"
        recipe = small_recipe(place, "data.workers=2", f"checkpoint.every={EVERY}")
        run = Path(recipe.run.folder) / "tiny" / "1"
        number = signal.SIGTERM if turn % 2 else signal.SIGKILL
        first = 1 if number == signal.SIGTERM else 2 * EVERY + 1  # by then the first save is whole
        stop = Signal(number, draw.randint(first, STEPS), draw.randrange(processes))
        codes = end(start(recipe, resume=None, processes=processes, signal=stop))
        again = small_recipe(place, "data.workers=3", f"checkpoint.every={EVERY}")
        finish(again, resume=str(run), processes=processes)
        equals = same(run, straight)
        equal += equals
        name = signal.Signals(number).name
        print(
            f"{name} before step {stop.step} in process {stop.rank}, exit codes {codes}: {'equal' if equals else 'NOT'}"
        )
        shutil.rmtree(place)
    return equal


def same(run: Path, straight: Path) -> bool:
    """Whether two runs of `STEPS` steps came to the same numbers."""
    one, other = weights(run), weights(straight)
    counts = [load_checkpoint((f / "checkpoints/last").resolve(), with_optimizer=False).meta for f in (run, straight)]
    return (
        one.keys() == other.keys()
        and all(torch.equal(one[key], other[key]) for key in one)
        and losses(run) == losses(straight)
        and [line["AP"] for line in metrics(run, "eval")] == [line["AP"] for line in metrics(straight, "eval")]
        and counts[0]["averaged_steps"] == counts[1]["averaged_steps"] == STEPS
        and counts[0]["progress"] == counts[1]["progress"]
    )


def main() -> None:
    """The figures, and exit code 1 where they are not what is promised."""
    given = options(__doc__ or "", 20)
    with tempfile.TemporaryDirectory() as folder:
        equal = resumed_equal(Path(folder), count=given.count, processes=given.processes, seed=given.seed)
    print(f"torch {torch.__version__}, {given.processes} processes: {equal}/{given.count} equal to the last bit")
    sys.exit(equal != given.count)


if __name__ == "__main__":
    main()
