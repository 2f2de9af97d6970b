"""A device that is out of memory: the message says where, and which recipe keys need less."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from samdetr.engine.run.folder import has_checkpoint, resume_command
from samdetr.errors import SamdetrError
from samdetr.recipe import RECIPE_FILE
from samdetr.structures import Batch

if TYPE_CHECKING:
    from samdetr.engine.checkpoint.format import Progress
    from samdetr.recipe import Recipe

START_UP = "the start-up"


class Key(NamedTuple):
    """A change of a recipe that needs less memory."""

    setting: str  # as a person would set it
    resumable: bool  # whether a run may be resumed with it
    remark: str = ""


@contextmanager
def note_place(place: str) -> Iterator[None]:
    """Add ``place`` to an out-of-memory error raised within the context; the innermost place comes first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(place)
        raise


def batch_size(batch: Batch) -> str:
    """Describe a batch's size in words; reads nothing from the device."""
    images, _, height, width = batch.images.shape
    return f"{images} images of {height} x {width} pixels, with up to {batch.targets.boxes.shape[1]} boxes each"


def training_message(
    error: torch.OutOfMemoryError,
    recipe: Recipe,
    progress: Progress,
    folder: Path,
    *,
    device: torch.device,
    precision: torch.dtype,
    processes: int,
) -> str:
    """Return the lines that say where a run in ``folder`` was out of memory, what needs less, and how to continue."""
    if progress.evaluation_due and START_UP not in _notes(error):
        place, advice = f"the evaluation after step {progress.step}", evaluation_advice(recipe)
    else:
        place = f"step {progress.step + 1}"
        advice = training_advice(recipe, folder, processes=processes, precision=precision)
    way = "There is no checkpoint yet: start it again."
    if has_checkpoint(folder):
        way = f"Continue with {resume_command(folder)} --set KEY=VALUE, or start a new run from it (init.checkpoint)."
    return "\n".join([_first_line(error, device, place), *advice, way])


@contextmanager
def explain_evaluation(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Raise SamdetrError with advice where an evaluation outside a run is out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = [_first_line(error, device, "the evaluation"), *evaluation_advice(recipe)]
        raise SamdetrError("\n".join(lines)) from error


@contextmanager
def explain_place(device: torch.device, place: str) -> Iterator[None]:
    """Raise SamdetrError where memory runs out in ``place`` ("the start-up"), which no recipe key makes smaller."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SamdetrError(
            f"{_first_line(error, device, place)} If other programs use the rest (nvidia-smi lists them), end them "
            "or choose another GPU with CUDA_VISIBLE_DEVICES."
        ) from error


def training_advice(recipe: Recipe, folder: Path, *, processes: int, precision: torch.dtype) -> list[str]:
    """List the recipe keys that make a training step smaller."""
    keys = smaller_steps(recipe, processes=processes, precision=precision)
    lines = [f"  {key.setting}{key.remark}{'' if key.resumable else '; in a new run'}" for key in keys]
    report = f"samdetr report {shlex.quote(str(folder / RECIPE_FILE))}"
    return [f"A step needs less memory with one of these keys ({report} has the numbers):", *lines]


def smaller_steps(recipe: Recipe, *, processes: int, precision: torch.dtype) -> list[Key]:
    """Return what the recipe can still change. precision: what it computes in."""
    keys = []
    fixed = recipe.data.batching == "buckets"  # which images share a micro-batch decides the epoch's steps
    share = recipe.train.total_batch // processes
    smaller = max((images for images in range(1, recipe.train.images) if share % images == 0), default=None)
    if smaller:
        keys.append(Key(f"train.micro_batch = {smaller}", resumable=not fixed, remark=f" (now {recipe.train.images})"))
    if recipe.compute.activation_checkpointing == "off" and recipe.model.can_checkpoint_activations:
        recorded = recipe.compute.cuda_graph == "on"
        remark = ', with compute.cuda_graph = "off"; slower' if recorded else "; slower"
        keys.append(Key('compute.activation_checkpointing = "layers"', resumable=not recorded, remark=remark))
    largest, limit = max(recipe.augment.train_sizes), recipe.augment.max_size
    keys.append(Key(f"augment.train_sizes and augment.max_size below {largest} and {limit}", resumable=False))
    if precision == torch.float32:
        keys.append(Key('compute.precision = "bf16"', resumable=False))
    if processes > 1 and recipe.parallel.strategy == "ddp" and recipe.optim.optimizer == "adamw":
        keys.append(Key('parallel.strategy = "fsdp"', resumable=True))
    return keys


def evaluation_advice(recipe: Recipe) -> list[str]:
    """List the recipe keys that make an evaluation smaller."""
    section = recipe.augment
    lines = [f"  eval.batch = {recipe.eval.batch // 2} (now {recipe.eval.batch})"] if recipe.eval.batch > 1 else []
    lines.append(
        f"  augment.eval_size and augment.eval_max_size below {section.eval_size} and {section.eval_max_size}: other "
        "numbers than published; in a new run, or with samdetr eval"
    )
    return ["It needs less memory with", *lines]


def _notes(error: torch.OutOfMemoryError) -> list[str]:
    return getattr(error, "__notes__", [])


def _first_line(error: torch.OutOfMemoryError, device: torch.device, place: str) -> str:
    """Name the device, the place and the batch, and quote the allocator."""
    batch = next((f", at {note}" for note in _notes(error) if note != START_UP), "")
    reason = str(error).partition("\n")[0].partition(" If reserved")[0]
    return f"{device} is out of memory in {START_UP if START_UP in _notes(error) else place}{batch}: {reason}"
