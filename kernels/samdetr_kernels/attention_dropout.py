"""Dropout of attention: a hash of (seed, image, head, query, cell) decides which weights are kept.

Counter-based, so that forward, backward and reference agree whatever the tiles are and a seed repeats a run. The hash
is Wellons' lowbias32 (two multiplications, three shifts), chained over seed, image, head and query, once more for the
cell. Beside each device function stands the same in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN, MIX_1, MIX_2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B  # 2^32 / golden ratio; lowbias32's factors
_GOLDEN, _MIX_1, _MIX_2 = tl.constexpr(GOLDEN), tl.constexpr(MIX_1), tl.constexpr(MIX_2)


def _signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def threshold_of(dropout: float) -> int:
    """Return the number below which a hash (as int32) is dropped."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def _mix_reference(x: Tensor) -> Tensor:
    """Compute lowbias32 of int32, whose products wrap around."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_1
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(MIX_2)
    return x ^ ((x >> 16) & 0xFFFF)


def dropout_mask(seed: Tensor, dropout: float, image: int, heads: int, queries: int, cells: int) -> Tensor:
    """Compute which weights of image number ``image`` are kept: [heads, queries, cells] bool. seed: one int64."""
    head, query, cell = (torch.arange(n, dtype=torch.int32, device=seed.device) for n in (heads, queries, cells))
    seed, golden = seed.reshape(()).long(), _signed(GOLDEN)
    key = _mix_reference(_mix_reference(seed.to(torch.int32) + golden) ^ (seed >> 32).to(torch.int32))
    key = _mix_reference(_mix_reference(key ^ image) ^ head)[:, None]
    rows = _mix_reference(_mix_reference(query ^ key) + _mix_reference(key + golden))
    x = rows[..., None] ^ (cell * golden)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(MIX_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(MIX_2))
    return x >= threshold_of(dropout)  # lowbias32's last step would change the lower half only


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """Compute lowbias32 of uint32."""
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def row_keys(p_seed, i_b, i_m, o_n):  # type: ignore[no-untyped-def]
    """Hash rows, twice so that rows do not share a sequence: the keys of `kept`. p_seed: one int64."""
    seed = tl.load(p_seed)
    key = _mix(_mix(seed.to(tl.uint32) + _GOLDEN) ^ (seed >> 32).to(tl.uint32))
    key = _mix(_mix(key ^ i_b.to(tl.uint32)) ^ i_m.to(tl.uint32))
    return _mix(_mix(o_n.to(tl.uint32) ^ key) + _mix(key + _GOLDEN))


@triton.jit
def kept(b_keys, o_s, threshold):  # type: ignore[no-untyped-def]
    """Tell whether the weights of cells ``o_s`` in rows ``b_keys`` are kept; they broadcast."""
    x = b_keys ^ (o_s.to(tl.uint32) * _GOLDEN)
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x.to(tl.int32, bitcast=True) >= threshold
