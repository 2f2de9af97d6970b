"""Small layers that several parts of a detector share, with their published names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import TransformerSection

INVERSE_SIGMOID_EPSILON = 1e-5
GROUPS = 32  # of the norm after the input projection
# not cuDNN's, some of whose kernels round the probability of dropout to sixteenths (pytorch/pytorch#174245)
EXACT_DROPOUT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MASK_CHANNELS = 8  # flash attention takes heads of a multiple of 8 channels
MASKED = -(2.0**15)  # times the scale far below any score, and float16 holds it
WIDEST_FLASH_HEAD = 256
CLASS_PRIOR = 0.01  # initial probability of every class (focal loss paper, section 4.1)
# our prefixes -> published ones, as in `PublishedLayout`: in every decoder layer, and with `ConditionalSelfAttention`
PUBLISHED_DECODER_LAYER = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "feed_forward.norm.": "norm3.",
    "feed_forward.": "",
}
PUBLISHED_SELF_ATTENTION = {
    "self_attention.query_content.": "sa_qcontent_proj.",
    "self_attention.query_position.": "sa_qpos_proj.",
    "self_attention.key_content.": "sa_kcontent_proj.",
    "self_attention.key_position.": "sa_kpos_proj.",
    "self_attention.value.": "sa_v_proj.",
    "self_attention.out.": "self_attn.out_proj.",
}


class LayerSizes(NamedTuple):
    """The sizes that all layers of a transformer have in common."""

    width: int  # channels
    heads: int  # of attention
    ffn: int  # hidden channels of the feed-forward block
    dropout: float  # probability


def build_layer_sizes(section: TransformerSection) -> LayerSizes:
    """Return the sizes of a recipe's layers."""
    return LayerSizes(section.width, section.heads, section.ffn, section.dropout)


class Fp32Linear(nn.Linear):
    """A linear layer that autocast leaves in the dtype of its weights: for what becomes logits, boxes or points."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_meta:  # which has no autocast
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def joint_linear(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input as one product: [..., in] -> [..., out] of each."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return functional.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class MLP(nn.Sequential):
    """Linear layers of the given sizes with ReLU between them: MLP(256, 256, 4) has two.

    fp32_output: the last one is an `Fp32Linear`.
    """

    def __init__(self, *sizes: int, fp32_output: bool = False) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        fan_in, fan_out = sizes[-2:]
        layers.append(Fp32Linear(fan_in, fan_out) if fp32_output else nn.Linear(fan_in, fan_out))
        super().__init__(*layers)

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


def make_class_head(width: int, num_classes: int, *, prior: float = CLASS_PRIOR) -> nn.Linear:
    """Make a layer of logits that begin at a probability of about ``prior``; at 0 as torch's linear layers begin."""
    head = Fp32Linear(width, num_classes)
    if prior:
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
    return head


def make_box_head(width: int) -> MLP:
    """Make an MLP of box offsets (before the sigmoid) that begin at zero."""
    head = MLP(width, width, width, 4, fp32_output=True)
    nn.init.zeros_(head.last.weight)
    nn.init.zeros_(head.last.bias)
    return head


def box_head_flops(heads: Iterable[nn.Module], out: Outputs) -> int:
    """Count the flops of box heads, each for the queries of one layer."""
    weights = (weight for head in heads for weight in head.parameters() if weight.dim() > 1)
    return sum(weight.numel() for weight in weights) * out.boxes[0, ..., 0].numel()


def reset_matrices(*parts: nn.Module) -> None:
    """Draw every matrix of the parts from Xavier's uniform distribution, as DETR's transformer has it."""
    for part in parts:
        for parameter in part.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, heads: int, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax attention, channels split among heads: [B, Q, C], [B, S, C], [B, S, D] -> [B, Q, D].

    mask: bool (True: attended, one key at least) or added to the scores, broadcast to [B, heads, Q, S]. dropout: of the
    weights.
    """
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    width, scale = value.shape[-1], None  # None: torch's own, the root of the query's width
    # without dropout torch may take cuDNN's, which is fast with a mask too
    if dropout and mask is not None and query.is_cuda and fits_mask_channels(query, value, mask):
        scale = query.shape[-1] ** -0.5
        query, key, value = with_mask_channels(query, key, value, mask)
        mask = None
    with sdpa_kernel(EXACT_DROPOUT) if dropout else nullcontext():
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
    return attended[..., :width].transpose(1, 2).flatten(2)


def fits_mask_channels(query: Tensor, value: Tensor, mask: Tensor) -> bool:
    """Tell whether flash attention, which knows no mask, takes these heads, and the mask is one of keys."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    of_keys = mask.dtype == torch.bool and mask.shape[1:3] == (1, 1)
    return half and of_keys and query.shape[-1] == value.shape[-1] <= WIDEST_FLASH_HEAD - MASK_CHANNELS


