"""Build a run from its recipe: its data, its model and train state, and its folder, new or to be continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from torch import nn

from samdetr.data.checks import raise_for_errors
from samdetr.data.loader import EvalLoader, Shard, TrainLoader
from samdetr.data.splits import Splits, bucket_shapes, build_dataset, load_splits
from samdetr.engine.checkpoint.folder import load_newest
from samdetr.engine.checkpoint.format import BEST, Checkpoint, Progress, load_model_state, load_optimizer_state
from samdetr.engine.checkpoint.weights import load_initial_weights
from samdetr.engine.coco import Evaluator, choose_evaluator
from samdetr.engine.compute.precision import Compute, choose_compute
from samdetr.engine.distributed.parallel import distribute
from samdetr.engine.distributed.world import World, micro_batches_of
from samdetr.engine.ema import build_ema
from samdetr.engine.micro_batch import choose_micro_batch
from samdetr.engine.optim import build_optimizer
from samdetr.engine.run.folder import (
    CHECKPOINTS,
    environment_of,
    find_run,
    new_run,
    run_of_launch,
    with_micro_batch_of,
    write_environment,
)
from samdetr.engine.run.log import Timer, print_findings, print_line
from samdetr.engine.run.metrics import step_values
from samdetr.engine.state import Meter, TrainState
from samdetr.errors import CheckpointError
from samdetr.loss import Criterion, build_criterion
from samdetr.models import Detector, build_model

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


class Run(NamedTuple):
    """Everything `train` needs."""

    recipe: Recipe  # with a number as its micro-batch
    folder: Path
    facts: Mapping[str, object]  # the same in every checkpoint
    compute: Compute
    splits: Splits
    train_loader: TrainLoader
    val_loader: EvalLoader
    evaluator: Evaluator
    state: TrainState
    parallel_model: nn.Module  # what a forward pass in training calls: the model itself, in a single process
    criterion: Criterion


def build_run(recipe: Recipe, *, resume: str | None, device: torch.device, world: World, console: Console) -> Run:
    """Build everything from the recipe, in order; nothing is written before the data has passed its checks."""
    evaluator = choose_evaluator(recipe.eval.evaluator)
    folder = _run_to_continue(recipe, resume, world)
    recipe = recipe if folder is None else with_micro_batch_of(recipe, folder)
    say = partial(print_line, console)
    splits = _read_data(recipe, world, console)
    compute = choose_compute(recipe.compute, device, buckets=recipe.data.batching == "buckets", processes=world.size)
    if recipe.train.micro_batch == "auto" and folder is None:
        recipe = choose_micro_batch(recipe, splits, compute, device, world, say)
    torch.manual_seed(recipe.run.seed)
    model, criterion = build_model(recipe.model), build_criterion(recipe)
    train_loader, val_loader = build_loaders(recipe, splits, device, world)
    say(train_loader.describe())
    environment = environment_of(recipe, device)
    checkpoint = None if folder is None else _checkpoint_to_continue(folder, splits, world, say)
    origin = load_initial_weights(model, recipe) if checkpoint is None else ""
    state, parallel_model = build_state(recipe, model, criterion, checkpoint, device, world)
    if folder is None:
        folder = world.broadcast_from_main(lambda: new_run(recipe, environment))
    else:
        origin = f"continuing after step {state.progress.step}"
        _continue_folder(folder, state.progress, environment, world, epochs=recipe.train.epochs)
    say(f"model: {_size_and_place(model, recipe, device, world)}; {origin}{_never_drops(recipe)}")
    say(f"run: {folder}")
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "categories": splits.categories.to_json(),
        "data": splits.fingerprint(),
        "environment": environment,
    }
    return Run(
        recipe=recipe,
        folder=folder,
        facts=facts,
        compute=compute,
        splits=splits,
        train_loader=train_loader,
        val_loader=val_loader,
        evaluator=evaluator,
        state=state,
        parallel_model=parallel_model,
        criterion=criterion,
    )


def build_state(
    recipe: Recipe,
    model: Detector,
    criterion: Criterion,
    checkpoint: Checkpoint | None,
    device: torch.device,
    world: World,
) -> tuple[TrainState, nn.Module]:
    """Put the model on its device, among the processes, and build its optimizer, average and progress.

    model: on the CPU, with its initial weights. checkpoint: if given, replaces the initial weights. Returns the
    state, and the module that a forward pass in training calls.
    """
    if checkpoint is not None:
        load_model_state(model, checkpoint, averaged=False)
    parallel_model = distribute(model.to(device), recipe.parallel, world, device)
    optimizer = build_optimizer(model, recipe.optim, max_skips=recipe.train.skips_allowed)
    ema, progress = build_ema(model, recipe.optim.ema_decay), Progress()
    if checkpoint is not None:
        load_optimizer_state(model, optimizer, checkpoint)
        if ema:
            ema.load(checkpoint.average, checkpoint.meta["averaged_steps"])
        progress = replace(checkpoint.progress, finished=False)
        optimizer.consecutive_skips.fill_(progress.skips_in_row)
    names = step_values(criterion.logged)
    meters = (Meter.from_json(names, sums) for sums in (progress.epoch_sums, progress.interval_sums))
    return TrainState(model, optimizer, ema, progress, *meters), parallel_model


def build_loaders(recipe: Recipe, splits: Splits, device: torch.device, world: World) -> tuple[TrainLoader, EvalLoader]:
    """Build the loaders of both splits. Raises RecipeError where the processes cannot share a step."""
    micro_batches_of(world, total_batch=recipe.train.total_batch, micro_batch=recipe.train.images)
    shard = Shard(world.rank, world.size)
    seed, categories = recipe.run.seed, splits.categories
    pin_memory = device.type == "cuda"
    train_set, val_set = (
        build_dataset(data, categories, recipe.data, recipe.augment, seed=seed, training=training)
        for data, training in ((splits.train, True), (splits.val, False))
    )
    train_loader = TrainLoader(
        train_set,
        total_batch=recipe.train.total_batch,
        micro_batch=recipe.train.images,
        workers=recipe.data.workers,
        seed=seed,
        pin_memory=pin_memory,
        bucket_shapes=bucket_shapes(train_set, recipe.data),
        shard=shard,
    )
    val_loader = EvalLoader(
        val_set, batch=recipe.eval.batch, workers=recipe.data.workers, pin_memory=pin_memory, shard=shard
    )
    return train_loader, val_loader


def _run_to_continue(recipe: Recipe, resume: str | None, world: World) -> Path | None:
    """Find the run that was asked for, or that this launch began before its processes were restarted."""

    def find() -> tuple[Path | None]:
        wanted = run_of_launch(recipe) if resume is None else resume
        return (None if wanted is None else find_run(recipe, wanted),)

    return world.broadcast_from_main(find)[0]


def _read_data(recipe: Recipe, world: World, console: Console) -> Splits:
    """Read both splits and print their findings. Raises DatasetError where they hold what cannot be trained on."""
    timer = Timer()
    with console.status("reading and checking the data"), world.local_main_first():
        splits = load_splits(
            recipe.data,
            num_queries=recipe.model.most_objects,
            num_classes=recipe.model.num_classes,
            no_object=recipe.loss.classification == "softmax",
        )
        print_findings(console, [row for report in splits.reports for row in report.rows()])
        raise_for_errors(splits.reports)
    console.print(
        f"data: {len(splits.train.image_ids)} train and {len(splits.val.image_ids)} val images, "
        f"{len(splits.categories.ids)} categories, checked in {timer.lap():.1f} s"
    )
    return splits


def _checkpoint_to_continue(folder: Path, splits: Splits, world: World, say: Callable[[str], None]) -> Checkpoint:
    """Load the run's newest whole checkpoint. Raises CheckpointError if it was trained on other data."""
    checkpoint = load_newest(folder / CHECKPOINTS, world, say)
    if checkpoint.meta["data"] != splits.fingerprint():
        raise CheckpointError(
            f"--resume: the training split is not the one that {folder} was trained on "
            "(other images, boxes or categories): start a new run with init.checkpoint instead."
        )
    return checkpoint


def _continue_folder(
    folder: Path, progress: Progress, environment: Mapping[str, object], world: World, *, epochs: int
) -> None:
    """Record the environment in which a run continues; reset its best AP if the best checkpoint is missing."""
    if not (folder / CHECKPOINTS / BEST).exists():  # it was damaged: the next one is the best again
        progress.best_ap, progress.best_epoch = -1.0, -1
    if world.is_main and progress.epoch < epochs:
        write_environment(folder, environment, step=progress.step)


def _size_and_place(model: Detector, recipe: Recipe, device: torch.device, world: World) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    place = device if world.size == 1 else f"{device}, {world.size} processes ({recipe.parallel.strategy})"
    return f"{count:,} parameters on {place}"


def _never_drops(recipe: Recipe) -> str:
    """Warn of a step schedule whose first drop is after the last epoch."""
    drops = recipe.optim.drop_epochs
    if recipe.optim.schedule == "step" and min(drops, default=0) >= recipe.train.epochs:
        return f"; the learning rate never drops (optim.drop_epochs begin at {drops[0]})"
    return ""
