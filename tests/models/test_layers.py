"""Attention: channels that do what a mask of keys does, exactly, so that implementations without masks can be used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from samdetr.models.layers import attend, fits_mask_channels, with_mask_channels

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


def test_what_fits() -> None:
    (query, _, value), mask = inputs(torch.bfloat16)
    assert fits_mask_channels(query, value, mask) and fits_mask_channels(query.half(), value.half(), mask)
    wide = torch.zeros(3, HEADS, 5, 256, dtype=torch.bfloat16)
    assert fits_mask_channels(wide[..., :248], wide[..., :248], mask) and not fits_mask_channels(wide, wide, mask)
    assert not fits_mask_channels(query.float(), value.float(), mask)
    assert not fits_mask_channels(query, value[..., :4], mask)
    assert not fits_mask_channels(query, value, mask.float())  # added to the scores
    assert not fits_mask_channels(query, value, mask.expand(3, HEADS, 5, 11))  # of pairs, not of keys


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flash_attention_on_a_gpu_gives_the_gradients_of_float64(dtype: torch.dtype, compiled: bool) -> None:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 950, 256, generator=random).to(dtype) for _ in range(4)]
    mask = torch.rand(2, 1, 1, 950, generator=random) < 0.7
    few = 1e-6  # dropout that leaves out next to nothing, so that flash attention is taken and can be compared
    attention = torch.compile(attend, fullgraph=True) if compiled else attend
    found = []
    for run, device, wide in ((attention, "cuda", dtype), (attend, "cpu", torch.float64)):
        *leaves, upstream = (part.to(device, wide) for part in parts)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = run(*leaves, heads=8, dropout=few if device == "cuda" else 0.0, mask=mask.to(device))
        found.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for one, exact in zip(*found, strict=True):
        error = (one.cpu().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dropout_on_a_gpu_is_flash_attentions_and_keeps_its_share(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    mask = (torch.rand(4, 1, 1, 950, generator=random) < 0.7).cuda()
    zeros = torch.zeros(4, 950, 256, dtype=dtype, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        kept = attend(zeros, zeros, torch.ones_like(zeros), heads=8, dropout=0.1, mask=mask)
        torch.cuda.synchronize()
    assert any("flash" in event.key for event in profiler.key_averages())
    assert abs(kept.double().mean().item() - 1) < 0.01
