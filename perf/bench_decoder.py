"""Decoder and criterion alone, forward and backward, ours beside the published ones, on a made-up encoded map.

Both sides get the same weights, map and targets; losses and the map's gradient are compared before any speed is
printed, in fp32 and as it is timed: compiled, in bf16, where the recipe's ``compute`` section says so.

    python perf/bench_decoder.py recipes/r50_smca_12ep.toml --batch 2 --height 10 --width 10 --device cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perf.baseline import BaselineCriterion, BaselineSAMDETR, baseline_loss, published_batch
from perf.counting import count_compiled_kernels, peak_bytes
from perf.inputs import training_batch
from perf.report import Report, environment, number
from perf.sides import build_model_on
from perf.train_step import StepRow, wait
from samdetr.engine.compute.compile import compile_parts
from samdetr.engine.compute.precision import EXACT, Compute, autocast, choose_compute
from samdetr.errors import SamdetrError
from samdetr.loss import build_criterion
from samdetr.models.encoder import EncodedMap
from samdetr.models.position import MapGeometry, sine_map, valid_mask
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import Batch

STRIDE = 32
# relative differences of the loss and, by its largest value, of the map's gradient
NOISE = {torch.float32: {"loss": 1e-4, "memory": 1e-4}, torch.bfloat16: {"loss": 0.01, "memory": 0.15}}


class Part(NamedTuple):
    """One side: a call runs decoder and criterion forward and backward; it returns the loss, the map gets its grad."""

    name: str
    model: nn.Module
    run: Callable[[], Tensor]
    memory: Tensor  # [B, H, W, width], the leaf


def build_ours(recipe: Recipe, batch: Batch, valid: Tensor, memory: Tensor, compute: Compute) -> Part:
    """Build our decoder and criterion."""
    device = memory.device
    model, criterion = build_model_on(recipe, device), build_criterion(recipe)
    if compute.compile:
        compile_parts(model, criterion, shapes=1)
    leaf = memory.clone().requires_grad_()
    _, height, width, channels = memory.shape
    pos_embed = sine_map(valid, height, width, channels)
    geometry = MapGeometry(valid, valid_mask(valid, height, width), None)
    image_sizes = valid * STRIDE
    targets = batch.to(device).targets
    dtype = compute.precision

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        leaf.grad = None
        with autocast(dtype, device):
            outputs = model.decoder(EncodedMap(leaf.to(dtype), pos_embed.to(dtype), geometry, image_sizes))
        loss = criterion(outputs, targets).total
        loss.backward()
        return loss.detach()

    return Part("ours", model, run, leaf)


def build_theirs(recipe: Recipe, batch: Batch, valid: Tensor, memory: Tensor) -> Part:
    """Build the published decoder and criterion with the weights of ours."""
    device = memory.device
    model = BaselineSAMDETR(recipe.model)
    model.load_from(build_model_on(recipe, device))
    model.to(device).train()
    criterion = BaselineCriterion(recipe.loss)
    leaf = memory.clone().requires_grad_()
    _, height, width, channels = memory.shape
    padding = ~valid_mask(valid, height, width)
    position = sine_map(valid, height, width, channels).flatten(1, 2).transpose(0, 1)
    targets = published_batch(batch).to(device).targets

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        leaf.grad = None
        outputs = model.decode(leaf.flatten(1, 2).transpose(0, 1), position, padding)
        loss = baseline_loss(criterion, outputs, targets)
        loss.total.backward()
        return loss.total.detach()

    return Part("baseline", model, run, leaf)


def differences(theirs: Part, ours: Part) -> dict[str, float]:
    """Compare loss and the map's gradient, both sides without dropout: relative differences."""
    losses = []
    for part in (theirs, ours):
        part.model.eval()
        losses.append(part.run())
        part.model.train()
    assert theirs.memory.grad is not None and ours.memory.grad is not None
    error = (ours.memory.grad - theirs.memory.grad).abs().max() / theirs.memory.grad.abs().max()
    return {"loss": (losses[1] - losses[0]).abs().item() / losses[0].item(), "memory": error.item()}


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Times of decoder and criterion, after a comparison of losses.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--height", type=int, default=20, help="of the encoded map, cells")
    parser.add_argument("--width", type=int, default=27)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipe")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 where the sides disagree."""
    options = read_options(argv)
    recipe, device = load_recipe(options.recipe, options.set), torch.device(options.device)
    batch = training_batch(
        options.batch, options.height * STRIDE, options.width * STRIDE, classes=recipe.model.num_classes, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    memory = torch.randn(options.batch, options.height, options.width, recipe.model.width, generator=generator)
    memory, valid = memory.to(device), ((batch.image_sizes + STRIDE - 1) // STRIDE).to(device)
    report = Report(options.json.stem if options.json else "decoder", environment(options.device))
    report.environment["recipe"] = " ".join([str(options.recipe), *options.set])
    theirs = build_theirs(recipe, batch, valid, memory)
    compute = choose_compute(recipe.compute, device, buckets=True)
    for way in dict.fromkeys((EXACT, compute)):
        ours, name = build_ours(recipe, batch, valid, memory, way), str(way.precision).removeprefix("torch.")
        name += ", compiled" if way.compile else ""
        found, noise = differences(theirs, ours), NOISE[way.precision]
        report.gates.append({"case": recipe.run.name, "way": name, "relative_difference": found, "noise": noise})
        print(f"without dropout, {name}, relative: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
        report.failed |= not all(value <= noise[key] for key, value in found.items())
    if report.failed:
        report.note("RED: no speed")
    else:
        measure((theirs, ours), report, options, compute, device)
    report.complete = True
    report.write(options.json.parent if options.json else None)
    return int(report.failed)


def measure(
    parts: Sequence[Part], report: Report, options: argparse.Namespace, compute: Compute, device: torch.device
) -> None:
    """Measure times of both sides in turns, launches and peak memory; as rows and a table."""
    case = f"map {options.height}x{options.width} batch {options.batch}"
    times: dict[str, list[float]] = {part.name: [] for part in parts}
    for turn in range(1 + options.turns):
        for part in parts:
            taken = wait_and_time(part.run, device)
            if turn:  # the first compiles
                times[part.name].append(taken)
    for part in parts:
        dtype = "float32" if part.name == "baseline" else str(compute.precision).removeprefix("torch.")
        row = StepRow(report.op, case, dtype, "decoder and criterion", part.name, ms=median(times[part.name]))
        ratios = [first / own for first, own in zip(times[parts[0].name], times[part.name], strict=True)]
        row.times_faster, row.repeats = median(ratios), options.turns
        row.launches = count_compiled_kernels(part.run).total()
        row.peak_mb = peak_bytes(part.run, device) / 1e6
        report.rows.append(row)
        print(
            f"{case:24}{part.name:10}{dtype:10}{number(row.ms, 2):>10} ms{number(row.times_faster, 2):>7} x"
            f"{row.launches:>7} launches{row.peak_mb:>8.0f} MB peak"
        )


def wait_and_time(run: Callable[[], Tensor], device: torch.device) -> float:
    """Measure the milliseconds of one call on an idle device."""
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return (time.perf_counter() - begin) * 1e3


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        sys.exit(f"error: {error}")
