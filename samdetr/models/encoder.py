"""From images to an encoded map, the half that all systems share: backbone, projection, DETR's encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from samdetr.models.backbone import Backbone, build_backbone
from samdetr.models.layers import GROUPS, FeedForward, MapGroupNorm, attend
from samdetr.models.position import MapGeometry, covered_cells, sine_map, valid_cells, valid_mask
from samdetr.structures import Regions

if TYPE_CHECKING:
    from samdetr.recipe import SingleScaleSection


class EncoderLayer(nn.Module):
    """Self-attention with q = k = x + position, v = x, then a feed-forward block."""

    def __init__(self, *, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)  # one matrix for q, k, v: its Xavier range depends on it
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)

    def forward(self, x: Tensor, position: Tensor, key_mask: Tensor) -> Tensor:
        """x, position [B, S, width]; key_mask [B, S] bool, True: attended. Returns [B, S, width]."""
        width = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query_key = functional.linear(x + position, weight[: 2 * width], bias[: 2 * width])
        value = functional.linear(x, weight[2 * width :], bias[2 * width :])
        query, key = query_key.chunk(2, dim=-1)
        mask, dropout = key_mask[:, None, None, :], self.dropout.p if self.training else 0.0
        attended = self.out_proj(attend(query, key, value, heads=self.heads, dropout=dropout, mask=mask))
        return self.feed_forward(self.norm(x + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of encoder layers without a final norm."""

    def __init__(self, *, layers: int, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width=width, heads=heads, ffn=ffn, dropout=dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor, position: Tensor, key_mask: Tensor) -> Tensor:
        """As `EncoderLayer.forward`."""
        for layer in self.layers:
            x = layer(x, position, key_mask)
        return x


class EncoderHalf(NamedTuple):
    """The parts of a detector up to its encoded map."""

    backbone: Backbone
    input_proj: nn.Linear
    input_norm: MapGroupNorm | None
    encoder: Encoder
    mask_padding: bool  # whether padded cells are zero, so that an image's result does not depend on its padding


class MapDetector(nn.Module):
    """What the systems on one map have in common: images become an encoded map and its position code."""

    code_offset = 0.0  # of `sine_map`
    methods: tuple[str, ...] = ("embed", "predict")  # compiled regions around the layers
    decoder: nn.ModuleList

    def __init__(self, half: EncoderHalf) -> None:
        super().__init__()
        self.backbone, self.input_proj, self.input_norm, self.encoder, self.mask_padding = half

    def encode(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, MapGeometry]:
        """Images [B, 3, H, W] and sizes [B, 2] -> the encoded map [B, h, w, width], its position code, its geometry."""
        (features,) = self.backbone(images, image_sizes)
        x, position, geometry = self.embed(features, image_sizes, (images.shape[2], images.shape[3]))
        mask = geometry.mask
        memory = self.encoder(x.flatten(1, 2), position.flatten(1, 2), mask.flatten(1)).view(x.shape)
        memory = memory.to(features.dtype)  # under autocast norms return float32: twice the bytes to read
        if self.mask_padding:
            memory = memory * mask[..., None].to(memory.dtype)
        return memory, position, geometry

    def embed(
        self, features: Tensor, image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, MapGeometry]:
        """The backbone's map [B, C, h, w] -> the encoder's input and position code [B, h, w, width], and geometry.

        image_shape: padded (H, W) of the images.
        """
        height, width = features.shape[2:]
        if self.mask_padding:
            valid = covered_cells(image_sizes, self.backbone.strides[0])
        else:
            valid = valid_cells(image_sizes, image_shape, (height, width))
        mask = valid_mask(valid, height, width)
        x = self.input_proj(features.permute(0, 2, 3, 1))
        if self.input_norm is not None:
            x = self.input_norm(x, mask if self.mask_padding else None)
        position = sine_map(valid, height, width, x.shape[-1], offset=self.code_offset).to(x.dtype)
        return x, position, MapGeometry(valid, mask, valid if self.mask_padding else None)

    def regions(self) -> Regions:
        """What is compiled besides the backbone."""
        return Regions((*self.encoder.layers, *self.decoder), self.methods)


def build_encoder_half(section: SingleScaleSection) -> EncoderHalf:
    """Backbone, projection and encoder of a recipe, with random weights."""
    backbone, width = build_backbone(section.backbone, padding=section.padding), section.width
    return EncoderHalf(
        backbone,
        nn.Linear(backbone.channels[0], width),
        MapGroupNorm(GROUPS, width) if section.input_norm == "group_norm" else None,
        Encoder(
            layers=section.encoder_layers,
            width=width,
            heads=section.heads,
            ffn=section.ffn,
            dropout=section.dropout,
        ),
        section.padding == "masked",
    )
