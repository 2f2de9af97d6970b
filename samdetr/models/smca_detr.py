"""SMCA-DETR (ICCV 2021), single scale: DETR whose cross-attention is modulated by learned Gaussians.

Several scales: smca_detr_ms.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models import detr
from samdetr.models.encoder import EncoderHalf, MapDetector, build_encoder_half
from samdetr.models.layers import MLP, Fp32Linear, boxes_around, class_head, initialise
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe import SMCADETRSection

SMOOTHNESS = 8.0  # what squared distances are divided by
PUBLISHED_STRIDE = 32  # pixels a unit of the Gaussians, also where the map's stride is 16 (DC5)


class Gaussian(nn.Module):
    """What each query and head adds to the scores of the map's cells: minus a scaled squared distance from a point.

    The points of a query lie around its centre, which the first layer predicts and all others are given.
    """

    def __init__(self, *, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.centre = MLP(width, width, width, 2, fp32_output=True) if first else None
        self.offset = Fp32Linear(width, 2 * heads)
        self.scale = Fp32Linear(width, 2 * heads)
        nn.init.ones_(self.scale.bias)

    def forward(
        self, placed: Tensor, centre: Tensor | None, extent: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """placed [B, Q, width] queries with their positions; centre [B, Q, 2] (x, y) before the sigmoid, None for the
        first layer; extent [B, 2] (w, h) of the valid image, in units; mask [B, h, w] bool, True: attended.

        Returns the bias [B, heads, Q, h * w], the centre, and offsets and raw scales [B, Q, heads, 2] (x, y), units.
        """
        _, centre, offset, scale = self.look(placed, centre)
        points = (centre.sigmoid() * extent[:, None])[:, :, None] + offset
        return gaussian_bias(points, scale, mask), centre, offset, scale

    def look(self, placed: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the heads read [B, Q, width]; centre, offsets and raw scales."""
        x = self.norm(placed)
        if self.centre is not None:
            centre = self.centre(x)
        assert centre is not None
        offset, scale = (head(x).unflatten(-1, (self.heads, 2)) for head in (self.offset, self.scale))
        return x, centre, offset, scale


def gaussian_bias(points: Tensor, scale: Tensor, mask: Tensor, smoothness: float = SMOOTHNESS) -> Tensor:
    """points (x, y) in cells, scale [B, Q, heads, 2]; mask [B, h, w] bool -> what is added to the scores of the map's
    cells, -inf where it is not attended: [B, heads, Q, h * w]."""
    across, down = (  # [B, heads, Q, w] and [B, heads, Q, h]
        (coordinate[..., None] - torch.arange(cells, device=points.device)).square() * weight.square()[..., None]
        for coordinate, weight, cells in zip(
            points.transpose(1, 2).unbind(-1),
            scale.transpose(1, 2).unbind(-1),
            (mask.shape[2], mask.shape[1]),
            strict=True,
        )
    )
    bias = (down[..., None] + across[..., None, :]) / -smoothness
    return bias.masked_fill(~mask[:, None, None], float("-inf")).flatten(3)


class DecoderLayer(detr.DecoderLayer):
    """DETR's decoder layer with a Gaussian in its cross-attention."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float, first: bool) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout)
        self.gaussian = Gaussian(width=width, heads=heads, first=first)

    def forward(  # type: ignore[override]  # also takes and gives the centre
        self,
        x: Tensor,
        centre: Tensor | None,
        query_position: Tensor,
        key: Tensor,
        memory: Tensor,
        mask: Tensor,
        extent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [B, Q, width]; query_position [Q, width]; key (memory with its position code), memory [B, h * w, width];
        centre, mask and extent as of `Gaussian`. Returns the new x and the centre."""
        bias, centre, _, _ = self.gaussian(x + query_position, centre, extent, mask)
        return super().forward(x, query_position, key, memory, bias), centre


class SMCADETR(MapDetector):
    """A detector whose queries are learned positions that look around a centre; one pair of heads reads every layer.

    unit: pixels a unit of the Gaussians.
    """

    def __init__(
        self,
        half: EncoderHalf,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
        unit: int,
    ) -> None:
        super().__init__(half)
        self.unit = unit
        self.decoder = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.class_head = class_head(width, num_classes)
        self.box_head = MLP(width, width, width, 4, fp32_output=True)
        initialise(self.encoder, self.decoder)
        for layer in layers:
            nn.init.zeros_(layer.gaussian.scale.weight)  # all Gaussians begin equally wide

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, position, geometry = self.encode(images, image_sizes)
        memory, position = memory.flatten(1, 2), position.flatten(1, 2)
        key = memory + position
        extent = image_sizes.flip(-1).to(self.query_positions.dtype) / self.unit
        x, centre = memory.new_zeros(len(memory), *self.query_positions.shape), None
        layers = []
        for layer in self.decoder:
            x, centre = layer(x, centre, self.query_positions, key, memory, geometry.mask, extent)
            layers.append(x)
        assert centre is not None
        return Outputs(*self.predict(torch.stack(layers), centre))

    def predict(self, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers give, x [L, B, Q, width], centre [B, Q, 2] -> logits [L, B, Q, K] and boxes [L, B, Q, 4]."""
        x = self.norm(x)
        return self.class_head(x), boxes_around(self.box_head(x), centre)


def build_smca_detr(section: SMCADETRSection) -> SMCADETR:
    """The model of a recipe with random weights."""
    half = build_encoder_half(section)
    layers = [
        DecoderLayer(
            width=section.width, heads=section.heads, ffn=section.ffn, dropout=section.dropout, first=number == 0
        )
        for number in range(section.decoder_layers)
    ]
    return SMCADETR(
        half,
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        unit=PUBLISHED_STRIDE if section.smca_stride == "published" else half.backbone.strides[0],
    )
