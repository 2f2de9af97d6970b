"""Weights for others: one safetensors file and a JSON that says what they are, or the published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from samdetr.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from samdetr.engine.checkpoint.format import EXPORTED, meta_file, read_meta
from samdetr.engine.checkpoint.saving import save_weights, write_whole
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.run.folder import METRICS_FILE
from samdetr.errors import CheckpointError
from samdetr.models.official import to_official

PIXELS = {"channels": "RGB", "range": [0.0, 1.0], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def export(target: str, *, weights: str | None, official: str | None) -> list[Path]:
    """Write the weights of a run or checkpoint, the averaged ones where it has them, and return the files.

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
        write_whole(Path(official), lambda file: torch.save(layout, file))
    if weights:
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
        }
        save_weights(Path(weights), state, content)
    return files


def _metrics_of(path: Path, meta: Mapping[str, Any]) -> object:
    """Return the evaluation of a checkpoint in a run, None where there was none."""
    if "metrics" in meta:  # of an export, exported again
        return meta["metrics"]
    file = path.parent.parent / METRICS_FILE
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return next((line for line in lines if (line["kind"], line["step"]) == ("eval", meta["progress"]["step"])), None)
