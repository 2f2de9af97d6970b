"""deformable_attention: the reference against grid_sample in float64, the kernels against the reference, the op.

The kernels' error budget is twice what the reference in the same dtype loses against float64 (the largest error is that
of a few roundings), plus a few fp32 round-offs of the largest result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from samdetr_kernels.deformable_attention import (
    deformable_attention,
    deformable_attention_backward_reference,
    deformable_attention_backward_triton,
    deformable_attention_forward_triton,
    deformable_attention_reference,
)
from samdetr_kernels.launch import force_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODULE, KERNELS = (sys.modules[f"samdetr_kernels.deformable_attention{part}"] for part in ("", "_kernels"))


class Inputs(NamedTuple):
    value: Tensor
    shapes: tuple[tuple[int, int], ...]
    locations: Tensor
    weights: Tensor

    def call(self, function: Callable[..., Tensor], **options: object) -> Tensor:
        return function(self.value, self.shapes, self.locations, self.weights, **options)

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(change(self.value), self.shapes, change(self.locations), change(self.weights))

    def leaves(self) -> Inputs:
        return self.map(lambda part: part.detach().clone().requires_grad_())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights


class Case(NamedTuple):
    shapes: tuple[tuple[int, int], ...]
    batch: int
    queries: int
    heads: int
    channels: int
    points: int

    def inputs(self, dtype: torch.dtype = torch.float64, locations_dtype: torch.dtype = torch.float64) -> Inputs:
        """Draw locations within, around and far outside the maps; on borders; where floats hold them, on the kinks.

        They are multiples of 2^-12, so that fp32 cell coordinates are exact and no rounding crosses a kink.
        """
        generator = torch.Generator().manual_seed(self.channels * 100 + self.queries)
        cells = sum(height * width for height, width in self.shapes)
        samples = (self.batch, self.queries, self.heads, len(self.shapes), self.points)
        value = torch.randn(self.batch, cells, self.heads, self.channels, generator=generator)
        locations = torch.rand(*samples, 2, generator=generator).mul(1.8 * 4096).round() / 4096 - 0.375
        special = [-30.0, -0.375, 0.0, 1.0, 1.25, 9.0]
        for level, size in enumerate(self.shapes):
            for axis, cells_of_axis in enumerate(reversed(size)):
                exact = cells_of_axis & (cells_of_axis - 1) == 0
                places = [(cell + 0.5) / cells_of_axis for cell in range(-1, cells_of_axis + 1)] if exact else []
                flat = locations[:, :, :, level, :, axis].flatten()
                index = torch.randperm(flat.numel(), generator=generator)[: flat.numel() // 3]
                flat[index] = torch.tensor(special + places).repeat(len(index))[: len(index)]
                locations[:, :, :, level, :, axis] = flat.view(samples[:3] + samples[4:])
        weights = torch.rand(samples, generator=generator).flatten(3).softmax(-1).view(samples)
        return Inputs(value.to(dtype), self.shapes, locations.to(locations_dtype), weights.to(dtype))

    def upstream(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.batch, self.queries, self.heads * self.channels, generator=generator).to(dtype)


CASES = {
    "one cell": Case(((1, 1),), 2, 5, 2, 12, 3),
    "7x5": Case(((7, 5),), 1, 9, 1, 32, 4),
    "four levels on kinks": Case(((8, 4), (4, 2), (2, 2), (1, 1)), 2, 5, 2, 24, 2),
    "more queries than a block": Case(((7, 5), (1, 3)), 1, 37, 2, 16, 1),
    "wide": Case(((6, 9),), 1, 3, 3, 100, 5),
    "eight levels": Case(tuple((5 + level, 13 - level) for level in range(8)), 1, 3, 1, 64, 1),
    "no queries": Case(((7, 5), (3, 4)), 2, 0, 2, 32, 2),
    "no images": Case(((7, 5),), 0, 3, 2, 32, 2),
}
KINKS = CASES["four levels on kinks"]
SMALL = Case(((4, 3), (2, 2)), 2, 9, 2, 16, 1)


def published(value: Tensor, shapes: tuple[tuple[int, int], ...], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the PyTorch form of Deformable DETR's repository: grid_sample of every level, then the weighted sum."""
    batch, _, heads, channels = value.shape
    grids = 2 * locations - 1
    sampled = []
    for level, part in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, channels, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    attention = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]  # [B M, 1, Q, L P]
    out = (torch.stack(sampled, dim=-2).flatten(-2) * attention).sum(-1)
    return out.view(batch, heads * channels, locations.shape[1]).transpose(1, 2)


