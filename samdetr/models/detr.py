"""DETR (ECCV 2020), with its own softmax loss or, as its tables of later papers have it, the focal loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models.encoder import EncoderHalf, MapDetector, build_encoder_half
from samdetr.models.layers import MLP, Attention, FeedForward, class_head, initialise
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe import DETRSection


class DecoderLayer(nn.Module):
    """Attention among queries, attention to the map, feed-forward; the query's position is added before each."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """x [B, Q, width]; query_position [Q, width]; key (memory with its position code), memory [B, S, width];
        mask of the attention to the map, as of `attend`. Returns [B, Q, width]."""
        placed = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))
        attended = self.cross_attention(x + query_position, key, memory, mask)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class DETR(MapDetector):
    """A detector whose queries are learned positions; one pair of heads reads every layer."""

    def __init__(
        self,
        half: EncoderHalf,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
        class_prior: float,
    ) -> None:
        super().__init__(half)
        self.decoder = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.class_head = class_head(width, num_classes, prior=class_prior)
        self.box_head = MLP(width, width, width, 4, fp32_output=True)
        initialise(self.encoder, self.decoder)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, position, geometry = self.encode(images, image_sizes)
        memory, position, mask = memory.flatten(1, 2), position.flatten(1, 2), geometry.mask.flatten(1)[:, None, None]
        key = memory + position
        x = memory.new_zeros(len(memory), *self.query_positions.shape)
        layers = []
        for layer in self.decoder:
            x = layer(x, self.query_positions, key, memory, mask)
            layers.append(x)
        return Outputs(*self.predict(torch.stack(layers)))

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers give, x [L, B, Q, width] -> logits [L, B, Q, K] and boxes [L, B, Q, 4]."""
        x = self.norm(x)
        return self.class_head(x), self.box_head(x).sigmoid()


def build_detr(section: DETRSection) -> DETR:
    """The model of a recipe with random weights."""
    half = build_encoder_half(section)
    layers = [
        DecoderLayer(width=section.width, heads=section.heads, ffn=section.ffn, dropout=section.dropout)
        for _ in range(section.decoder_layers)
    ]
    return DETR(
        half,
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        class_prior=section.class_prior,
    )
