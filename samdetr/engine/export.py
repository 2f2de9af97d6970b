"""Weights for others: one safetensors file and a JSON that says what they are, or the published layout."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from samdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from samdetr.engine.checkpoint.format import EXPORTED, facts_of, meta_file, read_meta, reason_of, sync, write_meta
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.run.folder import METRICS_FILE
from samdetr.errors import CheckpointError
from samdetr.models.official import to_official

PIXELS = {"channels": "RGB", "range": [0.0, 1.0], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def export(target: str, *, weights: str | None, official: str | None) -> list[Path]:
    """Write the weights of a run or checkpoint, the averaged ones where it has them; returns the files.

    weights: NAME.safetensors, beside which NAME.json gets the recipe, the categories, the step, the numbers of its
    evaluation and a checksum; ``init.checkpoint``, eval and predict read the pair strictly. official: a .pth file in
    the layout of the published checkpoints of the system.

    Raises CheckpointError when the checkpoint cannot be read, a file is there already or cannot be written, or the
    published layout has no place for a weight.
    """
    wanted = [Path(name) for name in (weights, official) if name]
    if weights and Path(weights).suffix != EXPORTED:
        raise CheckpointError(f"--weights {weights}: the name must end in {EXPORTED}.")
    files = [*wanted, *([Path(weights).with_suffix(".json")] if weights else [])]
    for file in files:
        if file.exists():
            raise CheckpointError(f"{file} is there already: choose another name.")
    trained = load_trained(target)
    state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    if official:
        layout = {"model": to_official(trained.model)}
        written(Path(official), lambda file: torch.save(layout, file))
    if weights:
        place = Path(weights)
        written(place, lambda file: file.write_bytes(save(state, metadata={"format": "pt"})))
        meta = read_meta(meta_file(trained.path))
        content: dict[str, object] = {
            "system": trained.recipe.model.system,
            "parameters": sum(value.numel() for value in trained.model.parameters()),
            "averaged": bool(meta["averaged_steps"]),
            "averaged_steps": meta["averaged_steps"],
            "progress": {key: meta["progress"][key] for key in ("step", "epoch")},
            "metrics": _metrics_of(trained.path, meta),
            "pixels": PIXELS,
            "environment": {key: meta["environment"][key] for key in ("commit", "versions")},
            **{key: meta[key] for key in ("recipe", "categories", "data")},
            "files": {place.name: facts_of(place)},
        }
        written(place.with_suffix(".json"), lambda file: write_meta(file, content))
    return files


def _metrics_of(path: Path, meta: Mapping[str, Any]) -> object:
    """The evaluation of a checkpoint in a run, None where there was none."""
    if "metrics" in meta:  # what is exported again
        return meta["metrics"]
    file = path.parent.parent / METRICS_FILE
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return next((line for line in lines if (line["kind"], line["step"]) == ("eval", meta["progress"]["step"])), None)


def written(file: Path, write: Callable[[Path], object]) -> None:
    """The whole file or none."""
    unfinished = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        sync(unfinished)
        os.replace(unfinished, file)
    except (OSError, RuntimeError) as error:  # torch's own errors of writing are RuntimeErrors
        with suppress(OSError):
            unfinished.unlink()
        raise CheckpointError(f"cannot write {file} ({reason_of(error)}): choose another place.") from error
