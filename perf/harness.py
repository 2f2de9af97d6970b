"""Measuring of every bench: correctness gate first, then interleaved variants against the measured limits of the card.

A bench describes `Case`s; `main` runs them. If one variant of a case errs beyond its budget (`perf.gate`), no speed of
that case is printed and the exit code is 1. A variant that raises is reported with its reason, the others go on.

On a GPU a time lies between two events, after the L2 cache was flushed, while the queue is kept busy until the host
has started everything: it is the time of the kernels, as in a CUDA graph. What the host needs is the column "host ms".
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from perf.gate import Args, Case, Variant, Work, check, differentiate, leaves, reason, results
from perf.gpu_lock import gpu_alone
from perf.report import Report, Row, environment, table

FORWARD, BOTH = "forward", "forward+backward"
COPIES = 4  # sets of inputs, taken in turn
FLUSH_BYTES = 1 << 28  # several times any L2 cache
WARM_UPS = 3
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_DTYPES = {"gpu": "bfloat16,float32", "cpu": "float32", "small": "bfloat16,float32"}


class Timing(NamedTuple):
    """Milliseconds of one variant, and the megabytes (1e6) it took at its peak."""

    ms: float
    p20: float
    p80: float
    host_ms: float | None
    peak_mb: float | None
    repeats: int


class Options(NamedTuple):
    """The command line."""

    device: torch.device
    shapes: str
    dtypes: tuple[torch.dtype, ...]
    repeats: int
    seconds: float
    compile: bool
    gate: bool  # False: for a machine whose numbers mean nothing
    out: Path | None


class _Clock:
    """Clock for one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.flush = torch.ones(FLUSH_BYTES // 4, device=device)
            self.cycles_per_ms = 2e6
            self.cycles_per_ms *= 10 / self.time(lambda: torch.cuda._sleep(int(10 * self.cycles_per_ms)), 0.1)[0]

    def time(self, call: Callable[[], object], lead_ms: float) -> tuple[float, float]:
        """Measure milliseconds of the work and of starting it; the GPU sleeps ``lead_ms`` while the host runs ahead."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            taken = (time.perf_counter() - start) * 1e3
            return taken, taken
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.sum()
        torch.cuda._sleep(int(lead_ms * self.cycles_per_ms))
        begin.record()
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e3
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host


@gpu_alone()
def measure(
    variants: Mapping[str, Callable[[int], object]], device: torch.device, repeats: int = 20
) -> dict[str, Timing | str]:
    """Time interleaved variants, each called with 0, 1, 2, ... (which inputs to take); a reason where one failed.

    At least 3 calls of each are not counted (1 on the CPU), and the last of these measures the peak of memory.
    """
    clock = _Clock(device)
    failures: dict[str, str] = {}
    leads, peaks = dict.fromkeys(variants, 0.2), dict.fromkeys(variants)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    warm_ups = WARM_UPS if clock.cuda else 1
    gc.collect()
    for turn in range(warm_ups + repeats):
        for name, call in variants.items():
            if name in failures:
                continue
            try:
                before = torch.cuda.memory_allocated() if clock.cuda else 0
                if clock.cuda:
                    torch.cuda.reset_peak_memory_stats()
                taken = clock.time(partial(call, turn), leads[name])
                if turn == warm_ups - 1 and clock.cuda:
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
                    leads[name] = min(1.5 * taken[1] + 0.1, 50.0)
                if turn >= warm_ups:
                    times[name].append(taken)
            except Exception as error:
                failures[name] = reason(error)
                if clock.cuda and "out of memory" in failures[name]:
                    torch.cuda.empty_cache()
    return {
        name: failures[name] if name in failures else _timing(times[name], peaks[name], clock.cuda) for name in variants
    }


def _timing(times: Sequence[tuple[float, float]], peak: float | None, with_host: bool) -> Timing:
    taken = sorted(time for time, _ in times)
    low, high = (taken[round(share * (len(taken) - 1))] for share in (0.2, 0.8))
    return Timing(median(taken), low, high, median(h for _, h in times) if with_host else None, peak, len(taken))


def measure_ceilings(device: torch.device, repeats: int = 20) -> dict[str, float]:
    """Measure a large copy in GB/s and large products in TFLOP/s."""
    cuda = device.type == "cuda"
    elements, side = (1 << 28, 8192) if cuda else (1 << 24, 256)
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": _median_rate(lambda _: target.copy_(source), device, repeats, 8e-6 * elements)}
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bfloat16_tflops", torch.bfloat16, "highest"),
        ("float32_tflops", torch.float32, "highest"),
        ("tf32_tflops", torch.float32, "high"),
    ):
        torch.set_float32_matmul_precision(precision)
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        found[name] = _median_rate(partial(_product, left, right, out), device, repeats, 2e-9 * side**3)
    torch.set_float32_matmul_precision(before)
    return found


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, turn: int) -> None:
    torch.mm(left, right, out=out)


def _median_rate(call: Callable[[int], object], device: torch.device, repeats: int, amount: float) -> float:
    """Return ``amount`` for each millisecond of the median call."""
    timing = measure({"ceiling": call}, device, repeats)["ceiling"]
    if isinstance(timing, str):
        raise RuntimeError(f"the card's limits could not be measured: {timing}")
    return amount / timing.ms


def floor_ms(work: Work, dtype: torch.dtype, ceilings: Mapping[str, float]) -> float:
    """Return the larger of the times that the bytes and the operations take at the measured limits."""
    product = "float32_tflops" if work.vector or dtype == torch.float32 else "bfloat16_tflops"
    if product == "float32_tflops" and not work.vector and torch.get_float32_matmul_precision() != "highest":
        product = "tf32_tflops"
    return max(work.bytes / ceilings["copy_gb_per_s"], work.operations / ceilings[product] / 1e3) / 1e6


def run_case(case: Case, report: Report, options: Options, compiled: bool) -> None:
    """Compare, then time all variants in all directions; prints and adds to the report."""
    torch.compiler.reset()
    variants = [v._replace(run=torch.compile(v.run, dynamic=False)) if v.compile else v for v in case.variants]
    case = case._replace(variants=[variant for variant in variants if compiled or not variant.compile])
    dtype = str(case.dtype).removeprefix("torch.")
    sets = [case.make(seed) for seed in range(COPIES)]
    gate = check(case, sets[0])
    report.gates.append({"case": case.name, "dtype": dtype, "error_over_budget": gate})
    wrong = {name: ratio for name, ratio in gate.items() if not isinstance(ratio, str) and ratio > 1 and options.gate}
    for name, ratio in wrong.items():
        report.failed = True
        report.note(f"RED {report.op}  {case.name}  {dtype}: {name} errs by {ratio:.3g} times its budget; no speed")
    report.failed |= any(isinstance(gate[variant.name], str) for variant in case.variants if variant.ours)
    for direction, work in case.work.items():
        runnable = [variant for variant in case.variants if not isinstance(gate[variant.name], str)]
        timings: dict[str, Timing | str] = dict.fromkeys(gate, "not timed: the gate is red")
        timings |= {name: problem for name, problem in gate.items() if isinstance(problem, str)}
        if not wrong:
            calls = {variant.name: _call(variant, case, sets, direction) for variant in runnable}
            timings |= measure(calls, options.device, options.repeats)
        rows = [_row(report, case, direction, work, variant, timings) for variant in case.variants]
        report.failed |= any(row.problem is not None and v.ours for row, v in zip(rows, case.variants, strict=True))
        report.rows += rows
        if not wrong:
            print(table(rows), flush=True)
    if not wrong:
        print(f"  error over budget: {_ratios(gate)}\n", flush=True)


def _ratios(gate: Mapping[str, float | str]) -> str:
    return ", ".join(f"{name} {ratio:.2g}" for name, ratio in gate.items() if not isinstance(ratio, str))


def _call(variant: Variant, case: Case, sets: Sequence[Args], direction: str) -> Callable[[int], object]:
    """Return what `measure` times: the variant on one of the sets of arguments."""
    prepared = [variant.prepare(args) if variant.prepare else args for args in sets]

    def forward(turn: int) -> object:
        with torch.no_grad():
            return variant.run(*prepared[turn % len(prepared)])

    if direction == FORWARD:
        return forward
    prepared = [leaves(args, case.wanted) for args in prepared]
    upstream: list[torch.Tensor] = []

    def both(turn: int) -> object:
        if not upstream:
            upstream.extend(torch.randn_like(out) for out in results(forward(turn)))
        return differentiate(variant.run, prepared[turn % len(prepared)], case.wanted, upstream)

    return both


def _row(
    report: Report, case: Case, direction: str, work: Work, variant: Variant, timings: Mapping[str, Timing | str]
) -> Row:
    """Make the variant's row beside the floor and the case's first variant."""
    timing, first = timings[variant.name], timings[case.variants[0].name]
    floor = floor_ms(work, case.dtype, report.ceilings)
    row = Row(report.op, case.name, str(case.dtype).removeprefix("torch."), direction, variant.name, floor_ms=floor)
    if isinstance(timing, str):
        row.problem = timing
        return row
    row.ms, row.p20, row.p80, row.host_ms, row.peak_mb, row.repeats = timing
    row.gb_per_s, row.share = work.bytes / timing.ms / 1e6, floor / timing.ms
    row.times_faster = None if isinstance(first, str) else first.ms / timing.ms
    return row


def read_options(op: str, argv: Sequence[str] | None) -> Options:
    """Read the command line of every bench."""
    parser = argparse.ArgumentParser(description=f"Times of {op}, after a comparison with its float64 reference.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--shapes", choices=tuple(DEFAULT_DTYPES), help="gpu on a GPU, small (a test) on the CPU")
    parser.add_argument("--dtypes", help=f"comma-separated, of {', '.join(DTYPES)}")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--seconds", type=float, help="start no case after it (45 with the GPU's shapes, else none)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile variants (on a GPU)")
    parser.add_argument("--gate", action=argparse.BooleanOptionalAction, default=True, help="judge what was compared")
    parser.add_argument("--tf32", action="store_true", help="let fp32 products use TF32, the kernels' too")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not cuda:
        parser.error("torch finds no CUDA GPU here; --device cpu tries the machinery")
    if given.tf32:
        torch.set_float32_matmul_precision("high")
    shapes = given.shapes or ("gpu" if given.device == "cuda" else "small")
    return Options(
        device=torch.device(given.device),
        shapes=shapes,
        dtypes=tuple(DTYPES[name] for name in (given.dtypes or DEFAULT_DTYPES[shapes]).split(",")),
        repeats=given.repeats,
        seconds=(45.0 if shapes == "gpu" else float("inf")) if given.seconds is None else given.seconds,
        compile=given.device == "cuda" if given.compile is None else given.compile,
        gate=given.gate,
        out=given.out,
    )


def _guarded(case: Case, report: Report, options: Options, elapsed: float, compiled: bool = False) -> None:
    """Run one case, unless time is up; an error costs only this case."""
    if elapsed > options.seconds:
        report.note(f"not run, {elapsed:.0f} s had passed: {case.name} {case.dtype}")
        return
    try:
        run_case(case, report, options, compiled)
    except Exception as error:
        report.failed = True
        report.note(f"no result of {case.name} {case.dtype}: {reason(error)}")
    report.write(options.out)
    if options.device.type == "cuda":
        torch.cuda.empty_cache()


def main(op: str, cases: Callable[[Options], Iterable[Case]], argv: Sequence[str] | None = None) -> int:
    """Run a bench; returns its exit code: 1 if a gate is red or one of our variants failed."""
    begin = time.perf_counter()
    options = read_options(op, argv)
    report = Report(op, environment(options.device.type))
    report.ceilings = measure_ceilings(options.device, min(options.repeats, 20))
    print(" ".join(f"{key}={value}" for key, value in report.environment.items()))
    print("measured limits: " + ", ".join(f"{name} {value:.4g}" for name, value in report.ceilings.items()) + "\n")
    if not options.gate:
        report.note("no gate: --no-gate")
    try:
        again = []
        for case in cases(options):
            _guarded(case, report, options, time.perf_counter() - begin)
            if case.compiled and options.compile:
                again.append(case._replace(name=f"{case.name}, compiled too"))
        for case in again:  # last: a compilation may take longer than all the rest
            _guarded(case, report, options, time.perf_counter() - begin, compiled=True)
    except Exception as error:
        report.failed = True
        report.note(f"no more cases: {reason(error)}")
    report.complete = True
    report.write(options.out)
    return int(report.failed)
