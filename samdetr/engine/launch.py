"""Several training processes on this machine, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from samdetr.errors import SamdetrError

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


def processes_wanted(asked: int | None, recipe: Recipe, gpus: int) -> int:
    """``--nproc``, by default as many as can share the recipe's micro-batches equally, one for each of ``gpus``.

    What stays unused is said. Raises SamdetrError for more processes than there are GPUs.
    """
    if asked is None:
        train = recipe.train
        parts = train.total_batch // (1 if train.micro_batch == "auto" else train.micro_batch)
        processes = max(number for number in range(1, max(gpus, 1) + 1) if parts % number == 0)
        if processes < gpus:
            sys.stdout.write(
                f"using {processes} of {gpus} GPUs: they share the {parts} micro-batches of a step equally; with a "
                "smaller train.micro_batch there are more\n"
            )
        return processes
    if gpus and asked > gpus:
        raise SamdetrError(f"--nproc {asked}, but there are {gpus} GPUs: give at most {gpus}, or run.device=cpu.")
    return asked


def visible_gpus(recipe: Recipe) -> int:
    """How many GPUs ``run.device`` lets the recipe use."""
    return 0 if recipe.run.device == "cpu" else torch.cuda.device_count()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``python -m samdetr ARGUMENTS`` in each of the processes; returns the exit code of the whole.

    A signal is passed on and the processes have torch's grace (30 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT) to save; where
    one fails the others are ended.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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
            )
            elastic_launch(config, sys.executable)("-m", "samdetr", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        # those that were ended because another had failed have a negative code
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    return 0
