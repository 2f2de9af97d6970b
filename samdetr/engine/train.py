"""Training: `train` builds a run from its recipe and loops over its epochs and steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from rich.console import Console

from samdetr.data.device import prefetch
from samdetr.engine.build import Run, build_run
from samdetr.engine.checkpoint.saving import Saver
from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.precision import choose_device
from samdetr.engine.distributed.decision import Decision, Stopped, agree
from samdetr.engine.distributed.signals import StopSignal
from samdetr.engine.distributed.world import World, init_world
from samdetr.engine.evaluate import device_batches, evaluate_epoch
from samdetr.engine.failures.errors import translate_errors
from samdetr.engine.failures.nonfinite import stop_with_replay
from samdetr.engine.failures.out_of_memory import START_UP, explain_place, note_place
from samdetr.engine.failures.replay import step_seeds
from samdetr.engine.optim import RunningStatistics, lr_factor, set_learning_rate
from samdetr.engine.run.folder import CHECKPOINTS, METRICS_FILE
from samdetr.engine.run.log import RunLog, Timer, print_line
from samdetr.engine.run.metrics import RunAheadLimit, Step
from samdetr.engine.run.profile import StepProfiler
from samdetr.engine.run.reports import StepReports
from samdetr.engine.start_up import prepare_step
from samdetr.engine.step import train_step
from samdetr.errors import DataError
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
        with explain_place(device, START_UP):
            run = build_run(recipe, resume=resume, device=device, world=world, console=console)
        recipe, state, folder, progress = run.recipe, run.state, run.folder, run.state.progress
        say = partial(print_line, console)
        stop = StopSignal(prints=world.is_main)
        saver = Saver(
            folder / CHECKPOINTS, world, keep=recipe.checkpoint.keep, timeout=recipe.parallel.timeout, say=say
        )
        log = open_log(run, console, world)
        reports = StepReports(state, log, recipe.train.log_every, run.train_loader.image_ids)
        profiler = StepProfiler(folder / "profile" if profile and world.is_main else None, log.note)
        precision = run.compute.precision
        translated = translate_errors(
            recipe, progress, folder, world=world, stop=stop, saver=saver, say=say, device=device, precision=precision
        )
        with stop, closing(run.train_loader), closing(run.val_loader), translated, log, profiler:
            graphs = prepare(run, device, world, stop, saver, log)
            while progress.epoch < recipe.train.epochs:
                stop_if_asked(world, stop, saver)
                if not progress.evaluation_due:
                    train_epoch(run, graphs, device, world, stop, saver, log, reports, profiler)
                best = is_evaluated(recipe, progress.epoch) and evaluate_epoch(
                    state,
                    val_batches(run, device, world, stop, saver, log),
                    run.splits,
                    recipe,
                    folder,
                    evaluator=run.evaluator,
                    precision=precision,
                    world=world,
                    log=log,
                )
                progress.epoch, progress.step_in_epoch, progress.evaluation_due = progress.epoch + 1, 0, False
                progress.finished = progress.epoch == recipe.train.epochs
                saver.update(progress, best=best)
                if world.is_main:
                    plot_curves(folder / METRICS_FILE, folder / "curves.png")
        found = f"best AP {progress.best_ap:.3f} in epoch {progress.best_epoch + 1}; "
        log.note(f"finished: {found if progress.best_epoch >= 0 else ''}everything is in {folder}")
        return folder


def train_epoch(
    run: Run,
    graphs: StepGraphs | None,
    device: torch.device,
    world: World,
    stop: StopSignal,
    saver: Saver,
    log: RunLog,
    reports: StepReports,
    profiler: StepProfiler,
) -> None:
    """Take the epoch's remaining steps; before each step all processes agree to take it or to end (`agree`)."""
    recipe, state, loader, progress = run.recipe, run.state, run.train_loader, run.state.progress
    state.model.train()
    batches = prefetch(loader.epoch(progress.epoch, progress.step_in_epoch), device)
    statistics = RunningStatistics(state.model, kept=recipe.train.skips_allowed > 0)
    timer, run_ahead = Timer(), RunAheadLimit(device)
    while not progress.evaluation_due:
        data_timer = Timer()
        batch, bad_image = next_batch(batches)
        decision = agree(
            world, stop, bad_image=bool(bad_image), save_failed=saver.failed, not_finite=bool(reports.failed)
        )
        if decision is not Decision.CONTINUE:
            end_run(decision, run, world, saver, reports, bad_image)
        waited = data_timer.lap()
        factor = lr_factor(recipe.optim, step=progress.step, epoch=progress.epoch, total_steps=log.steps)
        set_learning_rate(state.optimizer, factor)
        statistics.keep()
        values = train_step(
            run.parallel_model,
            run.criterion,
            state.optimizer,
            batch,
            device=device,
            clip_norm=recipe.optim.clip_norm,
            precision=run.compute.precision,
            graphs=graphs,
            world=world,
            seeds=step_seeds(recipe.run.seed, progress.step, len(batch), world),
        )
        statistics.undo(state.optimizer.found_inf)
        if state.ema:
            state.ema.update(state.optimizer.found_inf if recipe.train.skips_allowed else None)
        run_ahead.step()
        step = Step(progress.step + 1, progress.epoch, progress.step_in_epoch, recipe.optim.lr * factor)
        progress.step, progress.step_in_epoch = step.number, step.step_in_epoch + 1
        log.step(step.epoch, seconds=timer.lap(), waited=waited, images=recipe.train.total_batch)
        profiler.step()
        reports.add(step, values)
        epoch_done = progress.step_in_epoch == loader.steps_per_epoch
        if epoch_done or (recipe.checkpoint.every and step.number % recipe.checkpoint.every == 0):
            failed = reports.finish(world)
            if failed:
                stop_with_replay(failed, state, recipe, run.folder, run.facts, world)
            if epoch_done:
                log.epoch(step.epoch, state.finish_steps())
            state.save(saver, run.facts)


