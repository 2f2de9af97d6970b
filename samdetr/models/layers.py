"""Small layers that several parts of a detector share."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

INVERSE_SIGMOID_EPSILON = 1e-5


class ExactLinear(nn.Linear):
    """A linear layer that autocast leaves in the dtype of its weights: for what becomes logits, boxes or points."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if x.is_meta:  # which has no autocast
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def joint_linear(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear layers of one input as one product: [..., in] -> [..., out] of each."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return functional.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


class MLP(nn.Sequential):
    """Linear layers of the given sizes with ReLU between them: MLP(256, 256, 4) has two. exact: the last one is."""

    def __init__(self, *sizes: int, exact: bool = False) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        fan_in, fan_out = sizes[-2:]
        layers.append(ExactLinear(fan_in, fan_out) if exact else nn.Linear(fan_in, fan_out))
        super().__init__(*layers)

    @property
    def last(self) -> nn.Linear:
        """The output layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class FeedForward(nn.Module):
    """The post-norm feed-forward block of a transformer layer: [..., width] -> [..., width]."""

    def __init__(self, *, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(functional.relu(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))


class MapGroupNorm(nn.GroupNorm):
    """GroupNorm of a channels-last map, over all cells (published) or over the valid ones only."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, H, W, C], mask [B, H, W] bool (True: valid) or None -> [B, H, W, C]."""
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


def inverse_sigmoid(x: Tensor) -> Tensor:
    """log(x / (1 - x)) of x in [0, 1], both sides clamped at 1e-5 (as published)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=INVERSE_SIGMOID_EPSILON) / (1 - x).clamp(min=INVERSE_SIGMOID_EPSILON))
