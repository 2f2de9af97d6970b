"""What a person reads when the device's memory is full: where, and which recipe keys need how much less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from samdetr.cost.memory import Memory, training_memory
from samdetr.cost.meta import build_on_meta
from samdetr.engine.checkpoint.format import LAST
from samdetr.engine.run.folder import CHECKPOINTS, resume_command
from samdetr.errors import SamdetrError
from samdetr.recipe import with_micro_batch
from samdetr.structures import Batch

if TYPE_CHECKING:
    from samdetr.engine.build import Training
    from samdetr.recipe import Recipe

GIB = 2**30
START_UP = "the start-up"
SMALLER = 0.75  # of the sides of the largest images, as advice


class Saving(NamedTuple):
    """A change of a recipe that needs less memory."""

    keys: str  # as a person would set them
    bytes: int | None  # None: not counted
    resumable: bool  # whether a run may go on with it
    remark: str = ""


@contextmanager
def named(what: Callable[[], str]) -> Iterator[None]:
    """Add what was under way to an error that says that memory is out; the innermost name comes first."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(what())
        raise


def described(batch: Batch) -> str:
    """The shape of a batch; reads nothing from the device."""
    images, _, height, width = batch.images.shape
    return f"{images} images of {height} x {width} pixels, with up to {batch.targets.boxes.shape[1]} boxes each"


def said_of_training(training: Training, error: torch.OutOfMemoryError) -> str:
    """Lines for a person: where memory ran out, what needs less of it, and how to go on."""
    recipe, progress, folder = training.recipe, training.progress, training.folder
    if progress.evaluation_due and START_UP not in _notes(error):
        where, advice = f"the evaluation after step {progress.step}", evaluation_advice(recipe)
    else:
        where = f"step {progress.step + 1}"
        advice = training_advice(recipe, processes=training.world.size, precision=training.compute.precision)
    way = "There is no checkpoint yet: start it again."
    if (folder / CHECKPOINTS / LAST).exists():
        way = f"Go on with {resume_command(folder)} --set KEY=VALUE, or start a new run from it (init.checkpoint)."
    return "\n".join([_first_line(error, training.device, where), *advice, way])


@contextmanager
def evaluating(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Around an evaluation outside a run: raises SamdetrError where memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lines = [_first_line(error, device, "the evaluation"), *evaluation_advice(recipe)]
        raise SamdetrError("\n".join(lines)) from error


@contextmanager
def placing(device: torch.device, where: str) -> Iterator[None]:
    """Around what no recipe key makes smaller: raises SamdetrError where memory runs out. where: "the start-up"."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SamdetrError(
            f"{_first_line(error, device, where)} If other programs hold the rest (nvidia-smi lists them), end them "
            "or choose another GPU by CUDA_VISIBLE_DEVICES."
        ) from error


def _notes(error: torch.OutOfMemoryError) -> list[str]:
    return getattr(error, "__notes__", [])


def _first_line(error: torch.OutOfMemoryError, device: torch.device, where: str) -> str:
    """What ran out, where, at which batch, and what the allocator says."""
    batch = next((f", at {note}" for note in _notes(error) if note != START_UP), "")
    said = str(error).partition("\n")[0].partition(" If reserved")[0]
    return f"{device} is out of memory in {START_UP if START_UP in _notes(error) else where}{batch}: {said}"


def training_advice(recipe: Recipe, *, processes: int, precision: torch.dtype) -> list[str]:
    """Lines: what a step keeps, and what the recipe's keys would save, counted from shapes."""
    memory = _counted(recipe)
    parts = ", ".join(
        f"{name} {size / GIB:.2f}"
        for name, size in (
            ("weights", memory.parameters),
            ("gradients", memory.gradients),
            ("optimizer", memory.optimizer),
            ("activations", memory.activations),
        )
    )
    lines = [
        f"A step with {memory.batch} images of {memory.size} keeps about {memory.total / GIB:.2f} GiB, counted in fp32 "
        f"({parts}). It needs less with"
    ]
    for saving in savings(recipe, memory, processes=processes, precision=precision):
        amount = "not counted" if saving.bytes is None else f"about {saving.bytes / GIB:.2f} GiB less"
        way = "" if saving.resumable else "; in a new run"
        lines.append(f"  {saving.keys}: {amount}{saving.remark}{way}")
    return lines


def savings(recipe: Recipe, memory: Memory, *, processes: int, precision: torch.dtype) -> list[Saving]:
    """What the recipe can still change. memory: of its step, as it is. precision: what it computes in."""
    found = []
    fixed = recipe.data.batching == "buckets"  # which images share a micro-batch decides the epoch's steps
    share = recipe.train.total_batch // processes
    smaller = max((n for n in range(1, memory.batch) if share % n == 0), default=None)
    if smaller:
        less = memory.total - _counted(with_micro_batch(recipe, smaller)).total
        found.append(Saving(f"train.micro_batch = {smaller}", less, resumable=not fixed))
    compute = recipe.compute
    if compute.activation_checkpointing == "off" and recipe.model.can_be_recomputed:
        changed = compute.model_copy(update={"activation_checkpointing": "layers"})
        less = memory.total - _counted(recipe.model_copy(update={"compute": changed})).total
        remark = ', with compute.cuda_graph = "off"' if compute.cuda_graph == "on" else ""
        key = 'compute.activation_checkpointing = "layers"'
        found.append(Saving(key, less, resumable=not remark, remark=f"{remark}, for more time"))
    sides = tuple(sorted({int(side * SMALLER) for side in recipe.augment.train_sizes}))
    augment = recipe.augment.model_copy(
        update={"train_sizes": sides, "max_size": int(recipe.augment.max_size * SMALLER)}
    )
    less = memory.total - _counted(recipe.model_copy(update={"augment": augment})).total
    keys = f"augment.train_sizes up to {sides[-1]} and augment.max_size = {augment.max_size}"
    found.append(Saving(keys, less, resumable=False))
    if precision == torch.float32:
        found.append(
            Saving('compute.precision = "bf16"', None, resumable=False, remark=", what products keep is halved")
        )
    if processes > 1 and recipe.parallel.strategy == "ddp" and recipe.optim.optimizer == "adamw":
        less = (memory.parameters + memory.gradients + memory.optimizer) * (processes - 1) // processes
        found.append(Saving('parallel.strategy = "fsdp"', less, resumable=True))
    return found


def evaluation_advice(recipe: Recipe) -> list[str]:
    """Lines: what makes an evaluation smaller."""
    section = recipe.augment
    lines = [f"  eval.batch = {recipe.eval.batch // 2} (now {recipe.eval.batch})"] if recipe.eval.batch > 1 else []
    lines.append(
        f"  augment.eval_size and augment.eval_max_size below {section.eval_size} and {section.eval_max_size}: other "
        "numbers than published; in a new run, or with samdetr eval"
    )
    return ["It needs less with", *lines]


def _counted(recipe: Recipe) -> Memory:
    return training_memory(build_on_meta(recipe.model), recipe)
