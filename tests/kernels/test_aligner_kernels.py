"""The Triton kernels of roi_align and salient_points, on a GPU or under the interpreter.

The error budget is what the reference in the same dtype loses against float64, times 1.5 (its largest error is that of
a few roundings), plus an fp32 round-off of the sums and weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from samdetr_kernels import roi_align, salient_points
from samdetr_kernels.roi_align import (
    roi_align_backward_reference,
    roi_align_backward_triton,
    roi_align_forward_triton,
    roi_align_reference,
)
from samdetr_kernels.salient_points import (
    salient_points_backward_reference,
    salient_points_backward_triton,
    salient_points_forward_triton,
    salient_points_reference,
)
from tests.kernels.test_aligner_ops import random_boxes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# height, width, channels, boxes, output size, whether the map is padded
CASES = [
    (1, 1, 5, 7, 7, False),
    (7, 5, 24, 7, 7, True),
    (7, 5, 4, 6, 14, False),
    (7, 5, 4, 6, 3, True),
    (13, 19, 70, 7, 7, False),
    (25, 38, 16, 6, 7, True),
    (50, 76, 16, 1, 7, False),
    (7, 5, 16, 0, 7, False),
]
CASE_IDS = [f"{h}x{w}-C{c}-N{n}-bins{s}{'-padded' * p}" for h, w, c, n, s, p in CASES]
# all cases in float32, the small ones also in bfloat16; the rest is slow, as they differ in how they load and store
QUICK = {torch.float32: CASE_IDS, torch.bfloat16: [CASE_IDS[place] for place in (0, 1, 3, 7)], torch.float16: []}
ALL = [
    pytest.param(case, dtype, id=f"{name}-{dtype}", marks=() if name in QUICK[dtype] else pytest.mark.long)
    for dtype in DTYPES
    for case, name in zip(CASES, CASE_IDS, strict=True)
]


class Inputs:
    """Random features (garbage beyond the valid cells), boxes and points, and the same in float64 without garbage."""

    def __init__(self, case: tuple[int, int, int, int, int, bool], dtype: torch.dtype, points: int = 8) -> None:
        height, width, channels, count, self.size, padded = case
        self.generator = torch.Generator().manual_seed(height * 1000 + channels)
        self.features = torch.randn(2, height, width, channels, generator=self.generator).to(dtype)
        self.clean = self.features.clone()
        self.valid = None
        if padded:
            self.valid = torch.tensor([[max(height - 2, 1), max(width - 3, 1)], [height, width]])
            rows, columns = self.valid[0].tolist()
            self.features[0, rows:], self.features[0, :, columns:] = torch.nan, torch.nan
            self.clean[0, rows:], self.clean[0, :, columns:] = 0, 0
        self.boxes = random_boxes(2, count, height, width).float()
        self.points = torch.rand(2, count, points, 2, generator=self.generator) * 2.4 - 1.2

    def upstream(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(self.features.dtype)


def assert_within_budget(out: Tensor, eager: Tensor, exact: Tensor, sums: float | Tensor) -> None:
    """Assert that the error is within 1.5 times eager's and a round-off.

    sums: of the absolute terms, for each element or the largest, whose fp32 round-off is allowed as well.
    """
    assert out.shape == exact.shape and out.dtype == eager.dtype
    if exact.numel() == 0:
        return
    error = (out.cpu().double() - exact).abs()
    budget = 1.5 * (eager.double() - exact).abs().max() + 16 * torch.finfo(torch.float32).eps * sums
    assert (error <= budget).all(), f"error over the budget by {(error - budget).max():.3g}"


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_roi_align_kernels(case, dtype, kernel_device):
    x = Inputs(case, dtype)
    on_device = x.features.to(kernel_device), x.boxes.to(kernel_device)
    valid = None if x.valid is None else x.valid.to(kernel_device)
    out = roi_align_forward_triton(*on_device, x.size, valid)
    exact = roi_align_reference(x.clean.double(), x.boxes.double(), x.size, x.valid)
    assert_within_budget(out, roi_align_reference(x.clean, x.boxes, x.size, x.valid), exact, sums=40)
    assert torch.equal(out, roi_align_forward_triton(*on_device, x.size, valid))

    upstream = x.upstream(exact)
    arguments = (on_device[1], *case[:2], valid)
    grad = roi_align_backward_triton(upstream.to(kernel_device), *arguments)
    exact = roi_align_backward_reference(upstream.double(), x.boxes.double(), *case[:2], x.valid)
    eager = roi_align_backward_reference(upstream, x.boxes, *case[:2], x.valid)
    # no weight is negative: what is summed for a cell, in absolute terms
    terms = roi_align_backward_reference(upstream.double().abs(), x.boxes.double(), *case[:2], x.valid)
    assert_within_budget(grad, eager, exact, sums=terms)
    assert torch.equal(grad, roi_align_backward_triton(upstream.to(kernel_device), *arguments))


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_salient_points_kernels(case, dtype, kernel_device):
    x = Inputs(case, dtype, points={14: 40, 3: 1}.get(case[4], 8))
    on_device = [part.to(kernel_device) for part in (x.features, x.boxes, x.points)]
    valid = None if x.valid is None else x.valid.to(kernel_device)
    wide = [part.double() for part in (x.clean, x.boxes, x.points)]
    out = salient_points_forward_triton(*on_device, x.size, valid)
    exact = salient_points_reference(*wide, x.size, x.valid)
    assert_within_budget(out, salient_points_reference(x.clean, x.boxes, x.points, x.size, x.valid), exact, sums=40)

    upstream = x.upstream(exact)
    grads = salient_points_backward_triton(upstream.to(kernel_device), *on_device, x.size, valid)
    exacts = salient_points_backward_reference(upstream.double(), *wide, x.size, x.valid)
    eagers = salient_points_backward_reference(upstream, x.clean, x.boxes, x.points, x.size, x.valid)
    terms = salient_points_backward_reference(upstream.double().abs(), *wide, x.size, x.valid)[0]
    for grad, eager, exact, sums in zip(grads, eagers, exacts, (terms, 40.0 * case[2]), strict=True):
        assert_within_budget(grad, eager, exact, sums=sums)
    again = salient_points_backward_triton(upstream.to(kernel_device), *on_device, x.size, valid)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


def test_permuted_inputs_give_the_same_bits(kernel_device):
    x = Inputs(CASES[1], torch.float32)
    features, boxes, points = (part.to(kernel_device) for part in (x.clean, x.boxes, x.points))
    permuted = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    swapped = points.transpose(1, 2).contiguous().transpose(1, 2)
    assert not permuted.is_contiguous() and not swapped.is_contiguous()
    assert torch.equal(roi_align_forward_triton(permuted, boxes), roi_align_forward_triton(features, boxes))
    expected = salient_points_forward_triton(features, boxes, points)
    assert torch.equal(salient_points_forward_triton(permuted, boxes, swapped), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ops_on_a_gpu_agree_with_the_reference_and_repeat_their_bits(dtype):
    x = Inputs((50, 76, 64, 300, 7, True), dtype)
    boxes, points, valid = x.boxes.cuda(), x.points.cuda(), x.valid.cuda()

    def run() -> list[Tensor]:
        features = x.features.cuda().requires_grad_()
        place = points.clone().requires_grad_()
        outs = [
            roi_align(features, boxes, 7, valid),
            salient_points(features, boxes, place, 7, valid),
        ]
        weights = [torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(dtype) for out in outs]
        pairs = zip(outs, weights, strict=True)
        grads = [torch.autograd.grad(out, features, w, retain_graph=True)[0] for out, w in pairs]
        return [*outs, *grads, torch.autograd.grad(outs[1], place, weights[1])[0]]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = salient_points_reference(x.clean.double(), x.boxes.double(), x.points.double(), 7, x.valid)
    eager = salient_points_reference(x.clean, x.boxes, x.points, 7, x.valid)
    assert_within_budget(first[1], eager, exact, sums=40)
    exact = roi_align_reference(x.clean.double(), x.boxes.double(), 7, x.valid)
    assert_within_budget(first[0], roi_align_reference(x.clean, x.boxes, 7, x.valid), exact, sums=40)


@pytest.mark.gpu
def test_ops_and_their_gradients_can_be_captured_in_a_cuda_graph():
    x = Inputs(CASES[5], torch.bfloat16)
    features, boxes, points = x.clean.cuda().requires_grad_(), x.boxes.cuda(), x.points.cuda().requires_grad_()

    def step() -> list[Tensor]:
        outs = [roi_align(features, boxes), salient_points(features, boxes, points)]
        upstream = [torch.ones_like(out) for out in outs]
        return [*outs, *torch.autograd.grad(outs, (features, points), upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        points.mul_(0.5)
        features.mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_tf32_loses_no_more_than_its_operands_rounding():
    x = Inputs((25, 38, 64, 40, 7, False), torch.float32)
    features, boxes, points = x.features.cuda(), x.boxes.cuda(), x.points.cuda()
    wide = [part.double() for part in (x.clean, x.boxes, x.points)]
    torch.set_float32_matmul_precision("high")
    try:
        out, sampled = (
            roi_align_forward_triton(features, boxes),
            salient_points_forward_triton(features, boxes, points),
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    pairs = (
        (out, roi_align_reference(*wide[:2]), roi_align_reference(wide[0].abs(), wide[1])),
        (sampled, salient_points_reference(*wide), salient_points_reference(wide[0].abs(), *wide[1:])),
    )
    for found, exact, terms in pairs:
        # weight and cell are each rounded (or cut) to 11 bits; beside it fp32 round-off
        error = (found.cpu().double() - exact).abs()
        assert (error <= 2 * 2**-10 * terms + 640 * torch.finfo(torch.float32).eps).all()
        assert error.max() > 2**-16  # tensor cores were in TF32


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_gpu_of_their_tensors():
    x = Inputs(CASES[1], torch.float32)
    first = salient_points(x.clean.cuda(0), x.boxes.cuda(0), x.points.cuda(0))
    second = salient_points(x.clean.cuda(1), x.boxes.cuda(1), x.points.cuda(1))
    assert torch.cuda.current_device() == 0 and second.device.index == 1
    assert torch.equal(first.cpu(), second.cpu())


def run_kernels(x: Inputs, device: torch.device) -> dict[str, Tensor]:
    """Run the kernels of both ops; returns every result and gradient, with ones upstream."""
    features, boxes, points = (part.to(device) for part in (x.features, x.boxes, x.points))
    valid = None if x.valid is None else x.valid.to(device)
    bins = roi_align_forward_triton(features, boxes, x.size, valid)
    grad = roi_align_backward_triton(torch.ones_like(bins), boxes, *features.shape[1:3], valid)
    found = {"roi bins": bins, "roi bins gradient": grad}
    out = salient_points_forward_triton(features, boxes, points, x.size, valid)
    grads = salient_points_backward_triton(torch.ones_like(out), features, boxes, points, x.size, valid)
    found |= {"points": out, "points gradient": grads[0], "points' own gradient": grads[1]}
    return {name: part.cpu() for name, part in found.items()}


def run_references(x: Inputs) -> dict[str, Tensor]:
    """Run the references; cells beyond the valid ones must not matter, so their garbage is left out."""
    map_size = x.clean.shape[1:3]
    bins = roi_align_reference(x.clean, x.boxes, x.size, x.valid)
    grad = roi_align_backward_reference(torch.ones_like(bins), x.boxes, *map_size, x.valid)
    found = {"roi bins": bins, "roi bins gradient": grad}
    out = salient_points_reference(x.clean, x.boxes, x.points, x.size, x.valid)
    grads = salient_points_backward_reference(torch.ones_like(out), x.clean, x.boxes, x.points, x.size, x.valid)
    return found | {"points": out, "points gradient": grads[0], "points' own gradient": grads[1]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert equality up to fp32 round-off, NaN where NaN is."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        assert torch.allclose(found[name], right, rtol=1e-4, atol=1e-4, equal_nan=True), name


@pytest.mark.parametrize("sizes", [[[0, 3], [5, 6]], [[8, 6], [5, 60]], [[-1, 6], [5, 0]], [[2**40, 6], [3, -(2**40)]]])
def test_valid_sizes_beyond_the_map_are_clamped_and_nothing_else_is_read(sizes, kernel_device):
    x = Inputs((5, 6, 16, 7, 7, False), torch.float32)
    x.valid = torch.tensor(sizes)
    around = torch.full((4, 5, 6, 16), 7.0)  # what a read outside the two images would find
    around[1:3] = 1.0
    x.features, x.clean = around[1:3], torch.ones(2, 5, 6, 16)
    for image, (rows, columns) in enumerate(x.valid.clamp(min=0).tolist()):
        x.features[image, rows:], x.features[image, :, columns:] = torch.nan, torch.nan
        x.clean[image, rows:], x.clean[image, :, columns:] = 0, 0
    found = run_kernels(x, kernel_device)
    assert_same(found, run_references(x))
    assert max(found["roi bins"].max(), found["points"].max()) < 1.0001


@pytest.mark.parametrize("size", [(0, 6), (5, 0)])
def test_a_map_without_cells_gives_zeros(size, kernel_device):
    x = Inputs((5, 6, 16, 7, 7, False), torch.float32)
    x.features = x.clean = torch.ones(2, *size, 16)
    found, expected = run_kernels(x, kernel_device), run_references(x)
    assert all(not part.any() for part in (*found.values(), *expected.values()))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")  # NumPy's word for what is tested
def test_nan_features_show(kernel_device):
    x = Inputs((7, 5, 16, 6, 7, False), torch.float32)
    x.features[0, 3, 2, 5] = torch.nan  # the reference's products spread it over the channel of the image
    found = run_kernels(x, kernel_device)
    hit = found["roi bins"].isnan().any(2).any(2)  # [B, N, C]
    assert hit[0, :, 5].any() and not hit[1].any() and not hit[0, :, :5].any()
    assert found["points"][0, :, :, 5].isnan().any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow|All-NaN):RuntimeWarning")
@pytest.mark.parametrize(("edge", "bad"), [(0, torch.nan), (3, torch.inf), (1, -torch.inf)])
def test_a_box_that_is_not_finite_gives_nan(edge, bad, kernel_device):
    x = Inputs((7, 5, 16, 6, 7, True), torch.float32)
    clean = run_kernels(x, kernel_device)
    x.boxes[1, 3, edge] = bad
    found = run_kernels(x, kernel_device)
    assert_same(found, run_references(x))
    for name, part in found.items():
        spoiled = part[1] if name.endswith(" gradient") and "own" not in name else part[1, 3]
        assert spoiled.isnan().all(), name
        assert torch.equal(part[0], clean[name][0]), name


def test_infinite_points_count_zero_and_nan_points_show(kernel_device):
    x = Inputs((7, 5, 16, 6, 7, False), torch.float32)
    x.points[0, 0, 3], x.points[0, 4, 1, 0], x.points[1, 0, 7, 1] = torch.inf, -torch.inf, torch.inf
    found, expected = run_kernels(x, kernel_device), run_references(x)
    own = "points' own gradient"
    assert not found["points"][0, 0, 3].any() and not found[own][0, 0, 3].any()
    assert_same(found, expected | {own: expected[own].nan_to_num(0)})
    x.points[0, 0, 3] = torch.nan
    found = run_kernels(x, kernel_device)
    assert found["points"][0, 0, 3].isnan().all() and found["points"][0, 0, :3].isfinite().all()
