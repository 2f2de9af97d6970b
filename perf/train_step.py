"""The training step of a recipe: images/s, ms by phase, launches, waits and memory, the published step beside ours.

Both sides take the same batches with the same weights, in turns; a turn is some steps in a row with one wait for the
device at its end. First one step of each without dropout is compared, ours in fp32 and in the precision that is timed:
if losses or gradients differ, no speed is printed. What is compiled or recorded passes the engine's own start-up check.
Phases are timed apart, with a wait after each, so on a GPU their sum is larger than the step.

    python perf/train_step.py recipes/r50_12ep.toml --batch 2 --height 320 --width 320 --device cpu
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from perf.counting import count_compiled_kernels, count_syncs, peak_bytes
from perf.harness import WARM_UPS
from perf.inputs import object_classes, training_batch
from perf.report import Report, Row, environment, number
from perf.sides import PHASES, Side, build_baseline, build_model_on, build_ours, first_images
from samdetr.engine.compile import EXACT, choose_compute
from samdetr.errors import RecipeError, SamdetrError
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import Batch

BATCHES = 3  # different ones, taken in turn
GATE_IMAGES = 2  # where the baseline serves the gate only
# relative differences of float32: losses of six layers, and a gradient that went through all of them
NOISE = {"loss": 1e-4, "loss_ce": 1e-4, "loss_bbox": 1e-4, "loss_giou": 1e-4, "grad_norm": 1e-2}
BF16_NOISE = {"loss": 0.01, "loss_ce": 0.01, "loss_bbox": 0.01, "loss_giou": 0.01, "grad_norm": 0.05}
# images/s that an H100 cannot exceed (design: sum over kernels of the larger of compute and traffic), at batch 16
H100_LIMITS = {(False, 800, 1216): 813, (True, 800, 1216): 469, (False, 640, 864): 1275, (True, 640, 864): 834}


@dataclass
class StepRow(Row):
    """A side's step. ``ms`` is wall time, the host's included; ``times_faster`` the median of the turns' ratios."""

    cpu_ms: float | None = None  # processor time of the host, all threads: what a busy machine disturbs less
    images_per_s: float | None = None
    phases_ms: dict[str, float] = field(default_factory=dict)  # medians
    launches: int | None = None  # kernels on a GPU; without one ops and fused kernels
    syncs: int | None = None  # reads of a scalar, on a GPU whatever makes the host wait
    state_mb: float | None = None  # parameters, buffers and the optimizer's state; peak_mb comes on top


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times of a recipe's training step, after a comparison of losses.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=864)
    parser.add_argument("--steps", type=int, default=20, help="timed turns of each side")
    parser.add_argument("--group", type=int, help="steps of a turn (4 on a GPU, else 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipe")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    options.device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    options.group = options.group or (4 if options.device == "cuda" else 1)
    return options


def check(recipe: Recipe, batch: Batch, device: torch.device, precision: torch.dtype) -> dict[str, float]:
    """The gate: relative differences of one step's losses and gradient norm, both sides without dropout or TF32.

    Ours computes in ``precision``, the published side in float32. Raises RecipeError where nothing like the recipe was
    published.
    """
    model = build_model_on(recipe, device)
    theirs = build_baseline(recipe, model, [batch], device)
    ours = build_ours(recipe, model, [batch], device, compute=EXACT._replace(precision=precision))
    for side in (theirs, ours):
        side.model.eval()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        expected, found = theirs.values(0), ours.values(0)
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return {name: abs(found[name] - expected[name]) / abs(expected[name]) for name in NOISE}


def pass_gate(recipe: Recipe, batch: Batch, device: torch.device, report: Report) -> None:
    """Compare the sides in float32 and in the precision that is timed; ``report`` has failed if they differ."""
    timed = choose_compute(recipe.compute, device, buckets=True).precision
    for precision in dict.fromkeys((torch.float32, timed)):
        noise = NOISE if precision == torch.float32 else BF16_NOISE
        name = str(precision).removeprefix("torch.")
        differences = check(recipe, batch, device, precision)
        gate = {"case": recipe.run.name, "dtype": name, "relative_difference": differences, "noise": noise}
        report.gates.append(gate)
        told = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
        print(f"one step without dropout, ours ({name}) against the baseline, relative: {told}")
        for key, value in differences.items():
            if not value <= noise[key]:
                report.failed = True
                report.note(f"RED {key} in {name} differs by {value:.3g} (noise {noise[key]:g}); no speed")


