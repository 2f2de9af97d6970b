"""The curves of a run: losses and AP, from metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from samdetr.errors import SamdetrError
from samdetr.visualize.predictions import save_png

Rows = dict[int, dict[str, Any]]  # rows of one kind by step or epoch, ascending

LOSS_PANELS = (
    ("loss", "total loss (weighted sum)"),
    ("loss_ce", "classification (focal)"),
    ("loss_bbox", "boxes (L1)"),
    ("loss_giou", "boxes (1 - GIoU)"),
)
REGION_PANELS = (
    ("loss", "total loss"),
    ("loss_classifier", "proposals: classification"),
    ("loss_objectness", "anchors: classification"),
    ("loss_rpn_box_reg", "anchors: boxes (smooth L1)"),
    ("loss_box_reg", "proposals: boxes (smooth L1)"),
)
AP_LINES = (("AP", "AP 0.50:0.95"), ("AP50", "AP 0.50"), ("AP75", "AP 0.75"))
AP_SIZES = (("APs", "small"), ("APm", "medium"), ("APl", "large"))


def _read(path: Path) -> dict[str, Rows]:
    """Read the rows of each kind. A line that was cut off is skipped; after a resume the newer line counts."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise SamdetrError(f"{path}: cannot be read ({error.strerror or error}).") from error
    kinds: dict[str, Rows] = {"train": {}, "epoch": {}, "eval": {}}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or row.get("kind") not in kinds:
            continue
        place = row.get("step" if row["kind"] == "train" else "epoch")
        if isinstance(place, int):
            kinds[row["kind"]][place] = row
    return {kind: dict(sorted(rows.items())) for kind, rows in kinds.items()}


def _number(value: object) -> float:
    """Convert a number to float; null and anything else to NaN, which leaves a gap in a line."""
    return float(value) if isinstance(value, int | float) else math.nan


def _line(axes: Axes, x: list[float], y: list[float], label: str, **style: Any) -> None:
    if any(math.isfinite(value) for value in y):
        axes.plot(x, y, label=label, **style)


def _finish(axes: Axes, *, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", va="center", color="grey")


def _plot_loss(axes: Axes, kinds: dict[str, Rows], key: str, title: str) -> None:
    train, epochs = kinds["train"], kinds["epoch"]
    _line(
        axes,
        [float(step) for step in train],
        [_number(row.get(key)) for row in train.values()],
        "log interval",
        color="tab:blue",
        alpha=0.45,
        linewidth=1.0,
    )
    _line(
        axes,
        [_number(row.get("step")) for row in epochs.values()],
        [_number(row.get(key)) for row in epochs.values()],
        "epoch mean",
        color="tab:red",
        marker=".",
        linewidth=1.6,
    )
    _finish(axes, title=title, x_label="optimizer step", y_label="loss")


def _plot_ap(axes: Axes, rows: Rows, lines: tuple[tuple[str, str], ...], title: str) -> None:
    epochs = [float(epoch + 1) for epoch in rows]
    for key, label in lines:
        # COCO gives -1 where there is no object of a size.
        values = [_number(row.get(key)) for row in rows.values()]
        _line(axes, epochs, [v if v >= 0 else math.nan for v in values], label, marker=".")
    axes.set_ylim(0.0, 1.0)
    _finish(axes, title=title, x_label="epochs trained", y_label="AP")


def draw_curves(metrics_jsonl: Path) -> Figure:
    """Draw the figure that `plot_curves` saves: four loss panels (of Faster R-CNN five) and two AP panels.

    Raises:
        SamdetrError: the file cannot be read.
    """
    kinds = _read(metrics_jsonl)
    figure = Figure(figsize=(14.0, 7.5), dpi=100, layout="constrained")
    rows = (*kinds["train"].values(), *kinds["epoch"].values())
    losses = REGION_PANELS if any("loss_objectness" in row for row in rows) else LOSS_PANELS
    columns = (len(losses) + 1) // 2
    panels = figure.subplots(2, columns + 1)
    places = (*panels[0, :columns], *panels[1, :columns])
    for axes, (key, title) in zip(places, losses, strict=False):
        _plot_loss(axes, kinds, key, title)
    for axes in places[len(losses) :]:
        axes.remove()
    _plot_ap(panels[0, columns], kinds["eval"], AP_LINES, "validation AP")
    _plot_ap(panels[1, columns], kinds["eval"], AP_SIZES, "validation AP by object size")
    return figure


def plot_curves(metrics_jsonl: Path, out: Path) -> None:
    """Plot losses (each log interval and the mean of each epoch) and AP of a run into the PNG ``out``.

    Lines that were cut off are skipped, null and NaN leave gaps, panels without data say so.

    Raises:
        SamdetrError: ``metrics_jsonl`` cannot be read or ``out`` cannot be written.
    """
    canvas = FigureCanvasAgg(draw_curves(metrics_jsonl))
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())[:, :, :3]
    save_png(out, torch.from_numpy(pixels).permute(2, 0, 1))
