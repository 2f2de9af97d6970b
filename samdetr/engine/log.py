"""What a person sees of a run, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor

from samdetr.engine.run_folder import METRICS_FILE

STEP_VALUES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "grad_norm")
STAT_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class Meter:
    """Sums of the step values on their device; reading them (and waiting for them) is left to `means`."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """values: [len(STEP_VALUES)] float."""
        self.sum = values.double() if self.sum is None else self.sum + values
        self.count += 1

    def means(self) -> dict[str, float]:
        """Mean of every step value, by name."""
        if self.sum is None:
            return {}
        return {name: value / self.count for name, value in zip(STEP_VALUES, self.sum.tolist(), strict=True)}

    def to_json(self) -> dict[str, float]:
        """The sums and their count, for `from_json`."""
        sums = [0.0] * len(STEP_VALUES) if self.sum is None else self.sum.tolist()
        return {"count": self.count, **dict(zip(STEP_VALUES, sums, strict=True))}

    @classmethod
    def from_json(cls, value: Mapping[str, float] | None) -> Meter:
        """The inverse of `to_json`; an empty meter from None."""
        meter = cls()
        if value and value["count"]:
            meter.count = int(value["count"])
            meter.sum = torch.tensor([value[name] for name in STEP_VALUES], dtype=torch.float64)
        return meter


class RunLog:
    """Progress of a run on the terminal (or plain lines where there is none), and metrics.jsonl in its folder."""

    def __init__(self, folder: Path, *, steps: int, done: int, evaluations: int, console: Console) -> None:
        self.folder, self.console = folder, console
        self.steps, self.done, self.evaluations = steps, done, evaluations
        self.step_seconds = self.data_seconds = self.evaluation_seconds = 0.0
        self.timed_steps = self.images = 0
        self._mean_step = 0.0
        self._metrics: TextIO | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=done, status="")

    def __enter__(self) -> RunLog:
        _drop_later_lines(self.folder / METRICS_FILE, self.done)
        self._metrics = (self.folder / METRICS_FILE).open("a")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._metrics:
            self._metrics.close()

    def write(self, kind: str, **values: object) -> None:
        """Append a line to metrics.jsonl; numbers that JSON lacks become null."""
        assert self._metrics is not None, "RunLog is used outside its with block"
        line = {"kind": kind, **{key: _plain(value) for key, value in values.items()}}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    def step(self, epoch: int, *, seconds: float, waited: float, images: int) -> None:
        """Count one optimizer step that took ``seconds``, of which ``waited`` waiting for data."""
        self.done += 1
        self.timed_steps += 1
        self.step_seconds += seconds
        self.data_seconds += waited
        self.images += images
        self._mean_step = seconds if not self._mean_step else 0.98 * self._mean_step + 0.02 * seconds
        self._bar.update(self._task, completed=self.done, description=f"epoch {epoch + 1}")

    def interval(self, epoch: int, means: Mapping[str, float], lr: float) -> None:
        """Report the steps since the last call: one line in metrics.jsonl, and on the terminal."""
        speed = self.images / max(self.step_seconds, 1e-9)
        waiting = self.data_seconds / max(self.step_seconds, 1e-9)
        memory = memory_mb()
        self.write(
            "train",
            epoch=epoch,
            step=self.done,
            **means,
            lr=lr,
            images_per_s=speed,
            data_wait=waiting,
            memory_mb=memory,
        )
        status = (
            f"loss {means['loss']:.3f}  lr {lr:.1e}  {speed:.1f} img/s  "
            f"data {waiting:.0%}  {memory / 1024:.1f} GB  ETA {self.eta()}"
        )
        self._bar.update(self._task, status=status)
        if not self.console.is_terminal:
            self.console.print(f"epoch {epoch + 1}  step {self.done}/{self.steps}  {status}")
        self.step_seconds = self.data_seconds = 0.0
        self.images = 0

    def eta(self) -> str:
        """Time to the end of the run, evaluations included."""
        seconds = self._mean_step * (self.steps - self.done) + self.evaluation_seconds * self.evaluations
        return duration(seconds)

    def epoch(self, epoch: int, epochs: int, means: Mapping[str, float]) -> None:
        """The permanent line of a finished epoch."""
        self.write("epoch", epoch=epoch, step=self.done, **means)
        self.console.print(
            f"epoch {epoch + 1}/{epochs}  loss {means['loss']:.3f}  class {means['loss_ce']:.3f}  "
            f"L1 {means['loss_bbox']:.3f}  GIoU {means['loss_giou']:.3f}  "
            f"class error {means['class_error']:.1f} %  grad norm {means['grad_norm']:.2f}  ETA {self.eta()}"
        )

    def evaluation(
        self,
        epoch: int,
        stats: Mapping[str, float],
        per_class: Mapping[str, float],
        *,
        seconds: float,
        best: bool,
    ) -> None:
        """The table of an evaluation."""
        self.evaluations -= 1
        self.evaluation_seconds = seconds
        self.write("eval", epoch=epoch, step=self.done, **stats, per_class=dict(per_class), seconds=seconds)
        print_evaluation(self.console, stats, f"epoch {epoch + 1}" + (" (best so far)" if best else ""))

    def note(self, text: str) -> None:
        """A line that stays above the progress bar."""
        self.console.print(text, markup=False, highlight=False)


def print_evaluation(console: Console, stats: Mapping[str, float], title: str) -> None:
    """The twelve COCO numbers as a table."""
    table = Table(title=title, title_justify="left")
    for name in STAT_NAMES:
        table.add_column(name, justify="right")
    table.add_row(*(_number(stats[name]) for name in STAT_NAMES))
    console.print(table)


def print_per_class(console: Console, per_class: Mapping[str, float]) -> None:
    """AP of every class."""
    table = Table("class", title="AP per class", title_justify="left")
    table.add_column("AP", justify="right")
    for name, value in per_class.items():
        table.add_row(name, _number(value))
    console.print(table)


def print_findings(console: Console, rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    """What the checks of the data set found; nothing where they found nothing."""
    if rows:
        table = Table("split", "severity", "count", "finding", "examples", title="data checks", title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def memory_mb() -> float:
    """Peak memory of the GPU in use, or of this process, MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call, or since the beginning."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed


def _drop_later_lines(file: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that a run continues from (its steps are taken again)."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the torn last line of a killed run
        if entry["step"] <= step:
            kept.append(line + "\n")
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(file)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return "-" if not math.isfinite(value) or value < 0 else f"{value:.3f}"
