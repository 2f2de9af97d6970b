"""Count what training steps ask of a GPU, on a machine without one: launches, waits, refused calls, copies, memory.

CUDA, cuBLAS and cuDNN are answered by a library that does no arithmetic and counts (`perf/null_library.py`); all else
is what runs on an H100. No time of a GPU comes out of it, and no number that a step computes means anything.

    export SAMDETR_NULL_GPU=FOLDER  # which holds nullcuda/nullcuda.cpp
    python perf/null_gpu.py recipes/r50_12ep.toml --batch 2 --size 800x1216 --compile --graph --json counts.json

Without a recipe every system of the table is counted; without --compile and --graph the step is eager.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf import null_library
from samdetr.errors import SamdetrError

if TYPE_CHECKING:
    from perf.null_counts import StepCounts

ROOT = Path(__file__).resolve().parents[1]
# a recipe for every system of the table, of 12 epochs where there is one; and SAM-DETR w/ SMCA on its finer map
SYSTEMS = (
    *("r50_12ep", "r50_smca_12ep", "r50_dc5_smca_12ep", "r50_ms_12ep", "r50_ms_smca_12ep", "detr_r50_500ep"),
    *("detr_focal_r50_12ep", "conditional_detr_r50_12ep", "dab_detr_r50_50ep", "smca_detr_r50_12ep"),
    *("smca_detr_r50_ms_50ep", "smca_detr_r50_ms_attention_50ep", "deformable_detr_r50_12ep"),
    *("deformable_detr_r50_ms_50ep",),
    *("faster_rcnn_r50_c4_12ep", "faster_rcnn_r50_dc5_12ep", "faster_rcnn_r50_fpn_108ep"),
)
NOT_COUNTED = "its sizes come from values on the device, and there are none here"
COLUMNS = ("launches", *null_library.KINDS, "nodes", "copies", "fills", "waits", "refused", "peak GiB", "host ms")
NAME, WAY = 34, 16  # characters of the first two columns


@dataclass
class Counted:
    """Results of one call, as its JSON file has them."""

    environment: dict[str, Any]
    batch: int
    size: str  # of the padded images, height x width
    rows: list[StepCounts] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # recipe -> why it cannot be counted
    failed: dict[str, str] = field(default_factory=dict)  # recipe -> what its step raised
    complete: bool = False

    def write(self, path: Path | None) -> None:
        """Replace the file in one step, so that a reader never sees half of it."""
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)

    def is_clean(self) -> bool:
        """Tell whether all steps ran, none waits, and no call was refused."""
        return not self.failed and not any(row.waits or row.refused for row in self.rows)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Count what training steps ask of a GPU, without one.")
    parser.add_argument("recipes", type=Path, nargs="*", metavar="RECIPE", help="every system of the table if none")
    parser.add_argument("--batch", type=int, default=2, help="images of a step")
    parser.add_argument("--size", type=height_and_width, default="800x1216", metavar="HEIGHTxWIDTH")
    parser.add_argument("--compile", action="store_true", help="minutes a recipe, unless its code is in the cache")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipes")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    options.recipes = options.recipes or [ROOT / "recipes" / f"{name}.toml" for name in SYSTEMS]
    return options


def height_and_width(text: str) -> tuple[int, int]:
    """Read "800x1216". Raises ValueError, which argparse reports."""
    height, width = map(int, text.split("x"))
    return height, width


def count_all(options: argparse.Namespace) -> Counted:
    """Count the recipes one by one, and print each as it is done; an error costs only its recipe."""
    # torch is loaded here, by a process that is on the null GPU
    from perf.inputs import object_classes, training_batch
    from perf.null_counts import count_step, free_memory
    from perf.report import environment
    from samdetr.recipe import load_recipe

    way = " ".join(name for name, is_asked in (("compiled", options.compile), ("graph", options.graph)) if is_asked)
    settings = [f"compute.compile={_switch(options.compile)}", f"compute.cuda_graph={_switch(options.graph)}"]
    recipes = [load_recipe(path, [*options.set, *settings]) for path in options.recipes]
    facts = environment("cuda") | {"device": "none: counted on the null GPU"}
    counted = Counted(facts, options.batch, "x".join(map(str, options.size)))
    print(head(counted))
    for recipe in recipes:
        name = recipe.run.name
        if recipe.model.system == "faster_rcnn":
            counted.left_out[name] = NOT_COUNTED
            print(f"{name} is left out: {NOT_COUNTED}.", flush=True)
            continue
        batch = training_batch(options.batch, *options.size, classes=object_classes(recipe))
        try:
            counted.rows.append(count_step(recipe, batch, way or "eager"))
            print(line(counted.rows[-1]), flush=True)
        except Exception as error:
            refused = "".join(f"\n  {call}" for call in null_library.refused())
            counted.failed[name] = f"{type(error).__name__}: {error}{refused}"
            print(f"{name} failed: {counted.failed[name]}", flush=True)
        free_memory()
        counted.write(options.json)
    counted.complete = True
    counted.write(options.json)
    return counted


def _switch(is_on: bool) -> str:
    return "on" if is_on else "off"


def head(counted: Counted) -> str:
    """Say what is counted and where, above the names of the columns."""
    facts = counted.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "commit"))
    names = "".join(f"{name:>9}" for name in (*COLUMNS, "start-up"))
    card = facts["name"].partition(",")[0]  # without what is said of the null GPU
    return f"{counted.size}, batch {counted.batch}, as if on {card}: {versions}\n{'':{NAME + WAY}}{names}"


def line(row: StepCounts) -> str:
    """Make a line of the table."""
    cells = [row.launches, *(row.kinds.get(kind, 0) for kind in null_library.KINDS), row.nodes]
    cells += [sum(row.copies.values()), row.fills, sum(row.waits.values()), len(row.refused)]
    measured = f"{row.peak_gib:>9.2f}{row.host_ms:>9.1f}{row.start_up_seconds:>7.0f} s"
    return f"{row.recipe:{NAME}}{row.way:{WAY}}" + "".join(f"{cell:>9}" for cell in cells) + measured


def phases_table(rows: Sequence[StepCounts]) -> str:
    """Make the table of the launches in each phase."""
    names = list(rows[0].phases)
    lines = [f"{'launches of':{NAME + WAY}}" + "".join(f"{name:>10}" for name in names)]
    for row in rows:
        cells = "".join(f"{row.phases[name].launches:>10}" for name in names)
        lines.append(f"{row.recipe:{NAME}}{row.way:{WAY}}{cells}")
    return "\n".join(lines)


def faults(row: StepCounts) -> list[str]:
    """List what makes a step's host wait, and what was refused."""
    waits = [f"{row.recipe} waits: {call} ({number})" for call, number in row.waits.items()]
    return waits + [f"{row.recipe}: {call}" for call in row.refused]


def main(argv: Sequence[str] | None = None) -> int:
    """Count; returns 1 where a step fails or waits, or a call is refused.

    Does not return where the process is not on the null GPU: one that is takes its place. Raises NullGpuError where
    that cannot be had.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = read_options(arguments)
    if not null_library.is_loaded():
        null_library.start([sys.executable, os.path.relpath(__file__), *arguments])
    counted = count_all(options)
    if with_phases := [row for row in counted.rows if row.phases]:
        print(phases_table(with_phases))
    for row in counted.rows:
        print("\n".join(faults(row)), end="\n" if faults(row) else "")
    return int(not counted.is_clean())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
