"""Training: `train` builds everything from a recipe and loops; `train_step` is one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from samdetr.data.checks import raise_for_errors
from samdetr.data.loader import EvalLoader, TrainLoader, build_eval_loader, build_train_loader
from samdetr.data.prefetch import prefetch
from samdetr.data.splits import Splits, batch_shapes, build_dataset, load_splits
from samdetr.engine.checkpoint import (
    LAST,
    Progress,
    load_checkpoint,
    load_model_state,
    load_optimizer_state,
    restore_links,
    save_checkpoint,
    update_progress,
)
from samdetr.engine.coco import Evaluator, choose_evaluator, coco_evaluate
from samdetr.engine.compile import Compute, choose_compute, computing_in, prepare_step
from samdetr.engine.cuda_graph import StepGraphs
from samdetr.engine.evaluate import detect
from samdetr.engine.interrupt import StopSignal
from samdetr.engine.log import STEP_VALUES, Meter, RunLog, Stopwatch, print_findings
from samdetr.engine.optim import GuardedAdamW, build_optimizer, lr_factor, set_learning_rate
from samdetr.engine.pictures import draw_validation
from samdetr.engine.profile import StepProfiler
from samdetr.engine.readings import Readings, Step
from samdetr.engine.run_folder import (
    CHECKPOINTS,
    METRICS_FILE,
    environment_of,
    find_run,
    new_run,
    resume_command,
    write_environment,
)
from samdetr.engine.setup import choose_device, load_initial_weights
from samdetr.errors import CheckpointError, DataError, NonFiniteError, SamdetrError
from samdetr.loss import SetCriterion, build_criterion
from samdetr.models import SAMDETR, build_model
from samdetr.recipe import with_absolute_paths
from samdetr.structures import Batch
from samdetr.visualize.curves import plot_curves

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


class StepResult(NamedTuple):
    """What one optimizer step reports, still on the device."""

    values: Tensor  # [6] float, in the order of log.STEP_VALUES


def train_step(
    model: nn.Module,
    criterion: SetCriterion,
    optimizer: GuardedAdamW,
    batch: Sequence[Batch],
    *,
    device: torch.device,
    clip_norm: float,
    precision: torch.dtype = torch.float32,
    graphs: StepGraphs | None = None,
) -> StepResult:
    """Forward, loss, backward over the micro-batches, then clip and update: one step of the whole batch.

    The loss is divided by the number of boxes of the whole step, so that its gradient does not depend on how the
    batch is split. clip_norm 0: no clipping. precision: what matrix products and convolutions compute in, float32
    or bfloat16; parameters, boxes, costs and losses are float32 either way. graphs: replayed instead, if given.
    Nothing waits for the device: where the matching cost, the loss or the gradient is not finite, the optimizer
    changes nothing in this step or a later one.
    """
    optimizer.zero_grad(set_to_none=graphs is None)
    moved = [micro.to(device) for micro in batch]
    num_boxes = torch.stack([micro.targets.counts.sum() for micro in moved]).sum()
    run = graphs.forward_backward if graphs else partial(forward_backward, model, criterion, precision=precision)
    values = torch.stack([run(micro, num_boxes) for micro in moved])
    loss = values[:, 0].sum()
    grad_norm = graphs.update(loss) if graphs else update(optimizer, clip_norm, loss)
    *sums, class_error = values.sum(0).unbind()
    return StepResult(torch.stack([*sums, class_error / len(moved), grad_norm]))


def forward_backward(
    model: nn.Module, criterion: SetCriterion, batch: Batch, num_boxes: Tensor, *, precision: torch.dtype
) -> Tensor:
    """Add the gradients of one micro-batch to those of the parameters; its values [5], as in log.STEP_VALUES."""
    with computing_in(precision, batch.images.device):
        outputs = model(batch.images, batch.image_sizes)
    losses = criterion(outputs, batch.targets, num_boxes)
    losses.total.backward()
    terms = losses.terms
    return torch.stack(
        [losses.total.detach(), terms["loss_ce"], terms["loss_bbox"], terms["loss_giou"], terms["class_error"]]
    )


def update(optimizer: GuardedAdamW, clip_norm: float, loss: Tensor) -> Tensor:
    """Clip the gradients and take the optimizer's step; returns their norm before. All on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm else float("inf"))
    optimizer.guard(loss + grad_norm)
    optimizer.step()
    return grad_norm


