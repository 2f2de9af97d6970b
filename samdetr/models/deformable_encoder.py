"""From images to encoded maps of several levels: the half that systems with Deformable-DETR's encoder share.

Deformable DETR (Zhu et al., ICLR 2021): every cell of every level looks at a few sampled points of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from samdetr.models.backbone import Backbone, build_backbone
from samdetr.models.layers import GROUPS, FeedForward, Fp32Linear, MapGroupNorm, initialise
from samdetr.models.position import MapGeometry, covered_cells, sine_map, valid_cells, valid_mask
from samdetr.structures import Regions
from samdetr_kernels import deformable_attention

if TYPE_CHECKING:
    from samdetr.recipe import DeformableSection, TransformerSection

POINTS = 4  # samples of a head in each level
MOST_BACKBONE_LEVELS = 3  # a further level is a convolution of the last map


class Pyramid(NamedTuple):
    """Where an image lies in its maps of L levels, fine to coarse, whose S cells stand one after another."""

    shapes: tuple[tuple[int, int], ...]  # (h, w) of each level
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
        self.start()

    def start(self) -> None:
        """The published start: head m looks in direction m of a compass, its points 1, 2, ... cells away, all alike."""
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
        """query [B, Q, width]; memory [B, S, width], read within the valid cells; reference in [0, 1] of the valid
        image: points (x, y) [B, Q, 2], around which offsets are in cells, or boxes (cx, cy, w, h) [B, Q, 4], which
        offsets of POINTS just leave. Returns [B, Q, width]."""
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
        return self.out(deformable_attention(value, pyramid.shapes, locations, weights))


class DeformableEncoderLayer(nn.Module):
    """Deformable attention of every cell around itself, then a feed-forward block."""

    def __init__(self, *, width: int, heads: int, levels: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(width=width, heads=heads, levels=levels)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)

    def forward(self, x: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """x, position [B, S, width] -> [B, S, width]."""
        attended = self.attention(x + position, pyramid.points, x, pyramid)
        return self.feed_forward(self.norm(x + self.dropout(attended)))


class PyramidEncoder(nn.Module):
    """A stack of layers, each of all maps, without a final norm."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """x, position [B, S, width] -> [B, S, width]."""
        for layer in self.layers:
            x = layer(x, position, pyramid)
        return x


class PyramidHalf(NamedTuple):
    """The parts of a detector up to its encoded maps."""

    backbone: Backbone
    projections: (
        nn.ModuleList
    )  # of each level: a linear layer, or a convolution with stride 2 of the backbone's last map
    norms: nn.ModuleList  # of each level; SMCA-DETR has none
    encoder: PyramidEncoder
    mask_padding: bool  # whether padded cells are zero, so that an image's result does not depend on its padding


class PyramidDetector(nn.Module):
    """What the systems on several maps have in common: images become encoded maps and their position codes."""

    # SAM-DETR's (i - 1/2) / n; Deformable-DETR's differs from it at padded cells alone, which nothing reads
    code_offset = 0.5  # of `sine_map`
    methods: tuple[str, ...] = ("embed", "predict")  # compiled regions around the layers
    decoder: nn.ModuleList

    def __init__(self, half: PyramidHalf) -> None:
        super().__init__()
        self.backbone, self.projections, self.norms, self.encoder, self.mask_padding = half
        finest = half.projections[0]
        assert isinstance(finest, nn.Linear)
        self.level_codes = nn.Parameter(torch.randn(len(half.projections), finest.out_features))
        initialise_deformable(self.encoder)
        for projection in half.projections:
            assert isinstance(projection, nn.Linear | nn.Conv2d)
            nn.init.xavier_uniform_(projection.weight)
            assert projection.bias is not None
            nn.init.zeros_(projection.bias)

    def encode(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Pyramid]:
        """Images [B, 3, H, W] and sizes [B, 2] -> the encoded cells [B, S, width], their position codes with that of
        their level, [B, S, width], and where they lie."""
        maps = self.backbone(images, image_sizes)
        dtype = maps[0].dtype
        # eagerly: the compiled regions have no convolution, and are one graph for maps of all sizes
        for projection in self.projections:
            if isinstance(projection, nn.Conv2d):
                maps = (*maps, projection(self._without_padding(maps[-1], image_sizes)))
        x, position, pyramid = self.embed(maps, image_sizes, (images.shape[2], images.shape[3]))
        # under autocast norms return float32: twice the bytes to read
        memory = self.encoder(x, position, pyramid).to(dtype)
        if self.mask_padding:
            memory = memory.masked_fill(~pyramid.mask[..., None], 0)
        return memory, position, pyramid

    def _without_padding(self, features: Tensor, image_sizes: Tensor) -> Tensor:
        if not self.mask_padding:
            return features
        valid = covered_cells(image_sizes, self.backbone.strides[-1])
        return features.masked_fill(~valid_mask(valid, features.shape[2], features.shape[3])[:, None], 0)

    def embed(
        self, maps: tuple[Tensor, ...], image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Pyramid]:
        """A map [B, C, h, w] of each level -> the encoder's input and position codes [B, S, width], and where they lie.

        image_shape: padded (H, W) of the images.
        """
        inputs, positions, geometries, points = [], [], [], []
        strides = (*self.backbone.strides, 2 * self.backbone.strides[-1])
        norms = self.norms or [None] * len(maps)
        levels = zip(maps, self.projections, norms, self.level_codes.unbind(), strict=True)
        for stride, (features, projection, norm, code) in zip(strides, levels, strict=False):
            height, width = features.shape[2:]
            if self.mask_padding:
                valid = covered_cells(image_sizes, stride)
            else:
                valid = valid_cells(image_sizes, image_shape, (height, width))
            mask = valid_mask(valid, height, width)
            x = features.permute(0, 2, 3, 1)
            x = projection(x) if isinstance(projection, nn.Linear) else x
            if norm is not None:
                x = norm(x, mask if self.mask_padding else None)
            position = sine_map(valid, height, width, x.shape[-1], offset=self.code_offset).to(x.dtype) + code
            inputs.append(x.flatten(1, 2))
            positions.append(position.flatten(1, 2))
            geometries.append(MapGeometry(valid, mask, valid if self.mask_padding else None))
            points.append(_centres(valid, height, width, code.dtype))
        shapes = tuple((features.shape[2], features.shape[3]) for features in maps)
        valid = torch.stack([geometry.valid.flip(-1) for geometry in geometries], dim=1)
        sizes = torch.stack([torch.stack([valid.new_full((), size) for size in shape[::-1]]) for shape in shapes])
        sizes = sizes.to(self.level_codes.dtype)
        mask = torch.cat([geometry.mask.flatten(1) for geometry in geometries], dim=1)
        pyramid = Pyramid(shapes, tuple(geometries), mask, torch.cat(points, dim=1), sizes, valid / sizes)
        return torch.cat(inputs, dim=1), torch.cat(positions, dim=1), pyramid

    def regions(self) -> Regions:
        """What is compiled besides the backbone."""
        return Regions((*self.encoder.layers, *self.decoder), self.methods)


def _centres(valid: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Centres (x, y) of a map's cells in units of its valid (h, w) [B, 2]: [B, h * w, 2]."""
    down, across = (
        (torch.arange(size, device=valid.device, dtype=dtype) + 0.5) / valid[:, axis, None]
        for axis, size in ((0, height), (1, width))
    )
    grid = (across[:, None, :].expand(-1, height, -1), down[:, :, None].expand(-1, -1, width))
    return torch.stack(grid, dim=-1).flatten(1, 2)