def take_turns(
    sides: Sequence[Side], device: torch.device, turns: int, group: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of a step, by the clock and of processor time, for every turn of every side but the first."""
    times: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for turn in range(1 + turns):
        for side in sides:
            wait(device)
            begin, cpu = time.perf_counter(), time.process_time()
            for step in range(group):
                side.step(turn * group + step)
            wait(device)
            taken, cpu_taken = time.perf_counter() - begin, time.process_time() - cpu
            if turn > 0:
                times[side.name].append((taken * 1e3 / group, cpu_taken * 1e3 / group))
    return times


def time_phases(sides: Sequence[Side], device: torch.device, turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each phase, by side."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(turns):
        for side in sides:
            wait(device)
            last = time.perf_counter()

            def mark(phase: str, name: str = side.name) -> None:
                nonlocal last
                wait(device)
                now = time.perf_counter()
                times.setdefault((name, phase), []).append((now - last) * 1e3)
                last = now

            side.phases(turn, mark)
    return {
        side.name: {phase: median(found) for (name, phase), found in times.items() if name == side.name}
        for side in sides
    }


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe(side: Side, row: StepRow, device: torch.device) -> None:
    """Fill in what is counted. The side has taken its first steps."""

    def step() -> object:
        return side.step(0)

    found = count_compiled_kernels(step)
    row.launches = found.total()
    row.syncs = count_syncs(step) if device.type == "cuda" else found.reads.total()
    side.optimizer.zero_grad(set_to_none=not side.recorded)
    row.state_mb = side.state_bytes() / 1e6
    row.peak_mb = peak_bytes(step, device, reserved=side.recorded) / 1e6


def table(rows: Sequence[StepRow], useful: float) -> str:
    """All rows with what was measured of them."""
    head = ("images/s", "ms", "p20", "p80", "cpu ms", "launches", "syncs", "state MB", "peak MB", "faster")
    lines = [
        f"{rows[0].case}, useful pixels {useful:.0%}",
        f"{'':20}" + "".join(f"{name:>10}" for name in head) + ("     limit" if rows[0].share is not None else ""),
    ]
    for row in rows:
        values = (row.images_per_s, row.ms, row.p20, row.p80, row.cpu_ms)
        cells = [number(value, 2) for value in values] + [number(row.launches, 0), number(row.syncs, 0)]
        cells += [number(row.state_mb, 0), number(row.peak_mb, 0), number(row.times_faster, 2)]
        cells += [] if row.share is None else [f"{row.share:.1%}"]
        lines.append(f"{row.variant:10}{row.dtype:10}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append(f"{'ms of':20}" + "".join(f"{phase:>10}" for phase in PHASES))
    for row in rows:
        found = (f"{number(row.phases_ms.get(name), 2):>10}" for name in PHASES)
        lines.append(f"{row.variant:10}{row.dtype:10}" + "".join(found))
    return "\n".join(lines)


def measure_step(
    recipe: Recipe, batches: Sequence[Batch], options: argparse.Namespace, report: Report, write: Callable[[], None]
) -> None:
    """Counts, phases and times of the sides, added to the report."""
    device = torch.device(options.device)
    batch, _, height, width = batches[0].images.shape
    model = build_model_on(recipe, device)
    compute = choose_compute(recipe.compute, device, buckets=True)
    sides = [build_baseline(recipe, model, batches, device)] if options.baseline else []
    dtypes = ["float32"] * len(sides) + [str(compute.precision).removeprefix("torch.")]
    sides.append(build_ours(recipe, model, batches, device, compute=compute, note=report.note))
    report.environment["compute"] = f"compile={compute.compile} cuda_graph={compute.cuda_graph}"
    case = f"{height}x{width} batch {batch}"
    rows = [
        StepRow(report.op, case, dtype, "step", side.name, problem="not timed yet")
        for side, dtype in zip(sides, dtypes, strict=True)
    ]
    limit = H100_LIMITS.get((recipe.model.backbone.dilation, height, width)) if batch == 16 else None
    limit = limit if "H100" in report.environment["name"] else None
    report.rows += rows
    for side, row in zip(sides, rows, strict=True):
        for turn in range(WARM_UPS if device.type == "cuda" else 1):
            side.step(turn)
        describe(side, row, device)
        write()
    times = take_turns(sides, device, options.steps, options.group)
    phases = time_phases(sides, device, max(3, options.steps // 4))
    for side, row in zip(sides, rows, strict=True):
        taken, cpu = (sorted(column) for column in zip(*times[side.name], strict=True))
        row.cpu_ms = median(cpu)
        row.ms, row.repeats, row.problem = median(taken), len(taken), None
        row.p20, row.p80 = (taken[round(share * (len(taken) - 1))] for share in (0.2, 0.8))
        row.images_per_s = batch / row.ms * 1e3
        if options.baseline:
            pairs = zip(times[sides[0].name], times[side.name], strict=True)
            row.times_faster = median(before[0] / after[0] for before, after in pairs)
        row.share = row.images_per_s / limit if limit else None
        row.phases_ms = phases[side.name]
        write()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns 1 where the sides disagree."""
    options = read_options(argv)
    recipe, device = load_recipe(options.recipe, options.set), torch.device(options.device)
    report = Report(options.json.stem if options.json else "train_step", environment(options.device))

    def write() -> None:
        report.write(options.json.parent if options.json else None)

    report.environment["recipe"] = " ".join([str(options.recipe), *options.set])
    report.environment["convolutions_tf32"] = torch.backends.cudnn.allow_tf32
    print(" ".join(f"{key}={value}" for key, value in report.environment.items()))
    classes = object_classes(recipe)
    batches = [
        training_batch(options.batch, options.height, options.width, classes=classes, seed=seed)
        for seed in range(BATCHES)
    ]
    useful = sum(batch.image_sizes.prod(-1).sum().item() for batch in batches)
    useful /= sum(batch.images[:, 0].numel() for batch in batches)
    report.notes.append(f"useful pixels {useful:.0%}")
    try:
        gate_batch = batches[0] if options.baseline else first_images(batches[0], GATE_IMAGES)
        pass_gate(recipe, gate_batch, device, report)
    except RecipeError as error:
        if options.baseline:
            raise
        report.note(f"no gate: {error}")
    gc.collect()
    if not report.failed:
        measure_step(recipe, batches, options, report, write)
        print(table([row for row in report.rows if isinstance(row, StepRow)], useful))
    report.complete = True
    write()
    return int(report.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        sys.exit(f"error: {error}")
