"""SMCA-DETR (ICCV 2021), single scale: DETR whose cross-attention is modulated by learned Gaussians.

Several scales: smca_detr_ms.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.models import detr
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
    Fp32Linear,
    LayerSizes,
    PredictionHeads,
    build_layer_sizes,
    make_class_head,
    reset_matrices,
)
from samdetr.models.system import PublishedLayout, System
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import SMCADETRSection

SMOOTHNESS = 8.0  # what squared distances are divided by
PUBLISHED_STRIDE = 32  # pixels a unit of the Gaussians, also where the map's stride is 16 (DC5)


class GaussianHeads(nn.Module):
    """Centre, offset and scale of the Gaussians of each query: one centre, and the others for each of ``count``.

    The first layer predicts the centre, all others are given it.
    """

    def __init__(self, *, width: int, count: int, first: bool) -> None:
        super().__init__()
        self.count = count
        self.norm = nn.LayerNorm(width)
        self.centre = MLP(width, width, width, 2, fp32_output=True) if first else None
        self.offset = Fp32Linear(width, 2 * count)
        self.scale = Fp32Linear(width, 2 * count)
        nn.init.ones_(self.scale.bias)

    def forward(self, x: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict x after the norm, the centre, and offsets and raw scales [B, Q, count, 2] (x, y).

        x [B, Q, width]: queries with their positions. centre [B, Q, 2]: (x, y) before the sigmoid, None in the first
        layer.
        """
        x = self.norm(x)
        if self.centre is not None:
            centre = self.centre(x)
        assert centre is not None
        offset, scale = (head(x).unflatten(-1, (self.count, 2)) for head in (self.offset, self.scale))
        return x, centre, offset, scale


class Gaussian(nn.Module):
    """A bias of each query and head on the scores of a map's cells: minus the scaled squared distance from a point."""

    def __init__(self, *, width: int, heads: int, first: bool) -> None:
        super().__init__()
        self.heads = GaussianHeads(width=width, count=heads, first=first)

    def forward(
        self, x: Tensor, centre: Tensor | None, extent: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the bias of x and centre, which are as of `GaussianHeads`.

        extent [B, 2]: (w, h) of the valid image, in units of the Gaussians. mask [B, h, w] bool, True: attended.
        Returns the bias [B, heads, Q, h * w], the centre, and offsets and raw scales [B, Q, heads, 2] (x, y), units.
        """
        _, centre, offset, scale = self.heads(x, centre)
        points = (centre.sigmoid() * extent[:, None])[:, :, None] + offset
        return gaussian_bias(points, scale, mask), centre, offset, scale


def gaussian_bias(points: Tensor, scale: Tensor, mask: Tensor, smoothness: float = SMOOTHNESS) -> Tensor:
    """Compute what is added to the scores of a map's cells, -inf where it is not attended: [B, heads, Q, h * w].

    points (x, y) in cells and scale [B, Q, heads, 2]; mask [B, h, w] bool, True: attended.
    """
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


class DecoderLayer(nn.Module):
    """DETR's decoder layer with a Gaussian in its cross-attention."""

    def __init__(self, sizes: LayerSizes, *, first: bool) -> None:
        super().__init__()
        self.layer = detr.DecoderLayer(sizes)
        self.gaussian = Gaussian(width=sizes.width, heads=sizes.heads, first=first)

    def forward(
        self,
        x: Tensor,
        centre: Tensor | None,
        query_position: Tensor,
        key: Tensor,
        memory: Tensor,
        mask: Tensor,
        extent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on x [B, Q, width]; returns the new x and the centre.

        query_position [Q, width]; key (memory + pos_embed), memory [B, h * w, width]; centre, mask and extent as of
        `Gaussian`.
        """
        bias, centre, _, _ = self.gaussian(x + query_position, centre, extent, mask)
        return self.layer(x, query_position, key, memory, bias), centre


class SMCADETRDecoder(nn.Module):
    """Queries are learned positions that look around a centre; one pair of heads reads every layer.

    unit: pixels a unit of the Gaussians.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int, unit: int
    ) -> None:
        super().__init__()
        self.unit = unit
        self.layers = nn.ModuleList(layers)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.heads = make_heads(width, num_classes)
        self.compiled_parts = (self.heads,)

    def forward(self, encoded: EncodedMap) -> Outputs:
        """Predict logits and boxes after every layer."""
        memory, pos_embed, _ = encoded.flatten()
        key, mask = memory + pos_embed, encoded.geometry.mask
        extent = encoded.image_sizes.flip(-1).to(self.query_positions.dtype) / self.unit
        x, centre = memory.new_zeros(len(memory), *self.query_positions.shape), None
        outputs = []
        for layer in self.layers:
            x, centre = layer(x, centre, self.query_positions, key, memory, mask, extent)
            outputs.append(x)
        return Outputs(*self.heads(torch.stack(outputs), centre))


def make_heads(width: int, num_classes: int) -> PredictionHeads:
    """Make the heads that read what all layers give."""
    class_head = make_class_head(width, num_classes)
    return PredictionHeads(width, class_head=class_head, box_head=MLP(width, width, width, 4, fp32_output=True))


def build_smca_detr(section: SMCADETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights."""
    encoder = build_image_encoder(section)
    layers = [DecoderLayer(build_layer_sizes(section), first=number == 0) for number in range(section.decoder_layers)]
    decoder = SMCADETRDecoder(
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        unit=PUBLISHED_STRIDE if section.smca_stride == "published" else encoder.backbone.strides[0],
    )
    reset_matrices(encoder.transformer, decoder.layers)
    reset_scales(layer.gaussian.heads for layer in layers)
    return EncoderDecoder(SYSTEM, encoder, decoder)


def reset_scales(gaussians: Iterable[GaussianHeads]) -> None:
    """Reset the scales, so that all Gaussians begin equally wide."""
    for heads in gaussians:
        nn.init.zeros_(heads.scale.weight)


PUBLISHED_LAYER = {  # our prefixes -> published ones
    **{f"layer.{ours}": theirs for ours, theirs in detr.PUBLISHED_LAYER.items()},
    "gaussian.heads.norm.": "norm4.",
    "gaussian.heads.centre.": "point1.layers.",
    "gaussian.heads.offset.": "point2.",
    "gaussian.heads.scale.": "point3.",
}
SYSTEM = System(
    name="smca_detr",
    build=build_smca_detr,
    class_heads="decoder.heads.class_head.",
    published=PublishedLayout(
        landmark="transformer.decoder.layers.0.point3.weight",
        whole=detr.PUBLISHED_WHOLE,
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_input_norm,
        convolutions=CONVOLUTIONS,
    ),
)
