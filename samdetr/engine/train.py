"""Training: `train` builds everything from a recipe and loops over its epochs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from samdetr.data.device import prefetch
from samdetr.engine.build import Training, build_training
from samdetr.engine.checkpoint.weights import choose_device
from samdetr.engine.coco import CocoDetections, coco_evaluate
from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.start_up import prepare_step
from samdetr.engine.distributed.world import init_world, is_communication_error
from samdetr.engine.evaluate import detect, gather_detections
from samdetr.engine.failures.nonfinite import report_all, report_steps
from samdetr.engine.failures.out_of_memory import START_UP, named, placing, said_of_training
from samdetr.engine.failures.replay import step_seed
from samdetr.engine.optim import lr_factor, set_learning_rate
from samdetr.engine.run.folder import METRICS_FILE, resume_command
from samdetr.engine.run.log import Meter, RunLog, Stopwatch
from samdetr.engine.run.metrics import RunAheadLimit, Step
from samdetr.engine.run.pictures import draw_validation
from samdetr.engine.run.profile import StepProfiler
from samdetr.engine.step import forward_backward, train_step, update
from samdetr.errors import DataError, SamdetrError
from samdetr.recipe import with_absolute_paths
from samdetr.structures import Batch
from samdetr.visualize.curves import plot_curves

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


def train(recipe: Recipe, *, resume: str | None = None, profile: bool = False) -> Path:
    """Train as the recipe says and return the run folder.

    resume: None starts a new run; a run folder continues it from its last checkpoint; "" continues the newest
    unfinished run of the recipe's name. A run that is stopped at any step and continued gives the same numbers.
    profile: write a profile of a few steps into the run folder's ``profile``; those steps are slower.
    Raises SamdetrError for a problem of the recipe, the data, the disk or the numbers; KeyboardInterrupt or
    SystemExit(143) after a signal, once the checkpoint is written.
    """
    recipe = with_absolute_paths(recipe)
    device = choose_device(recipe.run.device, recipe.compute.kernels)
    with init_world(device, recipe.parallel) as world:
        console = Console(quiet=not world.is_main)
        with placing(device, START_UP):
            training = build_training(
                recipe, resume=resume, device=device, world=world, console=console, train_step=train_step
            )
        return run(training, profile=profile)


def run(training: Training, *, profile: bool) -> Path:
    """The epochs that are left, each with its evaluation; returns the run folder. See `train`."""
    recipe, progress, world = training.recipe, training.progress, training.world
    epochs = recipe.train.epochs
    log = RunLog(
        training.folder,
        epochs=epochs,
        steps=training.train_loader.steps_per_epoch * epochs,
        evaluations=sum(is_evaluated(recipe, epoch) for epoch in range(progress.epoch, epochs)),
        progress=progress,
        console=training.console,
        writes=world.is_main,
    )
    profiled = training.folder / "profile" if profile and world.is_main else None
    with training.stop, translate_errors(training), log, StepProfiler(profiled, log.note) as profiler:
        with named(lambda: START_UP):
            training.graphs = start_step(training, log)
        while progress.epoch < epochs:
            if training.asked_to_stop():
                training.leave()
            if not progress.evaluation_due:
                train_epoch(training, log, profiler)
                training.save()
            best = is_evaluated(recipe, progress.epoch) and evaluate_epoch(training, log)
            progress.epoch, progress.step_in_epoch, progress.evaluation_due = progress.epoch + 1, 0, False
            progress.finished = progress.epoch == epochs
            training.saver.update(progress, best=best)
            if world.is_main:
                plot_curves(training.folder / METRICS_FILE, training.folder / "curves.png")
    found = f"best AP {progress.best_ap:.3f} in epoch {progress.best_epoch + 1}; " if progress.best_epoch >= 0 else ""
    log.note(f"finished: {found}everything is in {training.folder}")
    return training.folder


@contextmanager
def translate_errors(training: Training) -> Iterator[None]:
    """Ends the loaders' processes; makes sentences, which say how to go on, of what torch raises."""
    folder = training.folder
    try:
        yield
    except KeyboardInterrupt:
        if training.stop.at_once:
            training.saver.end(at_once=True)
            training.say_how_to_continue("stopped at once; what came after the last checkpoint is lost")
            training.stop.leave()
        raise
    except SamdetrError as error:
        training.saver.end()
        if training.saver.failed:  # before this: a full disk stops the pictures too
            training.console.print(str(error), markup=False, highlight=False, soft_wrap=True)
            training.saver.wait()
        raise
    except torch.OutOfMemoryError as error:
        training.saver.end()  # what it writes is there to go on from
        raise SamdetrError(said_of_training(training, error)) from error
    except RuntimeError as error:
        if training.world.size == 1 or not is_communication_error(error):
            raise
        silent = ", ".join(map(str, training.world.unresponsive_ranks())) or "none of them now"
        place = [frame.name for frame in traceback.extract_tb(error.__traceback__) if "samdetr" in frame.filename][-1]
        raise SamdetrError(
            f"a process does not answer (silent: {silent}) after step {training.progress.step}, in {place}: "
            f"{str(error).splitlines()[0]}; it hangs or has ended, and what it last said stands above. Continue with "
            f"{resume_command(folder)}."
        ) from error
    finally:
        training.saver.end(at_once=training.stop.at_once)
        torch.compiler.set_stance("default")  # a failed compilation may have changed it, for the whole process
        training.train_loader.close()
        training.val_loader.close()


