"""SMCA-DETR (ICCV 2021) on several scales: each is attended to by itself, and every query weighs the scales.

Before that, convolutions mix four maps in the released form, attention three in the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.errors import CheckpointError
from samdetr.models import detr, smca_detr
from samdetr.models.deformable_encoder import (
    CONVOLUTIONS,
    EncodedPyramid,
    Pyramid,
    PyramidEncoder,
    PyramidImageEncoder,
    build_projections,
)
from samdetr.models.detector import EncoderDecoder
from samdetr.models.encoder import PUBLISHED_LAYER_END, EncoderLayer
from samdetr.models.layers import (
    Attention,
    FeedForward,
    Fp32Linear,
    LayerSizes,
    attend,
    build_layer_sizes,
    reset_matrices,
)
from samdetr.models.position import MapGeometry
from samdetr.models.smca_detr import (
    PUBLISHED_STRIDE,
    SMOOTHNESS,
    GaussianHeads,
    gaussian_bias,
    make_heads,
    reset_scales,
)
from samdetr.models.system import PublishedLayout, System
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import MultiScaleSMCADETRSection

KERNEL = 5  # of the convolutions within and between maps
# stages of the backbone whose maps are used, up to stride 32; a map of stride 64 is a convolution of the last one
CONVOLVED_STAGES, ATTENDED_STAGES = 3, 2


class MixingLayer(nn.Module):
    """Convolutions of each channel within every map and between neighbours in place of attention, then feed-forward."""

    def __init__(self, sizes: LayerSizes, *, levels: int, mask_padding: bool) -> None:
        super().__init__()
        width, _, ffn, dropout = sizes
        self.mask_padding = mask_padding
        self.value = nn.Linear(width, width)
        self.within = nn.ModuleList(_depthwise(width) for _ in range(levels))
        self.down = nn.ModuleList(_depthwise(width, stride=2) for _ in range(levels - 1))  # into the next coarser map
        self.up = nn.ModuleList(_depthwise(width) for _ in range(levels - 1))  # into the next finer one
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)

    def forward(self, x: Tensor, pos_embed: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layer on x, pos_embed [B, S, width]: [B, S, width]."""
        sizes = [height * width for height, width in pyramid.spatial_shapes]
        cells = self.value(x + pos_embed).split(sizes, dim=1)
        maps = []
        for part, shape, geometry, within in zip(cells, pyramid.spatial_shapes, pyramid.maps, self.within, strict=True):
            features = self._without_padding(part.unflatten(1, shape).permute(0, 3, 1, 2), geometry)
            maps.append(self._without_padding(within(features), geometry))
        mixed = list(maps)
        for level, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            mixed[level + 1] = mixed[level + 1] + down(maps[level])
            mixed[level] = mixed[level] + upsample(up(maps[level + 1]), pyramid.maps[level + 1], pyramid.maps[level])
        attended = self.out(torch.cat([features.permute(0, 2, 3, 1).flatten(1, 2) for features in mixed], dim=1))
        return self.feed_forward(self.norm(x + self.dropout(attended)))

    def _without_padding(self, features: Tensor, geometry: MapGeometry) -> Tensor:
        return features.masked_fill(~geometry.mask[:, None], 0) if self.mask_padding else features


