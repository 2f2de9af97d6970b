"""From images to encoded maps of several levels, which several systems share.

Deformable DETR (Zhu et al., ICLR 2021): every cell of every level looks at a few sampled points of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from samdetr.models.backbone import Backbone, build_backbone
from samdetr.models.encoder import PUBLISHED_LAYER_END, cast_memory, embed_map
from samdetr.models.layers import (
    GROUPS,
    FeedForward,
    Fp32Linear,
    LayerSizes,
    MapGroupNorm,
    build_layer_sizes,
    reset_matrices,
)
from samdetr.models.position import MapGeometry, covered_cells, valid_mask
from samdetr.models.system import check_settings
from samdetr_kernels import deformable_attention

if TYPE_CHECKING:
    from samdetr.models.system import State
    from samdetr.recipe.model import DeformableSection, TransformerSection

POINTS = 4  # samples of a head in each level
MOST_BACKBONE_LEVELS = 3  # a further level is a convolution of the last map
# our prefixes -> published ones, as in `PublishedLayout`
PUBLISHED_ATTENTION = {
    "offsets.": "sampling_offsets.",
    "weights.": "attention_weights.",
    "value.": "value_proj.",
    "out.": "output_proj.",
}
PUBLISHED_ENCODER_LAYER = {
    **{f"attention.{ours}": f"self_attn.{theirs}" for ours, theirs in PUBLISHED_ATTENTION.items()},
    **PUBLISHED_LAYER_END,
}
PUBLISHED_PYRAMID = {
    "encoder.backbone.": "backbone.0.body.",
    "encoder.embed.level_embed": "transformer.level_embed",
    "decoder.class_heads.": "class_embed.",
    **{f"encoder.embed.projections.{level}.": f"input_proj.{level}.0." for level in range(4)},
    **{f"encoder.embed.norms.{level}.": f"input_proj.{level}.1." for level in range(4)},
}
CONVOLUTIONS = r"encoder\.embed\.projections\.\d+"  # published as such
SAMPLING = ".offsets."  # in the names of what says where `DeformableAttention` samples


class Pyramid(NamedTuple):
    """Where an image lies in its maps of L levels, fine to coarse, whose S cells stand one after another."""

    spatial_shapes: tuple[tuple[int, int], ...]  # (h, w) of each level
    maps: tuple[MapGeometry, ...]  # of each level
    mask: Tensor  # [B, S] bool, True within the valid cells
    points: Tensor  # [B, S, 2] centre (x, y) of each cell in [0, 1] of the valid image; beyond 1 at padding
    sizes: Tensor  # [L, 2] (w, h) of each level
    ratios: Tensor  # [B, L, 2] the share of each level's width and height that is valid


class DeformableAttention(nn.Module):
    """Attention to POINTS learned places a head and level around each query's reference (equation 3)."""

    def __init__(self, *, width: int, heads: int, levels: int) -> None:
        super().__init__()
        self.heads, self.levels = heads, levels
        self.offsets = Fp32Linear(width, heads * levels * POINTS * 2)
        self.weights = nn.Linear(width, heads * levels * POINTS)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset as published: head m looks in direction m of a compass, its points 1, 2, ... cells away, all alike."""
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        reach = torch.arange(1, POINTS + 1)[None, None, :, None] * direction[:, None, None]
        with torch.no_grad():
            self.offsets.bias.copy_(reach.expand(-1, self.levels, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias, self.value.bias, self.out.bias):
            nn.init.zeros_(zero)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, pyramid: Pyramid) -> Tensor:
        """Attend from query [B, Q, width] to the valid cells of memory [B, S, width]: [B, Q, width].

        reference, in [0, 1] of the valid image: points (x, y) [B, Q, 2] with offsets in cells, or boxes (cx, cy, w, h)
        [B, Q, 4] with offsets in shares of the box, where POINTS reaches its border.
        """
        value = self.value(memory).masked_fill(~pyramid.mask[..., None], 0).unflatten(-1, (self.heads, -1))
        offsets = self.offsets(query).unflatten(-1, (self.heads, self.levels, POINTS, 2))
        weights = self.weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, (self.levels, POINTS))
        # from the valid image to the padded maps: [B, Q, 1, L, 1, 2]
        centre = (reference[:, :, None, :2] * pyramid.ratios[:, None])[:, :, None, :, None]
        if reference.shape[-1] == 2:
            locations = centre + offsets / pyramid.sizes[:, None]
        else:
            extent = (reference[:, :, None, 2:] * pyramid.ratios[:, None])[:, :, None, :, None]
            locations = centre + offsets / POINTS * extent * 0.5
        return self.out(deformable_attention(value, pyramid.spatial_shapes, locations, weights))


def published_sampling_flops(attention: DeformableAttention, args: Sequence[Any], out: Tensor) -> int:
    """Count 4 for each sampled value of deformable attention, as the tool does that counted the published numbers."""
    return 4 * out.numel() * attention.levels * POINTS


class DeformableEncoderLayer(nn.Module):
    """Deformable attention of every cell around itself, then a feed-forward block."""

    def __init__(self, sizes: LayerSizes, *, levels: int) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.attention = DeformableAttention(width=width, heads=heads, levels=levels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)

    def forward(self, x: Tensor, pos_embed: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layer on x, pos_embed [B, S, width]: [B, S, width]."""
        attended = self.attention(x + pos_embed, pyramid.points, x, pyramid)
        return self.feed_forward(self.norm(x + self.dropout(attended)))


