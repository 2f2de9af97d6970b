"""Conditional-DETR (ICCV 2021): cross-attention whose queries say where to look apart from what to look for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models.detector import EncoderDecoder
from samdetr.models.detr import PUBLISHED_WHOLE
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
    PredictionHeads,
    attend,
    build_layer_sizes,
    inverse_sigmoid,
    joint_linear,
    make_box_head,
    make_class_head,
    reset_matrices,
)
from samdetr.models.position import sine_points
from samdetr.models.system import PublishedLayout, System
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import ConditionalDETRSection


class CrossAttention(nn.Module):
    """Attention to the map: every head compares content with content and position with position, side by side."""

    def __init__(self, *, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content = nn.Linear(width, width)
        self.query_position = nn.Linear(width, width) if first else None  # content says nothing yet in this layer
        self.query_sine = nn.Linear(width, width)
        self.key_content = nn.Linear(width, width)
        self.key_position = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        query_sine_embed: Tensor,
        memory: Tensor,
        pos_embed: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Attend to the map: [B, Q, width].

        x [B, Q, width]; query_position [Q, width]; query_sine_embed, of where to look, broadcast to x's shape; memory,
        pos_embed [B, S, width]; mask [B, S] bool, True: attended.
        """
        query, query_sine = self.query_content(x), self.query_sine(query_sine_embed)
        key, value = joint_linear(memory, self.key_content, self.value)
        key_position = self.key_position(pos_embed)
        if self.query_position is not None:
            query, key = query + self.query_position(query_position), key + key_position
        query, key = self.side_by_side(query, query_sine.expand_as(query)), self.side_by_side(key, key_position)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, heads=self.heads, dropout=dropout, mask=mask[:, None, None]))

    def side_by_side(self, content: Tensor, position: Tensor) -> Tensor:
        """Put each head's share of content and of position together: twice [B, N, width] -> [B, N, 2 * width]."""
        halves = [part.unflatten(-1, (self.heads, -1)) for part in (content, position)]
        return torch.cat(halves, dim=-1).flatten(2)


class DecoderLayer(nn.Module):
    """Attention among queries, conditional attention to the map, feed-forward."""

    def __init__(self, sizes: LayerSizes, *, first: bool, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.self_attention = ConditionalSelfAttention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width=width, heads=heads, dropout=dropout, first=first)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout, activation=activation)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        query_position: Tensor,
        query_sine_embed: Tensor,
        memory: Tensor,
        pos_embed: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Run the layer: [B, Q, width]. The arguments are those of `CrossAttention.forward`."""
        x = self.norm1(x + self.dropout(self.self_attention(x, query_position)))
        attended = self.cross_attention(x, query_position, query_sine_embed, memory, pos_embed, mask)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class ReferencePoints(nn.Module):
    """A reference point in the image for each query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reference_head = MLP(width, width, 2, fp32_output=True)

    def forward(self, query_positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Predict the points (x, y) of the valid image, [Q, 2] before the sigmoid, from query_positions [Q, width].

        Returns them and their sine embedding [Q, width] of ``dtype``.
        """
        reference = self.reference_head(query_positions).sigmoid()
        sine_embed = sine_points(reference, query_positions.shape[-1]).to(dtype)
        return inverse_sigmoid(reference), sine_embed


class QueryScale(nn.Module):
    """Where the next layer looks: a reference point's sine embedding, scaled by the query's content."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = MLP(width, width, width)

    def forward(self, sine_embed: Tensor, x: Tensor) -> Tensor:
        """Scale sine_embed [Q, width] by x [B, Q, width]: [B, Q, width]."""
        return sine_embed * self.scale(x)


class ConditionalDETRDecoder(nn.Module):
    """Queries each have a reference point in the image; one pair of heads reads every layer."""

    def __init__(self, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reference_points = ReferencePoints(width)
        self.query_scale = QueryScale(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.heads = PredictionHeads(
            width, class_head=make_class_head(width, num_classes), box_head=make_box_head(width)
        )
        self.compiled_parts = (self.reference_points, self.query_scale, self.heads)

    def forward(self, encoded: EncodedMap) -> Outputs:
        """Predict logits and boxes after every layer."""
        memory, pos_embed, mask = encoded.flatten()
        centre, sine_embed = self.reference_points(self.query_positions, memory.dtype)
        x, query_sine_embed = memory.new_zeros(len(memory), *self.query_positions.shape), sine_embed
        outputs: list[Tensor] = []
        for layer in self.layers:
            if outputs:
                query_sine_embed = self.query_scale(sine_embed, x)
            x = layer(x, self.query_positions, query_sine_embed, memory, pos_embed, mask)
            outputs.append(x)
        return Outputs(*self.heads(torch.stack(outputs), centre))


def build_conditional_detr(section: ConditionalDETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights."""
    encoder = build_image_encoder(section)
    layers = [DecoderLayer(build_layer_sizes(section), first=number == 0) for number in range(section.decoder_layers)]
    decoder = ConditionalDETRDecoder(
        layers, width=section.width, num_classes=section.num_classes, num_queries=section.num_queries
    )
    reset_matrices(encoder.transformer, decoder.layers, decoder.reference_points, decoder.query_scale)
    return EncoderDecoder(SYSTEM, encoder, decoder)


# our prefixes -> published ones, as in `PublishedLayout`
PUBLISHED_LAYER = {
    **PUBLISHED_DECODER_LAYER,
    **PUBLISHED_SELF_ATTENTION,
    "cross_attention.query_content.": "ca_qcontent_proj.",
    "cross_attention.query_position.": "ca_qpos_proj.",
    "cross_attention.query_sine.": "ca_qpos_sine_proj.",
    "cross_attention.key_content.": "ca_kcontent_proj.",
    "cross_attention.key_position.": "ca_kpos_proj.",
    "cross_attention.value.": "ca_v_proj.",
    "cross_attention.out.": "cross_attn.out_proj.",
}
SYSTEM = System(
    name="conditional_detr",
    build=build_conditional_detr,
    class_heads="decoder.heads.class_head.",
    published=PublishedLayout(
        landmark="transformer.decoder.ref_point_head.layers.0.weight",
        whole={
            **PUBLISHED_WHOLE,
            "decoder.reference_points.reference_head.": "transformer.decoder.ref_point_head.layers.",
            "decoder.query_scale.scale.": "transformer.decoder.query_scale.layers.",
        },
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_input_norm,
        convolutions=CONVOLUTIONS,
    ),
)
