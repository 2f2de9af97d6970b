"""From images to an encoded map, the half that all systems share: backbone, projection, DETR's encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.nn import functional

from samdetr.models.backbone import Backbone
from samdetr.models.layers import FeedForward, MapGroupNorm, attend
from samdetr.models.position import MapGeometry, covered_cells, sine_map, valid_cells, valid_mask

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection


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


def build_encoder(section: ModelSection) -> Encoder:
    """The encoder of a recipe."""
    return Encoder(
        layers=section.encoder_layers,
        width=section.width,
        heads=section.heads,
        ffn=section.ffn,
        dropout=section.dropout,
    )


class MapModel(Protocol):
    """What `encode_map` and `embed_map` use of a detector."""

    backbone: Backbone
    input_proj: nn.Linear
    input_norm: MapGroupNorm | None
    encoder: Encoder
    mask_padding: bool

    def embed(
        self, features: Tensor, image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, MapGeometry]:
        """`embed_map` with the model's offset; a region that is compiled."""


def encode_map(model: MapModel, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, MapGeometry]:
    """Images [B, 3, H, W] and sizes [B, 2] -> the encoded map [B, h, w, width], its position code, its geometry."""
    features = model.backbone(images, image_sizes)
    x, position, geometry = model.embed(features, image_sizes, (images.shape[2], images.shape[3]))
    memory = model.encoder(x.flatten(1, 2), position.flatten(1, 2), geometry.mask.flatten(1)).view(x.shape)
    memory = memory.to(features.dtype)  # under autocast norms return float32: twice the bytes to read
    return memory, position, geometry


def embed_map(
    model: MapModel, features: Tensor, image_sizes: Tensor, image_shape: tuple[int, int], *, offset: float
) -> tuple[Tensor, Tensor, MapGeometry]:
    """The backbone's map [B, C, h, w] -> the encoder's input and position code [B, h, w, width], and geometry.

    image_shape: padded (H, W) of the images. offset: of `sine_map`.
    """
    height, width = features.shape[2:]
    if model.mask_padding:
        valid = covered_cells(image_sizes, model.backbone.stride)
    else:
        valid = valid_cells(image_sizes, image_shape, (height, width))
    mask = valid_mask(valid, height, width)
    x = model.input_proj(features.permute(0, 2, 3, 1))
    if model.input_norm is not None:
        x = model.input_norm(x, mask if model.mask_padding else None)
    position = sine_map(valid, height, width, x.shape[-1], offset=offset).to(x.dtype)
    return x, position, MapGeometry(valid, mask, valid if model.mask_padding else None)