@dataclass
class Training:
    """Everything that the loop of `train` works on."""

    recipe: Recipe
    device: torch.device
    compute: Compute
    folder: Path
    splits: Splits
    model: SAMDETR
    criterion: SetCriterion
    optimizer: GuardedAdamW
    train_loader: TrainLoader
    val_loader: EvalLoader
    evaluator: Evaluator
    environment: Mapping[str, object]
    progress: Progress
    epoch_meter: Meter  # of the epoch's steps so far
    interval_meter: Meter  # of the steps since the last line of metrics.jsonl
    console: Console
    stop: StopSignal
    readings: Readings = field(default_factory=Readings)
    graphs: StepGraphs | None = None

    def save(self) -> None:
        """Write the checkpoint ``last``."""
        self.progress.epoch_sums = self.epoch_meter.to_json()
        self.progress.interval_sums = self.interval_meter.to_json()
        save_checkpoint(
            self.folder / CHECKPOINTS,
            model=self.model,
            optimizer=self.optimizer,
            progress=self.progress,
            meta={
                "recipe": self.recipe.model_dump_json(),
                "categories": self.splits.categories.to_json(),
                "data": self.splits.fingerprint(),
                "environment": self.environment,
            },
        )

    def leave(self) -> None:
        """Answer a signal, once everything is saved: say how to continue, and end."""
        self.say_how_to_continue(f"stopped after step {self.progress.step}")
        self.stop.leave()

    def say_how_to_continue(self, what: str) -> None:
        """Print ``what`` happened, and the command that goes on from the last checkpoint, if there is one."""
        way = f"continue with: {resume_command(self.folder)}"
        if not (self.folder / CHECKPOINTS / LAST).exists():
            way = "there is no checkpoint yet, start it again"
        self.console.print(f"{what}; {way}", markup=False, highlight=False, soft_wrap=True)


def train(recipe: Recipe, *, resume: str | None = None, profile: bool = False) -> Path:
    """Train as the recipe says and return the run folder.

    resume: None starts a new run; a run folder continues it from its last checkpoint; "" continues the newest
    unfinished run of the recipe's name. A run that is stopped at any step and continued gives the same numbers.
    profile: write a profile of a few steps into the run folder's ``profile``; those steps are slower.
    Raises SamdetrError for a problem of the recipe, the data, the disk or the numbers; KeyboardInterrupt or
    SystemExit(143) after a signal, once the checkpoint is written.
    """
    recipe = with_absolute_paths(recipe)
    training = build_training(recipe, resume=resume, console=Console())
    progress, epochs = training.progress, recipe.train.epochs
    log = RunLog(
        training.folder,
        epochs=epochs,
        steps=training.train_loader.steps_per_epoch * epochs,
        evaluations=sum(is_evaluated(recipe, epoch) for epoch in range(progress.epoch, epochs)),
        progress=progress,
        console=training.console,
    )
    try:
        with training.stop, log, StepProfiler(training.folder / "profile" if profile else None, log.note) as profiler:
            training.graphs = start_step(training, log)
            while progress.epoch < epochs:
                if training.stop:
                    training.leave()
                if not progress.evaluation_due:
                    train_epoch(training, log, profiler)
                    training.save()
                best = is_evaluated(recipe, progress.epoch) and evaluate_epoch(training, log)
                progress.epoch, progress.step_in_epoch, progress.evaluation_due = progress.epoch + 1, 0, False
                progress.finished = progress.epoch == epochs
                update_progress(training.folder / CHECKPOINTS, progress, best=best)
                plot_curves(training.folder / METRICS_FILE, training.folder / "curves.png")
    except KeyboardInterrupt:
        if training.stop.at_once:
            training.say_how_to_continue("stopped at once; what came after the last checkpoint is lost")
        raise
    except DataError:
        training.save()  # an image that cannot be used is found between two steps: nothing done is lost
        raise
    except torch.OutOfMemoryError as error:
        raise SamdetrError(
            f"{training.device} is out of memory: lower train.micro_batch (in an evaluation eval.batch), or "
            f"augment.max_size, then continue with --resume {training.folder} if a checkpoint was written."
        ) from error
    finally:
        training.train_loader.close()
        training.val_loader.close()
    found = f"best AP {progress.best_ap:.3f} in epoch {progress.best_epoch + 1}; " if progress.best_epoch >= 0 else ""
    log.note(f"finished: {found}everything is in {training.folder}")
    return training.folder


