"""The lines and the progress bar that a run prints, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from samdetr.engine.checkpoint.format import Progress
from samdetr.engine.coco import STAT_NAMES
from samdetr.engine.run.folder import METRICS_FILE
from samdetr.engine.run.metrics import Step
from samdetr.errors import SamdetrError

LOSS_NAMES = {  # in the line of a finished epoch
    "loss": "loss",
    "loss_ce": "class",
    "loss_bbox": "L1",
    "loss_giou": "GIoU",
    "loss_objectness": "objectness",
    "loss_rpn_box_reg": "anchor boxes",
    "loss_classifier": "class",
    "loss_box_reg": "boxes",
}


class RunLog:
    """Progress of a run on the terminal (or plain lines where there is none), and metrics.jsonl in its folder."""

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        steps: int,
        evaluations: int,
        progress: Progress,
        console: Console,
        writes: bool = True,
    ) -> None:
        """Set up, and show nothing yet.

        epochs, steps: of the whole run. evaluations: those to come. progress: where the run begins or continues.

        writes: whether this process writes metrics.jsonl; of several processes only one does.
        """
        self.folder, self.console, self.writes = folder, console, writes
        self.epochs, self.steps, self.evaluations = epochs, steps, evaluations
        self.done = progress.step
        self.step_seconds = self.data_seconds = self.evaluation_seconds = 0.0
        self.images = 0
        self._begun_at = progress
        self._timed_steps = 0
        self._mean_step = self._mean_wait = 0.0
        self._losses = self._speeds = ""
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %  step {task.completed}/{task.total}  ETA {task.fields[eta]}"),
            expand=True,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=self.done, eta="-")
        self._live = Live(console=console, get_renderable=self._picture, refresh_per_second=4, transient=True)

    def __enter__(self) -> RunLog:
        if self.writes:
            _drop_later_lines(self.folder / METRICS_FILE, self._begun_at)
        if self.console.is_terminal and not self.console.quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def write(self, kind: str, **values: object) -> None:
        """Append a line to metrics.jsonl; numbers that JSON lacks become null. Raises SamdetrError."""
        if not self.writes:
            return
        line = {"kind": kind, **{key: _plain(value) for key, value in values.items()}}
        file = self.folder / METRICS_FILE
        try:
            with file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise SamdetrError(
                f"cannot write {file} ({error.strerror}): free some space, then continue with --resume."
            ) from error

    def step(self, epoch: int, *, seconds: float, waited: float, images: int) -> None:
        """Count one optimizer step that took ``seconds``, ``waited`` of them waiting for data."""
        self.done += 1
        self.step_seconds += seconds
        self.data_seconds += waited
        self.images += images
        self._timed_steps += 1
        # a moving mean that forgets the first step, which waits for the loader to start
        weight = max(0.02, 1 / max(1, self._timed_steps - 1))
        self._mean_step += weight * (seconds - self._mean_step)
        self._mean_wait += weight * (waited - self._mean_wait)
        self._speeds = _speeds(images, self._mean_step, self._mean_wait)
        if self._timed_steps == 1 and not self.console.is_terminal:
            self.note(f"first step done after {seconds:.1f} s")
        self._bar.update(self._task, completed=self.done, description=self._name(epoch), eta=self.eta())

    def interval(self, epoch: int, step: int, means: Mapping[str, float], lr: float) -> None:
        """Report the steps since the last call, up to ``step``, in a line of metrics.jsonl and on the terminal."""
        self.write(
            "train",
            epoch=epoch,
            step=step,
            **means,
            lr=lr,
            images_per_s=self.images / max(self.step_seconds, 1e-9),
            data_wait=self.data_seconds / max(self.step_seconds, 1e-9),
            memory_mb=memory_mb(),
        )
        self._losses = f"loss {means['loss']:.3f}  lr {lr:.1e}"
        if not self.console.is_terminal:
            speeds = _speeds(self.images, self.step_seconds, self.data_seconds)
            self.note(f"{self._name(epoch)}  step {step}/{self.steps}  {self._losses}  {speeds}  ETA {self.eta()}")
        self.step_seconds = self.data_seconds = 0.0
        self.images = 0

    def skipped(self, step: Step, terms: Sequence[str], image_ids: Sequence[int], *, in_row: int) -> None:
        """Report a skipped step, the last of ``in_row``, of which ``terms`` were not finite."""
        self.write("skip", epoch=step.epoch, step=step.number, terms=terms, image_ids=image_ids, in_row=in_row)
        numbers = ", ".join(map(str, image_ids))
        self.note(
            f"step {step.number} is skipped, {in_row} in a row: {', '.join(terms)} not finite; image ids {numbers}"
        )

    def eta(self) -> str:
        """Return the time to the end of the run, with evaluations as soon as one has been timed."""
        steps = self.steps - self.done
        return duration(self._mean_step * steps + self.evaluation_seconds * self.evaluations)

    def epoch(self, epoch: int, means: Mapping[str, float]) -> None:
        """Report a finished epoch with its mean values."""
        self.write("epoch", epoch=epoch, step=self.done, **means)
        losses = (f"{LOSS_NAMES[name]} {value:.3f}" for name, value in means.items() if name in LOSS_NAMES)
        self.note("  ".join((self._name(epoch), *losses, f"ETA {self.eta()}")))

    def starting(self, what: str) -> None:
        """Show what is done before the first step."""
        self._bar.update(self._task, description=what)
        if not self.console.is_terminal:
            self.note(what)

    def evaluating(self, epoch: int, done: int, batches: int) -> None:
        """Show that ``done`` batches have been evaluated."""
        self._bar.update(self._task, description=f"{self._name(epoch)} evaluation {done}/{batches}")

    def evaluation(
        self,
        epoch: int,
        stats: Mapping[str, float],
        per_class: Mapping[str, float],
        *,
        evaluator: str,
        seconds: float,
        best: bool,
    ) -> None:
        """Report an evaluation, whose numbers ``evaluator`` computed, with a table."""
        self.evaluations -= 1
        self.evaluation_seconds = seconds
        classes = dict(per_class)
        self.write(
            "eval", epoch=epoch, step=self.done, **stats, per_class=classes, evaluator=evaluator, seconds=seconds
        )
        title = f"{self._name(epoch)}  AP {_number(stats['AP'])}" + (" (best so far)" if best else "")
        print_evaluation(self.console, stats, f"{title}, evaluated in {duration(seconds)} by {evaluator}")

    def note(self, text: str) -> None:
        """Print a line that stays above the progress bar."""
        print_line(self.console, text)

    def _name(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self.epochs}"

    def _picture(self) -> Group:
        status = "  ".join(text for text in (self._losses, self._speeds) if text)
        return Group(self._bar, Text(status, style="dim", no_wrap=True, overflow="ellipsis"))


def print_line(console: Console, text: str) -> None:
    """Print a text as it is: its brackets are no markup, its numbers have no colours, and it is not wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_evaluation(console: Console, stats: Mapping[str, float], title: str) -> None:
    """Print the twelve COCO numbers below their names: 72 columns, which fit any terminal."""
    print_line(console, title)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in STAT_NAMES:
        table.add_column(name, justify="right", min_width=5)
    table.add_row(*(_number(stats[name]) for name in STAT_NAMES))
    console.print(table)


