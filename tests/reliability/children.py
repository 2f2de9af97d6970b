"""Real training processes for the scripts of this folder, which signals stop at a chosen step or while they save."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import samdetr.engine.checkpoint.saving
import samdetr.engine.train
from samdetr.errors import SamdetrError
from samdetr.recipe import Recipe, load_recipe
from tests.engine.runs import TINY

# a run with all that must survive: augmentation, accumulation over four micro-batches, an average, dropout, schedule
KEYS = ("train.micro_batch=1", "model.backbone.norm=frozen", "optim.ema_decay=0.99")
STEPS = 12  # two epochs of six, each with an evaluation
LIMIT = 120.0  # seconds that a process may take


class Signal(NamedTuple):
    """A signal that a process sends itself before one of its steps, counted from 1."""

    number: int
    step: int
    rank: int = 0


class Saving(NamedTuple):
    """The marker that stands while a checkpoint is written; it holds its step."""

    file: Path

    def step(self) -> int | None:
        """The step whose checkpoint is being written, None while there is none."""
        try:
            return int(self.file.read_text() or 0) or None
        except FileNotFoundError:
            return None


def small_recipe(folder: Path, *keys: str) -> Recipe:
    """A recipe whose step takes milliseconds; runs and pictures are kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.toml"
    file.write_text(TINY)
    places = (f"run.folder={folder / 'runs'}", f"data.shapes.folder={folder / 'shapes'}")
    return load_recipe(file, [*places, *KEYS, *keys])


def start(
    recipe: Recipe,
    *,
    resume: str | None,
    processes: int = 1,
    signal: Signal | None = None,
    saving: Saving | None = None,
) -> list[BaseProcess]:
    """Train in one process or in several, which find each other; what they print goes to ``run.folder``/output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["samdetr.engine.train", "torchvision", "scipy.optimize", "matplotlib.figure"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    worlds = [
        {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
            **{"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        for rank in range(processes)
    ]
    started: list[BaseProcess] = []
    for rank, world in enumerate(worlds):
        own = signal if signal is not None and signal.rank == rank else None
        arguments = (recipe, resume, world if processes > 1 else {}, own, saving)
        process = context.Process(target=_train, args=arguments)
        process.start()
        started.append(process)
    return started


def end(processes: Sequence[BaseProcess]) -> list[int]:
    """Wait for the processes; their exit codes. Raises TimeoutError where one hangs."""
    for process in processes:
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a process has not ended within {LIMIT:.0f} s")
    return [process.exitcode for process in processes if process.exitcode is not None]


def finish(recipe: Recipe, *, resume: str | None, processes: int = 1) -> None:
    """Train to the end. Raises RuntimeError where a process fails."""
    codes = end(start(recipe, resume=resume, processes=processes))
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {(Path(recipe.run.folder) / 'output').read_text()[-2000:]}")


def options(description: str, count: int, *, processes: int = 1) -> argparse.Namespace:
    """The command line of a script: how often, with how many processes, from which seed."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--count", type=int, default=count, help=f"how often ({count})")
    parser.add_argument("--processes", type=int, default=processes, help=f"of the run ({processes})")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (0)")
    return parser.parse_args()


def _train(
    recipe: Recipe, resume: str | None, world: dict[str, str], signal: Signal | None, saving: Saving | None
) -> None:
    """The body of a process."""
    os.environ.update(world)
    multiprocessing.set_start_method(None, force=True)  # loader processes start as they do in a command
    torch.set_num_threads(1)
    Path(recipe.run.folder).mkdir(parents=True, exist_ok=True)
    output = os.open(Path(recipe.run.folder) / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if signal is not None:
        _signal_before_step(signal)
    if saving is not None and world.get("RANK", "0") == "0":
        _mark_saves(saving)
    try:
        samdetr.engine.train.train(recipe, resume=resume)
    except SamdetrError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _signal_before_step(signal: Signal) -> None:
    step, calls = samdetr.engine.train.train_step, 0

    def stepping(*arguments: Any, **values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == signal.step:
            os.kill(os.getpid(), signal.number)
        return step(*arguments, **values)

    samdetr.engine.train.train_step = stepping


def _mark_saves(saving: Saving) -> None:
    save = samdetr.engine.checkpoint.saving.save_checkpoint

    def marking(*arguments: Any, **values: Any) -> Path:
        saving.file.write_text(str(values["progress"].step))
        path = save(*arguments, **values)
        saving.file.unlink()
        return path

    samdetr.engine.checkpoint.saving.save_checkpoint = marking
