"""The transformer encoder of DETR: post-norm layers over the cells of one map."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from samdetr.models.layers import FeedForward


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
        batch, cells, width = x.shape
        weight, bias = self.in_proj.weight, self.in_proj.bias
        query_key = functional.linear(x + position, weight[: 2 * width], bias[: 2 * width])
        value = functional.linear(x, weight[2 * width :], bias[2 * width :])
        query, key, value = (
            part.view(batch, cells, self.heads, -1).transpose(1, 2) for part in (*query_key.chunk(2, dim=-1), value)
        )
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=key_mask[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        attended = self.out_proj(attended.transpose(1, 2).reshape(batch, cells, width))
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