def gradients(function: Callable[..., Tensor], inputs: Inputs, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = inputs.leaves()
    return torch.autograd.grad(leaves.call(function), leaves.tensors(), upstream)


@pytest.mark.parametrize("name", CASES)
def test_reference_and_op_equal_grid_sample_with_gradients(name):
    case = CASES[name]
    inputs, upstream = case.inputs(), case.upstream()
    expected, expected_grads = inputs.call(published), gradients(published, inputs, upstream)
    for function in (deformable_attention_reference, deformable_attention):
        out = inputs.call(function)
        assert out.shape == (case.batch, case.queries, case.heads * case.channels)
        assert torch.allclose(out, expected, rtol=0, atol=1e-12)
        for grad, exact in zip(gradients(function, inputs, upstream), expected_grads, strict=True):
            assert torch.allclose(grad, exact, rtol=0, atol=1e-11)


def test_gradcheck():
    inputs = Case(((3, 2), (2, 4)), 1, 3, 2, 2, 2).inputs()
    leaves = inputs._replace(locations=torch.rand_like(inputs.locations) * 1.4 - 0.2).leaves()

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, inputs.shapes, locations, weights)

    # finite differences of 1e-8 stay on one smooth piece of the piecewise-bilinear samples
    assert torch.autograd.gradcheck(function, leaves.tensors(), eps=1e-8, atol=1e-6)


def assert_within_budget(out: Tensor, eager: Tensor, exact: Tensor) -> None:
    assert out.shape == exact.shape and out.dtype == eager.dtype and out.is_contiguous()
    if exact.numel() == 0:
        return
    error = (out.cpu().double() - exact).abs().max().item()
    lost = (eager.cpu().double() - exact).abs().max().item()
    budget = 2 * lost + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= budget, f"error {error:.3g} over the budget of {budget:.3g}"


def check_kernels(case: Case, dtype: torch.dtype, locations_dtype: torch.dtype, device: torch.device) -> None:
    inputs, upstream = case.inputs(dtype, locations_dtype), case.upstream(dtype)
    on_device, wide = inputs.map(lambda part: part.to(device)), inputs.map(Tensor.double)
    out = on_device.call(deformable_attention_forward_triton)
    exact = wide.call(deformable_attention_reference)
    assert_within_budget(out, inputs.call(deformable_attention_reference), exact)

    exacts = deformable_attention_backward_reference(upstream.double(), *wide)
    eagers = deformable_attention_backward_reference(upstream, *inputs)
    for deterministic in (False, True):
        grads = deformable_attention_backward_triton(upstream.to(device), *on_device, deterministic)
        for grad, eager, exact in zip(grads, eagers, exacts, strict=True):
            assert_within_budget(grad, eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name, dtype, kernel_device):
    check_kernels(CASES[name], dtype, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_with_locations_of_half_precision(dtype, kernel_device):
    check_kernels(KINKS, dtype, dtype, kernel_device)


def backward(inputs: Inputs, upstream: Tensor, device: torch.device, deterministic: bool) -> tuple[Tensor, ...]:
    on_device = inputs.map(lambda part: part.to(device))
    return deformable_attention_backward_triton(upstream.to(device), *on_device, deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_gradient_of_value_does_not_depend_on_the_order_of_its_terms(dtype, kernel_device):
    case = Case(((3, 2), (2, 2)), 1, 41, 1, 16, 2)
    inputs, upstream = case.inputs(dtype, torch.float32), case.upstream(dtype)
    order = torch.randperm(case.queries, generator=torch.Generator().manual_seed(0))
    shuffled = inputs._replace(locations=inputs.locations[:, order], weights=inputs.weights[:, order])
    expected = backward(inputs, upstream, kernel_device, True)
    again = backward(inputs, upstream, kernel_device, True)
    assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))
    other_order = backward(shuffled, upstream[:, order], kernel_device, True)
    assert torch.equal(other_order[0], expected[0])
    assert torch.equal(other_order[1], expected[1][:, order]) and torch.equal(other_order[2], expected[2][:, order])
    if dtype == torch.float32:
        # what this test would say of sums that do depend on it
        fast = [
            backward(x, g, kernel_device, False)[0] for x, g in ((inputs, upstream), (shuffled, upstream[:, order]))
        ]
        assert not torch.equal(*fast)


