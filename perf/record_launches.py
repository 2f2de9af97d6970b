"""Write anew which of our kernels training steps compile: the list that `samdetr_kernels.aot` goes through.

    export SAMDETR_NULL_GPU=FOLDER  # which holds nullcuda/nullcuda.cpp
    python perf/record_launches.py [RECIPE ...] [--to FILE]

Takes a training step and a detection of every model of the recipes in each of `WAYS`, on a library that does no
arithmetic (`perf/null_library.py`). Triton says what it would compile, and neither compiles nor launches it.
Without a recipe: all of them. Faster R-CNN is left out, which launches none of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perf import null_library
from samdetr.errors import SamdetrError

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "kernels" / "samdetr_kernels" / "launches.json"
SIZE = (800, 1216)


class Way(NamedTuple):
    """Settings beside the recipe that decide what is compiled."""

    precision: str  # of products, a dtype of torch
    matmul: str = "highest"  # torch's precision of float32 products
    deterministic: bool = False
    images: int = 2


WAYS = (
    Way("bfloat16"),
    Way("bfloat16", images=16),  # so many that attention does not split its heads
    Way("bfloat16", "high", deterministic=True),
    Way("float32"),
    Way("float32", "high", deterministic=True),
)


@contextmanager
def recorded() -> Iterator[set[str]]:
    """Keep our kernels from running within the context; each compilation is added to the set, a line of the list."""
    from triton import knobs

    found: set[str] = set()

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names, (attributes,) = fn.jit_function.arg_names, compile["configs"]
        compilation = {
            "module": fn.module.removeprefix("samdetr_kernels."),
            "kernel": fn.name,
            "types": {name: kind for name, kind in compile["signature"].items() if kind != "constexpr"},
            "aligned": [names[place] for (place,), known in attributes.items() if ["tt.divisibility", 16] in known],
            "constants": {names[place]: value for (place,), value in compile["constants"].items()},
            "warps": compile["num_warps"],
            "stages": compile["num_stages"],
        }
        found.add(json.dumps(compilation))
        return True  # do not compile

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, record
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def record_model(recipe: Recipe) -> None:
    """Take a training step and a detection of a recipe's model in each of `WAYS`."""
    import torch

    from perf.inputs import MAX_TARGETS
    from perf.null_counts import grid_sample_without_cudnn
    from perf.sides import build_model_on
    from samdetr.data.device import to_device
    from samdetr.engine.compute.precision import autocast, choose_device
    from samdetr.engine.start_up import random_batch
    from samdetr.engine.step import forward_backward
    from samdetr.loss import build_criterion

    device = choose_device("cuda", recipe.compute.kernels)
    model, criterion = build_model_on(recipe, device), build_criterion(recipe)
    most = recipe.data.shapes.max_objects if recipe.data.format == "shapes" else MAX_TARGETS
    for way in WAYS:
        torch.set_float32_matmul_precision(way.matmul)
        torch.use_deterministic_algorithms(way.deterministic, warn_only=True)
        batch = to_device(random_batch(SIZE, way.images, most, least=1), device)
        precision = getattr(torch, way.precision)
        with grid_sample_without_cudnn(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's ops that are not deterministic
            forward_backward(model.train(), criterion, batch, batch.targets.counts.sum(), precision=precision)
            with torch.no_grad(), autocast(precision, device):
                model.eval()(batch.images, batch.image_sizes)
    torch.cuda.empty_cache()


def read_recipes(paths: Sequence[Path]) -> list[Recipe]:
    """Read the recipes whose ops are ours, one for each model."""
    from samdetr.recipe import load_recipe

    found = {}
    for path in paths:
        recipe = load_recipe(path)
        if recipe.model.system != "faster_rcnn":
            found.setdefault((recipe.model.model_dump_json(), recipe.loss.classification), recipe)
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Record, and write the list, sorted, a compilation a line.

    Does not return where the process is not on the null GPU: one that is takes its place. Raises NullGpuError where
    that cannot be had.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description="Write anew which of our kernels training steps compile.")
    parser.add_argument("recipes", type=Path, nargs="*", metavar="RECIPE", help="all of them if none")
    parser.add_argument("--to", type=Path, default=LIST, metavar="FILE", help="instead of the package's list")
    options = parser.parse_args(arguments)
    if not null_library.is_loaded():
        null_library.start([sys.executable, os.path.relpath(__file__), *arguments])
    with recorded() as lines:
        for recipe in read_recipes(options.recipes or sorted((ROOT / "recipes").glob("*.toml"))):
            before = len(lines)
            record_model(recipe)
            print(f"{recipe.run.name:34}{len(lines) - before:>4} new compilations", flush=True)
    options.to.write_text("[\n" + ",\n".join(sorted(lines)) + "\n]\n")
    print(f"{len(lines)} compilations: {options.to}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SamdetrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