def start_step(training: Training, log: RunLog) -> StepGraphs | None:
    """Compile and record the step as the recipe asks; a signal stops between two shapes."""
    model, criterion, optimizer = training.model, training.criterion, training.optimizer
    model.train()
    values_of = partial(forward_backward, training.parallel_model, criterion)

    def started(what: str) -> None:
        log.starting(what)
        if training.asked_to_stop():
            training.leave()

    return prepare_step(
        model,
        criterion,
        optimizer,
        values_of,
        partial(update, optimizer, training.recipe.optim.clip_norm),
        compute=training.compute,
        on_failure=training.recipe.compute.on_failure,
        shapes=training.train_loader.bucket_shapes or (),
        micro_batch=training.recipe.train.images,
        max_objects=training.train_loader.max_objects,
        device=training.device,
        started=started,
        note=log.note,
    )


def train_epoch(training: Training, log: RunLog, profiler: StepProfiler) -> None:
    """Take the epoch's remaining steps."""
    recipe, progress, epoch = training.recipe, training.progress, training.progress.epoch
    training.model.train()
    total, data, lead = Stopwatch(), Stopwatch(), RunAheadLimit(training.device)
    for batch in agreed_batches(training, log):
        waited = data.lap()
        if training.statistics:
            training.statistics.keep()
        factor = lr_factor(recipe.optim, step=progress.step, epoch=epoch, total_steps=log.steps)
        set_learning_rate(training.optimizer, factor)
        first = training.world.rank
        places = range(first, first + len(batch) * training.world.size, training.world.size)
        result = train_step(
            training.parallel_model,
            training.criterion,
            training.optimizer,
            batch,
            device=training.device,
            clip_norm=recipe.optim.clip_norm,
            precision=training.compute.precision,
            graphs=training.graphs,
            world=training.world,
            seeds=[step_seed(recipe.run.seed, progress.step, place) for place in places],
        )
        skipped = training.optimizer.found_inf if training.statistics else None
        if training.statistics:
            training.statistics.undo(training.optimizer.found_inf)
        if training.ema:
            training.ema.update(skipped)
        step = Step(progress.step + 1, epoch, progress.step_in_epoch, recipe.optim.lr * factor)
        training.metrics.add(step, result.values)
        lead.step()
        progress.step += 1
        progress.step_in_epoch += 1
        log.step(epoch, seconds=total.lap(), waited=waited, images=recipe.train.total_batch)
        profiler.step()
        if training.device.type == "cpu" or progress.step % recipe.train.log_every == 0:
            training.metrics.flush()
        report_steps(training, log, training.metrics.ready())
        if is_saved(training):
            report_all(training, log)
            training.save()
        data.lap()
    report_all(training, log)
    log.epoch(epoch, training.epoch_meter.means())
    progress.evaluation_due, training.epoch_meter = True, Meter(training.epoch_meter.names)


