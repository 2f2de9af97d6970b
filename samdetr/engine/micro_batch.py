"""``train.micro_batch = "auto"``: whole steps of the largest batches, tried on the GPU until one does not fit.

Every process tries on its own GPU, alone, so that none waits for one that is out of memory; the smallest result is
everybody's. A trial has its own model, optimizer and average, freed before the run's are built, and holds them whole:
with sharding a step needs less. It runs eagerly; compiled code, CUDA graphs, collectives and fragmentation need the
margin.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from samdetr.data.batching import Shape
from samdetr.data.datasets import DetectionDataset
from samdetr.data.device import to_device
from samdetr.data.splits import Splits, build_dataset, largest_shape
from samdetr.engine.compute.precision import Compute
from samdetr.engine.distributed.world import World, micro_batches_of
from samdetr.engine.ema import build_ema
from samdetr.engine.optim import build_optimizer
from samdetr.engine.start_up import arrange, random_batch
from samdetr.engine.step import train_step
from samdetr.errors import RecipeError
from samdetr.loss import build_criterion
from samdetr.models import build_model
from samdetr.recipe import with_micro_batch

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

MARGIN = 0.1  # of the usable memory, to be left free
STEPS = 2  # the first one allocates the optimizer's state
GIB = 2**30


class Trial(NamedTuple):
    """The memory that a step with a micro-batch needed."""

    images: int
    shape: Shape  # padded height and width
    peak: int | None  # bytes; None: out of memory

    def fits(self, usable: int) -> bool:
        """Return whether the step leaves the margin of ``usable`` bytes free."""
        return self.peak is not None and self.peak <= (1 - MARGIN) * usable


def choose_micro_batch(
    recipe: Recipe,
    splits: Splits,
    compute: Compute,
    device: torch.device,
    world: World,
    say: Callable[[str], None],
) -> Recipe:
    """Return the recipe with the largest micro-batch that fits on the GPUs of all processes and divides their shares.

    Prints a table of the trials with ``say`` and restores random states. All processes must call it. Raises RecipeError
    on a CPU, where the processes cannot share a step, or where one image does not fit.
    """
    usable, share = usable_bytes(device), micro_batches_of(world, total_batch=recipe.train.total_batch, micro_batch=1)
    dataset = build_dataset(
        splits.train, splits.categories, recipe.data, recipe.augment, seed=recipe.run.seed, training=True
    )

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trials = try_sizes(recipe, compute, device, dataset, share, usable)
    fitting = max((trial.images for trial in trials if trial.fits(usable)), default=0)
    agreed = -world.all_reduce_max(-fitting)
    for line in memory_table(trials, usable, boxes=dataset.max_objects):
        say(line)
    if not agreed:
        raise RecipeError(
            'train.micro_batch = "auto": a step of one image does not fit into the memory; set '
            'compute.activation_checkpointing = "layers", compute.precision = "bf16" or a smaller augment.max_size.'
        )
    others = ", the most that fits in every process" if agreed < fitting else ""
    say(f"train.micro_batch = {agreed}{others}; the run keeps it when it is continued")
    return with_micro_batch(recipe, agreed)


def divisors(share: int) -> list[int]:
    """Return the micro-batches that divide a process's images of a step evenly, ascending."""
    return [images for images in range(1, share + 1) if share % images == 0]


def try_sizes(
    recipe: Recipe, compute: Compute, device: torch.device, dataset: DetectionDataset, share: int, usable: int
) -> list[Trial]:
    """Try the micro-batches that divide ``share`` images, ascending, up to the first that does not fit."""
    trials = []
    for images in divisors(share):
        shape = largest_shape(dataset, recipe.data, images)
        counts = (images, share // images, dataset.max_objects)
        trials.append(Trial(images, shape, peak_bytes(recipe, compute, device, shape, counts)))
        if not trials[-1].fits(usable):
            break
    return trials


def memory_table(trials: Iterable[Trial], usable: int, *, boxes: int) -> list[str]:
    """Format the trials as a table."""
    lines = [
        f"memory of a step with {boxes} boxes an image; {usable / GIB:.2f} GiB are usable, {MARGIN:.0%} stay free",
        "micro_batch   largest batch       peak   fits",
    ]
    for trial in trials:
        shape = f"{trial.shape[0]} x {trial.shape[1]}"
        peak = "too much" if trial.peak is None else f"{trial.peak / GIB:.2f} GiB"
        lines.append(f"{trial.images:11} {shape:>15} {peak:>10}   {'yes' if trial.fits(usable) else 'no'}")
    return lines


def usable_bytes(device: torch.device) -> int:
    """Return how many bytes of its GPU's memory this process can use. Raises RecipeError on a CPU."""
    if device.type != "cuda":
        raise RecipeError(
            'train.micro_batch = "auto" tries steps on a GPU, and this run is on the CPU: set it to a number.'
        )
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def peak_bytes(
    recipe: Recipe, compute: Compute, device: torch.device, shape: Shape, counts: tuple[int, int, int]
) -> int | None:
    """Return the peak of allocated GPU memory, bytes, in `try_steps`; None where it is out of memory."""
    torch.cuda.reset_peak_memory_stats(device)
    peak = None
    try:
        try_steps(recipe, compute, device, shape, counts)
        peak = torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        pass  # what it held is freed below, once nothing refers to the exception
    gc.collect()  # a model with activation checkpointing is in a cycle
    torch.cuda.empty_cache()
    return peak


def try_steps(
    recipe: Recipe, compute: Compute, device: torch.device, shape: Shape, counts: tuple[int, int, int]
) -> None:
    """Take two steps of a new model with everything in memory that a run has there.

    counts: images of a micro-batch, micro-batches of this process's step, boxes of an image.
    """
    images, parts, boxes = counts
    model, criterion = build_model(recipe.model).to(device).train(), build_criterion(recipe)
    arrange(model, criterion, compute._replace(compile=False), num_shapes=1)
    optimizer = build_optimizer(model, recipe.optim)
    ema = build_ema(model, recipe.optim.ema_decay)
    # a step's batches are there while the next ones arrive
    held = [to_device(random_batch(shape, images, boxes, least=boxes), device) for _ in range(2 * parts)]
    for _ in range(STEPS):
        train_step(
            model,
            criterion,
            optimizer,
            held[: min(parts, 2)],  # gradients are there from the second one on; more adds nothing
            device=device,
            clip_norm=recipe.optim.clip_norm,
            precision=compute.precision,
        )
        if ema:
            ema.update()