def test_fixed_point_takes_any_magnitude_and_full_sums(kernel_device):
    inputs, upstream = SMALL.inputs(torch.float32, torch.float32), SMALL.upstream(torch.float32)
    expected = backward(inputs, upstream, kernel_device, True)[0]
    for power in (2.0**-60, 2.0**90):  # exact in fp32: the same bits but for the exponent
        assert torch.equal(backward(inputs, upstream * power, kernel_device, True)[0], expected * power)
    assert backward(inputs, upstream * 0, kernel_device, True)[0].abs().max() == 0

    # every term falls on one cell with its full weight: the sum is as large as its bound
    place, weights = torch.full((1, 16, 1, 1, 8, 2), 0.5), torch.ones(1, 16, 1, 1, 8)
    one_cell = Inputs(torch.ones(1, 1, 1, 16), ((1, 1),), place, weights)
    for sign in (1.0, -1.0):
        grad = backward(one_cell, torch.full((1, 16, 16), sign * 1.9375), kernel_device, True)[0]
        assert torch.equal(grad.cpu(), torch.full((1, 1, 1, 16), sign * 1.9375 * 128))


def test_fixed_point_keeps_the_precision_of_small_gradients(kernel_device):
    # one query on each of two cells, the second with a gradient 2^-35 times the first
    place = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).view(1, 2, 1, 1, 1, 2)
    two_cells = Inputs(torch.ones(1, 2, 1, 16), ((1, 2),), place, torch.ones(1, 2, 1, 1, 1))
    upstream = torch.rand(1, 2, 16, generator=torch.Generator().manual_seed(0)) + 1
    upstream[:, 1] *= 2.0**-35
    grad = backward(two_cells, upstream, kernel_device, True)[0].cpu().squeeze(2)
    assert ((grad - upstream) / upstream).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("images", [1, 2])
def test_images_take_turns_when_the_fixed_point_sums_do_not_fit(images, kernel_device, monkeypatch):
    case = SMALL._replace(batch=3)
    inputs, upstream = case.inputs(torch.bfloat16, torch.float32), case.upstream(torch.bfloat16)
    together = backward(inputs, upstream, kernel_device, True)
    monkeypatch.setattr(KERNELS, "FIXED_POINT_BYTES", images * 8 * inputs.value[0].numel())
    apart = backward(inputs, upstream, kernel_device, True)
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word for what is tested
def test_a_gradient_that_is_not_finite_shows(kernel_device):
    inputs, upstream = SMALL.inputs(torch.float32, torch.float32), SMALL.upstream(torch.float32)
    clean = backward(inputs, upstream, kernel_device, True)[0]
    for bad in (torch.nan, torch.inf):
        upstream[1, 3, SMALL.channels + 2] = bad  # image 1, head 1
        grad = backward(inputs, upstream, kernel_device, True)[0]
        assert grad[1, :, 1].isnan().all()
        assert torch.equal(grad[0], clean[0]) and torch.equal(grad[1, :, 0], clean[1, :, 0])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_samples_without_a_finite_location_count_zero(kernel_device):
    outside, upstream = SMALL.inputs(torch.float32, torch.float32), SMALL.upstream(torch.float32)
    outside.locations[:, ::3, :, :, 0, 0] = 50.0
    odd = outside._replace(locations=outside.locations.clone())
    for first, number in enumerate((torch.nan, torch.inf, -3e38)):
        odd.locations[:, 3 * first, :, :, 0, 0] = number
    expected = outside.call(deformable_attention_reference)
    assert torch.equal(odd.call(deformable_attention_reference), expected)
    assert torch.equal(
        odd.map(lambda part: part.to(kernel_device)).call(deformable_attention_forward_triton),
        outside.map(lambda part: part.to(kernel_device)).call(deformable_attention_forward_triton),
    )
    expected_grads = deformable_attention_backward_reference(upstream, *outside)
    grads = deformable_attention_backward_reference(upstream, *odd)
    assert all(torch.equal(grad, exact) for grad, exact in zip(grads, expected_grads, strict=True))
    for deterministic in (False, True):
        grads = backward(odd, upstream, kernel_device, deterministic)
        expected_grads = backward(outside, upstream, kernel_device, deterministic)
        assert all(torch.equal(grad, exact) for grad, exact in zip(grads[1:], expected_grads[1:], strict=True))
        if deterministic:
            assert torch.equal(grads[0], expected_grads[0])
        else:  # summed in the order of the GPU's atomics
            assert torch.allclose(grads[0], expected_grads[0], rtol=1e-5, atol=1e-6)