def _depthwise(width: int, *, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(width, width, KERNEL, stride=stride, padding=KERNEL // 2, groups=width)
    return convolution.to(memory_format=torch.channels_last)


def upsample(features: Tensor, coarse: MapGeometry, fine: MapGeometry) -> Tensor:
    """Upsample a map [B, C, h, w] to the cells of a finer one, bilinearly, corners on corners: [B, C, H, W].

    The corners are those of the maps as they are padded (published), or of their valid cells where padding is masked.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)  # eight bits are too few for a coordinate
    coordinates = []
    for axis in (1, 2):
        small, large = features.shape[axis + 1], fine.mask.shape[axis]
        cells = torch.arange(large, device=features.device, dtype=dtype)
        coordinate = (cells * ((small - 1) / max(large - 1, 1))).expand(len(features), -1)
        if coarse.sampling_limit is not None and fine.sampling_limit is not None:
            last, fine_last = (limit[:, axis - 1, None] - 1 for limit in (coarse.sampling_limit, fine.sampling_limit))
            coordinate = cells * (last.to(dtype) / fine_last.clamp(min=1))
        coordinates.append(coordinate * (2 / max(small - 1, 1)) - 1)
    down, across = coordinates
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)
    return functional.grid_sample(features.to(dtype), grid, align_corners=True).to(features.dtype)


class ScaleEncoder(nn.Module):
    """Attention of every cell to its own map, with the same weights for all maps, and in the middle layer to all maps:
    of five layers two within maps, one across them, two within (section 3.3)."""

    def __init__(self, layers: Iterable[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, pos_embed: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layers on x, pos_embed [B, S, width]: [B, S, width]."""
        sizes = [height * width for height, width in pyramid.spatial_shapes]
        for number, layer in enumerate(self.layers):
            if number == len(self.layers) // 2:
                x = layer(x, pos_embed, pyramid.mask)
            else:
                maps = zip(*(part.split(sizes, dim=1) for part in (x, pos_embed, pyramid.mask)), strict=True)
                x = torch.cat([layer(*part) for part in maps], dim=1)
        return x


class Gaussians(nn.Module):
    """A Gaussian of each query and head on each map, in its cells, and the query's weights of the maps."""

    def __init__(self, *, width: int, heads: int, strides: Sequence[int], first: bool) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.heads = GaussianHeads(width=width, count=len(strides) * heads, first=first)
        self.weigh = Fp32Linear(width, len(strides))

    def forward(
        self, x: Tensor, centre: Tensor | None, image_extent: Tensor, masks: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        """Compute the biases of x and centre, which are as of `GaussianHeads`.

        image_extent [B, 2]: (w, h) of the valid image, pixels. masks [B, h, w] bool of L maps, True: attended.
        Returns the bias of each map [B, heads, Q, h * w], the weights [B, Q, L], the centre, and offsets and raw scales
        [B, Q, L, heads, 2] (x, y), cells.
        """
        x, centre, offset, scale = self.heads(x, centre)
        offset, scale = (part.unflatten(2, (len(self.strides), -1)) for part in (offset, scale))
        middle, biases = centre.sigmoid() * image_extent[:, None], []
        for level, (stride, mask) in enumerate(zip(self.strides, masks, strict=True)):
            points = (middle / stride)[:, :, None] + offset[:, :, level]
            # a stride of 32 has the Gaussians of one scale, in its cells
            biases.append(gaussian_bias(points, scale[:, :, level], mask, SMOOTHNESS * PUBLISHED_STRIDE / stride))
        return biases, self.weigh(x).softmax(-1), centre, offset, scale


class ScaleModulation(NamedTuple):
    """The terms that `ScaleAttention` adds to the scores, and its weights of the maps."""

    biases: list[Tensor]  # of each map, [B, heads, Q, cells]
    weights: Tensor  # [B, Q, L], of sum 1


class ScaleAttention(nn.Module):
    """Attention to each of several maps by itself; a query's results are added by its weights of the maps."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width=width, heads=heads, dropout=dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, modulation: ScaleModulation) -> Tensor:
        """Attend from query [B, Q, width] to key, value [B, S, width] of the cells of all maps: [B, Q, width]."""
        query, key, value = self.attention.project(query, key, value)
        sizes, heads = [bias.shape[-1] for bias in modulation.biases], self.attention.heads
        dropout = self.attention.dropout if self.training else 0.0
        found = [
            weight[..., None] * attend(query, keys, values, heads=heads, dropout=dropout, mask=bias)
            for keys, values, bias, weight in zip(
                key.split(sizes, dim=1),
                value.split(sizes, dim=1),
                modulation.biases,
                modulation.weights.unbind(-1),
                strict=True,
            )
        ]
        return self.attention.out_proj(torch.stack(found).sum(0))  # once: weights of sum 1 leave its bias as it is


class DecoderLayer(nn.Module):
    """DETR's decoder layer with attention to several maps."""

    def __init__(self, sizes: LayerSizes, *, strides: Sequence[int], first: bool) -> None:
        super().__init__()
        width, heads, _, dropout = sizes
        attention = ScaleAttention(width=width, heads=heads, dropout=dropout)
        self.layer = detr.DecoderLayer(sizes, cross_attention=attention)
        # drawn and dropped: what a seed gives to the parts after it depends on that
        Attention(width=width, heads=heads, dropout=dropout)
        self.gaussian = Gaussians(width=width, heads=heads, strides=strides, first=first)

    def forward(
        self,
        x: Tensor,
        centre: Tensor | None,
        query_position: Tensor,
        key: Tensor,
        memory: Tensor,
        masks: Sequence[Tensor],
        image_extent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Run the layer on x [B, Q, width]; returns the new x and the centre.

        query_position [Q, width]; key (memory + pos_embed), memory [B, S, width]; centre, masks and image_extent as of
        `Gaussians`.
        """
        biases, weights, centre, _, _ = self.gaussian(x + query_position, centre, image_extent, masks)
        return self.layer(x, query_position, key, memory, ScaleModulation(biases, weights)), centre


class MultiScaleSMCADETRDecoder(nn.Module):
    """SMCA-DETR's queries look at several maps; one pair of heads reads every layer.

    halve_finest: whether a convolution halves the finest map first.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
        halve_finest: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.heads = make_heads(width, num_classes)
        reset_matrices(self.layers)
        reset_scales(layer.gaussian.heads for layer in layers)
        self.halve: nn.Conv2d | None = None
        if halve_finest:
            self.halve = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1)
            self.halve.to(memory_format=torch.channels_last)
            nn.init.xavier_uniform_(self.halve.weight)
        self.compiled_parts = (self.heads,)

    def forward(self, encoded: EncodedPyramid) -> Outputs:
        """Predict logits and boxes after every layer."""
        memory, pos_embed, masks = self.read(encoded)
        key = memory + pos_embed
        extent = encoded.image_sizes.flip(-1).to(self.query_positions.dtype)
        x, centre = memory.new_zeros(len(memory), *self.query_positions.shape), None
        outputs = []
        for layer in self.layers:
            x, centre = layer(x, centre, self.query_positions, key, memory, masks, extent)
            outputs.append(x)
        return Outputs(*self.heads(torch.stack(outputs), centre))

    def read(self, encoded: EncodedPyramid) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Give memory and pos_embed [B, S, width] of the maps that are looked at, and the mask [B, h, w] of each.

        The halved map has the embedding of the map of its size: the level's part of it is the same for all its cells,
        and so of no weight in their softmax.
        """
        memory, pos_embed, pyramid, _ = encoded
        masks = [geometry.mask for geometry in pyramid.maps]
        if self.halve is None:
            return memory, pos_embed, masks
        fine, second = (height * width for height, width in pyramid.spatial_shapes[:2])
        halved = self.halve(memory[:, :fine].unflatten(1, pyramid.spatial_shapes[0]).permute(0, 3, 1, 2))
        memory = torch.cat((halved.permute(0, 2, 3, 1).flatten(1, 2), memory[:, fine:]), dim=1)
        pos_embed = torch.cat((pos_embed[:, fine : fine + second], pos_embed[:, fine:]), dim=1)
        return memory, pos_embed, [masks[1], *masks[1:]]


def build_smca_detr_ms(section: MultiScaleSMCADETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights.

    The released form mixes maps of stride 8 to 64 by convolutions, and its decoder sees the finest one at stride 16.
    """
    convolved = section.scale_encoder == "convolution"
    stages = CONVOLVED_STAGES if convolved else ATTENDED_STAGES
    backbone, projections = build_projections(section, levels=stages, last=True)
    strides = (*backbone.strides, 2 * backbone.strides[-1])
    transformer = build_mixing_encoder(section, levels=len(strides)) if convolved else build_scale_encoder(section)
    encoder = PyramidImageEncoder(
        backbone,
        projections,
        transformer,
        layers=() if convolved else transformer.layers,  # with convolutions there is no graph for maps of all sizes
        width=section.width,
        group_norm=False,
        mask_padding=section.padding == "masked",
        pos_offset=0.0,
    )
    looked_at = (strides[1], *strides[1:]) if convolved else strides
    layers = [
        DecoderLayer(build_layer_sizes(section), strides=looked_at, first=number == 0)
        for number in range(section.decoder_layers)
    ]
    encoder.reset_parameters()  # after the decoder's layers: a seed means this order of draws
    decoder = MultiScaleSMCADETRDecoder(
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        halve_finest=convolved,
    )
    return EncoderDecoder(SYSTEM, encoder, decoder)


def build_mixing_encoder(section: MultiScaleSMCADETRSection, *, levels: int) -> PyramidEncoder:
    """Build the released transformer of a recipe, with random weights."""
    sizes, mask_padding = build_layer_sizes(section), section.padding == "masked"
    layers = (MixingLayer(sizes, levels=levels, mask_padding=mask_padding) for _ in range(section.encoder_layers))
    return PyramidEncoder(layers)


def build_scale_encoder(section: MultiScaleSMCADETRSection) -> ScaleEncoder:
    """Build the paper's transformer of a recipe, with random weights."""
    return ScaleEncoder(EncoderLayer(build_layer_sizes(section)) for _ in range(section.encoder_layers))


def check_scale_encoder(model: Any) -> None:
    """Raise CheckpointError where the model has the paper's form, which was never released."""
    if isinstance(model.encoder.transformer, ScaleEncoder):
        raise CheckpointError(
            'model.scale_encoder = "attention" has no published layout: set model.scale_encoder = "convolution", '
            "or start from init.checkpoint."
        )


PUBLISHED_PROJECTIONS = ("512", "1024", "2048", "2048_3")
SYSTEM = System(
    name="smca_detr_ms",
    build=build_smca_detr_ms,
    class_heads="decoder.heads.class_head.",
    published=PublishedLayout(
        landmark="transformer.decoder.layers.0.point4.weight",
        whole={
            **detr.PUBLISHED_WHOLE,
            "encoder.embed.level_embed": "transformer.level_embed",
            "decoder.halve.": "transformer.conv.",
            **{f"encoder.embed.projections.{n}.": f"input_proj_{of}." for n, of in enumerate(PUBLISHED_PROJECTIONS)},
        },
        encoder_layer={
            "value.": "conv_1.",
            "out.": "conv_2.",
            **{f"within.{level}.": f"self_attn_{8 << level}." for level in range(4)},
            **{f"down.{level}.": f"high_to_low_{level + 1}." for level in range(3)},
            **{f"up.{level}.": f"low_to_high_{level + 1}." for level in range(3)},
            **PUBLISHED_LAYER_END,
        },
        decoder_layer={
            "layer.cross_attention.attention.in_proj.": "multihead_attn.in_proj_",
            "layer.cross_attention.attention.out_proj.": "multihead_attn.out_proj.",
            **smca_detr.PUBLISHED_LAYER,
            "gaussian.weigh.": "point4.",
        },
        check_model=check_scale_encoder,
        convolutions=rf"{CONVOLUTIONS}|encoder\.transformer\.layers\.\d+\.(value|out)",
    ),
)
