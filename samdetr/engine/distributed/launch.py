"""Several training processes on this machine, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from samdetr.engine.distributed.signals import SIGNALS, SignalCounter
from samdetr.errors import SamdetrError

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

STOPPED = "stopped at once; what came after the last checkpoint is lost\n"


def processes_wanted(asked: int | None, recipe: Recipe, gpus: int) -> int:
    """Return ``--nproc``, or by default as many of ``gpus`` as can share the recipe's micro-batches equally.

    Prints how many GPUs stay unused. Raises SamdetrError for more processes than there are GPUs.
    """
    if asked is None:
        train = recipe.train
        parts = train.total_batch // (1 if train.micro_batch == "auto" else train.micro_batch)
        processes = max(number for number in range(1, max(gpus, 1) + 1) if parts % number == 0)
        if processes < gpus:
            sys.stdout.write(
                f"using {processes} of {gpus} GPUs: as many as can share the {parts} micro-batches of a step equally; "
                "a smaller train.micro_batch allows more\n"
            )
        return processes
    if gpus and asked > gpus:
        raise SamdetrError(f"--nproc {asked}, but there are {gpus} GPUs: give at most {gpus}, or run.device=cpu.")
    return asked


def visible_gpus(recipe: Recipe) -> int:
    """Return how many GPUs ``run.device`` lets the recipe use."""
    return 0 if recipe.run.device == "cpu" else torch.cuda.device_count()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``python -m samdetr ARGUMENTS`` in each of the processes and return the exit code of the whole.

    A signal is passed on, and the processes have 30 s (or TORCH_ELASTIC_SHUTDOWN_TIMEOUT) to save; a second one kills
    them. Where one process fails the others are ended.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes print their own errors
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    counter = SignalCounter()

    def handle(number: int, _: FrameType | None) -> None:
        if not counter.is_first():
            if not counter.is_second(number):
                return
            os.write(2, STOPPED.encode())
            _kill_children()
        raise SignalException("", signal.Signals(number))  # torch's launcher passes the first one on, and waits

    previous = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        with TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                run_id=str(uuid4()),
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                signals_to_handle="SIGHUP,SIGQUIT",  # the others are handled here
            )
            elastic_launch(config, sys.executable)("-m", "samdetr", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        # those that were ended because another had failed have a negative code
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _kill_children() -> None:
    """Kill the process groups that this process started; each child leads one."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)
