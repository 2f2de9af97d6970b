"""Published SAM-DETR checkpoints <-> our models, strict in both directions.

The two layouts differ in names, in 1x1 convolutions (ours are linear layers on channels-last maps) and in the
order of the first point layer's inputs (theirs channel, row, column; ours row, column, channel). The published
layout also stores every box head twice.
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
from samdetr.models.aligner import ROI_SIZE
from samdetr.models.sam_detr import SAMDETR
from samdetr.models.state import first_of

# Our prefix -> published prefix; of several that fit, the first. A value that ends in "layers." is an MLP, whose
# linear layers the published names count without the ReLUs between them.
_WHOLE = {
    "backbone.": "backbone.0.body.",
    "input_proj.": "input_proj.0.0.",
    "input_norm.": "input_proj.0.1.",
    "reference_boxes": "query_embed.weight",
    "class_heads.": "class_embed.",
}
_ENCODER_LAYER = {
    "in_proj.": "self_attn.in_proj_",
    "out_proj.": "self_attn.out_proj.",
    "norm.": "norm1.",
    "feed_forward.norm.": "norm2.",
    "feed_forward.": "",
}
_DECODER_LAYER = {
    "self_attention.query_content.": "sa_qcontent_proj.",
    "self_attention.query_position.": "sa_qpos_proj.",
    "self_attention.key_content.": "sa_kcontent_proj.",
    "self_attention.key_position.": "sa_kpos_proj.",
    "self_attention.value.": "sa_v_proj.",
    "self_attention.out.": "self_attn.out_proj.",
    "norm1.": "norm1.",
    "aligner.reduce.": "point1.0.",
    "aligner.point_mlp.": "point2.",
    "aligner.content_gate.": "attn1.",
    "aligner.position_gate.": "attn2.",
    "cross_attention.query_content.": "ca_qcontent_proj.",
    "cross_attention.query_position.": "ca_qpos_sine_proj.layers.",
    "cross_attention.key_content.": "ca_kcontent_proj.",
    "cross_attention.key_position.": "ca_kpos_sine_proj.layers.",
    "cross_attention.value.": "ca_v_proj.",
    "cross_attention.out.": "cross_attn.out_proj.",
    "norm2.": "norm2.",
    "feed_forward.norm.": "norm3.",
    "feed_forward.": "",
}
_BOX_HEAD = {"": "layers."}
# Our numbered parts: pattern, published prefix, names within.
_NUMBERED = (
    (r"encoder\.layers\.(\d+)\.(.+)", "transformer.encoder.layers", _ENCODER_LAYER),
    (r"decoder\.(\d+)\.(.+)", "transformer.decoder.layers", _DECODER_LAYER),
    (r"box_heads\.(\d+)\.(.+)", "bbox_embed", _BOX_HEAD),
)
# Keys that every published SAM-DETR has, whatever its backbone, depth and prior.
_LANDMARKS = ("backbone.0.body.conv1.weight", "input_proj.0.0.weight", "class_embed.0.weight")
_DUPLICATE_PREFIX = "transformer.decoder."  # box heads stand in the published file with and without it


def official_name(name: str) -> str:
    """The published key of one of our parameters or buffers. Raises CheckpointError where there is none."""
    for pattern, prefix, names in _NUMBERED:
        if found := re.fullmatch(pattern, name):
            return f"{prefix}.{found[1]}.{_renamed(found[2], names)}"
    if "num_batches_tracked" in name:
        raise CheckpointError(
            f"{name} has no place in the published layout, which holds frozen BatchNorm only: "
            'set model.backbone.norm = "frozen".'
        )
    return _renamed(name, _WHOLE)


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    ours, theirs = next((one, other) for one, other in prefixes.items() if name.startswith(one))
    rest = name.removeprefix(ours)
    if theirs.endswith("layers."):
        position, leaf = rest.split(".")
        rest = f"{int(position) // 2}.{leaf}"
    return theirs + rest


def load_official(model: SAMDETR, state_dict: Mapping[str, Tensor], *, remake_class_heads: bool = False) -> int:
    """Load a published state dict; every key of it is used or named in an error.

    remake_class_heads: leave the class heads as they are where the file has another number of classes.
    Returns that number, 0 where nothing was left out.
    Raises CheckpointError when keys or shapes do not fit, or the two copies of a box head differ.
    """
    own = model.state_dict()
    names = {name: official_name(name) for name in own}
    remaining = dict(state_dict)
    _check_input_norm(model, remaining)
    for key in [key for key in remaining if key.startswith(f"{_DUPLICATE_PREFIX}bbox_embed.")]:
        copy, original = remaining.pop(key), state_dict.get(key.removeprefix(_DUPLICATE_PREFIX))
        if original is None or not torch.equal(copy, original):
            raise CheckpointError(f"{key} differs from {key.removeprefix(_DUPLICATE_PREFIX)}, which it must repeat.")
    loaded: dict[str, Tensor] = {}
    problems: list[str] = []
    remade = 0
    for name, key in names.items():
        value = remaining.pop(key, None)
        if value is None:
            problems.append(f"{key} is missing")
            continue
        if remake_class_heads and name.startswith("class_heads.") and value.shape[0] != own[name].shape[0]:
            remade = value.shape[0]
            continue
        if value.numel() != own[name].numel() or value.shape[0] != own[name].shape[0]:
            problems.append(f"{key} is {list(value.shape)}, the model needs {list(own[name].shape)}")
            continue
        loaded[name] = _from_official_layout(name, value).view(own[name].shape)
    problems += [f"{key} is not part of this model" for key in remaining]
    if problems:
        raise CheckpointError(f"the published checkpoint does not fit the recipe's model: {first_of(problems)}.")
    model.load_state_dict(loaded, strict=not remade)
    return remade


def to_official(model: SAMDETR) -> dict[str, Tensor]:
    """Our weights under the published keys and shapes, box heads repeated as there."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        state[official_name(name)] = _to_official_layout(name, value)
    for key in [key for key in state if key.startswith("bbox_embed.")]:
        state[_DUPLICATE_PREFIX + key] = state[key]
    return state


