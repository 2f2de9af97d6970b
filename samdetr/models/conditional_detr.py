"""Conditional-DETR (ICCV 2021): cross-attention whose queries name a place in the image, apart from their content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models.encoder import EncoderHalf, MapDetector, build_encoder_half
from samdetr.models.layers import (
    MLP,
    FeedForward,
    PlacedSelfAttention,
    attend,
    box_head,
    boxes_around,
    class_head,
    initialise,
    inverse_sigmoid,
    joint_linear,
)
from samdetr.models.position import sine_points
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe import ConditionalDETRSection


class CrossAttention(nn.Module):
    """Attention to the map in which every head compares content with content and place with place, side by side."""

    def __init__(self, *, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content = nn.Linear(width, width)
        self.query_position = nn.Linear(width, width) if first else None  # content says nothing yet in this layer
        self.query_place = nn.Linear(width, width)
        self.key_content = nn.Linear(width, width)
        self.key_place = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: Tensor, query_position: Tensor, place: Tensor, memory: Tensor, memory_position: Tensor, mask: Tensor
    ) -> Tensor:
        """x [B, Q, width]; query_position [Q, width]; place, the sine code of where to look, broadcast to x's shape;
        memory, memory_position [B, S, width]; mask [B, S] bool, True: attended. Returns [B, Q, width]."""
        query, query_place = self.query_content(x), self.query_place(place)
        key, value = joint_linear(memory, self.key_content, self.value)
        key_place = self.key_place(memory_position)
        if self.query_position is not None:
            query, key = query + self.query_position(query_position), key + key_place
        query, key = self.beside(query, query_place.expand_as(query)), self.beside(key, key_place)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(query, key, value, heads=self.heads, dropout=dropout, mask=mask[:, None, None]))

    def beside(self, content: Tensor, place: Tensor) -> Tensor:
        """Each head's half of content and half of place: twice [B, N, width] -> [B, N, 2 * width]."""
        halves = [part.unflatten(-1, (self.heads, -1)) for part in (content, place)]
        return torch.cat(halves, dim=-1).flatten(2)


class DecoderLayer(nn.Module):
    """Attention among queries, conditional attention to the map, feed-forward."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.self_attention = PlacedSelfAttention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(width=width, heads=heads, dropout=dropout, first=first)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_position: Tensor, place: Tensor, memory: Tensor, memory_position: Tensor, mask: Tensor
    ) -> Tensor:
        """As `CrossAttention.forward`."""
        x = self.norm1(x + self.dropout(self.self_attention(x, query_position)))
        attended = self.cross_attention(x, query_position, place, memory, memory_position, mask)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class ConditionalDETR(MapDetector):
    """A detector whose queries each have a reference point in the image; one pair of heads reads every layer."""

    methods = ("embed", "refer", "rescale", "predict")

    def __init__(
        self, half: EncoderHalf, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int
    ) -> None:
        super().__init__(half)
        self.decoder = nn.ModuleList(layers)
        self.reference_head = MLP(width, width, 2, fp32_output=True)
        self.place_scale = MLP(width, width, width)
        self.norm = nn.LayerNorm(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.class_head = class_head(width, num_classes)
        self.box_head = box_head(width)
        initialise(self.encoder, self.decoder, self.reference_head, self.place_scale)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, position, geometry = self.encode(images, image_sizes)
        memory, position, mask = memory.flatten(1, 2), position.flatten(1, 2), geometry.mask.flatten(1)
        reference, code = self.refer(memory.dtype)
        x, place = memory.new_zeros(len(memory), *self.query_positions.shape), code
        layers: list[Tensor] = []
        for layer in self.decoder:
            if layers:
                place = self.rescale(code, x)
            x = layer(x, self.query_positions, place, memory, position, mask)
            layers.append(x)
        return Outputs(*self.predict(torch.stack(layers), reference))

    def refer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The reference points (x, y) in [0, 1] of the valid image, [Q, 2], and their sine code [Q, width]."""
        reference = self.reference_head(self.query_positions).sigmoid()
        return reference, sine_points(reference, self.query_positions.shape[-1]).to(dtype)

    def rescale(self, code: Tensor, x: Tensor) -> Tensor:
        """Where the next layer looks: the reference's code [Q, width], scaled by content x [B, Q, width]."""
        return code * self.place_scale(x)

    def predict(self, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers give, x [L, B, Q, width], reference [Q, 2] -> logits [L, B, Q, K], boxes [L, B, Q, 4]."""
        x = self.norm(x)
        return self.class_head(x), boxes_around(self.box_head(x), inverse_sigmoid(reference))


def build_conditional_detr(section: ConditionalDETRSection) -> ConditionalDETR:
    """The model of a recipe with random weights."""
    half = build_encoder_half(section)
    layers = [
        DecoderLayer(
            width=section.width, heads=section.heads, ffn=section.ffn, dropout=section.dropout, first=number == 0
        )
        for number in range(section.decoder_layers)
    ]
    return ConditionalDETR(
        half, layers, width=section.width, num_classes=section.num_classes, num_queries=section.num_queries
    )
