"""Several training processes on this machine, by torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from uuid import uuid4

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from samdetr.errors import SamdetrError


def processes_wanted(asked: int | None, device: str) -> int:
    """``--nproc``, by default one for each visible GPU. Raises SamdetrError for more than there are GPUs.

    device: ``run.device``.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if asked is None:
        return max(1, gpus)
    if gpus and asked > gpus:
        raise SamdetrError(f"--nproc {asked}, but there are {gpus} GPUs: give at most {gpus}, or run.device=cpu.")
    return asked


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run ``python -m samdetr ARGUMENTS`` in each of the processes; returns the exit code of the whole.

    A signal is passed on and the processes have torch's grace (30 s, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT) to save; where
    one fails the others are ended.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "samdetr", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        # those that were ended because another had failed have a negative code
        codes = [failure.exitcode for failure in error.failures.values()]
        return next((code for code in codes if code > 0), 1)
    return 0
