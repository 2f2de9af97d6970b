"""Profile of a recipe's training step: Chrome trace, top kernels, and on a GPU the gaps between them.

    python perf/profile_step.py recipes/r50_12ep.toml --batch 4 --height 640 --width 864 --out profile

What this prints is no measurement of speed (a profiled step is slower): `perf/train_step.py` is. A run profiles its
own steps, with its data path, under ``samdetr-train --profile``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from perf.inputs import object_classes, training_batch
from perf.sides import build_baseline, build_model_on, build_ours
from samdetr.engine.compute.precision import choose_compute
from samdetr.engine.run.profile import StepProfiler
from samdetr.errors import SamdetrError
from samdetr.recipe import load_recipe

WARM_UPS = 4  # before the profiled steps, the last of them under the profiler
BATCHES = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Profile and print the tables."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Profile of a recipe's training step.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=864)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--side", choices=("ours", "baseline"), default="ours")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipe")
    parser.add_argument("--out", type=Path, default=Path("profile"), help="folder for the trace and the tables")
    options = parser.parse_args(argv)
    device = torch.device(("cuda" if cuda else "cpu") if options.device == "auto" else options.device)
    recipe = load_recipe(options.recipe, options.set)
    batches = [
        training_batch(options.batch, options.height, options.width, classes=object_classes(recipe), seed=seed)
        for seed in range(BATCHES)
    ]
    model, way = build_model_on(recipe, device), "as published"
    if options.side == "ours":
        compute = choose_compute(recipe.compute, device, buckets=True)
        side, way = build_ours(recipe, model, batches, device, compute=compute), str(compute)
    else:
        side = build_baseline(recipe, model, batches, device)
    with StepProfiler(options.out, print, first=WARM_UPS + 1, last=WARM_UPS + options.steps) as profiler:
        for turn in range(WARM_UPS + options.steps):
            side.step(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()  # a step's kernels belong to its range
            profiler.step()
    print(f"{recipe.run.name}, {side.name}, {options.height}x{options.width} batch {options.batch} on {device}; {way}")
    print(profiler.report, end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        sys.exit(f"error: {error}")
