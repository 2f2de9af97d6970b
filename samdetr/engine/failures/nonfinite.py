"""A step whose loss or gradient is not finite and may not be skipped: the run stops, with a file to replay it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from samdetr.engine.distributed.world import World
from samdetr.engine.failures.replay import write_replay
from samdetr.engine.run.folder import has_checkpoint, resume_command
from samdetr.engine.run.metrics import terms_not_finite
from samdetr.engine.run.reports import FailedStep
from samdetr.engine.state import TrainState
from samdetr.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from samdetr.recipe import Recipe


def stop_with_replay(
    failed: FailedStep, state: TrainState, recipe: Recipe, folder: Path, facts: Mapping[str, object], world: World
) -> NoReturn:
    """Write the replay of the step that failed, and raise the NonFiniteError that ends the run.

    All processes must call it after the same step. The optimizer has changed nothing since the one that failed. folder:
    of the run. facts: as every checkpoint has them.
    """
    step, values, image_ids = failed
    try:
        file = write_replay(failed, state, recipe, folder, facts, world)
        way = f"to find the module: samdetr debug-nan {shlex.quote(str(file))}"
    except CheckpointError as error:
        way = f"there is no file to replay, {error}"
    if recipe.train.skips_allowed:
        skipped, again = f" after {state.progress.skips_in_row - 1} skipped in a row", "raise train.max_skips"
    elif has_checkpoint(folder):
        skipped, again = "", f"skip such steps with {resume_command(folder)} --set train.on_nonfinite=skip"
    else:
        skipped, again = "", 'set train.on_nonfinite = "skip" to skip such steps'
    raise NonFiniteError(
        f"the loss or its gradient is not finite at step {step.number}{skipped} (epoch {step.epoch + 1}, image ids "
        f"{', '.join(map(str, image_ids))}): {', '.join(terms_not_finite(values))}; no parameter was changed by "
        f"this step or after it; {way}. Lower optim.lr, look at these images, or {again}; what was saved is in "
        f"{folder}."
    )
