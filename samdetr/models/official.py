"""Published checkpoints of each system <-> our models, strict in both directions.

The layouts differ from ours in names, in 1x1 convolutions (ours are linear layers on channels-last maps) and, for
SAM-DETR, in the order of the first point layer's inputs (theirs channel, row, column; ours row, column, channel).
SAM-DETR's and Deformable-DETR's also store heads several times.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from samdetr.errors import CheckpointError
from samdetr.models import DeformableDETR, Detector
from samdetr.models.aligner import ROI_SIZE
from samdetr.models.deformable_encoder import PyramidDetector
from samdetr.models.layouts import BOX_HEAD, LAYOUTS, Layout
from samdetr.models.state import CLASS_HEADS, first_of

_DUPLICATE_PREFIX = "transformer.decoder."  # heads that the decoder uses stand in the file with and without it


def official_names(model: Detector) -> dict[str, str]:
    """Our parameters and buffers -> their published keys. Raises CheckpointError where there is none."""
    layout = _layout_of_model(model)
    return {name: _official_name(name, layout) for name in model.state_dict()}


def _layout_of_model(model: Detector) -> Layout:
    if type(model) not in LAYOUTS:
        raise CheckpointError(f"{type(model).__name__} has no published layout: start from init.checkpoint instead.")
    return LAYOUTS[type(model)]


def _official_name(name: str, layout: Layout) -> str:
    for pattern, prefix, names in (
        (r"encoder\.layers\.(\d+)\.(.+)", "transformer.encoder.layers", layout.encoder_layer),
        (r"decoder\.(\d+)\.(.+)", "transformer.decoder.layers", layout.decoder_layer),
        (r"box_heads\.(\d+)\.(.+)", "bbox_embed", BOX_HEAD),
    ):
        if found := re.fullmatch(pattern, name):
            return f"{prefix}.{found[1]}.{_renamed(found[2], names)}"
    if "num_batches_tracked" in name:
        raise CheckpointError(
            f"{name} has no place in the published layout, which holds frozen BatchNorm only: "
            'a model for such a file is trained with model.backbone.norm = "frozen".'
        )
    if name.startswith("input_norm.") and "input_norm." not in layout.whole:
        raise CheckpointError(
            f"{name} has no place in the published layout of {layout.system}, which has no norm after its input "
            'projection: set model.input_norm = "none".'
        )
    return _renamed(name, layout.whole)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    ours, theirs = next((one, other) for one, other in prefixes.items() if name.startswith(one))
    rest = name.removeprefix(ours)
    if theirs.endswith("layers."):
        position, leaf = rest.split(".")
        rest = f"{int(position) // 2}.{leaf}"
    return theirs + rest


def _copies(model: Detector) -> dict[str, str]:
    """The published keys that repeat another one, and that one."""
    names = official_names(model)
    heads = [names[name] for name in names if name.startswith("box_heads.")]
    if isinstance(model, DeformableDETR):
        class_heads = [names[name] for name in names if name.startswith("class_heads.")]
        if not model.box_refine:
            numbers = range(1, len(model.decoder))
            return {key.replace(".0.", f".{n}.", 1): key for key in heads + class_heads for n in numbers}
        if model.first_stage is not None:
            heads += class_heads
    return {_DUPLICATE_PREFIX + key: key for key in heads}


def layout_of(keys: Iterable[str]) -> Layout | None:
    """The layout that has these keys."""
    present = set(keys)
    return next((layout for layout in LAYOUTS.values() if layout.landmark in present), None)


def load_official(model: Detector, state_dict: Mapping[str, Tensor], *, remake_class_heads: bool = False) -> int:
    """Load a published state dict; every key of it is used or named in an error.

    remake_class_heads: leave the class heads as they are where the file has another number of classes.
    Returns that number, 0 where nothing was left out.
    Raises CheckpointError when the file is of another system, keys or shapes do not fit, or the copies of a head
    differ.
    """
    own = model.state_dict()
    remaining = dict(state_dict)
    _check_system(model, remaining)
    names = official_names(model)
    lacking: list[str] = []
    for key, repeated in _copies(model).items():
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
        if remake_class_heads and name.startswith(CLASS_HEADS) and value.shape[0] != own[name].shape[0]:
            remade = value.shape[0]
            continue
        if value.shape not in (own[name].shape, _to_official_layout(name, own[name]).shape):
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(own[name].shape)}")
            continue
        loaded[name] = _from_official_layout(name, value).view(own[name].shape)
    problems += [f"{key} is not part of this model" for key in remaining] + lacking
    if problems:
        raise CheckpointError(f"the published checkpoint does not fit the recipe's model: {first_of(problems)}.")
    model.load_state_dict(loaded, strict=not remade)
    return remade


def to_official(model: Detector) -> dict[str, Tensor]:
    """Our weights under the published keys and shapes, heads repeated as there."""
    names = official_names(model)
    state = {names[name]: _to_official_layout(name, value) for name, value in model.state_dict().items()}
    return state | {copy: state[key] for copy, key in _copies(model).items()}


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published .pth file. Only tensors, plain values and argparse.Namespace are unpickled.

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
    if layout_of(state) is None:
        landmarks = " and no ".join(layout.landmark for layout in LAYOUTS.values())
        raise CheckpointError(
            f"{path} is a published checkpoint of none of the systems: it has no {landmarks}. Use one that is, "
            "or for a backbone alone model.backbone.weights."
        )
    return dict(state)


def _is_legacy_pickle(path: Path) -> bool:
    """Whether the file begins as torch's format before 1.6 does (a pickle of protocol 2 or later)."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _check_system(model: Detector, state: Mapping[str, Tensor]) -> None:
    """Errors that say which key of the recipe fits the file."""
    found = layout_of(state)
    if found is not None and found is not _layout_of_model(model):
        raise CheckpointError(f'the published checkpoint is another system\'s: set model.system = "{found.system}".')
    if isinstance(model, PyramidDetector):
        _check_pyramid(model, state)
        return
    has_norm = "input_proj.0.1.weight" in state
    if has_norm != any(name.startswith("input_norm.") for name in model.state_dict()):
        wanted = "group_norm" if has_norm else "none"
        raise CheckpointError(
            f"the published checkpoint has {'a' if has_norm else 'no'} GroupNorm after its input projection: "
            f'set model.input_norm = "{wanted}".'
        )