class PyramidEncoder(nn.Module):
    """A stack of layers, each of all maps, without a final norm."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, pos_embed: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layers on x, pos_embed [B, S, width]: [B, S, width]."""
        for layer in self.layers:
            x = layer(x, pos_embed, pyramid)
        return x


class PyramidEmbedding(nn.Module):
    """From maps of several levels to the transformer's input, with embeddings of every cell's position and level.

    projections: of each level, a linear layer, or a convolution that the map already is a result of.
    """

    def __init__(
        self,
        projections: nn.ModuleList,
        width: int,
        *,
        strides: tuple[int, ...],
        group_norm: bool,
        pos_offset: float,
        mask_padding: bool,
    ) -> None:
        super().__init__()
        self.projections = projections
        self.norms = nn.ModuleList(MapGroupNorm(GROUPS, width) for _ in projections if group_norm)
        self.level_embed = nn.Parameter(torch.zeros(len(projections), width))
        self.strides, self.pos_offset, self.mask_padding = strides, pos_offset, mask_padding

    def forward(
        self, maps: tuple[Tensor, ...], image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Pyramid]:
        """Embed a map [B, C, h, w] of each level: the transformer's input and pos_embed [B, S, width], the geometry.

        image_sizes: [B, 2] int valid (h, w). image_shape: padded (H, W) of the images.
        """
        inputs, pos_embeds, geometries, points = [], [], [], []
        norms = self.norms or [None] * len(maps)
        levels = zip(maps, self.strides, self.projections, norms, self.level_embed.unbind(), strict=True)
        for features, stride, projection, norm, level_embed in levels:
            x, pos_embed, geometry = embed_map(
                features,
                image_sizes,
                image_shape,
                projection=projection if isinstance(projection, nn.Linear) else None,
                norm=norm,
                stride=stride,
                mask_padding=self.mask_padding,
                pos_offset=self.pos_offset,
            )
            inputs.append(x.flatten(1, 2))
            pos_embeds.append((pos_embed + level_embed).flatten(1, 2))
            geometries.append(geometry)
            points.append(_centres(geometry.valid, features.shape[2], features.shape[3], level_embed.dtype))
        spatial_shapes = tuple((features.shape[2], features.shape[3]) for features in maps)
        valid = torch.stack([geometry.valid.flip(-1) for geometry in geometries], dim=1)
        sizes = [torch.stack([valid.new_full((), size) for size in shape[::-1]]) for shape in spatial_shapes]
        size = torch.stack(sizes).to(self.level_embed.dtype)
        mask = torch.cat([geometry.mask.flatten(1) for geometry in geometries], dim=1)
        pyramid = Pyramid(spatial_shapes, tuple(geometries), mask, torch.cat(points, dim=1), size, valid / size)
        return torch.cat(inputs, dim=1), torch.cat(pos_embeds, dim=1), pyramid


class EncodedPyramid(NamedTuple):
    """Encoded maps of several levels, whose cells stand one after another."""

    memory: Tensor  # [B, S, width]
    pos_embed: Tensor  # [B, S, width], with that of the level
    pyramid: Pyramid
    image_sizes: Tensor  # [B, 2] int, valid (h, w) in pixels


