"""A step as a file: what `samdetr debug-nan` needs to compute it again, written when its numbers were not finite.

NAME.safetensors has the model's tensors as the step found them; NAME.json the recipe and the step: its images in their
order, and the seed of each micro-batch's dropout, which is all that is random on the device. The images are loaded
again from the data set; seed, epoch and step make them the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samdetr.engine.checkpoint.format import model_tensors
from samdetr.engine.checkpoint.saving import save_weights
from samdetr.engine.distributed.parallel import full_tensor
from samdetr.engine.distributed.world import World
from samdetr.engine.run.reports import FailedStep
from samdetr.engine.state import TrainState

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

REPLAY = "replay"  # the entry of the JSON


def step_seed(seed: int, step: int, place: int) -> int:
    """Return the dropout seed of a step's micro-batch, the same after a resume and in any number of processes."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def step_seeds(seed: int, step: int, count: int, world: World) -> list[int]:
    """Return the dropout seeds of this process's ``count`` micro-batches of a step."""
    places = range(world.rank, world.rank + count * world.size, world.size)
    return [step_seed(seed, step, place) for place in places]


def write_replay(
    failed: FailedStep, state: TrainState, recipe: Recipe, folder: Path, facts: Mapping[str, object], world: World
) -> Path:
    """Write the step and the model as it found it into the run's folder, and return the safetensors file.

    All processes must call it; the main one writes. The JSON has the micro-batches in their order, which the processes
    took in turn, and ``facts``, as every checkpoint has them. Raises CheckpointError in the main process when the disk
    refuses, SystemExit in the others.
    """
    step, values, image_ids = failed
    size = recipe.train.images
    micro_batches = [
        {
            "process": place % world.size,
            "image_ids": list(image_ids[place * size : (place + 1) * size]),
            "seed": step_seed(recipe.run.seed, step.number - 1, place),
        }
        for place in range(-(-len(image_ids) // size))
    ]
    replay = {
        "step": step.number,
        "epoch": step.epoch,
        "step_in_epoch": step.step_in_epoch,
        "values": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        "micro_batches": micro_batches,
    }
    file = folder / f"nonfinite-step-{step.number:08d}.safetensors"
    tensors = {name: full_tensor(value.detach()) for name, value in model_tensors(state.model).items()}

    def write() -> Path:
        on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
        save_weights(file, on_cpu, {REPLAY: replay, **facts})
        return file

    return world.broadcast_from_main(write)
