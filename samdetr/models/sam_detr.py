"""SAM-DETR and SAM-DETR w/ SMCA (CVPR 2022), single scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models.aligner import AlignedQueries, PooledAligner, SemanticAligner, build_aligner
from samdetr.models.encoder import EncoderHalf, MapDetector, build_encoder_half
from samdetr.models.layers import (
    MLP,
    FeedForward,
    PlacedSelfAttention,
    attend,
    box_head,
    class_head,
    initialise,
    inverse_sigmoid,
    joint_linear,
)
from samdetr.models.position import MapGeometry, sine_points
from samdetr.structures import Outputs
from samdetr_kernels import salient_cross_attention

if TYPE_CHECKING:
    from samdetr.recipe import AlignedSection, SAMDETRSection

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

    def forward(
        self, aligned: AlignedQueries, memory: Tensor, memory_position: Tensor, geometry: MapGeometry
    ) -> Tensor:
        """memory, memory_position [B, H, W, width] -> [B, Q, width]."""
        query = self.query_content(aligned.content) + self.query_position(aligned.position)
        key, value = joint_linear(memory, self.key_content, self.value)
        key = key + self.key_position(memory_position)
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
    """Self-attention, semantic alignment, cross-attention, feed-forward. aligner: makes the one of this layer."""

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        ffn: int,
        dropout: float,
        aligner: Callable[[], SemanticAligner | PooledAligner],
    ) -> None:
        super().__init__()
        self.self_attention = PlacedSelfAttention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.aligner = aligner()
        self.cross_attention = CrossAttention(width=width, heads=heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, boxes: Tensor, memory: Tensor, memory_position: Tensor, geometry: MapGeometry
    ) -> Tensor:
        """x [B, Q, width]; boxes [B, Q, 4]; memory, memory_position [B, H, W, width] -> [B, Q, width]."""
        box_position = sine_points(boxes[..., :2].detach(), x.shape[-1]).to(x.dtype)  # no gradient, as published
        x = self.norm1(x + self.dropout(self.self_attention(x, box_position)))
        aligned = self.aligner(x, boxes, memory, geometry)
        attended = self.cross_attention(aligned, memory, memory_position, geometry)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class AlignedDecoder(nn.Module):
    """The half behind the encoder, on one map or several: boxes refined layer by layer, heads for each layer."""

    def start_decoder(self, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int) -> None:
        """Make the parts of this half; the layers' own start is the whole detector's affair."""
        self.decoder = nn.ModuleList(layers)
        self.reference_boxes = nn.Parameter(torch.randn(num_queries, 4))
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in layers)
        self.box_heads = nn.ModuleList(box_head(width) for _ in layers)

    def refine(self, maps: Sequence[tuple[Tensor, Tensor, MapGeometry]]) -> Outputs:
        """The predictions of every layer. maps: what each one reads, memory and position code [B, h, w, width]."""
        memory = maps[0][0]
        reference = self.reference_boxes.expand(len(memory), -1, -1)
        x = torch.zeros(*reference.shape[:2], memory.shape[-1], dtype=memory.dtype, device=memory.device)
        logits, boxes = [], []
        for layer, classify, locate, read in zip(self.decoder, self.class_heads, self.box_heads, maps, strict=True):
            x = layer(x, reference.sigmoid(), *read)
            layer_logits, layer_boxes, reference = self.predict(classify, locate, x, reference)
            logits.append(layer_logits)
            boxes.append(layer_boxes)
        return Outputs(torch.stack(logits), torch.stack(boxes))

    @staticmethod
    def predict(classify: nn.Module, locate: nn.Module, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, Q, K], boxes [B, Q, 4] and the next layer's reference [B, Q, 4] before the sigmoid."""
        offset = locate(x)
        boxes = (inverse_sigmoid(reference.sigmoid()) + offset).sigmoid()
        return classify(x), boxes, (reference + offset).detach()


class SAMDETR(AlignedDecoder, MapDetector):
    """A detector that refines learned reference boxes layer by layer, with semantic-aligned matching."""

    code_offset = 0.5

    def __init__(
        self, half: EncoderHalf, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int
    ) -> None:
        super().__init__(half)
        self.start_decoder(layers, width=width, num_classes=num_classes, num_queries=num_queries)
        initialise(self.encoder, self.decoder)  # this also overwrites the zero start of the point branch, as published
        nn.init.xavier_uniform_(self.input_proj.weight)
        nn.init.zeros_(self.input_proj.bias)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        return self.decode(*self.encode(images, image_sizes))

    def decode(self, memory: Tensor, position: Tensor, geometry: MapGeometry) -> Outputs:
        """The predictions of every layer from the encoded map and its position code [B, h, w, width]."""
        return self.refine([(memory, position, geometry)] * len(self.decoder))


def build_aligned_layers(section: AlignedSection) -> list[DecoderLayer]:
    """The decoder layers of a recipe, with random weights."""
    return [
        DecoderLayer(
            width=section.width,
            heads=section.heads,
            ffn=section.ffn,
            dropout=section.dropout,
            aligner=partial(build_aligner, section),
        )
        for _ in range(section.decoder_layers)
    ]


def build_sam_detr(section: SAMDETRSection) -> SAMDETR:
    """The model of a recipe with random weights; needs no download and no GPU."""
    return SAMDETR(
        build_encoder_half(section),
        build_aligned_layers(section),
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
    )