def with_mask_channels(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append channels that make the weight of a masked key exactly zero, and change no other score.

    [B, heads, Q or S, C] each, mask [B, 1, 1, S] bool (True: attended) -> the same with `MASK_CHANNELS` more channels.
    """
    masked = torch.where(mask, 0.0, MASKED / MASK_CHANNELS).to(key.dtype).transpose(2, 3)
    key = torch.cat((key, masked.expand(*key.shape[:3], MASK_CHANNELS)), -1)
    return functional.pad(query, (0, MASK_CHANNELS), value=1.0), key, functional.pad(value, (0, MASK_CHANNELS))


class Attention(nn.Module):
    """Multi-head attention whose query, key and value projections are one matrix, as torch's own layer has it."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj = nn.Linear(width, 3 * width)  # one matrix: its Xavier range depends on it
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from query [B, Q, width] to key and value [B, S, width]: [B, Q, width]. mask: as of `attend`."""
        query, key, value = self.project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(query, key, value, heads=self.heads, dropout=dropout, mask=mask))

    def project(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Project the inputs of query, key and value, each [B, ..., width] -> [B, ..., width]."""
        parts = zip(inputs, self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3), strict=True)
        return tuple(functional.linear(x, weight, bias) for x, weight, bias in parts)


class ConditionalSelfAttention(nn.Module):
    """Conditional-DETR's attention among queries: content and position are projected apart and added."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content = nn.Linear(width, width)
        self.query_position = nn.Linear(width, width)
        self.key_content = nn.Linear(width, width)
        self.key_position = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Attend among x [B, Q, width] at position [B, Q, width]: [B, Q, width]."""
        query, key, value = joint_linear(x, self.query_content, self.key_content, self.value)
        query_position, key_position = joint_linear(position, self.query_position, self.key_position)
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(query + query_position, key + key_position, value, heads=self.heads, dropout=dropout))


class FeedForward(nn.Module):
    """The post-norm feed-forward block of a transformer layer: [..., width] -> [..., width].

    activation: makes what stands between its two linear layers.
    """

    def __init__(
        self, *, width: int, hidden: int, dropout: float, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.activation = activation()
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


class PredictionHeads(nn.Module):
    """A norm, a class head and a box head that read what all decoder layers give."""

    def __init__(self, width: int, *, class_head: nn.Module, box_head: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.class_head = class_head
        self.box_head = box_head

    def forward(self, x: Tensor, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict logits [L, B, Q, K] and boxes [L, B, Q, 4] from x [L, B, Q, width].

        centre: where boxes begin, (x, y) before the sigmoid, [Q, 2] or [B, Q, 2]; None: in the middle of the image.
        """
        x = self.norm(x)
        logits, offset = self.class_head(x), self.box_head(x)
        return logits, offset.sigmoid() if centre is None else boxes_around(offset, centre)


class MapGroupNorm(nn.GroupNorm):
    """GroupNorm of a channels-last map, over all cells (published) or over the valid ones only."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x [B, H, W, C]: [B, H, W, C]. mask [B, H, W] bool, True: valid; None: all cells count."""
        if mask is None:
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        x = x.float() if x.dtype == torch.bfloat16 else x  # as autocast does for torch's own norms
        weight = mask[..., None, None].to(x.dtype)
        groups = x.view(batch, height, width, self.num_groups, channels // self.num_groups)
        count = weight.sum((1, 2, 3, 4), keepdim=True) * groups.shape[-1]
        mean = (groups * weight).sum((1, 2, 4), keepdim=True) / count
        variance = ((groups - mean).square() * weight).sum((1, 2, 4), keepdim=True) / count
        normalised = (groups - mean) * torch.rsqrt(variance + self.eps)
        return normalised.view(x.shape) * self.weight + self.bias


def boxes_around(offset: Tensor, start: Tensor) -> Tensor:
    """Compute boxes (cx, cy, w, h) in [0, 1] from offsets [..., 4].

    start: where they begin before the sigmoid, points (x, y) [..., 2] or boxes [..., 4].
    """
    if start.shape[-1] == 2:
        start = torch.cat((start, torch.zeros_like(start)), dim=-1)
    return (offset + start).sigmoid()


def inverse_sigmoid(x: Tensor, epsilon: float = INVERSE_SIGMOID_EPSILON) -> Tensor:
    """Compute log(x / (1 - x)) of x in [0, 1], both sides clamped at ``epsilon`` (as published)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=epsilon) / (1 - x).clamp(min=epsilon))
