"""The names of parameters in the published checkpoints of each system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from samdetr.models import DETR, SAMDETR, SMCADETR, ConditionalDETR, DeformableDETR, Detector, MultiScaleSAMDETR
from samdetr.models.smca_detr_ms import ConvolvedSMCADETR

# Our prefix -> published prefix; of several that fit, the first. A value that ends in "layers." is an MLP, whose
# linear layers the published names count without the ReLUs between them.
_LAYER_END = {"norm.": "norm1.", "feed_forward.norm.": "norm2.", "feed_forward.": ""}
_ENCODER_LAYER = {
    "in_proj.": "self_attn.in_proj_",
    "out_proj.": "self_attn.out_proj.",
    **_LAYER_END,
}
_DEFORMABLE_ATTENTION = {
    "offsets.": "sampling_offsets.",
    "weights.": "attention_weights.",
    "value.": "value_proj.",
    "out.": "output_proj.",
}
_DEFORMABLE_ENCODER_LAYER = {
    **{f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in _DEFORMABLE_ATTENTION.items()},
    **_LAYER_END,
}
# What the decoder layers of all systems have, and below what those of some have.
_DECODER_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "feed_forward.norm.": "norm3.",
    "feed_forward.": "",
}
_PLACED_SELF_ATTENTION = {
    "self_attention.query_content.": "sa_qcontent_proj.",
    "self_attention.query_position.": "sa_qpos_proj.",
    "self_attention.key_content.": "sa_kcontent_proj.",
    "self_attention.key_position.": "sa_kpos_proj.",
    "self_attention.value.": "sa_v_proj.",
    "self_attention.out.": "self_attn.out_proj.",
}
_ATTENTION = {
    "self_attention.in_proj.": "self_attn.in_proj_",
    "self_attention.out_proj.": "self_attn.out_proj.",
    "cross_attention.in_proj.": "multihead_attn.in_proj_",
    "cross_attention.out_proj.": "multihead_attn.out_proj.",
}
BOX_HEAD = {"": "layers."}
_SHARED_HEADS = {
    "backbone.": "backbone.0.body.",
    "input_proj.": "input_proj.",
    "norm.": "transformer.decoder.norm.",
    "query_positions": "query_embed.weight",
    "class_head.": "class_embed.",
    "box_head.": "bbox_embed.layers.",
}
_PYRAMID = {
    "backbone.": "backbone.0.body.",
    "level_codes": "transformer.level_embed",
    "class_heads.": "class_embed.",
    **{f"projections.{level}.": f"input_proj.{level}.0." for level in range(4)},
    **{f"norms.{level}.": f"input_proj.{level}.1." for level in range(4)},
}


class Layout(NamedTuple):
    """The published names of one system."""

    system: str  # of the recipe
    landmark: str  # a key that its files have, and those of no layout before it
    whole: Mapping[str, str]
    decoder_layer: Mapping[str, str]
    encoder_layer: Mapping[str, str] = _ENCODER_LAYER


_SAM_DETR = Layout(
    system="sam_detr",
    landmark="transformer.decoder.layers.0.ca_qpos_sine_proj.layers.0.weight",
    whole={
        "backbone.": "backbone.0.body.",
        "input_proj.": "input_proj.0.0.",
        "input_norm.": "input_proj.0.1.",
        "reference_boxes": "query_embed.weight",
        "class_heads.": "class_embed.",
    },
    decoder_layer={
        **_DECODER_LAYER,
        **_PLACED_SELF_ATTENTION,
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
    },
)
_CONDITIONAL_DETR = Layout(
    system="conditional_detr",
    landmark="transformer.decoder.ref_point_head.layers.0.weight",
    whole={
        **_SHARED_HEADS,
        "reference_head.": "transformer.decoder.ref_point_head.layers.",
        "place_scale.": "transformer.decoder.query_scale.layers.",
    },
    decoder_layer={
        **_DECODER_LAYER,
        **_PLACED_SELF_ATTENTION,
        "cross_attention.query_content.": "ca_qcontent_proj.",
        "cross_attention.query_position.": "ca_qpos_proj.",
        "cross_attention.query_place.": "ca_qpos_sine_proj.",
        "cross_attention.key_content.": "ca_kcontent_proj.",
        "cross_attention.key_place.": "ca_kpos_proj.",
        "cross_attention.value.": "ca_v_proj.",
        "cross_attention.out.": "cross_attn.out_proj.",
    },
)
_SMCA_DETR = Layout(
    system="smca_detr",
    landmark="transformer.decoder.layers.0.point3.weight",
    whole=_SHARED_HEADS,
    decoder_layer={
        **_DECODER_LAYER,
        **_ATTENTION,
        "gaussian.norm.": "norm4.",
        "gaussian.centre.": "point1.layers.",
        "gaussian.offset.": "point2.",
        "gaussian.scale.": "point3.",
    },
)
_SMCA_DETR_MS = Layout(
    system="smca_detr_ms",
    landmark="transformer.decoder.layers.0.point4.weight",
    whole={
        **_SHARED_HEADS,
        "level_codes": "transformer.level_embed",
        "halve.": "transformer.conv.",
        **{f"projections.{n}.": f"input_proj_{of}." for n, of in enumerate(("512", "1024", "2048", "2048_3"))},
    },
    decoder_layer={**_SMCA_DETR.decoder_layer, "gaussian.weigh.": "point4."},
    encoder_layer={
        "value.": "conv_1.",
        "out.": "conv_2.",
        **{f"within.{level}.": f"self_attn_{8 << level}." for level in range(4)},
        **{f"down.{level}.": f"high_to_low_{level + 1}." for level in range(3)},
        **{f"up.{level}.": f"low_to_high_{level + 1}." for level in range(3)},
        **_LAYER_END,
    },
)
_DETR = Layout(
    system="detr",
    landmark="transformer.decoder.layers.0.multihead_attn.in_proj_weight",
    whole=_SHARED_HEADS,
    decoder_layer=_DECODER_LAYER | _ATTENTION,
)
_DEFORMABLE_DETR = Layout(
    system="deformable_detr",
    landmark="transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    whole={
        **_PYRAMID,
        "queries": "query_embed.weight",
        "reference_head.": "transformer.reference_points.",
        "first_stage.project.": "transformer.enc_output.",
        "first_stage.norm.": "transformer.enc_output_norm.",
        "first_stage.queries.": "transformer.pos_trans.",
        "first_stage.queries_norm.": "transformer.pos_trans_norm.",
    },
    decoder_layer={
        "self_attention.in_proj.": "self_attn.in_proj_",
        "self_attention.out_proj.": "self_attn.out_proj.",
        **{f"cross_attention.{ours}": f"cross_attn.{theirs}" for ours, theirs in _DEFORMABLE_ATTENTION.items()},
        "norm1.": "norm2.",
        "norm2.": "norm1.",
        "feed_forward.norm.": "norm3.",
        "feed_forward.": "",
    },
    encoder_layer=_DEFORMABLE_ENCODER_LAYER,
)
_SAM_DETR_MS = Layout(
    system="sam_detr_ms",
    landmark="transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    whole={**_PYRAMID, "reference_boxes": "query_embed.weight"},
    decoder_layer=_SAM_DETR.decoder_layer,
    encoder_layer=_DEFORMABLE_ENCODER_LAYER,
)
LAYOUTS: dict[type[Detector], Layout] = {
    DeformableDETR: _DEFORMABLE_DETR,
    MultiScaleSAMDETR: _SAM_DETR_MS,
    SAMDETR: _SAM_DETR,
    ConditionalDETR: _CONDITIONAL_DETR,
    ConvolvedSMCADETR: _SMCA_DETR_MS,  # before the one whose landmark its files have too
    SMCADETR: _SMCA_DETR,
    DETR: _DETR,
}