class PyramidImageEncoder(nn.Module):
    """From images to encoded maps of several levels. `reset_parameters` draws its weights.

    projections: of each level, a linear layer, or a convolution with stride 2 of the backbone's last map. layers: those
    of the transformer that are compiled, sharded and checkpointed one by one. mask_padding: padded cells are zero, so
    that an image's result does not depend on its padding. pos_offset: of `sine_map`; SAM-DETR's is 0.5, and
    Deformable-DETR's differs from that at padded cells alone, which nothing reads.
    """

    def __init__(
        self,
        backbone: Backbone,
        projections: nn.ModuleList,
        transformer: nn.Module,
        *,
        layers: Iterable[nn.Module],
        width: int,
        group_norm: bool,
        mask_padding: bool,
        pos_offset: float = 0.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed = PyramidEmbedding(
            projections,
            width,
            strides=(*backbone.strides, 2 * backbone.strides[-1])[: len(projections)],
            group_norm=group_norm,
            pos_offset=pos_offset,
            mask_padding=mask_padding,
        )
        self.transformer = transformer
        self.layers = tuple(layers)
        self.compiled_parts = (self.embed,)
        self.mask_padding = mask_padding

    def reset_parameters(self) -> None:
        """Draw the embeddings of levels, the transformer and the projections, but not the backbone."""
        nn.init.normal_(self.embed.level_embed)
        reset_deformable(self.transformer)
        for projection in self.embed.projections:
            assert isinstance(projection, nn.Linear | nn.Conv2d)
            nn.init.xavier_uniform_(projection.weight)
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)

    def forward(self, images: Tensor, image_sizes: Tensor) -> EncodedPyramid:
        """Encode images [B, 3, H, W], normalised, zero-padded bottom/right; image_sizes [B, 2] int, valid (h, w)."""
        maps = self.backbone(images, image_sizes)
        dtype = maps[0].dtype
        # eagerly: the compiled parts have no convolution, and are one graph for maps of all sizes
        for projection in self.embed.projections:
            if isinstance(projection, nn.Conv2d):
                maps = (*maps, projection(self._without_padding(maps[-1], image_sizes)))
        x, pos_embed, pyramid = self.embed(maps, image_sizes, (images.shape[2], images.shape[3]))
        memory = self.transformer(x, pos_embed, pyramid)
        memory = cast_memory(memory, dtype, pyramid.mask if self.mask_padding else None)
        return EncodedPyramid(memory, pos_embed, pyramid, image_sizes)

    def _without_padding(self, features: Tensor, image_sizes: Tensor) -> Tensor:
        if not self.mask_padding:
            return features
        valid = covered_cells(image_sizes, self.backbone.strides[-1])
        return features.masked_fill(~valid_mask(valid, features.shape[2], features.shape[3])[:, None], 0)


def _centres(valid: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Compute the centres (x, y) of a map's cells in units of its valid (h, w) [B, 2]: [B, h * w, 2]."""
    down, across = (
        (torch.arange(size, device=valid.device, dtype=dtype) + 0.5) / valid[:, axis, None]
        for axis, size in ((0, height), (1, width))
    )
    grid = (across[:, None, :].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width))
    return torch.stack(grid, dim=-1).flatten(1, 2)


def reset_deformable(*parts: nn.Module) -> None:
    """Call `reset_matrices`, then reset deformable attention in its own way."""
    reset_matrices(*parts)
    for part in parts:
        for module in part.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()


def check_levels(model: Any, state: State) -> None:
    """Raise CheckpointError where the published checkpoint has another number of levels than the model."""
    if "transformer.level_embed" in state:
        levels = len(state["transformer.level_embed"]), len(model.encoder.embed.level_embed)
        check_settings(feature_levels=levels)


def build_projections(section: TransformerSection, *, levels: int, last: bool) -> tuple[Backbone, nn.ModuleList]:
    """Build a recipe's backbone, and projections of the maps of its last ``levels`` stages.

    last: and of a further map, of twice the stride.
    """
    backbone = build_backbone(section.backbone, padding=section.padding, levels=levels)
    projections: list[nn.Module] = [nn.Linear(channels, section.width) for channels in backbone.channels]
    if last:
        convolution = nn.Conv2d(backbone.channels[-1], section.width, kernel_size=3, stride=2, padding=1)
        projections.append(convolution.to(memory_format=torch.channels_last))
    return backbone, nn.ModuleList(projections)


def build_pyramid_encoder(section: DeformableSection, *, ffn: int) -> PyramidImageEncoder:
    """Build the image encoder of a recipe, with a norm after each projection. ffn: of its layers.

    `PyramidImageEncoder.reset_parameters` gives it random weights.
    """
    levels = section.feature_levels
    from_backbone = min(levels, MOST_BACKBONE_LEVELS)
    backbone, projections = build_projections(section, levels=from_backbone, last=levels > from_backbone)
    sizes = build_layer_sizes(section)._replace(ffn=ffn)
    transformer = PyramidEncoder(DeformableEncoderLayer(sizes, levels=levels) for _ in range(section.encoder_layers))
    return PyramidImageEncoder(
        backbone,
        projections,
        transformer,
        layers=transformer.layers,
        width=section.width,
        group_norm=True,
        mask_padding=section.padding == "masked",
    )
