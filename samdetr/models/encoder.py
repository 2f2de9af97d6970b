"""From images to one encoded map, which several systems share: backbone, projection, DETR's encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.errors import CheckpointError
from samdetr.models.backbone import Backbone, build_backbone
from samdetr.models.layers import GROUPS, FeedForward, LayerSizes, MapGroupNorm, attend, build_layer_sizes
from samdetr.models.position import TEMPERATURE, MapGeometry, covered_cells, sine_map, valid_cells, valid_mask

if TYPE_CHECKING:
    from samdetr.models.system import State
    from samdetr.recipe.model import SingleScaleSection

# our prefixes -> published ones, as in `PublishedLayout`
PUBLISHED_LAYER_END = {"norm.": "norm1.", "feed_forward.norm.": "norm2.", "feed_forward.": ""}
PUBLISHED_ENCODER_LAYER = {
    "in_proj.": "self_attn.in_proj_",
    "out_proj.": "self_attn.out_proj.",
    **PUBLISHED_LAYER_END,
}
CONVOLUTIONS = r"encoder\.embed\.input_proj"  # published as such


class EncoderLayer(nn.Module):
    """Self-attention with q = k = x + pos_embed, v = x, then a feed-forward block."""

    def __init__(self, sizes: LayerSizes, *, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)  # one matrix for q, k, v: its Xavier range depends on it
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout, activation=activation)

    def forward(self, x: Tensor, pos_embed: Tensor, key_mask: Tensor) -> Tensor:
        """Run the layer on x, pos_embed [B, S, width]: [B, S, width]. key_mask [B, S] bool, True: attended."""
        width = x.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query_key = functional.linear(x + pos_embed, weight[: 2 * width], bias[: 2 * width])
        value = functional.linear(x, weight[2 * width :], bias[2 * width :])
        query, key = query_key.chunk(2, dim=-1)
        mask, dropout = key_mask[:, None, None, :], self.dropout.p if self.training else 0.0
        attended = self.out_proj(attend(query, key, value, heads=self.heads, dropout=dropout, mask=mask))
        return self.feed_forward(self.norm(x + self.dropout(attended)))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers without a final norm.

    pos_scale(pos_embed, x) gives each layer's pos_embed, x the layer's input; None: unscaled.
    """

    def __init__(self, layers: Iterable[EncoderLayer], *, pos_scale: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pos_scale = pos_scale

    def forward(self, x: Tensor, pos_embed: Tensor, key_mask: Tensor) -> Tensor:
        """Run the layers on x, pos_embed [B, S, width]: [B, S, width]. key_mask [B, S] bool, True: attended."""
        for layer in self.layers:
            x = layer(x, pos_embed if self.pos_scale is None else self.pos_scale(pos_embed, x), key_mask)
        return x


def embed_map(
    features: Tensor,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    *,
    projection: nn.Module | None,
    norm: nn.Module | None,
    stride: int,
    mask_padding: bool,
    pos_offset: float,
    pos_temperature: float = TEMPERATURE,
) -> tuple[Tensor, Tensor, MapGeometry]:
    """Embed a backbone's map [B, C, h, w]: x and pos_embed [B, h, w, width], and the geometry.

    image_sizes: [B, 2] int valid (h, w). image_shape: padded (H, W) of the images. projection, norm: of x, None: left
    out. stride: of the map, in pixels. pos_offset, pos_temperature: of `sine_map`.
    """
    height, width = features.shape[2:]
    if mask_padding:
        valid = covered_cells(image_sizes, stride)
    else:
        valid = valid_cells(image_sizes, image_shape, (height, width))
    mask = valid_mask(valid, height, width)
    x = features.permute(0, 2, 3, 1)
    if projection is not None:
        x = projection(x)
    if norm is not None:
        x = norm(x, mask if mask_padding else None)
    pos_embed = sine_map(valid, height, width, x.shape[-1], offset=pos_offset, temperature=pos_temperature)
    return x, pos_embed.to(x.dtype), MapGeometry(valid, mask, valid if mask_padding else None)


def cast_memory(memory: Tensor, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """Cast memory [B, ..., width], and zero the cells outside of mask [B, ...] bool; None: leave them."""
    memory = memory.to(dtype)  # under autocast norms return float32: twice the bytes to read
    return memory if mask is None else memory.masked_fill(~mask[..., None], 0)


class MapEmbedding(nn.Module):
    """From a backbone's map to the transformer's input, with a position embedding of every cell."""

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        stride: int,
        group_norm: bool,
        mask_padding: bool,
        pos_offset: float = 0.0,
        pos_temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(channels, width)
        self.input_norm = MapGroupNorm(GROUPS, width) if group_norm else None
        self.stride, self.mask_padding = stride, mask_padding
        self.pos_offset, self.pos_temperature = pos_offset, pos_temperature

    def forward(
        self, features: Tensor, image_sizes: Tensor, image_shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, MapGeometry]:
        """Embed the map [B, C, h, w]: the transformer's input and pos_embed [B, h, w, width], and the geometry.

        image_sizes: [B, 2] int valid (h, w). image_shape: padded (H, W) of the images.
        """
        return embed_map(
            features,
            image_sizes,
            image_shape,
            projection=self.input_proj,
            norm=self.input_norm,
            stride=self.stride,
            mask_padding=self.mask_padding,
            pos_offset=self.pos_offset,
            pos_temperature=self.pos_temperature,
        )


class EncodedMap(NamedTuple):
    """An encoded map, as decoders read it."""

    memory: Tensor  # [B, h, w, width]
    pos_embed: Tensor  # [B, h, w, width]
    geometry: MapGeometry
    image_sizes: Tensor  # [B, 2] int, valid (h, w) in pixels

    def flatten(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory and pos_embed [B, h * w, width], and the mask [B, h * w] bool, True within the valid cells."""
        return self.memory.flatten(1, 2), self.pos_embed.flatten(1, 2), self.geometry.mask.flatten(1)


class ImageEncoder(nn.Module):
    """From images to an encoded map.

    mask_padding: padded cells are zero, so that an image's result does not depend on its padding.
    """

    def __init__(
        self, backbone: Backbone, embed: MapEmbedding, transformer: TransformerEncoder, *, mask_padding: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.embed = embed
        self.transformer = transformer
        self.layers = tuple(transformer.layers)
        scale = transformer.pos_scale
        self.compiled_parts = (embed,) if scale is None else (embed, scale)
        self.mask_padding = mask_padding

    def forward(self, images: Tensor, image_sizes: Tensor) -> EncodedMap:
        """Encode images [B, 3, H, W], normalised, zero-padded bottom/right; image_sizes [B, 2] int, valid (h, w)."""
        (features,) = self.backbone(images, image_sizes)
        x, pos_embed, geometry = self.embed(features, image_sizes, (images.shape[2], images.shape[3]))
        mask = geometry.mask
        memory = self.transformer(x.flatten(1, 2), pos_embed.flatten(1, 2), mask.flatten(1)).view(x.shape)
        memory = cast_memory(memory, features.dtype, mask if self.mask_padding else None)
        return EncodedMap(memory, pos_embed, geometry, image_sizes)


def check_input_norm(model: Any, state: State) -> None:
    """Raise CheckpointError where only the model or only the published checkpoint has a norm after its projection."""
    has_norm = "input_proj.0.1.weight" in state
    if has_norm != (model.encoder.embed.input_norm is not None):
        wanted = "group_norm" if has_norm else "none"
        raise CheckpointError(
            f"the published checkpoint has {'a' if has_norm else 'no'} GroupNorm after its input projection: "
            f'set model.input_norm = "{wanted}".'
        )


def build_image_encoder(
    section: SingleScaleSection,
    *,
    pos_offset: float = 0.0,
    pos_temperature: float = TEMPERATURE,
    pos_scale: nn.Module | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> ImageEncoder:
    """Build the image encoder of a recipe, with random weights.

    pos_offset, pos_temperature: of `sine_map`. pos_scale: of `TransformerEncoder`. activation: of `FeedForward`.
    """
    backbone, mask_padding = build_backbone(section.backbone, padding=section.padding), section.padding == "masked"
    embed = MapEmbedding(
        backbone.channels[0],
        section.width,
        stride=backbone.strides[0],
        group_norm=section.input_norm == "group_norm",
        mask_padding=mask_padding,
        pos_offset=pos_offset,
        pos_temperature=pos_temperature,
    )
    sizes = build_layer_sizes(section)
    layers = [EncoderLayer(sizes, activation=activation) for _ in range(section.encoder_layers)]
    transformer = TransformerEncoder(layers, pos_scale=pos_scale)
    return ImageEncoder(backbone, embed, transformer, mask_padding=mask_padding)
