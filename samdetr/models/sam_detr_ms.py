"""SAM-DETR and SAM-DETR w/ SMCA on several maps, from coarse to fine: in the authors' code, not in the CVPR paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samdetr.models.aligner import PUBLISHED_POINT_BRANCH
from samdetr.models.deformable_encoder import (
    CONVOLUTIONS,
    PUBLISHED_ENCODER_LAYER,
    PUBLISHED_PYRAMID,
    SAMPLING,
    DeformableAttention,
    EncodedPyramid,
    build_pyramid_encoder,
    check_levels,
    published_sampling_flops,
)
from samdetr.models.detector import EncoderDecoder
from samdetr.models.encoder import EncodedMap
from samdetr.models.layers import reset_matrices
from samdetr.models.sam_detr import ALIGNER_CONVOLUTIONS, PUBLISHED_LAYER, SAMDETRDecoder, build_sam_detr_layers
from samdetr.models.sam_detr import SYSTEM as SAM_DETR
from samdetr.models.system import PublishedLayout, System, repeated_box_heads

if TYPE_CHECKING:
    from samdetr.recipe.model import MultiScaleSAMDETRSection

ENCODER_FFN_SHARE = 2  # the encoder's feed-forward blocks have the decoder's hidden channels divided by this


def coarse_to_fine(encoded: EncodedPyramid, layers: int) -> list[EncodedMap]:
    """Give the first layers the coarsest map and the last ones the finest.

    Published with three maps and six layers, two for each.
    """
    pyramid = encoded.pyramid
    cells = [height * width for height, width in pyramid.spatial_shapes]
    maps = []
    for *parts, shape, geometry in zip(
        encoded.memory.split(cells, 1),
        encoded.pos_embed.split(cells, 1),
        pyramid.spatial_shapes,
        pyramid.maps,
        strict=True,
    ):
        # contiguous once, not in each op that reads it
        memory, pos_embed = (part.unflatten(1, shape).contiguous() for part in parts)
        maps.append(EncodedMap(memory, pos_embed, geometry, encoded.image_sizes))
    return [maps[-1 - number * len(maps) // layers] for number in range(layers)]


def build_sam_detr_ms(section: MultiScaleSAMDETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights: SAM-DETR's decoder behind Deformable-DETR's encoder."""
    encoder = build_pyramid_encoder(section, ffn=section.ffn // ENCODER_FFN_SHARE)
    layers = build_sam_detr_layers(section)
    encoder.reset_parameters()  # after the decoder's layers: a seed means this order of draws
    decoder = SAMDETRDecoder(
        layers,
        coarse_to_fine,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
    )
    reset_matrices(decoder.layers)
    return EncoderDecoder(SYSTEM, encoder, decoder)


SYSTEM = System(
    name="sam_detr_ms",
    build=build_sam_detr_ms,
    class_heads="decoder.class_heads.",
    published_flops={**SAM_DETR.published_flops, DeformableAttention: published_sampling_flops},
    sampling=(SAMPLING,),
    published=PublishedLayout(
        landmark="transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
        whole={**PUBLISHED_PYRAMID, "decoder.reference_boxes": "query_embed.weight"},
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_levels,
        convolutions=f"{CONVOLUTIONS}|{ALIGNER_CONVOLUTIONS}",
        copies=repeated_box_heads,
        reordered=PUBLISHED_POINT_BRANCH,
    ),
)