def end_run(
    decision: Decision, run: Run, world: World, saver: Saver, reports: StepReports, bad_image: DataError | None
) -> NoReturn:
    """End the run between two steps, as all processes have decided; save before a signal or a bad image ends it."""
    if decision is Decision.SAVE_FAILED:
        saver.wait()  # raises in the processes that know the reason
        raise SystemExit(1)
    failed = reports.finish(world)  # the values of the last steps may come only now
    if decision is Decision.NOT_FINITE or failed:
        assert failed, "every process has its values now"
        stop_with_replay(failed, run.state, run.recipe, run.folder, run.facts, world)
    run.state.save(saver, run.facts)  # nothing done is lost
    saver.wait()
    if decision is Decision.STOP:
        raise Stopped
    if bad_image is not None:
        raise bad_image
    raise SystemExit(1)  # the image is another process's, which names it


def prepare(
    run: Run, device: torch.device, world: World, stop: StopSignal, saver: Saver, log: RunLog
) -> StepGraphs | None:
    """Compile, record and check the step as configured; return its CUDA graphs. Signals are checked between parts."""

    def started(part: str) -> None:
        log.starting(part)
        stop_if_asked(world, stop, saver)

    run.state.model.train()
    with note_place(START_UP):
        return prepare_step(
            run.state.model,
            run.parallel_model,
            run.criterion,
            run.state.optimizer,
            compute=run.compute,
            on_failure=run.recipe.compute.on_failure,
            clip_norm=run.recipe.optim.clip_norm,
            bucket_shapes=run.train_loader.bucket_shapes or (),
            micro_batch=run.recipe.train.images,
            max_objects=run.train_loader.max_objects,
            device=device,
            started=started,
            note=log.note,
        )


def next_batch(batches: Iterator[list[Batch]]) -> tuple[list[Batch], DataError | None]:
    """Return the next step's batch on the device, or no batch and the error of an image that cannot be used."""
    try:
        return next(batches), None
    except DataError as error:
        return [], error


def val_batches(
    run: Run, device: torch.device, world: World, stop: StopSignal, saver: Saver, log: RunLog
) -> Iterator[Batch]:
    """Yield the val split's batches on the device; after each one show how many are done, and stop after a signal."""
    for done, batch in enumerate(device_batches(run.val_loader, device), start=1):
        yield batch
        log.evaluating(run.state.progress.epoch, done, len(run.val_loader))
        stop_if_asked(world, stop, saver)


def stop_if_asked(world: World, stop: StopSignal, saver: Saver) -> None:
    """If any process got a signal: finish the save under way, then raise Stopped in all.

    All processes must call it, at the same place.
    """
    if agree(world, stop) is Decision.STOP:
        saver.wait()
        raise Stopped


def open_log(run: Run, console: Console, world: World) -> RunLog:
    """Open the log where the run begins or continues."""
    epochs, progress = run.recipe.train.epochs, run.state.progress
    return RunLog(
        run.folder,
        epochs=epochs,
        steps=run.train_loader.steps_per_epoch * epochs,
        evaluations=sum(is_evaluated(run.recipe, epoch) for epoch in range(progress.epoch, epochs)),
        progress=progress,
        console=console,
        writes=world.is_main,
    )


def is_evaluated(recipe: Recipe, epoch: int) -> bool:
    """Return whether the epoch (from 0) ends with an evaluation; the last one always does."""
    return (epoch + 1) % recipe.eval.every == 0 or epoch + 1 == recipe.train.epochs
