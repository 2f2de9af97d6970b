"""SMCA-DETR (ICCV 2021) on several scales: each is attended to by itself, and every query weighs the scales.

Before that, convolutions mix four maps in the released form, attention three in the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.models import detr
from samdetr.models.deformable_encoder import Pyramid, PyramidDetector, PyramidEncoder, PyramidHalf, build_projections
from samdetr.models.encoder import EncoderLayer
from samdetr.models.layers import MLP, Attention, FeedForward, Fp32Linear, attend, boxes_around, class_head, initialise
from samdetr.models.position import MapGeometry
from samdetr.models.smca_detr import PUBLISHED_STRIDE, SMOOTHNESS, Gaussian, gaussian_bias
from samdetr.structures import Outputs, Regions

if TYPE_CHECKING:
    from samdetr.recipe import MultiScaleSMCADETRSection

KERNEL = 5  # of the convolutions within and between maps
# stages of the backbone whose maps are used, up to stride 32; a map of stride 64 is a convolution of the last one
CONVOLVED_STAGES, ATTENDED_STAGES = 3, 2


class MixingLayer(nn.Module):
    """Convolutions of each channel within every map and between neighbours in place of attention, then feed-forward."""

    def __init__(self, *, levels: int, width: int, ffn: int, dropout: float, mask_padding: bool) -> None:
        super().__init__()
        self.mask_padding = mask_padding
        self.value = nn.Linear(width, width)
        self.within = nn.ModuleList(_depthwise(width) for _ in range(levels))
        self.down = nn.ModuleList(_depthwise(width, stride=2) for _ in range(levels - 1))  # into the next coarser map
        self.up = nn.ModuleList(_depthwise(width) for _ in range(levels - 1))  # into the next finer one
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)

    def forward(self, x: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """x, position [B, S, width] -> [B, S, width]."""
        sizes = [height * width for height, width in pyramid.shapes]
        cells = self.value(x + position).split(sizes, dim=1)
        maps = []
        for part, shape, geometry, within in zip(cells, pyramid.shapes, pyramid.maps, self.within, strict=True):
            features = self._without_padding(part.unflatten(1, shape).permute(0, 3, 1, 2), geometry)
            maps.append(self._without_padding(within(features), geometry))
        mixed = list(maps)
        for level, (down, up) in enumerate(zip(self.down, self.up, strict=True)):
            mixed[level + 1] = mixed[level + 1] + down(maps[level])
            mixed[level] = mixed[level] + enlarged(up(maps[level + 1]), pyramid.maps[level + 1], pyramid.maps[level])
        attended = self.out(torch.cat([features.permute(0, 2, 3, 1).flatten(1, 2) for features in mixed], dim=1))
        return self.feed_forward(self.norm(x + self.dropout(attended)))

    def _without_padding(self, features: Tensor, geometry: MapGeometry) -> Tensor:
        return features.masked_fill(~geometry.mask[:, None], 0) if self.mask_padding else features


def _depthwise(width: int, *, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(width, width, KERNEL, stride=stride, padding=KERNEL // 2, groups=width)
    return convolution.to(memory_format=torch.channels_last)


def enlarged(features: Tensor, coarse: MapGeometry, fine: MapGeometry) -> Tensor:
    """A map [B, C, h, w] on the cells of a finer one, bilinearly, corners on corners: of the maps as they are padded
    (published), or of their valid cells where padding is masked. Returns [B, C, H, W]."""
    dtype = torch.promote_types(features.dtype, torch.float32)  # eight bits are too few for a place
    coordinates = []
    for axis in (1, 2):
        small, large = features.shape[axis + 1], fine.mask.shape[axis]
        cells = torch.arange(large, device=features.device, dtype=dtype)
        place = (cells * ((small - 1) / max(large - 1, 1))).expand(len(features), -1)
        if coarse.sampling_limit is not None and fine.sampling_limit is not None:
            last, fine_last = (limit[:, axis - 1, None] - 1 for limit in (coarse.sampling_limit, fine.sampling_limit))
            place = cells * (last.to(dtype) / fine_last.clamp(min=1))
        coordinates.append(place * (2 / max(small - 1, 1)) - 1)
    down, across = coordinates
    grid = torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)
    return functional.grid_sample(features.to(dtype), grid, align_corners=True).to(features.dtype)


class ScaleEncoder(PyramidEncoder):
    """Attention of every cell to its own map, with the same weights for all maps, and in the middle layer to all maps:
    of five layers two within maps, one across them, two within (section 3.3)."""

    def forward(self, x: Tensor, position: Tensor, pyramid: Pyramid) -> Tensor:
        """As of `PyramidEncoder`."""
        sizes = [height * width for height, width in pyramid.shapes]
        for number, layer in enumerate(self.layers):
            if number == len(self.layers) // 2:
                x = layer(x, position, pyramid.mask)
            else:
                maps = zip(*(part.split(sizes, dim=1) for part in (x, position, pyramid.mask)), strict=True)
                x = torch.cat([layer(*part) for part in maps], dim=1)
        return x


class Gaussians(Gaussian):
    """A Gaussian of each query and head on each map, in its cells, and the query's weights of the maps."""

    def __init__(self, *, width: int, heads: int, strides: Sequence[int], first: bool) -> None:
        super().__init__(width=width, heads=len(strides) * heads, first=first)
        self.strides = tuple(strides)
        self.weigh = Fp32Linear(width, len(strides))

    def forward(  # type: ignore[override]  # of several maps
        self, placed: Tensor, centre: Tensor | None, image_extent: Tensor, masks: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        """placed and centre as of `Gaussian`; image_extent [B, 2] (w, h) of the valid image, pixels; masks of L maps.

        Returns the bias of each map [B, heads, Q, h * w], the weights [B, Q, L], the centre, and offsets and raw scales
        [B, Q, L, heads, 2] (x, y), cells.
        """
        x, centre, offset, scale = self.look(placed, centre)
        offset, scale = (part.unflatten(2, (len(self.strides), -1)) for part in (offset, scale))
        middle, biases = centre.sigmoid() * image_extent[:, None], []
        for level, (stride, mask) in enumerate(zip(self.strides, masks, strict=True)):
            points = (middle / stride)[:, :, None] + offset[:, :, level]
            # a stride of 32 has the Gaussians of one scale, in its cells
            biases.append(gaussian_bias(points, scale[:, :, level], mask, SMOOTHNESS * PUBLISHED_STRIDE / stride))
        return biases, self.weigh(x).softmax(-1), centre, offset, scale


class Look(NamedTuple):
    """What `ScaleAttention` adds to the scores, and how it weighs the maps."""

    biases: list[Tensor]  # of each map, [B, heads, Q, cells]
    weights: Tensor  # [B, Q, L], of sum 1


class ScaleAttention(Attention):
    """Attention to each of several maps by itself; a query's results are added by its weights of the maps."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, look: Look) -> Tensor:  # type: ignore[override]
        """query [B, Q, width]; key, value [B, S, width] of the cells of all maps -> [B, Q, width]."""
        query, key, value = self.project(query, key, value)
        sizes = [bias.shape[-1] for bias in look.biases]
        dropout = self.dropout if self.training else 0.0
        found = [
            weight[..., None] * attend(query, keys, values, heads=self.heads, dropout=dropout, mask=bias)
            for keys, values, bias, weight in zip(
                key.split(sizes, dim=1), value.split(sizes, dim=1), look.biases, look.weights.unbind(-1), strict=True
            )
        ]
        return self.out_proj(torch.stack(found).sum(0))  # once: weights of sum 1 leave its bias as it is


class DecoderLayer(detr.DecoderLayer):
    """DETR's decoder layer with attention to several maps."""

    def __init__(
        self, *, width: int, heads: int, ffn: int, dropout: float, strides: Sequence[int], first: bool
    ) -> None:
        super().__init__(width=width, heads=heads, ffn=ffn, dropout=dropout)
        self.cross_attention = ScaleAttention(width=width, heads=heads, dropout=dropout)
        self.gaussian = Gaussians(width=width, heads=heads, strides=strides, first=first)

    def forward(  # type: ignore[override]  # also takes and gives the centre
        self,
        x: Tensor,
        centre: Tensor | None,
        query_position: Tensor,
        key: Tensor,
        memory: Tensor,
        masks: Sequence[Tensor],
        image_extent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x [B, Q, width]; query_position [Q, width]; key (memory with its position code), memory [B, S, width];
        centre, masks and image_extent as of `Gaussians`. Returns the new x and the centre."""
        biases, weights, centre, _, _ = self.gaussian(x + query_position, centre, image_extent, masks)
        look = Look(biases, weights)
        return super().forward(x, query_position, key, memory, look), centre  # type: ignore[arg-type]


class MultiScaleSMCADETR(PyramidDetector):
    """SMCA-DETR whose queries look at several maps; one pair of heads reads every layer."""

    code_offset = 0.0

    def __init__(
        self,
        half: PyramidHalf,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
    ) -> None:
        super().__init__(half)
        self.decoder = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.query_positions = nn.Parameter(torch.randn(num_queries, width))
        self.class_head = class_head(width, num_classes)
        self.box_head = MLP(width, width, width, 4, fp32_output=True)
        initialise(self.decoder)
        for layer in layers:
            nn.init.zeros_(layer.gaussian.scale.weight)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, position, pyramid = self.encode(images, image_sizes)
        memory, position, masks = self.attended(memory, position, pyramid)
        key = memory + position
        extent = image_sizes.flip(-1).to(self.query_positions.dtype)
        x, centre = memory.new_zeros(len(memory), *self.query_positions.shape), None
        outputs = []
        for layer in self.decoder:
            x, centre = layer(x, centre, self.query_positions, key, memory, masks, extent)
            outputs.append(x)
        assert centre is not None
        return Outputs(*self.predict(torch.stack(outputs), centre))

    def attended(self, memory: Tensor, position: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Of the encoded cells [B, S, width], their codes and where they lie: what the decoder looks at, and the mask
        [B, h, w] of each of its maps."""
        return memory, position, [geometry.mask for geometry in pyramid.maps]

    def predict(self, x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """What the layers give, x [L, B, Q, width], centre [B, Q, 2] -> logits [L, B, Q, K] and boxes [L, B, Q, 4]."""
        x = self.norm(x)
        return self.class_head(x), boxes_around(self.box_head(x), centre)


class ConvolvedSMCADETR(MultiScaleSMCADETR):
    """The released form: maps of stride 8 to 64 mixed by convolutions; the decoder sees the finest one at stride 16."""

    def __init__(
        self, half: PyramidHalf, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int
    ) -> None:
        super().__init__(half, layers, width=width, num_classes=num_classes, num_queries=num_queries)
        self.halve = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1).to(memory_format=torch.channels_last)
        nn.init.xavier_uniform_(self.halve.weight)

    def attended(self, memory: Tensor, position: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As of `MultiScaleSMCADETR`. The halved map has the codes of the map of its size: what is said of the level is
        the same for all its cells, and so of no weight in their softmax."""
        fine, second = (height * width for height, width in pyramid.shapes[:2])
        halved = self.halve(memory[:, :fine].unflatten(1, pyramid.shapes[0]).permute(0, 3, 1, 2))
        memory = torch.cat((halved.permute(0, 2, 3, 1).flatten(1, 2), memory[:, fine:]), dim=1)
        position = torch.cat((position[:, fine : fine + second], position[:, fine:]), dim=1)
        maps = (pyramid.maps[1], *pyramid.maps[1:])
        return memory, position, [geometry.mask for geometry in maps]

    def regions(self) -> Regions:
        """All but the encoder: one graph for maps of all sizes has no convolution."""
        return Regions(tuple(self.decoder), self.methods)


def build_smca_detr_ms(section: MultiScaleSMCADETRSection) -> MultiScaleSMCADETR:
    """The model of a recipe with random weights."""
    convolved, mask_padding = section.scale_encoder == "convolution", section.padding == "masked"
    stages = CONVOLVED_STAGES if convolved else ATTENDED_STAGES
    backbone, projections = build_projections(section, levels=stages, last=True)
    strides = (*backbone.strides, 2 * backbone.strides[-1])
    encoder = build_mixing_encoder(section, levels=len(strides)) if convolved else build_scale_encoder(section)
    layers = [
        DecoderLayer(
            first=number == 0,
            strides=(strides[1], *strides[1:]) if convolved else strides,
            width=section.width,
            heads=section.heads,
            ffn=section.ffn,
            dropout=section.dropout,
        )
        for number in range(section.decoder_layers)
    ]
    form = ConvolvedSMCADETR if convolved else MultiScaleSMCADETR
    return form(
        PyramidHalf(backbone, projections, nn.ModuleList(), encoder, mask_padding),
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
    )


def build_mixing_encoder(section: MultiScaleSMCADETRSection, *, levels: int) -> PyramidEncoder:
    return PyramidEncoder(
        MixingLayer(
            levels=levels,
            width=section.width,
            ffn=section.ffn,
            dropout=section.dropout,
            mask_padding=section.padding == "masked",
        )
        for _ in range(section.encoder_layers)
    )


def build_scale_encoder(section: MultiScaleSMCADETRSection) -> ScaleEncoder:
    return ScaleEncoder(
        EncoderLayer(width=section.width, heads=section.heads, ffn=section.ffn, dropout=section.dropout)
        for _ in range(section.encoder_layers)
    )
