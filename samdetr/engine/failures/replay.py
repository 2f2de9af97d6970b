"""A step as a file: what `samdetr debug-nan` needs to compute it again, written when its numbers were not finite.

NAME.safetensors has the model's tensors as the step found them; NAME.json the recipe and the step: its images in their
order, and the seed of each micro-batch's dropout, which is all that is random on the device. The images are loaded
again from the data set; seed, epoch and step make them the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from samdetr.engine.checkpoint.saving import save_weights
from samdetr.engine.distributed.world import World
from samdetr.engine.run.metrics import Step

REPLAY = "replay"  # the entry of the JSON


def step_seed(seed: int, step: int, place: int) -> int:
    """Return the dropout seed of a step's micro-batch, the same after a resume and in any number of processes."""
    return int(np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def step_seeds(seed: int, step: int, count: int, world: World) -> list[int]:
    """Return the dropout seeds of this process's ``count`` micro-batches of a step."""
    places = range(world.rank, world.rank + count * world.size, world.size)
    return [step_seed(seed, step, place) for place in places]


def write_replay(
    file: Path,
    tensors: Mapping[str, Tensor],
    step: Step,
    values: Mapping[str, float],
    image_ids: Sequence[int],
    facts: Mapping[str, object],
    *,
    micro_batch: int,
    processes: int,
    seed: int,
) -> Path:
    """Write ``file`` and its JSON, and return the file.

    tensors: of the model, whole. values: of the step, by name. image_ids: of the step, micro-batch after micro-batch of
    ``micro_batch`` images each, which the ``processes`` took in turn. facts: as every checkpoint has them. seed: of the
    run. Raises CheckpointError.
    """
    micro_batches = [
        {
            "process": place % processes,
            "image_ids": list(image_ids[place * micro_batch : (place + 1) * micro_batch]),
            "seed": step_seed(seed, step.number - 1, place),
        }
        for place in range(-(-len(image_ids) // micro_batch))
    ]
    replay = {
        "step": step.number,
        "epoch": step.epoch,
        "step_in_epoch": step.step_in_epoch,
        "values": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        "micro_batches": micro_batches,
    }
    on_cpu = {name: value.contiguous().cpu() for name, value in tensors.items()}
    save_weights(file, on_cpu, {REPLAY: replay, **facts})
    return file