def _check_pyramid(model: PyramidDetector, state: Mapping[str, Tensor]) -> None:
    facts: dict[str, tuple[object, object]] = {}
    if "transformer.level_embed" in state:
        facts["feature_levels"] = (len(state["transformer.level_embed"]), len(model.level_codes))
    if isinstance(model, DeformableDETR):
        facts["box_refine"] = (f"{_DUPLICATE_PREFIX}bbox_embed.0.layers.0.weight" in state, model.box_refine)
        facts["two_stage"] = ("transformer.pos_trans.weight" in state, model.first_stage is not None)
    for key, (found, wanted) in facts.items():
        if found != wanted:
            value = str(found).lower()
            raise CheckpointError(f"the published checkpoint is of another model: set model.{key} = {value}.")


def _from_official_layout(name: str, value: Tensor) -> Tensor:
    if name.endswith("aligner.point_mlp.0.weight"):
        return value.unflatten(1, (-1, ROI_SIZE * ROI_SIZE)).transpose(1, 2).flatten(1)
    return value


def _to_official_layout(name: str, value: Tensor) -> Tensor:
    if name.endswith("aligner.point_mlp.0.weight"):
        return value.unflatten(1, (ROI_SIZE * ROI_SIZE, -1)).transpose(1, 2).flatten(1)
    linear = r"input_proj|projections\.\d+|decoder\.\d+\.aligner\.reduce|encoder\.layers\.\d+\.(value|out)"
    if value.dim() == 2 and re.fullmatch(rf"({linear})\.weight", name):
        return value[:, :, None, None]
    return value