def permuted(part: Tensor) -> Tensor:
    """Return the same numbers with the second axis innermost in memory."""
    return part.movedim(1, -1).contiguous().movedim(-1, 1)


def test_permuted_inputs_give_the_same_bits(kernel_device):
    inputs = SMALL.inputs(torch.float32, torch.float32).map(lambda part: part.to(kernel_device))
    upstream = SMALL.upstream(torch.float32).to(kernel_device)
    strided = inputs.map(permuted)
    assert not any(part.is_contiguous() for part in strided.tensors())
    assert torch.equal(
        strided.call(deformable_attention_forward_triton), inputs.call(deformable_attention_forward_triton)
    )
    grads = deformable_attention_backward_triton(permuted(upstream), *strided, True)
    expected = deformable_attention_backward_triton(upstream, *inputs, True)
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact) and grad.is_contiguous()


@pytest.mark.parametrize("change", [torch.clone, permuted], ids=["compact", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(change, dtype):
    inputs, upstream = SMALL.inputs(dtype, torch.float32).map(change), change(SMALL.upstream(dtype))
    sizes = [size for shape in inputs.shapes for size in shape]
    value, locations, weights = inputs.tensors()
    for of_value in (True, False):
        arguments = (upstream, value, sizes, locations, weights, True, of_value)
        torch.library.opcheck(torch.ops.samdetr.deformable_attention_backward.default, arguments)
    leaves = value.requires_grad_(), sizes, locations.requires_grad_(), weights.requires_grad_(), False
    torch.library.opcheck(torch.ops.samdetr.deformable_attention.default, leaves)


def test_compiles_into_one_graph_with_dynamic_batch_and_map_size():
    compiled_graphs = 0

    def backend(graph, examples):
        nonlocal compiled_graphs
        compiled_graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, examples)

    def model(fine: Tensor, coarse: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        maps = (fine, coarse)
        value = torch.cat([part.flatten(1, 2) for part in maps], dim=1)
        shapes = [(part.shape[1], part.shape[2]) for part in maps]
        return deformable_attention(value, shapes, locations.sigmoid(), weights.softmax(-1)).square()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    # sizes of the first call differ from each other: torch would take equal ones for the same symbol
    for batch, queries, height, width in ((5, 7, 12, 16), (3, 8, 10, 4), (2, 7, 4, 6)):
        inputs = [
            torch.randn(batch, height, width, 3, 9, generator=generator),
            torch.randn(batch, height // 2, width // 2, 3, 9, generator=generator),
            torch.randn(batch, queries, 3, 2, 4, 2, generator=generator),
            torch.randn(batch, queries, 3, 2, 4, generator=generator),
        ]
        leaves = [part.requires_grad_() for part in inputs]
        expected = model(*leaves)
        out = compiled(*leaves)
        assert (out - expected).abs().max() < 1e-5
        upstream = torch.randn(expected.shape, generator=generator)
        pairs = zip(*(torch.autograd.grad(result, leaves, upstream) for result in (out, expected)), strict=True)
        assert all((grad - exact).abs().max() < 1e-4 for grad, exact in pairs)
    assert compiled_graphs == 1


def test_the_mode_follows_torch_unless_it_is_given(monkeypatch):
    inputs, seen = SMALL.inputs(), []
    monkeypatch.setattr(MODULE, "_deformable_attention", lambda *arguments: seen.append(arguments[-1]))
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted)
        for given in (None, True, False):
            inputs.call(deformable_attention, deterministic=given)
    assert seen == [True, True, False, False, True, False]


def test_bad_inputs_are_named():
    inputs = CASES["7x5"].inputs()

    def refuses(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            inputs._replace(**changes).call(deformable_attention)

    refuses(
        r"value must be \[B, S, M, D\] with D from 1 to 128, got \[1, 35, 1, 129\]", value=torch.ones(1, 35, 1, 129)
    )
    refuses(r"value must be \[B, S, M, D\]", value=inputs.value[0])
    refuses(r"spatial_shapes have 36 cells, value has 35", shapes=((9, 4),))
    refuses(r"spatial_shapes must have 1 to 8 levels, got 0", shapes=())
    refuses(r"spatial_shapes must have 1 to 8 levels, got 9", shapes=((1, 1),) * 9)
    refuses(r"spatial_shapes must be \(H, W\) from 1 to 32767, got \[\(-7, -5\)\]", shapes=((-7, -5),))
    refuses(r"spatial_shapes must be \(H, W\) from 1 to 32767", shapes=((35, 1, 1),))
    refuses(r"weights must be \[1, Q, 1, 2, P\], got \[1, 9, 1, 1, 4\]", shapes=((5, 5), (5, 2)))
    refuses(r"locations must be \[1, 9, 1, 1, 4, 2\], got \[1, 8, 1, 1, 4, 2\]", locations=inputs.locations[:, :8])
    refuses(
        r"fp16, bf16 or fp32 each, or all fp64, got \[torch.float64, torch.float32", locations=inputs.locations.float()
    )
    refuses(r"fp16, bf16 or fp32 each", weights=inputs.weights.long())
    for name in ("locations", "weights"):
        refuses(f"{name} must be on cpu, got .* on meta", **{name: getattr(inputs, name).to("meta")})


def test_a_gradient_of_value_that_nobody_wants_is_not_computed(kernel_device, monkeypatch):
    inputs, upstream = SMALL.inputs(torch.float32, torch.float32), SMALL.upstream(torch.float32)
    on_device = inputs.map(lambda part: part.to(kernel_device))
    expected = deformable_attention_backward_triton(upstream.to(kernel_device), *on_device)
    found = deformable_attention_backward_triton(upstream.to(kernel_device), *on_device, of_value=False)
    assert found[0].numel() == 0
    assert all(torch.equal(one, other) for one, other in zip(found[1:], expected[1:], strict=True))

    seen, op = [], MODULE._deformable_attention_backward
    monkeypatch.setattr(MODULE, "_deformable_attention_backward", lambda *given: seen.append(given[-1]) or op(*given))
    for wanted in (True, False):
        leaves = inputs.leaves()
        leaves.value.requires_grad_(wanted)
        leaves.call(deformable_attention).backward(upstream)
        assert (leaves.value.grad is not None) == wanted and leaves.weights.grad.abs().max() > 0
    assert seen == [True, False]


def test_no_heads(kernel_device):
    case = SMALL._replace(heads=0)
    inputs, upstream = case.inputs(torch.float32, torch.float32), case.upstream(torch.float32)
    for deterministic in (False, True):
        grads = backward(inputs, upstream, kernel_device, deterministic)
        assert [grad.shape for grad in grads] == [part.shape for part in inputs.tensors()]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_training_shape(dtype):
    case = Case(((50, 76), (25, 38), (13, 19), (7, 10)), 2, 1000, 8, 32, 4)
    check_kernels(case, dtype, torch.float32, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_op_agrees_with_the_forced_reference_and_repeats_its_bits(dtype):
    case = Case(((25, 38), (13, 19)), 2, 900, 8, 32, 4)
    inputs = case.inputs(dtype, torch.float32).map(Tensor.cuda)
    upstream = case.upstream(dtype).cuda()

    def run(deterministic: bool) -> list[Tensor]:
        leaves = inputs.leaves()
        out = leaves.call(deformable_attention, deterministic=deterministic)
        return [out, *torch.autograd.grad(out, leaves.tensors(), upstream)]

    force_reference(True)
    try:
        expected = run(True)
    finally:
        force_reference(False)
    first, second, fast = run(True), run(True), run(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    # the modes' backward kernels have tiles of their own, whose sums over channels differ in their order
    assert torch.equal(first[0], fast[0])
    for results in (first, fast):
        for part, exact in zip(results, expected, strict=True):
            tolerance = 4 * max(torch.finfo(dtype).eps, 1e-6) * exact.abs().max()
            assert (part - exact).abs().max() <= tolerance


@pytest.mark.gpu
def test_gpu_graph_capture():
    inputs = KINKS.inputs(torch.bfloat16, torch.float32).map(Tensor.cuda)
    leaves, upstream = inputs.leaves(), KINKS.upstream(torch.bfloat16).cuda()

    def step() -> list[Tensor]:
        out = leaves.call(deformable_attention, deterministic=True)
        return [out, *torch.autograd.grad(out, leaves.tensors(), upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves.value.mul_(-2)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))