def start_step(training: Training, log: RunLog) -> StepGraphs | None:
    """Compile and record the step as the recipe asks; a signal stops between two shapes."""
    model, criterion, optimizer = training.model, training.criterion, training.optimizer
    model.train()

    def started(what: str) -> None:
        log.starting(what)
        if training.stop:
            training.leave()

    return prepare_step(
        model,
        criterion,
        optimizer,
        partial(forward_backward, model, criterion),
        partial(update, optimizer, training.recipe.optim.clip_norm),
        compute=training.compute,
        on_failure=training.recipe.compute.on_failure,
        shapes=training.train_loader.shapes or (),
        micro_batch=training.recipe.train.micro_batch,
        max_objects=training.train_loader.max_objects,
        device=training.device,
        started=started,
        note=log.note,
    )


def train_epoch(training: Training, log: RunLog, profiler: StepProfiler) -> None:
    """Take the epoch's remaining steps."""
    recipe, progress, epoch = training.recipe, training.progress, training.progress.epoch
    training.model.train()
    batches = prefetch(training.train_loader.epoch(epoch, progress.step_in_epoch), training.device)
    total, data = Stopwatch(), Stopwatch()
    for batch in batches:
        waited = data.lap()
        factor = lr_factor(recipe.optim, step=progress.step, epoch=epoch, total_steps=log.steps)
        set_learning_rate(training.optimizer, factor)
        torch.manual_seed(step_seed(recipe.run.seed, progress.step))
        result = train_step(
            training.model,
            training.criterion,
            training.optimizer,
            batch,
            device=training.device,
            clip_norm=recipe.optim.clip_norm,
            precision=training.compute.precision,
            graphs=training.graphs,
        )
        progress.step += 1
        progress.step_in_epoch += 1
        image_ids = [number for micro in batch for number in micro.image_ids.tolist()]
        training.readings.add(Step(progress.step, epoch, recipe.optim.lr * factor, image_ids), result.values)
        log.step(epoch, seconds=total.lap(), waited=waited, images=recipe.train.total_batch)
        profiler.step()
        if training.device.type == "cpu" or progress.step % recipe.train.log_every == 0:
            training.readings.send()
        report_steps(training, log, training.readings.arrived())
        if training.stop:
            report_steps(training, log, training.readings.all())
            training.save()
            training.leave()
        data.lap()
    report_steps(training, log, training.readings.all())
    log.epoch(epoch, training.epoch_meter.means())
    progress.evaluation_due, training.epoch_meter = True, Meter()


def report_steps(training: Training, log: RunLog, steps: Iterator[tuple[Step, list[float]]]) -> None:
    """Count steps whose values have arrived. Raises NonFiniteError at the first that was not finite."""
    for step, values in steps:
        if not math.isfinite(values[STEP_VALUES.index("loss")] + values[STEP_VALUES.index("grad_norm")]):
            raise NonFiniteError(
                f"the loss or its gradient is not finite at step {step.number} (epoch {step.epoch + 1}, image ids "
                f"{', '.join(map(str, step.image_ids))}); no parameter was changed by this step or after it. Lower "
                f"optim.lr or look at these images; what was saved is in {log.folder}."
            )
        training.epoch_meter.add(values)
        training.interval_meter.add(values)
        if step.number % training.recipe.train.log_every == 0:
            log.interval(step.epoch, step.number, training.interval_meter.means(), step.lr)
            training.interval_meter = Meter()


def evaluate_epoch(training: Training, log: RunLog) -> bool:
    """Evaluate, report and draw; True if this is the best AP so far."""
    recipe, progress = training.recipe, training.progress

    def after_batch(done: int) -> None:
        log.evaluating(progress.epoch, done, len(training.val_loader))
        if training.stop:
            training.leave()  # the epoch's steps are saved; its evaluation is done when the run continues

    watch = Stopwatch()
    results = detect(
        training.model,
        training.val_loader,
        training.splits.categories,
        device=training.device,
        top_k=recipe.eval.top_k,
        precision=training.compute.precision,
        after_batch=after_batch,
    )
    evaluation = coco_evaluate(training.splits.val, results, evaluator=training.evaluator)
    ap = evaluation.stats["AP"]
    best = ap > progress.best_ap
    if best:
        progress.best_ap, progress.best_epoch = ap, progress.epoch
    log.evaluation(
        progress.epoch,
        evaluation.stats,
        evaluation.per_class,
        evaluator=training.evaluator,
        seconds=watch.lap(),
        best=best,
    )
    draw_validation(
        training.folder / "val_predictions.png",
        training.splits.val,
        results,
        training.splits.categories,
        max_pixels=recipe.data.max_pixels,
    )
    return best


