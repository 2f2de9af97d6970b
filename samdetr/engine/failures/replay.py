"""A step as a file: what `samdetr debug-nan` needs to compute it again, written when its numbers were not finite.

NAME.safetensors has the model's tensors as the step found them, NAME.json the recipe and what the step was made of:
its images in their order, and the seed of each micro-batch's dropout, which is all that is random on the device.
Images are loaded again from the data set, which the seed, the epoch and the step make the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import save
from torch import Tensor

from samdetr.engine.checkpoint.format import facts_of, write_meta
from samdetr.engine.export import written
from samdetr.engine.run.metrics import Step

if TYPE_CHECKING:
    from samdetr.engine.build import Training

REPLAY = "replay"  # the entry of the JSON


def step_seed(seed: int, step: int, place: int) -> int:
    """The seed of the dropout of a step's micro-batch: a continued run, or one of other processes, repeats it."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def write_replay(
    training: Training, file: Path, tensors: Mapping[str, Tensor], step: Step, values: Mapping[str, float]
) -> Path:
    """Write ``file`` and its JSON: ``tensors`` of the model, whole, and the step with its values by name.

    Raises CheckpointError.
    """
    recipe, world = training.recipe, training.world
    image_ids, micro = training.train_loader.image_ids(step.epoch, step.step_in_epoch), recipe.train.images
    micro_batches = [
        {
            "process": place % world.size,
            "image_ids": image_ids[place * micro : (place + 1) * micro],
            "seed": step_seed(recipe.run.seed, step.number - 1, place),
        }
        for place in range(-(-len(image_ids) // micro))
    ]
    on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
    written(file, lambda place: place.write_bytes(save(on_cpu, metadata={"format": "pt"})))
    content: dict[str, object] = {
        REPLAY: {
            "step": step.number,
            "epoch": step.epoch,
            "step_in_epoch": step.step_in_epoch,
            "values": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
            "micro_batches": micro_batches,
        },
        "recipe": recipe.model_dump(mode="json"),
        "categories": training.splits.categories.to_json(),
        "data": training.splits.fingerprint(),
        "environment": training.environment,
        "files": {file.name: facts_of(file)},
    }
    written(file.with_suffix(".json"), lambda place: write_meta(place, content))
    return file
