"""The folder of a run: ``<run.folder>/<run.name>/<n>``, with all that is needed to repeat or continue it."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from samdetr.engine.checkpoint.folder import newest_first, newest_progress
from samdetr.engine.checkpoint.format import LAST
from samdetr.errors import CheckpointError, RecipeError, SamdetrError
from samdetr.recipe import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    dump_recipe,
    load_recipe,
    with_absolute_paths,
    with_micro_batch,
)

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"
# what may change when a run continues; everything else would make it another run
FREE_KEYS = (
    *("run.folder", "run.device", "train.epochs", "train.micro_batch", "train.log_every", "eval."),
    *("train.on_nonfinite", "train.max_skips"),
    *("data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations"),
    *("data.shapes.folder", "data.max_pixels", "data.workers", "compute.on_failure", "parallel.", "checkpoint."),
    "compute.activation_checkpointing",
)
_PACKAGES = (
    "samdetr",
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "scipy",
    "pycocotools",
    "hotcoco",
    "pillow",
    "simplejpeg",
    "safetensors",
)


def new_run(recipe: Recipe, environment: Mapping[str, object]) -> Path:
    """Make the next free numbered folder, with the resolved recipe and the environment; never reuse one.

    Raises SamdetrError when it cannot be written.
    """
    parent = Path(recipe.run.folder) / recipe.run.name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _next_folder(parent)
        (folder / RECIPE_FILE).write_text(dump_recipe(recipe))
        write_environment(folder, environment)
    except OSError as error:
        raise SamdetrError(
            f"cannot write the run folder {parent} ({error.strerror}): choose another run.folder."
        ) from error
    return folder


def write_environment(folder: Path, environment: Mapping[str, object], *, step: int | None = None) -> None:
    """Record where a run begins, or continues after ``step``: the machine or torch may be another one."""
    name = ENVIRONMENT_FILE if step is None else f"environment-after-step-{step}.json"
    (folder / name).write_text(json.dumps(environment, indent=1))


def find_run(recipe: Recipe, resume: str) -> Path:
    """Return the run to continue: ``resume`` itself, or with "" the newest unfinished run of the recipe's name.

    Raises CheckpointError when there is none, RecipeError when the recipe is not the run's own.
    """
    folder = Path(resume) if resume else _newest_unfinished(Path(recipe.run.folder) / recipe.run.name)
    if not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(f"--resume: {folder} is not a run folder (it has no {RECIPE_FILE}).")
    checkpoints = folder / CHECKPOINTS
    if not newest_first(checkpoints) and not (checkpoints / LAST).is_dir():
        raise CheckpointError(f"--resume: the run {folder} has no checkpoint yet; start it again without --resume.")
    before, now = (_flat(with_absolute_paths(one)) for one in (load_recipe(folder / RECIPE_FILE), recipe))
    fixed = {}
    if recipe.optim.schedule == "cosine":
        fixed["train.epochs"] = ", on which the learning rate of every step of a cosine schedule depends"
    if recipe.data.batching == "buckets":
        fixed["train.micro_batch"] = ", and which images share one decides the steps of an epoch of buckets"
    if now["train.micro_batch"] == "auto":
        now["train.micro_batch"] = before["train.micro_batch"]
    free = tuple(key for key in FREE_KEYS if key not in fixed)
    both = before.keys() & now.keys()  # another system has other keys
    changed = [key for key in before if key in both and before[key] != now[key] and not key.startswith(free)]
    if changed:
        lines = [
            f"--resume: {key} is {now[key]!r}, but {folder} was trained with {before[key]!r}{fixed.get(key, '')}"
            for key in changed
        ]
        lines[-1] += f"; start a new run from its weights with --set init.checkpoint={shlex.quote(str(folder))}"
        lines[-1] += f", or continue it unchanged with {resume_command(folder)}"
        raise RecipeError("\n".join(lines))
    return folder


def run_of_launch(recipe: Recipe) -> str | None:
    """Return the unfinished run that this launch began, if its launcher has restarted the processes; else None.

    A launch is known by torchrun's ``--rdzv-id``, which each run's environment.json has. Raises CheckpointError where
    processes were restarted and have no such id.
    """
    launch = _launch()
    if launch is None:
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            raise CheckpointError(
                "torchrun has restarted the processes, but without an id of the launch they cannot find their run: "
                "give torchrun --rdzv-id, or continue the run with --resume RUN."
            )
        return None
    for folder in _numbered(Path(recipe.run.folder) / recipe.run.name):
        try:
            began = json.loads((folder / ENVIRONMENT_FILE).read_text())["launch"] == launch
        except (OSError, ValueError, KeyError):
            continue
        progress = newest_progress(folder / CHECKPOINTS) if began else None
        if progress is not None and not progress.finished:
            return str(folder)
    return None


def with_micro_batch_of(recipe: Recipe, folder: Path) -> Recipe:
    """Replace "auto" by the micro-batch that the run in ``folder`` began with; another one would round differently."""
    if recipe.train.micro_batch != "auto":
        return recipe
    return with_micro_batch(recipe, load_recipe(folder / RECIPE_FILE).train.images)


def resume_command(folder: Path) -> str:
    """Return the command that continues the run in a folder with its own recipe."""
    return f"samdetr-train --resume {shlex.quote(str(folder))}"


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run in a folder has a checkpoint to continue from."""
    return (folder / CHECKPOINTS / LAST).exists()


def how_to_continue(folder: Path) -> str:
    """Return the end of a stopped run's last line: the command that continues it, if there is a checkpoint."""
    if has_checkpoint(folder):
        return f"continue with: {resume_command(folder)}"
    return "there is no checkpoint yet, start it again"


def environment_of(recipe: Recipe, device: torch.device) -> dict[str, object]:
    """Return what is needed to repeat a run: commit, versions, device, seed, command."""
    versions = {name: metadata.version(name) for name in _PACKAGES if _installed(name)}
    versions["torch"] = str(torch.__version__)  # which also names its CUDA version
    return {
        "command": sys.argv,
        "launch": _launch(),
        "commit": _commit(),
        "seed": recipe.run.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _next_folder(parent: Path) -> Path:
    number = 1 + max((int(entry.name) for entry in parent.iterdir() if entry.name.isdigit()), default=0)
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # another run started meanwhile
            number += 1
        else:
            return parent / str(number)


def _newest_unfinished(parent: Path) -> Path:
    for entry in _numbered(parent):
        progress = newest_progress(entry / CHECKPOINTS)
        if progress is not None and not progress.finished:
            return entry
    raise CheckpointError(f"--resume: there is no unfinished run with a checkpoint in {parent}.")


def _numbered(parent: Path) -> list[Path]:
    """List the runs in a folder, newest first."""
    entries = parent.iterdir() if parent.is_dir() else ()
    return sorted((entry for entry in entries if entry.name.isdigit()), key=lambda entry: -int(entry.name))


def _launch() -> str | None:
    """Return the id that a launcher gives all processes it starts and restarts; None without one."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's value where no id was given
    return None if launch == "none" else launch


def _flat(recipe: Recipe) -> dict[str, object]:
    flat: dict[str, object] = {}

    def walk(prefix: str, values: dict[str, object]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(f"{prefix}{key}.", value)
            else:
                flat[prefix + key] = value

    walk("", recipe.model_dump())
    return flat


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    """Return the commit of this source tree, with "+changes" where files differ; "" outside a git checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    try:
        git = ("git", "-C", str(root))
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
