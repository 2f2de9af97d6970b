"""The training step of a recipe: images/s, ms by phase, launches, waits and memory, the published step beside ours.

Both sides take the same batches with the same weights, in turns; a turn is some steps in a row with one wait for the
device at its end. First one step of each without dropout is compared, ours in fp32 and in the precision that is timed:
if losses or gradients differ, no speed is printed. What is compiled or recorded passes the engine's own start-up check.
Phases are timed apart, with a wait after each, so on a GPU their sum is larger than the step.

Several batch sizes and ways to run our step may be asked for. All are built, then timed (the published step at the
first batch size only), then counted, and the last way is profiled. Results are written as they come, and a way that
fails costs only itself.

    python perf/train_step.py recipes/r50_12ep.toml --batch 2 --height 320 --width 320 --device cpu
    python perf/train_step.py recipes/r50_12ep.toml --batch 4 16 --ways eager compiled graph --profile profile
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from perf.counting import count_compiled_kernels, count_syncs, host_ms, peak_bytes, reserved_bytes
from perf.gate import reason
from perf.gpu_lock import gpu_alone
from perf.harness import WARM_UPS
from perf.inputs import object_classes, training_batch
from perf.report import Report, Row, environment, number
from perf.sides import PHASES, Side, build_baseline, build_model_on, build_ours, first_images
from samdetr.engine.compute.precision import EXACT, choose_compute, choose_precision
from samdetr.engine.run.profile import StepProfiler
from samdetr.errors import RecipeError, SamdetrError
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import Batch

BATCHES = 3  # different ones, taken in turn
GATE_IMAGES = 2  # where the baseline serves the gate only
# relative differences of float32: losses of six layers, and a gradient that went through all of them
NOISE = {"loss": 1e-4, "loss_ce": 1e-4, "loss_bbox": 1e-4, "loss_giou": 1e-4, "grad_norm": 1e-2}
BF16_NOISE = {"loss": 0.01, "loss_ce": 0.01, "loss_bbox": 0.01, "loss_giou": 0.01, "grad_norm": 0.05}
WAYS: dict[str, dict[str, str]] = {  # what they change of the recipe's compute section
    "recipe": {},
    "eager": {"compile": "off", "cuda_graph": "off"},
    "compiled": {"compile": "on", "cuda_graph": "off"},
    "graph": {"compile": "on", "cuda_graph": "on"},
}
PROFILED_STEPS = 3
H100 = "NVIDIA H100 80GB HBM3"
# images/s that an H100 cannot exceed (design: sum over kernels of the larger of compute and traffic), at batch 16
H100_LIMITS = {(False, 800, 1216): 813, (True, 800, 1216): 469, (False, 640, 864): 1275, (True, 640, 864): 834}


@dataclass
class StepRow(Row):
    """A side's step. ``ms`` is wall time, the host's included.

    ``times_faster`` is the median of the turns' ratios for the first way, which takes turns with the baseline; for
    others at that size the ratio of medians.
    """

    cpu_ms: float | None = None  # processor time of the host, all threads: what a busy machine disturbs less
    images_per_s: float | None = None
    phases_ms: dict[str, float] = field(default_factory=dict)  # medians
    launches: int | None = None  # kernels on a GPU; without one ops and fused kernels
    syncs: int | None = None  # reads of a scalar, on a GPU whatever makes the host wait
    state_mb: float | None = None  # parameters, buffers and the optimizer's state; peak_mb comes on top


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Times of a recipe's training step, after a comparison of losses.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="one size or several")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["recipe"], help="how our step is run")
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=864)
    parser.add_argument("--steps", type=int, default=20, help="timed turns of each side")
    parser.add_argument("--group", type=int, help="steps of a turn (4 on a GPU, else 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--gate", action=argparse.BooleanOptionalAction, default=True, help="compare losses first")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipe")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--profile", type=Path, help="folder for profiles of the last of the ways")
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        parser.error("torch finds no CUDA GPU here: --device cpu")
    options.device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    options.group = options.group or (4 if options.device == "cuda" else 1)
    return options


def check(recipe: Recipe, batch: Batch, device: torch.device, precision: torch.dtype) -> dict[str, float]:
    """Compare one step's losses and gradient norm, both sides without dropout or TF32: relative differences.

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
    """Measure milliseconds of a step, by the clock and of processor time, in every turn of every side but the first."""
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


def time_phases(sides: Sequence[Side], device: torch.device, turns: int) -> list[dict[str, float]]:
    """Measure median milliseconds of each phase, of each side."""
    times: list[dict[str, list[float]]] = [{} for _ in sides]
    for turn in range(turns):
        for side, found in zip(sides, times, strict=True):
            wait(device)
            last = time.perf_counter()

            def mark(phase: str, found: dict[str, list[float]] = found) -> None:
                nonlocal last
                wait(device)
                now = time.perf_counter()
                found.setdefault(phase, []).append((now - last) * 1e3)
                last = now

            side.phases(turn, mark)
    return [{phase: median(taken) for phase, taken in found.items()} for found in times]