def read_official(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published .pth file. Only tensors, plain values and argparse.Namespace are unpickled.

    Raises CheckpointError when the file is absent, holds anything else, or has no state dict of a SAM-DETR.
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
    strange = [key for key in _LANDMARKS if key not in state]
    if strange:
        raise CheckpointError(
            f"{path} is not a published SAM-DETR: it has no {' and no '.join(strange)}. Use one that is, "
            "or for a backbone alone model.backbone.weights."
        )
    return dict(state)


def _is_legacy_pickle(path: Path) -> bool:
    """Whether the file begins as torch's format before 1.6 does (a pickle of protocol 2 or later)."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _check_input_norm(model: SAMDETR, state: Mapping[str, Tensor]) -> None:
    has_norm = "input_proj.0.1.weight" in state
    if has_norm != (model.input_norm is not None):
        wanted = "group_norm" if has_norm else "none"
        raise CheckpointError(
            f"the published checkpoint has {'a' if has_norm else 'no'} GroupNorm after its input projection: "
            f'set model.input_norm = "{wanted}".'
        )


def _from_official_layout(name: str, value: Tensor) -> Tensor:
    if name.endswith("aligner.point_mlp.0.weight"):
        return value.unflatten(1, (-1, ROI_SIZE * ROI_SIZE)).transpose(1, 2).flatten(1)
    return value


def _to_official_layout(name: str, value: Tensor) -> Tensor:
    if name.endswith("aligner.point_mlp.0.weight"):
        return value.unflatten(1, (ROI_SIZE * ROI_SIZE, -1)).transpose(1, 2).flatten(1)
    if re.fullmatch(r"input_proj\.weight|decoder\.\d+\.aligner\.reduce\.weight", name):
        return value[:, :, None, None]
    return value