def print_per_class(console: Console, per_class: Mapping[str, float]) -> None:
    """Print the AP of every class."""
    table = Table("class", title="AP per class", title_justify="left")
    table.add_column("AP", justify="right")
    for name, value in per_class.items():
        table.add_row(Text(name), _number(value))
    console.print(table)


def print_findings(console: Console, rows: Sequence[tuple[str, str, str, str, str]]) -> None:
    """Print what the checks of the data set dropped or noted; errors have a message of their own."""
    rows = [row for row in rows if row[1] != "error"]
    if rows:
        table = Table("split", "severity", "count", "finding", "examples", title="data checks", title_justify="left")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def memory_mb() -> float:
    """Return the peak memory of the GPU if one is in use, else of this process, in MiB."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Timer:
    """Measures the seconds between laps."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last call, or since the timer was made."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed


def _drop_later_lines(file: Path, progress: Progress) -> None:
    """Remove the lines logged after the checkpoint that a run continues from: those steps are taken and logged again.

    Raises SamdetrError when the file cannot be read or written.
    """
    if not file.is_file():
        return
    kept = []
    try:
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the torn last line of a killed run
            if _is_before(entry, progress):
                kept.append(line + "\n")
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.write_text("".join(kept))
        temporary.replace(file)
    except OSError as error:
        raise SamdetrError(f"cannot rewrite {file} ({error.strerror}): free some space, then try again.") from error


def _is_before(entry: Mapping[str, Any], progress: Progress) -> bool:
    if entry["kind"] in ("train", "skip"):
        return bool(entry["step"] <= progress.step)
    finished = progress.epoch + (entry["kind"] == "epoch" and progress.evaluation_due)
    return bool(entry["epoch"] < finished)


def _speeds(images: int, seconds: float, waited: float) -> str:
    seconds = max(seconds, 1e-9)
    return f"{images / seconds:.1f} img/s  data {waited / seconds:.0%}  {memory_mb() / 1024:.1f} GiB"


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    """Format a COCO number, "-" where the data cannot define it."""
    return "-" if not math.isfinite(value) or value < 0 else f"{value:.3f}"
