"""DETR (ECCV 2020), with its own softmax loss or, as its tables of later papers have it, the focal loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models.backbone import Backbone, build_backbone
from samdetr.models.encoder import Encoder, build_encoder, embed_map, encode_map
from samdetr.models.layers import MLP, Attention, FeedForward, MapGroupNorm, class_head, initialise, input_norm
from samdetr.models.position import MapGeometry
from samdetr.structures import Outputs, Regions

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection


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

    def forward(self, x: Tensor, query_position: Tensor, key: Tensor, memory: Tensor, key_mask: Tensor) -> Tensor:
        """x [B, Q, width]; query_position [Q, width]; key (memory with its position code), memory [B, S, width];
        key_mask [B, S] bool, True: attended. Returns [B, Q, width]."""
        placed = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))
        attended = self.cross_attention(x + query_position, key, memory, key_mask[:, None, None])
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class DETR(nn.Module):
    """A detector whose queries are learned positions; one pair of heads reads every layer."""

    def __init__(
        self,
        backbone: Backbone,
        norm: MapGroupNorm | None,
        encoder: Encoder,
        decoder: list[DecoderLayer],
        *,
        width: int,
        num_queries: int,
        num_classes: int,
        class_prior: float,
    ) -> None:
        super().__init__()
        self.backbone, self.mask_padding = backbone, backbone.mask_padding
        self.input_proj, self.input_norm = nn.Linear(backbone.out_channels, width), norm
        self.encoder = encoder
        self.decoder = nn.ModuleList(decoder)
        self.norm = nn.LayerNorm(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.class_head = class_head(width, num_classes, prior=class_prior)
        self.box_head = MLP(width, width, width, 4, exact=True)
        initialise(self.encoder, self.decoder)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, position, geometry = encode_map(self, images, image_sizes)
        memory, position, mask = memory.flatten(1, 2), position.flatten(1, 2), geometry.mask.flatten(1)
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

    def embed(
        self, features: Tensor, image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, MapGeometry]:
        """As `embed_map`."""
        return embed_map(self, features, image_sizes, image_shape, offset=0.0)

    def regions(self) -> Regions:
        """What is compiled besides the backbone."""
        return Regions((*self.encoder.layers, *self.decoder), ("embed", "predict"))


def build_detr(section: ModelSection) -> DETR:
    """The model of a recipe with random weights; needs no download and no GPU."""
    sizes = {"width": section.width, "heads": section.heads, "ffn": section.ffn}
    return DETR(
        build_backbone(section.backbone, padding=section.padding),
        input_norm(section.input_norm, section.width),
        build_encoder(section),
        [DecoderLayer(**sizes, dropout=section.dropout) for _ in range(section.decoder_layers)],
        width=section.width,
        num_queries=section.num_queries,
        num_classes=section.num_classes,
        class_prior=section.class_prior,
    )