def build_training(recipe: Recipe, *, resume: str | None, console: Console) -> Training:
    """Everything from the recipe, in order; nothing is written before the data has passed its checks."""
    device = choose_device(recipe.run.device, recipe.compute.kernels)
    evaluator = choose_evaluator(recipe.eval.evaluator)
    folder = None if resume is None else find_run(recipe, resume)
    watch = Stopwatch()
    with console.status("reading and checking the data"):
        splits = load_splits(recipe.data, num_queries=recipe.model.num_queries, num_classes=recipe.model.num_classes)
    print_findings(console, [row for report in splits.reports for row in report.rows()])
    raise_for_errors(splits.reports)
    console.print(
        f"data: {len(splits.train.image_ids)} train and {len(splits.val.image_ids)} val images, "
        f"{len(splits.categories.ids)} categories, checked in {watch.lap():.1f} s"
    )
    torch.manual_seed(recipe.run.seed)
    model = build_model(recipe.model)
    train_loader, val_loader = build_loaders(recipe, splits, device)
    console.print(train_loader.describe(), markup=False, highlight=False, soft_wrap=True)
    compute = choose_compute(recipe.compute, device, buckets=train_loader.shapes is not None)
    progress, environment = Progress(), environment_of(recipe, device)
    if folder is None:
        note = load_initial_weights(model, recipe)
        model.to(device)
        optimizer = build_optimizer(model, recipe.optim)
        folder = new_run(recipe, environment)
    else:
        restore_links(folder / CHECKPOINTS)
        checkpoint = load_checkpoint((folder / CHECKPOINTS / LAST).resolve(), with_optimizer=True)
        if checkpoint.meta["data"] != splits.fingerprint():
            raise CheckpointError(
                f"--resume: the training split is not the one that {folder} was trained on "
                "(other images, boxes or categories): start a new run with init.checkpoint instead."
            )
        load_model_state(model, checkpoint)
        model.to(device)
        optimizer = build_optimizer(model, recipe.optim)
        load_optimizer_state(model, optimizer, checkpoint)
        progress = replace(checkpoint.progress, finished=False)
        write_environment(folder, environment, step=progress.step)
        note = f"continuing after step {progress.step}"
    count = sum(parameter.numel() for parameter in model.parameters())
    if recipe.optim.schedule == "step" and min(recipe.optim.drop_epochs, default=0) >= recipe.train.epochs:
        note += f"; the learning rate never drops (optim.drop_epochs begin at {recipe.optim.drop_epochs[0]})"
    for line in (f"model: {count:,} parameters on {device}; {note}", f"run: {folder}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return Training(
        recipe=recipe,
        device=device,
        compute=compute,
        folder=folder,
        splits=splits,
        model=model,
        criterion=build_criterion(recipe),
        optimizer=optimizer,
        train_loader=train_loader,
        val_loader=val_loader,
        evaluator=evaluator,
        environment=environment,
        progress=progress,
        epoch_meter=Meter.from_json(progress.epoch_sums),
        interval_meter=Meter.from_json(progress.interval_sums),
        console=console,
        stop=StopSignal(),
    )


def build_loaders(recipe: Recipe, splits: Splits, device: torch.device) -> tuple[TrainLoader, EvalLoader]:
    """The loaders of both splits."""
    seed, categories = recipe.run.seed, splits.categories
    pin_memory = device.type == "cuda"
    train_set, val_set = (
        build_dataset(data, categories, recipe.data, recipe.augment, seed=seed, training=training)
        for data, training in ((splits.train, True), (splits.val, False))
    )
    train_loader = build_train_loader(
        train_set,
        total_batch=recipe.train.total_batch,
        micro_batch=recipe.train.micro_batch,
        workers=recipe.data.workers,
        seed=seed,
        pin_memory=pin_memory,
        shapes=batch_shapes(train_set, recipe.data),
    )
    val_loader = build_eval_loader(val_set, batch=recipe.eval.batch, workers=recipe.data.workers, pin_memory=pin_memory)
    return train_loader, val_loader


def is_evaluated(recipe: Recipe, epoch: int) -> bool:
    """Whether the epoch (from 0) ends with an evaluation; the last one always does."""
    return (epoch + 1) % recipe.eval.every == 0 or epoch + 1 == recipe.train.epochs


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout: a function of its number alone, so that a continued run repeats it."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