def initialise_deformable(*parts: nn.Module) -> None:
    """`initialise`, then the start that deformable attention has of its own."""
    initialise(*parts)
    for part in parts:
        for module in part.modules():
            if isinstance(module, DeformableAttention):
                module.start()


def build_projections(section: TransformerSection, *, levels: int, last: bool) -> tuple[Backbone, nn.ModuleList]:
    """The backbone of a recipe and projections of the maps of its last stages, as many as levels; last: and of a
    further map, of twice the stride."""
    backbone = build_backbone(section.backbone, padding=section.padding, levels=levels)
    projections: list[nn.Module] = [nn.Linear(channels, section.width) for channels in backbone.channels]
    if last:
        convolution = nn.Conv2d(backbone.channels[-1], section.width, kernel_size=3, stride=2, padding=1)
        projections.append(convolution.to(memory_format=torch.channels_last))
    return backbone, nn.ModuleList(projections)


def build_pyramid_half(section: DeformableSection, *, ffn: int) -> PyramidHalf:
    """Backbone, projections and encoder of a recipe, with random weights. ffn: of the encoder."""
    width, levels = section.width, section.feature_levels
    from_backbone = min(levels, MOST_BACKBONE_LEVELS)
    backbone, projections = build_projections(section, levels=from_backbone, last=levels > from_backbone)
    return PyramidHalf(
        backbone,
        projections,
        nn.ModuleList(MapGroupNorm(GROUPS, width) for _ in projections),
        PyramidEncoder(
            DeformableEncoderLayer(width=width, heads=section.heads, levels=levels, ffn=ffn, dropout=section.dropout)
            for _ in range(section.encoder_layers)
        ),
        section.padding == "masked",
    )
