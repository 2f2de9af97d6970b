"""What a run does about steps whose loss or gradient is not finite: count those that it skips, or stop with a file.

Such a step changes nothing: that is the optimizer's doing, on the device (`optim.NonFiniteGuard`). The host hears of
it here, on a GPU some steps later. The step's number, and with it rates and order, goes on over a skipped step, as does
the warm-up of the averages, which themselves stay; AdamW's own count of updates does not.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from samdetr.engine.checkpoint.format import LAST, model_tensors
from samdetr.engine.distributed.parallel import full_tensor
from samdetr.engine.failures.replay import write_replay
from samdetr.engine.run.folder import CHECKPOINTS, resume_command
from samdetr.engine.run.log import Meter, RunLog, step_values
from samdetr.engine.run.metrics import Step
from samdetr.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from samdetr.engine.build import Training


def report_steps(training: Training, log: RunLog, steps: Iterator[tuple[Step, list[float]]]) -> None:
    """Count steps whose values have arrived, up to one that was not finite and may not be skipped."""
    progress = training.progress
    for step, values in steps:
        if training.failed:
            return
        if math.isfinite(values[0]) and math.isfinite(values[-1]):  # the loss and the gradient's norm
            progress.skips_in_row = 0
            training.epoch_meter.add(values)
            training.interval_meter.add(values)
        else:
            progress.skips_in_row += 1
            if progress.skips_in_row > training.optimizer.max_skips:
                training.failed = step, values
                return
            progress.skips += 1
            terms = terms_not_finite(training.epoch_meter.names, values)
            image_ids = training.train_loader.image_ids(step.epoch, step.step_in_epoch)
            log.skipped(step, terms, image_ids, in_row=progress.skips_in_row)
        if step.number % training.recipe.train.log_every == 0 and training.interval_meter.count:
            log.interval(step.epoch, step.number, training.interval_meter.means(), step.lr)
            training.interval_meter = Meter(training.interval_meter.names)


def report_all(training: Training, log: RunLog) -> None:
    """Count all steps; all processes call it, after the same one. Raises NonFiniteError in all of them."""
    training.world.all_reduce_max(0)  # notice a lost process here, before waiting for a device that waits for it
    report_steps(training, log, training.metrics.drain())
    if training.failed:
        stop_with_replay(training, *training.failed)


def terms_not_finite(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """Which of a step's values (`log.step_values`) say where it went wrong: terms of the loss, else what is left."""
    bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    return [name for name in bad if name not in ("loss", "class_error", "grad_norm")] or [
        "the total loss (a term of an earlier layer, or a cost of the matching)" if "loss" in bad else "the gradient"
    ]


def stop_with_replay(training: Training, step: Step, values: Sequence[float]) -> NoReturn:
    """Write the replay of a step whose values were not finite, and raise the error that ends the run.

    All processes call it after the same step; the main one writes. The optimizer has changed nothing since that step.
    """
    names = step_values(training.criterion.logged)
    image_ids = training.train_loader.image_ids(step.epoch, step.step_in_epoch)
    file = training.folder / f"nonfinite-step-{step.number:08d}.safetensors"
    tensors = {name: full_tensor(value.detach()) for name, value in model_tensors(training.model).items()}
    try:
        training.world.broadcast_from_main(
            lambda: write_replay(training, file, tensors, step, dict(zip(names, values, strict=True)))
        )
        way = f"to find the module: samdetr debug-nan {shlex.quote(str(file))}"
    except CheckpointError as error:
        way = f"there is no file to replay, {error}"
    if training.optimizer.max_skips:
        again = "raise train.max_skips"
    elif (training.folder / CHECKPOINTS / LAST).exists():
        again = f"leave such steps out with {resume_command(training.folder)} --set train.on_nonfinite=skip"
    else:
        again = 'set train.on_nonfinite = "skip" to leave such steps out'
    skipped = f" after {training.progress.skips_in_row - 1} skipped in a row" if training.optimizer.max_skips else ""
    raise NonFiniteError(
        f"the loss or its gradient is not finite at step {step.number}{skipped} (epoch {step.epoch + 1}, image ids "
        f"{', '.join(map(str, image_ids))}): {', '.join(terms_not_finite(names, values))}; no parameter was changed by "
        f"this step or after it; {way}. Lower optim.lr, look at these images, or {again}; what was saved is in "
        f"{training.folder}."
    )
