"""Reports as a table for the terminal, as JSON, and as the Markdown of docs/models.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from samdetr.cost.memory import Memory
from samdetr.cost.meta import Size
from samdetr.cost.report import GIGA, Report, by_sizes, make_reports

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

WIDE = 200  # columns, where the output is no terminal
ABSENT = "-"
GIBI = 2**30

HEAD = """\
# Models

What every recipe's model costs, beside what is published. `samdetr report --all --markdown` writes this file.
**No AP here was measured with this package**: no recipe has been trained on COCO yet.
"""
NOTES = """\
- **Parameters** are all of the model, in brackets those that are trained; *difference* is to those of the published
  code, both counted to the unit.
- **GFLOPs** are billions of multiply-accumulates of one image: convolutions, linear layers and the two products of
  attention. RoIAlign, softmax and all that goes element by element are not counted, in either column. A detector with
  proposals is counted with as many of them as its limit allows.
  *Published form* is the count of what the published code computes, *as run* of what this package computes. They
  differ for SAM-DETR: its published code projects the 49 cells of every box to 64 channels after RoIAlign, which this
  package does to the map before it (the two commute), and runs all box heads but the last twice. That it also runs
  RoIAlign twice, on all channels, shows in neither column. Where there is deformable attention, its published form has
  4 for each sampled value, as the tool that made the published numbers counts; as run, sampling counts nothing.
- *Published* GFLOPs are the mean over the first 100 images of COCO val2017 at 800/1333. The sizes counted by default
  are those of a 640 x 480 and a 640 x 426 photo after the recipe's resize for evaluation. Their mean is **not** the
  published mean: *difference* is only a rough check.
- **Training memory** is an estimate for one micro-batch of the recipe at its largest training size, in float32 and not
  compiled: parameters, gradients, optimizer state, and the bytes that autograd keeps for the backward pass, counted
  from shapes. Temporary tensors, workspace of libraries and the padding of a batch of mixed shapes come on top; bf16
  is not estimated. It has not been compared with a GPU yet. 1 GiB is 2^30 bytes.
- **State**: *compared* means that outputs, matching, losses and gradients equal those of the published code within
  its float32 noise, in [tests/parity](../tests/parity); *not compared*, that no outputs of the published code are
  recorded for this row; *ours*, that nothing is published about it.
"""
LEGEND = """
GFLOPs: billions of multiply-accumulates of an image, in the published code; as run: in this package.
paper, AP: published; GFLOPs are the mean over the first 100 images of COCO val2017, which have other sizes.
±: ours less the published; of GFLOPs, the means. memory: a training step of one micro-batch, estimated in float32.
docs/models.md says what is counted."""


def report_recipes(
    recipes: Mapping[Path, Recipe], sizes: Sequence[tuple[int, int]], form: Literal["table", "json", "markdown"]
) -> None:
    """Print a report of each recipe, at ``sizes`` (height, width), or at those of its evaluation if there are none."""
    reports = make_reports(recipes, [Size(*size) for size in sizes])
    if form == "table":
        print_tables(reports)
    else:
        sys.stdout.write(markdown(reports) if form == "markdown" else as_json(reports))


def as_json(reports: Sequence[Report]) -> str:
    """Write the reports as a JSON list of `Report.to_json`."""
    return json.dumps([report.to_json() for report in reports], indent=1) + "\n"


def print_tables(reports: Sequence[Report]) -> None:
    """Print a table for each group of sizes, about 100 columns wide; names fold in fewer."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    for sizes, group in by_sizes(reports).items():
        title = f"GFLOPs at {_listed(sizes)}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("recipe", overflow="fold")
        for name in ("parameters", "trained", "±", "GFLOPs", "as run", "paper", "±", "memory", "AP"):
            table.add_column(name, justify="right", no_wrap=True)
        for report in group:
            cells = (report.path.stem, *_numbers(report), f"{report.figures.memory.total / GIBI:.1f} GiB", _ap(report))
            table.add_row(*map(Text, cells))
        console.print(table)
    console.print(LEGEND, markup=False, highlight=False, soft_wrap=True)


def markdown(reports: Sequence[Report]) -> str:
    """Write the text of docs/models.md, with links to the recipes beside it."""
    parts = [HEAD]
    names = (
        *("system", "backbone", "recipe", "epochs", "published AP", "parameters (trained)", "difference"),
        *("published", "GFLOPs, published form", "as run", "published", "difference", "training memory", "state"),
    )
    for sizes, group in by_sizes(reports).items():
        rows = [names, ("---",) * len(names), *map(_markdown_row, group)]
        parts.append(f"## GFLOPs at {_listed(sizes)}\n")
        parts.append("".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "\n".join([*parts, "## What the columns mean\n", NOTES])


def _markdown_row(report: Report) -> tuple[str, ...]:
    published, recipe = report.published, report.recipe
    parameters, trained, difference, *gflops = _numbers(report)
    return (
        published.system if published else recipe.model.system,
        published.backbone if published else recipe.model.backbone.name,
        f"[{report.path.stem}](../recipes/{report.path.name})",
        str(recipe.train.epochs),
        _ap(report),
        f"{parameters} ({trained})",
        difference,
        f"{published.millions} M" if published and published.millions else ABSENT,
        *gflops,
        _memory(report.figures.memory),
        ("compared" if published.compared else "not compared") if published else "ours",
    )


def _numbers(report: Report) -> tuple[str, ...]:
    """Format parameters, trained ones, their difference; GFLOPs in published form, as run, published, difference."""
    figures, published, over = report.figures, report.published, report.gflops.over_published
    counts = figures.flops.values()
    return (
        f"{figures.parameters:,}",
        f"{figures.trainable:,}",
        ABSENT if report.parameters_over is None else f"{report.parameters_over[0]:,}",
        _gflops([count.published for count in counts]),
        _gflops([count.run for count in counts]),
        ABSENT if published is None or published.gflops is None else str(published.gflops),
        ABSENT if over is None else f"{over:+.1f}",
    )


def _gflops(counts: Sequence[int]) -> str:
    return "/".join(f"{count / GIGA:.3g}" if count < GIGA else f"{count / GIGA:.1f}" for count in counts)


def _memory(memory: Memory) -> str:
    return f"{memory.total / GIBI:.1f} GiB ({memory.batch} x {memory.size})"


def _ap(report: Report) -> str:
    return ABSENT if report.published is None or report.published.ap is None else f"{report.published.ap:.1f}"


def _listed(sizes: Sequence[Size]) -> str:
    return " / ".join(map(str, sizes))
