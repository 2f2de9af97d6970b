"""A profile of some training steps: a Chrome trace, the slowest operations, and the gaps between them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, schedule

TRACE_FILE, TABLE_FILE = "trace.json.gz", "profile.txt"
FIRST_STEP, LAST_STEP = 10, 15  # of a run, counted from 1
ROWS = 25
LARGEST_GAPS = 10
GAP_CLASSES = (5.0, 20.0, 100.0, 1000.0)  # upper ends, microseconds
NAME_WIDTH = 72


class Interval(NamedTuple):
    """One kernel or copy on the device."""

    start: float  # microseconds
    end: float
    name: str


class Gap(NamedTuple):
    """Time in which the device did nothing."""

    microseconds: float
    after: str
    before: str


class StepProfiler:
    """Profiles the steps ``first`` to ``last`` (from 1) of those that `step` counts; the step before is its warm-up.

    Writes ``trace.json.gz`` (chrome://tracing, ui.perfetto.dev) and ``profile.txt`` into ``folder``; with None it does
    nothing. A run of fewer steps than ``last`` has a shorter profile, of fewer than ``first`` none. ``note`` prints it.
    """

    def __init__(
        self, folder: Path | None, note: Callable[[str], None], *, first: int = FIRST_STEP, last: int = LAST_STEP
    ) -> None:
        self.folder, self.note, self.first, self.last = folder, note, first, last
        self.taken = 0
        self.report = ""  # the text of ``profile.txt``, once it is written
        self._profiler: profile | None = None

    def __enter__(self) -> Self:
        if self.folder is not None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            warm_up = min(1, self.first - 1)
            self._profiler = profile(
                activities=activities,
                schedule=schedule(
                    wait=self.first - 1 - warm_up, warmup=warm_up, active=self.last - self.first + 1, repeat=1
                ),
                on_trace_ready=self._write,
                acc_events=True,
            )
            self._profiler.start()
        return self

    def step(self) -> None:
        """Count a step that was just taken."""
        self.taken += 1
        if self._profiler is not None and self.taken <= self.last:
            self._profiler.step()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            if not self.report:
                self.note(f"profile: none, the run ended before step {self.first}")

    def _write(self, profiler: profile) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / TRACE_FILE))
        steps = self.taken - self.first + 1
        self.report = report(profiler, steps=steps)
        (self.folder / TABLE_FILE).write_text(self.report)
        self.note(f"profile: steps {self.first} to {self.taken} are in {self.folder}")


def report(profiler: profile, *, steps: int) -> str:
    """Format the tables of a profile of ``steps`` steps: top kernels and gaps; without a GPU the top operations."""
    events: Sequence[FunctionEvent] = profiler.events()  # type: ignore[no-untyped-call]
    kernels = [
        Interval(event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if kernels:
        rows = [(kernel.name, kernel.end - kernel.start) for kernel in kernels]
        return f"{top_table('kernel', rows, steps=steps)}\n\n{gap_table(kernels, steps=steps)}\n"
    rows = [
        (event.name, event.self_cpu_time_total)
        for event in events
        if event.device_type == DeviceType.CPU and not event.name.startswith("ProfilerStep")
    ]
    table = top_table("operation (time without what it calls)", rows, steps=steps)
    return f"{table}\n\nGaps need a GPU: here the host itself computes.\n"


def top_table(what: str, rows: Iterable[tuple[str, float]], *, steps: int) -> str:
    """Format a table of names by their summed microseconds, largest first, with time and calls of one step."""
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, microseconds in rows:
        times[name] = times.get(name, 0.0) + microseconds
        calls[name] = calls.get(name, 0) + 1
    total = sum(times.values())
    lines = [
        f"{steps} steps; {total / steps / 1e3:.3f} ms and {sum(calls.values()) / steps:.0f} calls a step",
        f"{'ms a step':>10}{'share':>8}{'calls':>9}  {what}",
    ]
    for name in sorted(times, key=lambda name: -times[name])[:ROWS]:
        share = times[name] / total if total else 0.0
        lines.append(f"{times[name] / steps / 1e3:>10.3f}{share:>8.1%}{calls[name] / steps:>9.1f}  {name[:NAME_WIDTH]}")
    return "\n".join(lines)


def find_gaps(kernels: Sequence[Interval]) -> list[Gap]:
    """Find where no kernel of any stream ran, between the first and the last, in order of time."""
    gaps: list[Gap] = []
    latest: Interval | None = None
    for kernel in sorted(kernels):
        if latest is not None and kernel.start > latest.end:
            gaps.append(Gap(kernel.start - latest.end, latest.name, kernel.name))
        if latest is None or kernel.end > latest.end:
            latest = kernel
    return gaps


def gap_table(kernels: Sequence[Interval], *, steps: int) -> str:
    """Format a table of how often and how long the device idled, and the longest gaps with their neighbours."""
    gaps = find_gaps(kernels)
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    idle = sum(gap.microseconds for gap in gaps)
    share = idle / span if span else 0.0
    lines = [
        f"gaps: {len(gaps) / steps:.0f} and {idle / steps / 1e3:.3f} ms a step, {share:.1%} of the time",
        f"{'ms a step':>10}{'gaps':>9}  length",
    ]
    low = 0.0
    for high in (*GAP_CLASSES, float("inf")):
        inside = [gap.microseconds for gap in gaps if low < gap.microseconds <= high]
        lines.append(f"{sum(inside) / steps / 1e3:>10.3f}{len(inside) / steps:>9.1f}  {low:g} to {high:g} us")
        low = high
    lines.append(f"{'us':>10}  the longest: after, before")
    lines += [
        f"{gap.microseconds:>10.1f}  {gap.after[: NAME_WIDTH // 2]}, {gap.before[: NAME_WIDTH // 2]}"
        for gap in heapq.nlargest(LARGEST_GAPS, gaps)
    ]
    return "\n".join(lines)