def agreed_batches(training: Training, log: RunLog) -> Iterator[list[Batch]]:
    """This process's batches of the epoch's remaining steps, on the device, while every process has the next one.

    Where one was asked to stop, or met an image that cannot be used, all save after the same step and end; the
    DataError is raised in the process that met it. Where a save has failed, all end with its reason; where a step was
    not finite, which a GPU may tell one process before another, all end with its file (`report_all`).
    """
    progress = training.progress
    batches = prefetch(training.train_loader.epoch(progress.epoch, progress.step_in_epoch), training.device)
    while progress.step_in_epoch < training.train_loader.steps_per_epoch:
        batch, failure = None, None
        try:
            batch = next(batches)
        except DataError as error:
            failure = error
        own = 3 if training.failed else 2 if training.saver.failed else int(failure is not None)
        failed = training.world.all_reduce_max(own)
        if failed == 3:
            report_all(training, log)
        if failed == 2:
            training.saver.wait()
            raise SystemExit(1)  # of another process, which says so
        if training.asked_to_stop() or failed:
            report_all(training, log)
            training.save()  # between two steps: nothing done is lost
            training.saver.wait()
            if failed:
                raise failure or SystemExit(1)  # the process that met it says so
            training.leave()
        assert batch is not None
        yield batch


def evaluate_epoch(training: Training, log: RunLog) -> bool:
    """Evaluate, report and draw; True if this is the best AP so far."""
    recipe, progress = training.recipe, training.progress

    def after_batch(done: int) -> None:
        log.evaluating(progress.epoch, done, len(training.val_loader))
        if training.asked_to_stop():
            training.leave()  # the epoch's steps are saved; its evaluation is done when the run continues

    watch = Stopwatch()
    with training.ema.in_place() if training.ema else nullcontext():
        found = detect(
            training.model,
            training.val_loader,
            training.splits.categories,
            device=training.device,
            top_k=recipe.eval.top_k,
            classification=recipe.loss.classification,
            precision=training.compute.precision,
            after_batch=after_batch,
        )
    results = gather_detections(found, training.world, training.splits.val.image_ids)
    ap = training.world.broadcast_from_main(
        lambda: report_evaluation(training, log, results, watch) if results is not None else -1.0
    )
    best = ap > progress.best_ap
    if best:
        progress.best_ap, progress.best_epoch = ap, progress.epoch
    return best


def report_evaluation(training: Training, log: RunLog, results: CocoDetections, watch: Stopwatch) -> float:
    """The COCO numbers of the val split's detections, in the log and as pictures; returns AP."""
    recipe, progress = training.recipe, training.progress
    evaluation = coco_evaluate(training.splits.val, results, evaluator=training.evaluator)
    ap = evaluation.stats["AP"]
    log.evaluation(
        progress.epoch,
        evaluation.stats,
        evaluation.per_class,
        evaluator=training.evaluator,
        seconds=watch.lap(),
        best=ap > progress.best_ap,
    )
    draw_validation(
        training.folder / "val_predictions.png",
        training.splits.val,
        results,
        training.splits.categories,
        max_pixels=recipe.data.max_pixels,
    )
    return ap


def is_evaluated(recipe: Recipe, epoch: int) -> bool:
    """Whether the epoch (from 0) ends with an evaluation; the last one always does."""
    return (epoch + 1) % recipe.eval.every == 0 or epoch + 1 == recipe.train.epochs


def is_saved(training: Training) -> bool:
    """Whether a checkpoint is due between two steps of an epoch; its end always is one."""
    every, progress = training.recipe.checkpoint.every, training.progress
    inside = progress.step_in_epoch < training.train_loader.steps_per_epoch
    return bool(every) and inside and progress.step % every == 0
