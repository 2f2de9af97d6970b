"""What ddp, fsdp and recomputation of layers cost a training step in one process, after a comparison of losses.

A process alone never has the first two: `distribute` leaves its model as it is. Here they are forced on it, over a
process group of one, so that what they cost without any other process can be seen.

    python perf/bench_parallel.py recipes/r50_12ep.toml --batch 2 --height 320 --width 320 --out perf/records/NAME
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist
from torch import Tensor

from perf.report import Report, environment, table
from perf.train_step import StepRow, wait
from samdetr.data.prefetch import finish
from samdetr.engine.compute.activation_checkpoint import checkpoint_activations
from samdetr.engine.distributed.parallel import wrap
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.optim import build_optimizer
from samdetr.engine.start_up import random_batch
from samdetr.engine.step import train_step
from samdetr.loss import build_criterion
from samdetr.models import Detector, build_model
from samdetr.recipe import ParallelSection, Recipe, load_recipe
from samdetr.structures import Batch

PLAIN, DDP, FSDP, AGAIN = "plain", "ddp", "fsdp", "layers computed again"
NOISE = 1e-3  # relative; float32 in another order and layout, then AdamW, whose first steps make rounding as large
OBJECTS = 12  # at most, of an image
Step = Callable[[int], Tensor]


def build_step(recipe: Recipe, model: Detector, way: str, batch: Batch, device: torch.device) -> Step:
    """The engine's step on a copy of the model, wrapped in one of the ways; it returns the values of `train_step`."""
    model = deepcopy(model)
    parallel_model: torch.nn.Module = model
    if way == DDP:
        parallel_model = wrap(model, ParallelSection(strategy="ddp"), ALONE, device)
    elif way == FSDP:
        parallel_model = wrap(model, ParallelSection(strategy="fsdp"), ALONE, device)
    elif way == AGAIN:
        checkpoint_activations(model)
    criterion, optimizer = build_criterion(recipe), build_optimizer(model, recipe.optim)
    clip_norm = recipe.optim.clip_norm

    def step(turn: int) -> Tensor:
        return train_step(
            parallel_model, criterion, optimizer, [batch], device=device, clip_norm=clip_norm, world=ALONE, seeds=[turn]
        )

    return step


def differences(steps: dict[str, Step]) -> dict[str, float]:
    """The largest relative difference of loss and gradient norm to the plain step's, after two steps with dropout."""
    values = {way: [step(turn)[[0, -1]].cpu() for turn in range(2)] for way, step in steps.items()}
    return {
        way: max(float(((a - b) / b).abs().max()) for a, b in zip(found, values[PLAIN], strict=True))
        for way, found in values.items()
        if way != PLAIN
    }


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """A process group that this process has for itself."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(recipe: Recipe, case: str, batch: Batch, device: torch.device, repeats: int, report: Report) -> None:
    """Gate and times of all ways, in turns."""
    torch.manual_seed(0)
    model = build_model(recipe.model).to(device).train()
    steps = {way: build_step(recipe, model, way, batch, device) for way in (PLAIN, DDP, FSDP, AGAIN)}
    gate = differences(steps)
    report.gates.append({"case": case, "relative_difference": gate})
    wrong = {way: found for way, found in gate.items() if not found <= NOISE}
    if wrong:
        report.failed = True
        report.note(f"RED {case}: {wrong}; no speed")
        return
    rows: list[StepRow] = []
    for way, times in take_turns(steps, device, repeats).items():
        clock, cpu = zip(*times, strict=True)
        row = StepRow(report.op, case, "float32", "step", way, median(clock), cpu_ms=median(cpu), repeats=len(times))
        row.p20, _, _, row.p80 = quantiles(clock, n=5)
        rows.append(row)
    report.rows += rows
    print(table([*rows]) + "\n", flush=True)
    plain = rows[0]
    for row in rows[1:]:
        pairs = (("by the clock", row.ms, plain.ms), ("of processor time", row.cpu_ms, plain.cpu_ms))
        ratios = [
            f"{now / before - 1:+.1%} {what}, {before:.0f} to {now:.0f} ms"
            for what, now, before in pairs
            if now and before
        ]
        report.note(f"{row.variant}: {'; '.join(ratios)}")


def take_turns(steps: dict[str, Step], device: torch.device, turns: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds by the clock and of processor time, all threads, of every way's steps; the ways take turns."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in steps}
    for turn in range(turns):
        for way, step in steps.items():
            wait(device)
            begin, cpu = time.perf_counter(), time.process_time()
            step(turn)
            wait(device)
            times[way].append(((time.perf_counter() - begin) * 1e3, (time.process_time() - cpu) * 1e3))
    return times


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns its exit code: 1 if a loss differs."""
    parser = argparse.ArgumentParser(description="What ddp, fsdp and recomputation cost one process.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--height", type=int, default=320)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for parallel.json")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    recipe = load_recipe(given.recipe, ["model.backbone.weights=none"])
    report = Report("parallel", environment(given.device))
    print(" ".join(f"{key}={value}" for key, value in report.environment.items()) + "\n")
    batch = finish(random_batch((given.height, given.width), given.batch, OBJECTS), device)
    case = f"{given.recipe.stem} {given.batch} x {given.height} x {given.width}"
    with group_of_one(device):
        run(recipe, case, batch, device, given.repeats, report)
    report.complete = True
    report.write(given.out)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
