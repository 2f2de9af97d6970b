"""``samdetr ARGUMENTS`` on the null GPU, with a report of waits and refused calls at its end.

With --nproc 2 both processes compute on the one device there is, and gloo carries what NCCL would, which the null GPU
does not answer. Each process, the launcher too, prints what was counted as JSON in one line after `COUNTED`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

import samdetr.cli.main as cli
import samdetr.engine.distributed.launch as launching
import samdetr.engine.train as training
from perf import null_library

COUNTED = "null GPU: "
PROCESSES = 2  # at most


def count_epochs() -> list[dict[str, int]]:
    """Count the waits of each epoch's steps, by the call that waits; the list grows with them."""
    waits: list[dict[str, int]] = []
    before: Counter[str] = Counter()
    prefetch, report_epoch = training.prefetch, training.RunLog.epoch

    def begin(*arguments: Any) -> Any:  # called when an epoch begins
        nonlocal before
        before = Counter(null_library.counts().waits)
        return prefetch(*arguments)

    def end(*arguments: Any) -> None:  # and when its steps are done
        waits.append(dict(Counter(null_library.counts().waits) - before))
        report_epoch(*arguments)

    training.prefetch, training.RunLog.epoch = begin, end
    return waits


def share_the_device() -> None:
    """Let several processes compute on the one device and talk by gloo; each of them runs this program."""
    launch, make_group = launching.elastic_launch, dist.init_process_group

    def start(config: Any, program: str) -> Any:
        return lambda *words: launch(config, program)(__file__, *words[2:])  # without "-m samdetr"

    launching.elastic_launch = start
    launching.visible_gpus = lambda recipe: PROCESSES
    dist.init_process_group = lambda backend, **options: make_group("gloo", **options)
    torch.cuda.set_device = lambda device: None


def tell(epochs: list[dict[str, int]]) -> None:
    """Print what was counted."""
    found = {"epochs": epochs, "refused": null_library.refused(), "waits": null_library.counts().waits}
    sys.stdout.write(f"{COUNTED}{json.dumps(found)}\n")
    sys.stdout.flush()


def main() -> None:
    """Run ``samdetr``."""
    torch.set_num_threads(1)
    if "--nproc" in sys.argv or "WORLD_SIZE" in os.environ:
        share_the_device()
    epochs, leave = count_epochs(), cli._leave

    def told(code: int) -> None:
        tell(epochs)
        leave(code)

    cli._leave = told
    try:
        cli.main()
    finally:
        tell(epochs)


if __name__ == "__main__":
    main()
