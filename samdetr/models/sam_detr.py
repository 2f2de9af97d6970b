"""SAM-DETR and SAM-DETR w/ SMCA (CVPR 2022), single scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samdetr.models.aligner import (
    PUBLISHED_POINT_BRANCH,
    AlignedQueries,
    PooledAligner,
    SemanticAligner,
    build_aligner,
    published_projection_flops,
)
from samdetr.models.detector import EncoderDecoder
from samdetr.models.encoder import (
    CONVOLUTIONS,
    PUBLISHED_ENCODER_LAYER,
    EncodedMap,
    build_image_encoder,
    check_input_norm,
)
from samdetr.models.layers import (
    MLP,
    PUBLISHED_DECODER_LAYER,
    PUBLISHED_SELF_ATTENTION,
    ConditionalSelfAttention,
    FeedForward,
    LayerSizes,
    attend,
    box_head_flops,
    boxes_around,
    build_layer_sizes,
    inverse_sigmoid,
    joint_linear,
    make_box_head,
    make_class_head,
    reset_matrices,
)
from samdetr.models.position import MapGeometry, sine_points
from samdetr.models.system import PublishedLayout, System, repeated_box_heads
from samdetr.structures import Outputs
from samdetr_kernels import salient_cross_attention

if TYPE_CHECKING:
    from samdetr.models.deformable_encoder import EncodedPyramid
    from samdetr.recipe.model import MultiScaleSAMDETRSection, SAMDETRSection

SEEDS = 2**62  # from which a call of attention draws that of its dropout


class CrossAttention(nn.Module):
    """Attention from aligned queries to the map: a full-width key shared by all heads, values split among them.

    Where all heads have one query, each takes its share of the channels of query and key, as in DETR.
    """

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content = nn.Linear(width, width)
        self.query_position = MLP(width, width, width)
        self.key_content = nn.Linear(width, width)
        self.key_position = MLP(width, width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def forward(self, aligned: AlignedQueries, memory: Tensor, pos_embed: Tensor, geometry: MapGeometry) -> Tensor:
        """Attend to memory and pos_embed [B, H, W, width]: [B, Q, width]."""
        query = self.query_content(aligned.content) + self.query_position(aligned.position)
        key, value = joint_linear(memory, self.key_content, self.value)
        key = key + self.key_position(pos_embed)
        dropout = self.dropout if self.training else 0.0
        if query.shape[2] < self.heads:
            key, value, mask = key.flatten(1, 2), value.flatten(1, 2), geometry.mask.flatten(1)[:, None, None]
            return self.out(attend(query[:, :, 0], key, value, heads=self.heads, dropout=dropout, mask=mask))
        value = value.unflatten(-1, (self.heads, -1))
        points = None
        if aligned.scales is not None:
            points = aligned.locations * geometry.valid.flip(-1)[:, None, None].to(aligned.locations.dtype)
        attended = salient_cross_attention(
            query,
            key.flatten(1, 2),
            value.flatten(1, 2),
            geometry.valid,
            memory.shape[2],
            points=points,
            scales=aligned.scales,
            dropout=dropout,
            seed=torch.randint(SEEDS, (1,), device=query.device) if dropout else None,
        )
        return self.out(attended)


class DecoderLayer(nn.Module):
    """Self-attention, semantic alignment, cross-attention, feed-forward."""

    def __init__(
        self,
        sizes: LayerSizes,
        *,
        self_attention: ConditionalSelfAttention,
        aligner: SemanticAligner | PooledAligner,
    ) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.self_attention = self_attention
        self.norm1 = nn.LayerNorm(width)
        self.aligner = aligner
        self.cross_attention = CrossAttention(width=width, heads=heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, pos_embed: Tensor, geometry: MapGeometry) -> Tensor:
        """Run the layer on x [B, Q, width], boxes [B, Q, 4], memory and pos_embed [B, H, W, width]: [B, Q, width]."""
        query_sine_embed = sine_points(boxes[..., :2].detach(), x.shape[-1]).to(x.dtype)  # no gradient, as published
        x = self.norm1(x + self.dropout(self.self_attention(x, query_sine_embed)))
        aligned = self.aligner(x, boxes, memory, geometry)
        attended = self.cross_attention(aligned, memory, pos_embed, geometry)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class LayerPrediction(nn.Module):
    """A layer's predictions, whose boxes are refined by the next layer. It has no weights: the heads are given."""

    def forward(
        self, x: Tensor, reference: Tensor, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict logits [B, Q, K] and boxes [B, Q, 4] from x [B, Q, width], and the next layer's reference.

        reference: boxes [B, Q, 4] before the sigmoid, as is the next layer's.
        """
        offset = box_head(x)
        boxes = boxes_around(offset, inverse_sigmoid(reference.sigmoid()))
        return class_head(x), boxes, (reference + offset).detach()


class SAMDETRDecoder(nn.Module):
    """Learned reference boxes are refined layer by layer, with semantic-aligned matching; each layer has its heads.

    choose_maps: gives the map that each of so many layers reads.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        choose_maps: Callable[[Any, int], Sequence[EncodedMap]],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.choose_maps = choose_maps
        self.reference_boxes = nn.Parameter(torch.randn(num_queries, 4))
        self.class_heads = nn.ModuleList(make_class_head(width, num_classes) for _ in layers)
        self.box_heads = nn.ModuleList(make_box_head(width) for _ in layers)
        self.predict = LayerPrediction()
        self.compiled_parts = (self.predict,)

    def forward(self, encoded: EncodedMap | EncodedPyramid) -> Outputs:
        """Predict logits and boxes after every layer."""
        maps = self.choose_maps(encoded, len(self.layers))
        memory = maps[0].memory
        reference = self.reference_boxes.expand(len(memory), -1, -1)
        x = torch.zeros(*reference.shape[:2], memory.shape[-1], dtype=memory.dtype, device=memory.device)
        logits, boxes = [], []
        for layer, class_head, box_head, read in zip(self.layers, self.class_heads, self.box_heads, maps, strict=True):
            x = layer(x, reference.sigmoid(), read.memory, read.pos_embed, read.geometry)
            layer_logits, layer_boxes, reference = self.predict(x, reference, class_head, box_head)
            logits.append(layer_logits)
            boxes.append(layer_boxes)
        return Outputs(torch.stack(logits), torch.stack(boxes))


def repeat_map(encoded: EncodedMap, layers: int) -> list[EncodedMap]:
    """Give every layer the same map."""
    return [encoded] * layers


def build_sam_detr_layers(section: SAMDETRSection | MultiScaleSAMDETRSection) -> list[DecoderLayer]:
    """Build the decoder layers of a recipe, with random weights."""
    sizes = build_layer_sizes(section)
    return [
        DecoderLayer(
            sizes,
            # before the aligner: a seed means this order of draws
            self_attention=ConditionalSelfAttention(width=sizes.width, heads=sizes.heads, dropout=sizes.dropout),
            aligner=build_aligner(section),
        )
        for _ in range(section.decoder_layers)
    ]


def build_sam_detr(section: SAMDETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights; needs no download and no GPU."""
    encoder = build_image_encoder(section, pos_offset=0.5)
    decoder = SAMDETRDecoder(
        build_sam_detr_layers(section),
        repeat_map,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
    )
    reset_matrices(encoder.transformer, decoder.layers)  # also overwrites the point branch's zero start, as published
    nn.init.xavier_uniform_(encoder.embed.input_proj.weight)
    nn.init.zeros_(encoder.embed.input_proj.bias)
    return EncoderDecoder(SYSTEM, encoder, decoder)


PUBLISHED_LAYER = {  # our prefixes -> published ones
    **PUBLISHED_DECODER_LAYER,
    **PUBLISHED_SELF_ATTENTION,
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
}
ALIGNER_CONVOLUTIONS = r"decoder\.layers\.\d+\.aligner\.reduce"  # published as such


def published_box_head_flops(decoder: SAMDETRDecoder, args: Sequence[Any], out: Outputs) -> int:
    """Count all box heads but the last: the published code runs them for the next reference and for the prediction."""
    return box_head_flops(decoder.box_heads[:-1], out)


SYSTEM = System(
    name="sam_detr",
    build=build_sam_detr,
    class_heads="decoder.class_heads.",
    published_flops={SemanticAligner: published_projection_flops, SAMDETRDecoder: published_box_head_flops},
    published=PublishedLayout(
        landmark="transformer.decoder.layers.0.ca_qpos_sine_proj.layers.0.weight",
        whole={
            "encoder.backbone.": "backbone.0.body.",
            "encoder.embed.input_proj.": "input_proj.0.0.",
            "encoder.embed.input_norm.": "input_proj.0.1.",
            "decoder.reference_boxes": "query_embed.weight",
            "decoder.class_heads.": "class_embed.",
        },
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_input_norm,
        convolutions=f"{CONVOLUTIONS}|{ALIGNER_CONVOLUTIONS}",
        copies=repeated_box_heads,
        reordered=PUBLISHED_POINT_BRANCH,
    ),
)
