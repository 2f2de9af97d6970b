"""Attention: channels that do what a mask of keys does, exactly, so that implementations without masks can be used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from samdetr.models.layers import attend, masks_by_channels, with_mask_channels

HEADS, WIDTH = 4, 8


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, HEADS, n, WIDTH, generator=random, dtype=torch.float64) for n in (5, 11, 11)]
    mask = torch.ones(3, 1, 1, 11, dtype=torch.bool)
    mask[0, ..., 7:], mask[1, ..., 1:] = False, False
    return [(4 * part).to(dtype) for part in parts], mask


def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, mask)


def channels(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    parts = with_mask_channels(query, key, value, mask)
    return scaled_dot_product_attention(*parts, scale=WIDTH**-0.5)[..., :WIDTH]


# roundings of scores as large as 100; in bfloat16 that of the result hides them
@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float64, 200), (torch.float32, 200), (torch.bfloat16, 4)])
def test_mask_channels_do_what_a_mask_does(dtype: torch.dtype, roundings: int) -> None:
    parts, mask = inputs(dtype)
    found = []
    for attention in (masked, channels):
        leaves = [part.clone().requires_grad_() for part in parts]
        out = attention(*leaves, mask)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == dtype
        assert (one - other).abs().max() <= roundings * torch.finfo(dtype).eps * one.abs().max()
    for gradient in found[1][2:]:  # of keys and values
        assert gradient[0, :, :7].abs().min() > 0
        assert not gradient[0, :, 7:].any() and not gradient[1, :, 1:].any()


def test_a_masked_key_changes_nothing_to_the_last_bit() -> None:
    parts, mask = inputs(torch.bfloat16)
    query, key, value = parts
    before = channels(query, key, value, mask)
    key[0, :, 7:], value[0, :, 7:] = 100.0, -1000.0
    assert torch.equal(before, channels(query, key, value, mask))


def test_where_they_are_used() -> None:
    parts, mask = inputs(torch.bfloat16)
    query, _, value = parts
    assert not masks_by_channels(query, value, mask)  # on a CPU, whose attention takes masks
    assert not masks_by_channels(query.float(), value.float(), mask) and not masks_by_channels(
        query, value[..., :4], mask
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_on_a_gpu_agrees_with_float64(dtype: torch.dtype, dropout: float) -> None:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 950, 256, generator=random).to(dtype) for _ in range(3)]
    mask = torch.rand(2, 1, 1, 950, generator=random) < 0.7
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        out = attend(*(part.cuda() for part in parts), heads=8, dropout=dropout, mask=mask.cuda())
        torch.cuda.synchronize()
    if dropout:  # without, cuDNN may be faster
        assert any("flash" in event.key for event in profiler.key_averages())
    exact = attend(*(part.double() for part in parts), heads=8, mask=mask)
    error = (out.cpu().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    # a weight that is kept with probability 0.9 has a relative variance of 1/9
    assert error < (0.01 if dropout == 0 else 0.5)
    if dropout:
        equal = (part.cuda() for part in (parts[0] * 0, parts[1] * 0, torch.ones_like(parts[2])))
        kept = attend(*equal, heads=8, dropout=dropout, mask=mask.cuda())
        assert abs(kept.double().mean().item() - 1) < 0.01
