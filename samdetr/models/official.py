"""Published checkpoints of each system <-> our models, strict in both directions.

The layouts stand beside the systems. They differ from ours in names, in 1x1 convolutions (ours are linear layers on
channels-last maps) and in the order of a few weights, and some hold heads several times. "Official" in the functions'
names, as in init.official and --official, means published.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from samdetr.errors import CheckpointError
from samdetr.models import SYSTEMS, Detector
from samdetr.models.state import first_of
from samdetr.models.system import PublishedLayout

LAYOUTS = {system.name: system.published for system in SYSTEMS.values() if system.published}
_BOX_HEAD = {"": "layers."}  # an MLP, as in `PublishedLayout`
_INPUT_NORM = "encoder.embed.input_norm."


def official_names(model: Detector) -> dict[str, str]:
    """Map our parameters and buffers to their published keys. Raises CheckpointError where there is none."""
    layout = _layout_of(model)
    return {name: _published_name(name, model.system.name, layout) for name in model.state_dict()}


def _layout_of(model: Detector) -> PublishedLayout:
    layout = model.system.published
    if layout is None:
        raise CheckpointError(
            f'model.system = "{model.system.name}" has no published layout: start from init.checkpoint instead.'
        )
    layout.check_model(model)
    return layout


def _published_name(name: str, system: str, layout: PublishedLayout) -> str:
    for pattern, prefix, names in (
        (r"encoder\.transformer\.layers\.(\d+)\.(.+)", "transformer.encoder.layers", layout.encoder_layer),
        (r"decoder\.layers\.(\d+)\.(.+)", "transformer.decoder.layers", layout.decoder_layer),
        (r"decoder\.box_heads\.(\d+)\.(.+)", "bbox_embed", _BOX_HEAD),
    ):
        if found := re.fullmatch(pattern, name):
            return f"{prefix}.{found[1]}.{_renamed(found[2], names)}"
    if "num_batches_tracked" in name:
        raise CheckpointError(
            f"{name} has no place in the published layout, which holds frozen BatchNorm only: "
            'a model for such a file is trained with model.backbone.norm = "frozen".'
        )
    if name.startswith(_INPUT_NORM) and _INPUT_NORM not in layout.whole:
        raise CheckpointError(
            f"{name} has no place in the published layout of {system}, which has no norm after its input "
            'projection: set model.input_norm = "none".'
        )
    return _renamed(name, layout.whole)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    ours, published = next((one, other) for one, other in prefixes.items() if name.startswith(one))
    rest = name.removeprefix(ours)
    if published.endswith("layers."):
        position, leaf = rest.split(".")
        rest = f"{int(position) // 2}.{leaf}"
    return published + rest


def _system_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the system whose published checkpoints have these keys."""
    return next((name for name, layout in LAYOUTS.items() if layout.landmark in state), None)


def load_official(model: Detector, state_dict: Mapping[str, Tensor], *, remake_class_heads: bool = False) -> int:
    """Load a published state dict; every key of it is used or named in an error.

    remake_class_heads: leave the class heads as they are where the file has another number of classes.
    Returns that number, 0 where nothing was left out.
    Raises CheckpointError when the file is of another system, keys or shapes do not fit, or the copies of a head
    differ.
    """
    own = model.state_dict()
    remaining = dict(state_dict)
    layout = _layout_of(model)
    _check_system(model, remaining)
    layout.check(model, remaining)
    names = official_names(model)
    lacking: list[str] = []
    for key, repeated in layout.copies(model, names).items():
        copy, original = remaining.pop(key, None), state_dict.get(repeated)
        if copy is None:
            lacking.append(f"{key} is missing")
        elif original is None or not torch.equal(copy, original):
            raise CheckpointError(f"{key} differs from {repeated}, which it must repeat.")
    loaded: dict[str, Tensor] = {}
    problems: list[str] = []
    remade = 0
    for name, key in names.items():
        value = remaining.pop(key, None)
        if value is None:
            problems.append(f"{key} is missing")
            continue
        if remake_class_heads and name.startswith(model.system.class_heads) and value.shape[0] != own[name].shape[0]:
            remade = value.shape[0]
            continue
        if value.shape not in (own[name].shape, _to_published(layout, name, own[name]).shape):
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(own[name].shape)}")
            continue
        loaded[name] = _to_ours(layout, name, value).view(own[name].shape)
    problems += [f"{key} is not part of this model" for key in remaining] + lacking
    if problems:
        raise CheckpointError(f"the published checkpoint does not fit the recipe's model: {first_of(problems)}.")
    model.load_state_dict(loaded, strict=not remade)
    return remade


def to_official(model: Detector) -> dict[str, Tensor]:
    """Return our weights under the published keys and shapes, heads repeated as there."""
    layout, names = _layout_of(model), official_names(model)
    state = {names[name]: _to_published(layout, name, value) for name, value in model.state_dict().items()}
    return state | {copy: state[key] for copy, key in layout.copies(model, names).items()}


def read_official(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a published .pth file. Only tensors, plain values and argparse.Namespace are unpickled.

    Raises CheckpointError when the file is absent, holds anything else, or has no state dict of a system.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no published checkpoint {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not zipfile.is_zipfile(path) and not _is_legacy_pickle(path):
            raise CheckpointError(f"{path} is not a torch checkpoint file.") from error
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, UnpicklingError):  # torch's own message advises to run what the file holds
            reason = "it is damaged, or holds more than tensors and plain values, which could run code."
        raise CheckpointError(f"cannot read {path} as a published checkpoint: {reason}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f'{path} holds no state dict (expected one under "model", as published).')
    if _system_of(state) is None:
        landmarks = " and no ".join(layout.landmark for layout in LAYOUTS.values())
        raise CheckpointError(
            f"{path} is a published checkpoint of none of the systems: it has no {landmarks}. Use one that is, "
            "or for a backbone alone model.backbone.weights."
        )
    return dict(state)


def _is_legacy_pickle(path: Path) -> bool:
    """Tell whether the file begins as torch's format before 1.6 does (a pickle of protocol 2 or later)."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _check_system(model: Detector, state: Mapping[str, Tensor]) -> None:
    found = _system_of(state)
    if found is not None and found != model.system.name:
        raise CheckpointError(f'the published checkpoint is another system\'s: set model.system = "{found}".')


def _to_ours(layout: PublishedLayout, name: str, value: Tensor) -> Tensor:
    for ending, reordering in layout.reordered.items():
        if name.endswith(ending):
            return reordering.ours(value)
    return value


def _to_published(layout: PublishedLayout, name: str, value: Tensor) -> Tensor:
    for ending, reordering in layout.reordered.items():
        if name.endswith(ending):
            return reordering.published(value)
    if value.dim() == 2 and re.fullmatch(rf"({layout.convolutions})\.weight", name):
        return value[:, :, None, None]
    return value
