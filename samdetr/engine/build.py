"""Everything that training works on, built from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn

from samdetr.data.checks import raise_for_errors
from samdetr.data.loader import EvalLoader, Shard, TrainLoader
from samdetr.data.splits import Splits, bucket_shapes, build_dataset, load_splits
from samdetr.engine.checkpoint.folder import load_newest
from samdetr.engine.checkpoint.format import (
    AVERAGE,
    BEST,
    LAST,
    MODEL,
    OPTIMIZER,
    Progress,
    load_model_state,
    load_optimizer_state,
    model_tensors,
    optimizer_tensors,
)
from samdetr.engine.checkpoint.saving import Saver
from samdetr.engine.checkpoint.weights import load_initial_weights
from samdetr.engine.coco import Evaluator, choose_evaluator
from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.micro_batch import choose_micro_batch
from samdetr.engine.compute.precision import Compute, choose_compute
from samdetr.engine.distributed.parallel import distribute
from samdetr.engine.distributed.world import World, micro_batches_of
from samdetr.engine.ema import EMA
from samdetr.engine.failures.interrupt import StopSignal
from samdetr.engine.optim import NonFiniteGuard, RunningStatistics, build_optimizer
from samdetr.engine.run.folder import (
    CHECKPOINTS,
    environment_of,
    find_run,
    new_run,
    resume_command,
    run_of_launch,
    with_micro_batch_of,
    write_environment,
)
from samdetr.engine.run.log import Meter, Stopwatch, print_findings, step_values
from samdetr.engine.run.metrics import AsyncMetrics, Step
from samdetr.errors import CheckpointError
from samdetr.loss import Criterion, build_criterion
from samdetr.models import Detector, build_model

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


@dataclass
class Training:
    """Everything that the loop of `train` works on."""

    recipe: Recipe
    device: torch.device
    compute: Compute
    folder: Path
    splits: Splits
    world: World
    model: Detector
    parallel_model: nn.Module  # what to call for a forward pass in training: the model itself, in a process alone
    criterion: Criterion
    optimizer: NonFiniteGuard
    ema: EMA | None
    train_loader: TrainLoader
    val_loader: EvalLoader
    evaluator: Evaluator
    environment: Mapping[str, object]
    progress: Progress
    epoch_meter: Meter  # of the epoch's steps so far
    interval_meter: Meter  # of the steps since the last line of metrics.jsonl
    console: Console
    stop: StopSignal
    saver: Saver
    statistics: RunningStatistics | None  # of live BatchNorm, where a step may be skipped
    metrics: AsyncMetrics = field(default_factory=AsyncMetrics)
    failed: tuple[Step, list[float]] | None = None  # the step that ends the run, not finite, and its values
    graphs: StepGraphs | None = None

    def asked_to_stop(self) -> bool:
        """Whether any process was, by a signal. All of them must ask, at the same place."""
        agreed = self.world.all_reduce_max(self.stop.number or 0)
        if agreed:
            self.stop.number = agreed
        return bool(
            agreed
        )  # not the flag, which a signal may have set while the processes agreed: it is heard next time

    def save(self) -> None:
        """Start to write the checkpoint ``last``. All processes must call it, at the same step."""
        self.progress.epoch_sums = self.epoch_meter.to_json()
        self.progress.interval_sums = self.interval_meter.to_json()
        parts = {
            # other processes' statistics of BatchNorm are not the run's; first, as it gives up gathered layers
            MODEL: model_tensors(self.model, with_buffers=self.world.is_main),
            OPTIMIZER: optimizer_tensors(self.model, self.optimizer),
            AVERAGE: self.ema.averages if self.ema else {},
        }
        meta = {
            "recipe": self.recipe.model_dump(mode="json"),
            "categories": self.splits.categories.to_json(),
            "data": self.splits.fingerprint(),
            "environment": self.environment,
            "averaged_steps": self.ema.count if self.ema else 0,
        }
        self.saver.save(parts, self.progress, meta)

    def leave(self) -> None:
        """Answer a signal, once what was to be saved is on the disk: say how to continue, and end."""
        self.saver.wait()
        self.say_how_to_continue(f"stopped after step {self.progress.step}")
        self.stop.leave()

    def say_how_to_continue(self, what: str) -> None:
        """Print ``what`` happened, and the command that goes on from the last checkpoint, if there is one."""
        way = f"continue with: {resume_command(self.folder)}"
        if not (self.folder / CHECKPOINTS / LAST).exists():
            way = "there is no checkpoint yet, start it again"
        self.console.print(f"{what}; {way}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Start:
    """What a new run and one that goes on bring along."""

    folder: Path
    parallel_model: nn.Module
    optimizer: NonFiniteGuard
    ema: EMA | None
    progress: Progress
    note: str  # for the console


def _run_to_continue(recipe: Recipe, resume: str | None, world: World) -> Path | None:
    """The run that was asked for, or that this launch began before its processes were started again."""

    def find() -> tuple[Path | None]:
        wanted = run_of_launch(recipe) if resume is None else resume
        return (None if wanted is None else find_run(recipe, wanted),)

    return world.broadcast_from_main(find)[0]


def build_training(
    recipe: Recipe,
    *,
    resume: str | None,
    device: torch.device,
    world: World,
    console: Console,
    train_step: Callable[..., object],
) -> Training:
    """Everything from the recipe, in order; nothing is written before the data has passed its checks.

    train_step: tried where the recipe leaves the micro-batch open.
    """
    evaluator = choose_evaluator(recipe.eval.evaluator)
    folder = _run_to_continue(recipe, resume, world)
    recipe = recipe if folder is None else with_micro_batch_of(recipe, folder)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    splits = _read_data(recipe, world, console)
    compute = choose_compute(recipe.compute, device, buckets=recipe.data.batching == "buckets", processes=world.size)
    if recipe.train.micro_batch == "auto" and folder is None:
        recipe = choose_micro_batch(recipe, splits, compute, device, world, train_step=train_step, say=say)
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.model)
    train_loader, val_loader = build_loaders(recipe, splits, device, world)
    say(train_loader.describe())
    environment = environment_of(recipe, device)
    if folder is None:
        start = _begin(recipe, model, device, world, environment)
    else:
        start = _go_on(recipe, model, device, world, environment, folder=folder, data=splits.fingerprint(), say=say)
    say(f"model: {_size_and_place(model, recipe, device, world)}; {start.note}{_never_drops(recipe)}")
    say(f"run: {start.folder}")
    criterion = build_criterion(recipe)
    logged = step_values(criterion.logged)
    return Training(
        recipe=recipe,
        device=device,
        compute=compute,
        folder=start.folder,
        splits=splits,
        world=world,
        model=model,
        parallel_model=start.parallel_model,
        criterion=criterion,
        optimizer=start.optimizer,
        ema=start.ema,
        train_loader=train_loader,
        val_loader=val_loader,
        evaluator=evaluator,
        environment=environment,
        progress=start.progress,
        epoch_meter=Meter.from_json(logged, start.progress.epoch_sums),
        interval_meter=Meter.from_json(logged, start.progress.interval_sums),
        console=console,
        stop=StopSignal(speaks=world.is_main),
        saver=Saver(
            start.folder / CHECKPOINTS, world, keep=recipe.checkpoint.keep, timeout=recipe.parallel.timeout, say=say
        ),
        statistics=RunningStatistics(model) if recipe.train.skips_allowed else None,
    )


def _read_data(recipe: Recipe, world: World, console: Console) -> Splits:
    """Both splits, their findings printed. Raises DatasetError where they hold what cannot be trained on."""
    watch = Stopwatch()
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
        f"{len(splits.categories.ids)} categories, checked in {watch.lap():.1f} s"
    )
    return splits


def _begin(
    recipe: Recipe, model: Detector, device: torch.device, world: World, environment: Mapping[str, object]
) -> _Start:
    """A new run: its initial weights, and its folder, last."""
    note = load_initial_weights(model, recipe)
    parallel_model = distribute(model.to(device), recipe.parallel, world, device)
    optimizer = build_optimizer(model, recipe.optim, max_skips=recipe.train.skips_allowed)
    average = build_ema(model, recipe)
    folder = world.broadcast_from_main(lambda: new_run(recipe, environment))
    return _Start(folder, parallel_model, optimizer, average, Progress(), note)


def _go_on(
    recipe: Recipe,
    model: Detector,
    device: torch.device,
    world: World,
    environment: Mapping[str, object],
    *,
    folder: Path,
    data: object,
    say: Callable[[str], None],
) -> _Start:
    """The run in ``folder``, from its newest whole checkpoint. Raises CheckpointError if its ``data`` is another."""
    checkpoint = load_newest(folder / CHECKPOINTS, world, say)
    if checkpoint.meta["data"] != data:
        raise CheckpointError(
            f"--resume: the training split is not the one that {folder} was trained on "
            "(other images, boxes or categories): start a new run with init.checkpoint instead."
        )
    load_model_state(model, checkpoint, averaged=False)
    parallel_model = distribute(model.to(device), recipe.parallel, world, device)
    optimizer = build_optimizer(model, recipe.optim, max_skips=recipe.train.skips_allowed)
    load_optimizer_state(model, optimizer, checkpoint)
    average = build_ema(model, recipe)
    if average:
        average.load(checkpoint.average, checkpoint.meta["averaged_steps"])
    progress = replace(checkpoint.progress, finished=False)
    optimizer.consecutive_skips.fill_(progress.skips_in_row)
    if not (folder / CHECKPOINTS / BEST).exists():  # it was damaged: the next one is the best again
        progress.best_ap, progress.best_epoch = -1.0, -1
    if world.is_main and progress.epoch < recipe.train.epochs:
        write_environment(folder, environment, step=progress.step)
    return _Start(folder, parallel_model, optimizer, average, progress, f"continuing after step {progress.step}")


def _size_and_place(model: Detector, recipe: Recipe, device: torch.device, world: World) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    place = device if world.size == 1 else f"{device}, {world.size} processes ({recipe.parallel.strategy})"
    return f"{count:,} parameters on {place}"


def _never_drops(recipe: Recipe) -> str:
    drops = recipe.optim.drop_epochs
    if recipe.optim.schedule == "step" and min(drops, default=0) >= recipe.train.epochs:
        return f"; the learning rate never drops (optim.drop_epochs begin at {drops[0]})"
    return ""


def build_ema(model: Detector, recipe: Recipe) -> EMA | None:
    """The average that ``optim.ema_decay`` asks for."""
    return EMA(model, recipe.optim.ema_decay) if recipe.optim.ema_decay else None


def build_loaders(recipe: Recipe, splits: Splits, device: torch.device, world: World) -> tuple[TrainLoader, EvalLoader]:
    """The loaders of both splits. Raises RecipeError where the processes cannot share a step."""
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