def wait(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe(side: Side, row: StepRow, device: torch.device) -> None:
    """Fill in the counts. The side has taken its first steps."""

    def step() -> object:
        return side.step(0)

    found = count_compiled_kernels(step)
    row.launches = found.total()
    row.syncs = count_syncs(step) if device.type == "cuda" else found.reads.total()
    side.optimizer.zero_grad(set_to_none=not side.recorded)
    row.state_mb = side.state_bytes() / 1e6
    if row.peak_mb is None:
        row.peak_mb = peak_bytes(step, device) / 1e6
    if device.type == "cuda":
        row.host_ms = median(host_ms(step) for _ in range(WARM_UPS))


def table(rows: Sequence[StepRow], useful: float) -> str:
    """Write all rows as a table."""
    head = ("images/s", "ms", "p20", "p80", "cpu ms", "host ms", "launches", "syncs", "state MB", "peak MB", "faster")
    lines = [
        f"useful pixels {useful:.0%}",
        f"{'':42}" + "".join(f"{name:>10}" for name in head) + "     limit",
    ]
    for row in rows:
        values = (row.images_per_s, row.ms, row.p20, row.p80, row.cpu_ms, row.host_ms)
        cells = [number(value, 2) for value in values] + [number(row.launches, 0), number(row.syncs, 0)]
        cells += [number(row.state_mb, 0), number(row.peak_mb, 0), number(row.times_faster, 2)]
        cells += ["-" if row.share is None else f"{row.share:.1%}"]
        lines.append(_named(row) + "".join(f"{cell:>10}" for cell in cells))
    lines.append(f"{'ms of':42}" + "".join(f"{phase:>10}" for phase in PHASES))
    for row in rows:
        found = (f"{number(row.phases_ms.get(name), 2):>10}" for name in PHASES)
        lines.append(_named(row) + "".join(found))
    return "\n".join(lines)


def _named(row: StepRow) -> str:
    return f"{row.case:18}{row.variant:14}{row.dtype:10}"


class Measurement:
    """Sides of one command, each with its row; a row is in the report from the moment its side is begun."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace, report: Report, write: Callable[[], None]) -> None:
        self.recipe, self.options, self.report, self.write = recipe, options, report, write
        self.device = torch.device(options.device)
        self.sides: list[tuple[Side, StepRow]] = []
        self.baseline: tuple[Side, StepRow] | None = None

    def row(self, batches: Sequence[Batch], dtype: str, variant: str) -> StepRow:
        """Add a row to the report."""
        batch, _, height, width = batches[0].images.shape
        row = StepRow(self.report.op, f"{height}x{width} batch {batch}", dtype, "step", variant, problem="not timed")
        self.report.rows.append(row)
        return row

    def time_ways(self, ways: Sequence[str], sizes: Sequence[Sequence[Batch]]) -> None:
        """Build our step in each way and size, then time all: what is timed may have to wait for the GPU."""
        built = [self.build(way, batches) for way in ways for batches in sizes]
        for side, row in filter(None, built):
            with self.failing(row):
                self.take_turns(side, row)

    def build(self, way: str, batches: Sequence[Batch]) -> tuple[Side, StepRow] | None:
        """Build our step in one way, and the baseline before the first; None where it fails."""
        changed = self.recipe.compute.model_copy(update=WAYS[way])
        dtype = str(choose_precision(changed.precision, self.device)).removeprefix("torch.")
        if self.options.baseline and self.baseline is None:
            self.build_baseline(batches)
        before = reserved_bytes(self.device)
        model = build_model_on(self.recipe, self.device)
        row = self.row(batches, dtype, "ours" if way == "recipe" else f"ours {way}")
        with self.failing(row):
            compute = choose_compute(changed, self.device, buckets=True)
            self.report.environment[row.variant] = f"compile={compute.compile} cuda_graph={compute.cuda_graph}"
            ours = build_ours(self.recipe, model, batches, self.device, compute=compute, note=self.report.note)
            self.warm_up(ours)
            if ours.recorded:  # a graph's memory is allocated for good
                row.peak_mb = (reserved_bytes(self.device) - before - ours.state_bytes()) / 1e6
            self.sides.append((ours, row))
            return ours, row
        return None

    @contextmanager
    def failing(self, row: StepRow) -> Iterator[None]:
        """Note an error within the context as the row's problem; write the report at its end."""
        try:
            yield
        except (SamdetrError, RuntimeError) as error:
            row.problem, self.report.failed = reason(error), True
            self.report.note(f"FAILED {row.case} {row.variant}: {row.problem}")
        self.write()

    def build_baseline(self, batches: Sequence[Batch]) -> None:
        """Build the published step, with the weights that ours begins with."""
        side = build_baseline(self.recipe, build_model_on(self.recipe, self.device), batches, self.device)
        self.baseline = side, self.row(batches, "float32", side.name)
        self.sides.append(self.baseline)
        self.warm_up(side)

    def warm_up(self, side: Side) -> None:
        """Take steps that are not timed."""
        for turn in range(WARM_UPS if self.device.type == "cuda" else 1):
            side.step(turn)

    @gpu_alone()
    def take_turns(self, ours: Side, row: StepRow) -> None:
        """Time one of our sides; the baseline with it, in turns, if it has no times yet."""
        pair = [(ours, row)]
        if self.baseline and self.baseline[1].ms is None:
            pair.insert(0, self.baseline)
        times = take_turns([side for side, _ in pair], self.device, self.options.steps, self.options.group)
        for side, timed in pair:
            taken, cpu = (sorted(column) for column in zip(*times[side.name], strict=True))
            timed.cpu_ms = median(cpu)
            timed.ms, timed.repeats, timed.problem = median(taken), len(taken), None
            timed.p20, timed.p80 = (taken[round(share * (len(taken) - 1))] for share in (0.2, 0.8))
            timed.images_per_s = int(timed.case.split()[-1]) / timed.ms * 1e3
            timed.share = self.share_of_limit(timed)
            if len(pair) == 2:
                turns = zip(times[pair[0][0].name], times[side.name], strict=True)
                timed.times_faster = median(before[0] / after[0] for before, after in turns)
            elif self.baseline and self.baseline[1].case == timed.case and self.baseline[1].ms:
                timed.times_faster = self.baseline[1].ms / timed.ms

    def share_of_limit(self, row: StepRow) -> float | None:
        """Return what part of an H100's limit a row of SAM-DETR on one map reaches, where the limit is known."""
        size, batch = row.case.split(" batch ")
        is_h100 = self.report.environment["name"] == H100
        if batch != "16" or not is_h100 or self.recipe.model.system != "sam_detr" or row.images_per_s is None:
            return None
        limit = H100_LIMITS.get((self.recipe.model.backbone.dilation, *map(int, size.split("x"))))
        return row.images_per_s / limit if limit else None

    @gpu_alone()
    def count(self) -> None:
        """Count, and time phases, of all sides."""
        for side, row in self.sides:
            describe(side, row, self.device)
            self.write()
        phases = time_phases([side for side, _ in self.sides], self.device, max(3, self.options.steps // 4))
        for (_, row), found in zip(self.sides, phases, strict=True):
            row.phases_ms = found
        self.write()

    @gpu_alone()
    def profile(self, folder: Path) -> None:
        """Write a profile of the last way at each size, and print the tables."""
        last = self.sides[-1][1].variant if self.sides else ""
        for side, row in self.sides:
            if side.name != "ours" or row.variant != last:
                continue
            place = folder / f"{self.report.op}_{row.case}_{row.variant}".replace(" ", "_")
            with StepProfiler(place, self.report.note, first=2, last=1 + PROFILED_STEPS) as profiler:
                for turn in range(1 + PROFILED_STEPS):
                    side.step(turn)
                    wait(self.device)  # a step's kernels belong to its range
                    profiler.step()
            print(f"{row.case} {row.variant}\n{profiler.report}", flush=True)


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
    sizes = {
        size: [
            training_batch(size, options.height, options.width, classes=object_classes(recipe), seed=seed)
            for seed in range(BATCHES)
        ]
        for size in options.batch
    }
    every = [batch for batches in sizes.values() for batch in batches]
    useful = sum(batch.image_sizes.prod(-1).sum().item() for batch in every)
    useful /= sum(batch.images[:, 0].numel() for batch in every)
    report.notes.append(f"useful pixels {useful:.0%}")
    if options.gate:
        first = every[0]
        try:
            pass_gate(recipe, first if options.baseline else first_images(first, GATE_IMAGES), device, report)
        except RecipeError as error:
            if options.baseline:
                raise
            report.note(f"no gate: {error}")
    else:
        report.note("no gate: --no-gate")
    gc.collect()
    if not report.failed:
        measurement = Measurement(recipe, options, report, write)
        measurement.time_ways(options.ways, list(sizes.values()))
        measurement.count()
        print(table([row for row in report.rows if isinstance(row, StepRow)], useful), flush=True)
        if options.profile:
            measurement.profile(options.profile)
    report.complete = True
    write()
    return int(report.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        sys.exit(f"error: {error}")
