"""Published SAM-DETR checkpoints <-> our models, strict in both directions.

The two layouts differ in names, in 1x1 convolutions (ours are linear layers on channels-last maps) and in the
order of the first point layer's inputs (theirs channel, row, column; ours row, column, channel). The published
layout also stores every box head twice.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from samdetr.errors import CheckpointError
from samdetr.models.aligner import ROI_SIZE
from samdetr.models.sam_detr import SAMDETR

# Our name -> published name, the first pattern that matches. {layer} stays as it is.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.(.+)", r"backbone.0.body.\1"),
    (r"input_proj\.(.+)", r"input_proj.0.0.\1"),
    (r"input_norm\.(.+)", r"input_proj.0.1.\1"),
    (r"encoder\.layers\.(\d+)\.in_proj\.(.+)", r"transformer.encoder.layers.\1.self_attn.in_proj_\2"),
    (r"encoder\.layers\.(\d+)\.out_proj\.(.+)", r"transformer.encoder.layers.\1.self_attn.out_proj.\2"),
    (r"encoder\.layers\.(\d+)\.norm\.(.+)", r"transformer.encoder.layers.\1.norm1.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.norm\.(.+)", r"transformer.encoder.layers.\1.norm2.\2"),
    (r"encoder\.layers\.(\d+)\.feed_forward\.(.+)", r"transformer.encoder.layers.\1.\2"),
    (
        r"decoder\.(\d+)\.self_attention\.query_content\.(.+)",
        r"transformer.decoder.layers.\1.sa_qcontent_proj.\2",
    ),
    (
        r"decoder\.(\d+)\.self_attention\.query_position\.(.+)",
        r"transformer.decoder.layers.\1.sa_qpos_proj.\2",
    ),
    (
        r"decoder\.(\d+)\.self_attention\.key_content\.(.+)",
        r"transformer.decoder.layers.\1.sa_kcontent_proj.\2",
    ),
    (r"decoder\.(\d+)\.self_attention\.key_position\.(.+)", r"transformer.decoder.layers.\1.sa_kpos_proj.\2"),
    (r"decoder\.(\d+)\.self_attention\.value\.(.+)", r"transformer.decoder.layers.\1.sa_v_proj.\2"),
    (r"decoder\.(\d+)\.self_attention\.out\.(.+)", r"transformer.decoder.layers.\1.self_attn.out_proj.\2"),
    (r"decoder\.(\d+)\.aligner\.reduce\.(.+)", r"transformer.decoder.layers.\1.point1.0.\2"),
    (r"decoder\.(\d+)\.aligner\.point_mlp\.(.+)", r"transformer.decoder.layers.\1.point2.\2"),
    (r"decoder\.(\d+)\.aligner\.content_gate\.(.+)", r"transformer.decoder.layers.\1.attn1.\2"),
    (r"decoder\.(\d+)\.aligner\.position_gate\.(.+)", r"transformer.decoder.layers.\1.attn2.\2"),
    (
        r"decoder\.(\d+)\.cross_attention\.query_content\.(.+)",
        r"transformer.decoder.layers.\1.ca_qcontent_proj.\2",
    ),
    (
        r"decoder\.(\d+)\.cross_attention\.query_position\.(\d)\.(.+)",
        "mlp:transformer.decoder.layers.{0}.ca_qpos_sine_proj",
    ),
    (
        r"decoder\.(\d+)\.cross_attention\.key_content\.(.+)",
        r"transformer.decoder.layers.\1.ca_kcontent_proj.\2",
    ),
    (
        r"decoder\.(\d+)\.cross_attention\.key_position\.(\d)\.(.+)",
        "mlp:transformer.decoder.layers.{0}.ca_kpos_sine_proj",
    ),
    (r"decoder\.(\d+)\.cross_attention\.value\.(.+)", r"transformer.decoder.layers.\1.ca_v_proj.\2"),
    (r"decoder\.(\d+)\.cross_attention\.out\.(.+)", r"transformer.decoder.layers.\1.cross_attn.out_proj.\2"),
    (r"decoder\.(\d+)\.feed_forward\.norm\.(.+)", r"transformer.decoder.layers.\1.norm3.\2"),
    (r"decoder\.(\d+)\.feed_forward\.(.+)", r"transformer.decoder.layers.\1.\2"),
    (r"decoder\.(\d+)\.(norm\d)\.(.+)", r"transformer.decoder.layers.\1.\2.\3"),
    (r"reference_boxes", r"query_embed.weight"),
    (r"class_heads\.(.+)", r"class_embed.\1"),
    (r"box_heads\.(\d+)\.(\d)\.(.+)", "mlp:bbox_embed.{0}"),
)
_DUPLICATE_PREFIX = "transformer.decoder."  # box heads stand in the published file with and without it


def official_name(name: str) -> str:
    """The published key of one of our parameters or buffers. Raises CheckpointError where there is none."""
    for pattern, replacement in _NAMES:
        found = re.fullmatch(pattern, name)
        if found and replacement.startswith("mlp:"):
            layer, position, leaf = found.groups()  # ours counts the ReLUs, theirs does not
            return f"{replacement[4:].format(layer)}.layers.{int(position) // 2}.{leaf}"
        if found and "num_batches_tracked" not in name:
            return found.expand(replacement)
    raise CheckpointError(
        f"{name} has no place in the published layout, which holds frozen BatchNorm only: "
        'set model.backbone.norm = "frozen".'
    )


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
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise CheckpointError(f"the published checkpoint does not fit the recipe's model: {problems[0]}{more}.")
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

    Raises CheckpointError when the file is absent, holds anything else, or has no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no published checkpoint {path}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot read {path} as a published checkpoint: {reason}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f'{path} holds no state dict (expected one under "model", as published).')
    return dict(state)


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
