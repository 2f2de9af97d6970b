"""SAM-DETR and SAM-DETR w/ SMCA on several maps, from coarse to fine: in the authors' code, not in the CVPR paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from samdetr.models.deformable_encoder import Pyramid, PyramidDetector, PyramidHalf, build_pyramid_half
from samdetr.models.layers import initialise
from samdetr.models.position import MapGeometry
from samdetr.models.sam_detr import AlignedDecoder, DecoderLayer, build_aligned_layers
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe import MultiScaleSAMDETRSection

ENCODER_FFN_SHARE = 2  # the encoder's feed-forward blocks have the decoder's hidden channels divided by this


class MultiScaleSAMDETR(AlignedDecoder, PyramidDetector):
    """SAM-DETR's decoder behind Deformable-DETR's encoder: its first layers read the coarsest map, its last the finest.

    Published with three maps and six layers, two for each.
    """

    def __init__(
        self, half: PyramidHalf, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int
    ) -> None:
        super().__init__(half)
        self.start_decoder(layers, width=width, num_classes=num_classes, num_queries=num_queries)
        initialise(self.decoder)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        maps = maps_of(*self.encode(images, image_sizes))
        coarse_to_fine = [maps[-1 - number * len(maps) // len(self.decoder)] for number in range(len(self.decoder))]
        return self.refine(coarse_to_fine)


def maps_of(memory: Tensor, position: Tensor, pyramid: Pyramid) -> list[tuple[Tensor, Tensor, MapGeometry]]:
    """Encoded cells and their position codes [B, S, width] as maps [B, h, w, width], fine to coarse."""
    cells = [height * width for height, width in pyramid.shapes]
    maps = []
    for *parts, shape, geometry in zip(
        memory.split(cells, 1), position.split(cells, 1), pyramid.shapes, pyramid.maps, strict=True
    ):
        level, codes = (part.unflatten(1, shape).contiguous() for part in parts)  # once, not in each op that reads it
        maps.append((level, codes, geometry))
    return maps


def build_sam_detr_ms(section: MultiScaleSAMDETRSection) -> MultiScaleSAMDETR:
    """The model of a recipe with random weights."""
    return MultiScaleSAMDETR(
        build_pyramid_half(section, ffn=section.ffn // ENCODER_FFN_SHARE),
        build_aligned_layers(section),
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
    )
