"""DETR (ECCV 2020), with its own softmax loss or, as in later papers' tables, focal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
    Attention,
    FeedForward,
    LayerSizes,
    PredictionHeads,
    build_layer_sizes,
    make_class_head,
    reset_matrices,
)
from samdetr.models.system import PublishedLayout, System
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import DETRSection


class DecoderLayer(nn.Module):
    """Attention among queries, attention to the map, feed-forward; the query's position is added before each.

    cross_attention: to the map, called as `Attention` is; None: one of those.
    """

    def __init__(self, sizes: LayerSizes, *, cross_attention: nn.Module | None = None) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.self_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        if cross_attention is None:
            cross_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.cross_attention = cross_attention
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Run the layer on x [B, Q, width]: [B, Q, width].

        query_position [Q, width]; key (memory + pos_embed), memory [B, S, width]; mask of the attention to the map, as
        of `attend`.
        """
        positioned = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(positioned, positioned, x)))
        attended = self.cross_attention(x + query_position, key, memory, mask)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class DETRDecoder(nn.Module):
    """Queries are learned positions; one pair of heads reads every layer."""

    def __init__(
        self, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int, class_prior: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.heads = PredictionHeads(
            width,
            class_head=make_class_head(width, num_classes, prior=class_prior),
            box_head=MLP(width, width, width, 4, fp32_output=True),
        )
        self.compiled_parts = (self.heads,)

    def forward(self, encoded: EncodedMap) -> Outputs:
        """Predict logits and boxes after every layer."""
        memory, pos_embed, mask = encoded.flatten()
        key, mask = memory + pos_embed, mask[:, None, None]
        x = memory.new_zeros(len(memory), *self.query_positions.shape)
        outputs = []
        for layer in self.layers:
            x = layer(x, self.query_positions, key, memory, mask)
            outputs.append(x)
        return Outputs(*self.heads(torch.stack(outputs)))


def build_detr(section: DETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights."""
    encoder = build_image_encoder(section)
    layers = [DecoderLayer(build_layer_sizes(section)) for _ in range(section.decoder_layers)]
    decoder = DETRDecoder(
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        class_prior=section.class_prior,
    )
    reset_matrices(encoder.transformer, decoder.layers)
    return EncoderDecoder(SYSTEM, encoder, decoder)


# our prefixes -> published ones, which other systems share
PUBLISHED_WHOLE = {
    "encoder.backbone.": "backbone.0.body.",
    "encoder.embed.input_proj.": "input_proj.",
    "decoder.heads.norm.": "transformer.decoder.norm.",
    "decoder.query_positions": "query_embed.weight",
    "decoder.heads.class_head.": "class_embed.",
    "decoder.heads.box_head.": "bbox_embed.layers.",
}
PUBLISHED_LAYER = {
    **PUBLISHED_DECODER_LAYER,
    "self_attention.in_proj.": "self_attn.in_proj_",
    "self_attention.out_proj.": "self_attn.out_proj.",
    "cross_attention.in_proj.": "multihead_attn.in_proj_",
    "cross_attention.out_proj.": "multihead_attn.out_proj.",
}
SYSTEM = System(
    name="detr",
    build=build_detr,
    class_heads="decoder.heads.class_head.",
    published=PublishedLayout(
        landmark="transformer.decoder.layers.0.multihead_attn.in_proj_weight",
        whole=PUBLISHED_WHOLE,
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_input_norm,
        convolutions=CONVOLUTIONS,
    ),
)
