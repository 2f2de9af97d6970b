"""Names of parameters in checkpoints of earlier versions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_LAYER = r"^decoder\.(\d+)\."  # of a decoder that was the list of its layers
# older beginnings of names, in regular expressions, and current ones; all that fit are replaced, from top to bottom
_RENAMED = {
    r"^backbone\.": "encoder.backbone.",
    r"^(input_proj|input_norm|projections|norms)\.": r"encoder.embed.\1.",
    r"^level_codes": "encoder.embed.level_embed",
    r"^encoder\.layers\.": "encoder.transformer.layers.",
    r"^(class_heads|box_heads|halve)\.": r"decoder.\1.",
    r"^(norm|class_head|box_head)\.": r"decoder.heads.\1.",
    r"^(query_positions|reference_boxes)": r"decoder.\1",
    r"^first_stage\.(project|norm)\.": r"decoder.queries.propose.\1.",
    r"^first_stage\.queries": "decoder.queries.transform",
}
_RENAMED_OF = {
    "conditional_detr": {
        r"^reference_head\.": "decoder.reference_points.reference_head.",
        r"^place_scale\.": "decoder.query_scale.scale.",
        rf"{_LAYER}cross_attention\.query_place\.": r"decoder.\1.cross_attention.query_sine.",
        rf"{_LAYER}cross_attention\.key_place\.": r"decoder.\1.cross_attention.key_position.",
    },
    "deformable_detr": {
        r"^reference_head\.": "decoder.queries.reference_head.",
        r"^queries": "decoder.queries.embedding",
    },
    "smca_detr": {
        rf"{_LAYER}gaussian\.": r"decoder.layers.\1.gaussian.heads.",
        _LAYER: r"decoder.layers.\1.layer.",
    },
    "smca_detr_ms": {
        rf"{_LAYER}gaussian\.weigh\.": r"decoder.layers.\1.gaussian.weigh.",
        rf"{_LAYER}gaussian\.": r"decoder.layers.\1.gaussian.heads.",
        rf"{_LAYER}cross_attention\.": r"decoder.layers.\1.layer.cross_attention.attention.",
        _LAYER: r"decoder.layers.\1.layer.",
    },
}
_RENAMED_LAST = {_LAYER: r"decoder.layers.\1."}


def current_names(tensors: Mapping[str, T], meta: Mapping[str, Any]) -> dict[str, T]:
    """Rename the tensors that have a name of an earlier version; current names stay as they are.

    tensors: by the name of a parameter or buffer, or by ``<parameter>:<field>`` of the optimizer. meta: the
    checkpoint's, which names the system.
    """
    system = meta["recipe"]["model"]["system"]
    if system == "faster_rcnn":
        return dict(tensors)
    rules = [rule for rules in (_RENAMED, _RENAMED_OF.get(system, {}), _RENAMED_LAST) for rule in rules.items()]
    renamed = {}
    for name, tensor in tensors.items():
        for older, current in rules:
            name = re.sub(older, current, name)
        renamed[name] = tensor
    return renamed
