"""`salient_cross_attention`: reference against a plain composition, kernels against the reference, the generator."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from samdetr_kernels.attention_dropout import dropout_mask
from samdetr_kernels.launch import force_reference
from samdetr_kernels.salient_cross_attention import salient_cross_attention, salient_cross_attention_reference
from samdetr_kernels.salient_cross_attention_backward_kernels import salient_cross_attention_backward_triton
from samdetr_kernels.salient_cross_attention_kernels import (
    MAX_CELLS,
    map_cells,
    salient_cross_attention_forward_triton,
)

NAMES = ("query", "key", "value", "points", "scales")
OP = torch.ops.samdetr.salient_cross_attention.default
BACKWARD_OP = torch.ops.samdetr.salient_cross_attention_backward.default


class Case(NamedTuple):
    sizes: tuple[tuple[int, int], ...]  # valid (h, w) of each image
    height: int
    width: int
    queries: int
    heads: int
    channels: int
    head_width: int
    smca: bool
    dropout: float

    def inputs(self, dtype: torch.dtype = torch.float64, device: str | torch.device = "cpu") -> Inputs:
        generator = torch.Generator().manual_seed(sum(self[1:7]))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        batch, cells = len(self.sizes), self.height * self.width
        wide = torch.promote_types(dtype, torch.float32)
        points = scales = None
        if self.smca:
            size = torch.tensor([self.width, self.height])
            points = (normal(batch, self.queries, self.heads, 2) * 0.4 + 0.5) * size
            points = points.to(wide).to(device)
            scales = (normal(batch, self.queries, self.heads, 2) * 0.7).to(wide).to(device)
        return Inputs(
            # times 2: softmax rows that are neither flat nor one-hot
            (normal(batch, self.queries, self.heads, self.channels) * 2).to(dtype).to(device),
            normal(batch, cells, self.channels).to(dtype).to(device),
            normal(batch, cells, self.heads, self.head_width).to(dtype).to(device),
            torch.tensor(self.sizes, device=device),
            self.width,
            points,
            scales,
            self.channels**-0.5,
            self.dropout,
            torch.tensor([(7 << 32) + 11], device=device) if self.dropout else None,
        )


class Inputs(NamedTuple):
    """Return the op's arguments in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    valid_sizes: Tensor
    map_width: int
    points: Tensor | None
    scales: Tensor | None
    softmax_scale: float
    dropout: float
    seed: Tensor | None

    def leaves(self, dtype: torch.dtype | None = None) -> Inputs:
        """Copy the inputs, differentiable (in ``dtype``)."""
        return Inputs(
            *(
                part.detach().clone().to(dtype or part.dtype).requires_grad_()
                if isinstance(part, Tensor) and part.is_floating_point()
                else part
                for part in self
            )
        )

    def to(self, device: str) -> Inputs:
        return Inputs(*(part.to(device) if isinstance(part, Tensor) else part for part in self))

    def differentiable(self) -> list[Tensor]:
        return [part for part in self if isinstance(part, Tensor) and part.is_floating_point()]

    def call(self, function, **changes):
        keywords = {
            "points": self.points,
            "scales": self.scales,
            "softmax_scale": self.softmax_scale,
            "dropout": self.dropout,
            "seed": self.seed,
        }
        return function(self.query, self.key, self.value, self.valid_sizes, self.map_width, **(keywords | changes))

    def upstream(self) -> Tensor:
        batch, queries, heads, _ = self.query.shape
        shape = (batch, queries, heads * self.value.shape[3])
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return upstream.to(self.query.dtype).to(self.query.device)


CASES = [
    Case(((7, 5), (4, 3), (1, 1)), 7, 5, 5, 3, 32, 12, True, 0.25),
    Case(((7, 5), (6, 2)), 7, 5, 5, 3, 32, 12, False, 0.0),
    Case(((1, 1), (0, 1)), 1, 1, 1, 1, 96, 12, True, 0.0),
    Case(((9, 13), (5, 8)), 9, 13, 70, 3, 96, 12, True, 0.1),
    Case(((9, 10), (0, 13), (3, 0)), 9, 13, 5, 8, 96, 12, False, 0.5),
    Case(((9, 11),), 9, 13, 5, 1, 256, 32, True, 0.0),
    Case(((25, 31),), 25, 38, 5, 8, 256, 32, True, 0.1),
    Case(((25, 38),), 25, 38, 70, 1, 40, 20, True, 0.1),
]
SMALL = CASES[:5]


def attend(inputs: Inputs) -> Tensor:
    """Compute the definition, head by head, in the dtype of the inputs: explicit mask, prior, softmax, dropout."""
    cells = inputs.key.shape[1]
    images = []
    for image, (height, width) in enumerate(inputs.valid_sizes.tolist()):
        heads = []
        for head in range(inputs.query.shape[2]):
            scores = inputs.query[image, :, head] @ inputs.key[image].T * inputs.softmax_scale
            y = torch.arange(cells, device=scores.device) // inputs.map_width
            x = torch.arange(cells, device=scores.device) % inputs.map_width
            if inputs.points is not None:
                point, scale = inputs.points[image, :, head], inputs.scales[image, :, head]
                along_x = scale[:, :1] ** 2 * (point[:, :1] - x - 0.5) ** 2
                along_y = scale[:, 1:] ** 2 * (point[:, 1:] - y - 0.5) ** 2
                scores = scores - ((along_x + along_y) / 8).to(scores.dtype)
            inside = (y < height) & (x < width)
            if not inside.any():
                heads.append(scores.new_zeros(len(scores), inputs.value.shape[3]))
                continue
            weights = scores.masked_fill(~inside, -math.inf).softmax(-1)
            if inputs.dropout:
                keep = dropout_mask(inputs.seed, inputs.dropout, image, head + 1, len(scores), cells)[head]
                weights = weights * keep / (1 - inputs.dropout)
            heads.append(weights @ inputs.value[image, :, head])
        images.append(torch.cat(heads, dim=-1))
    return torch.stack(images)


def gradients(out: Tensor, inputs: Inputs) -> list[Tensor]:
    found = torch.autograd.grad(out, inputs.differentiable(), inputs.upstream(), allow_unused=True)
    return [
        torch.zeros_like(part) if grad is None else grad
        for grad, part in zip(found, inputs.differentiable(), strict=True)
    ]


def run_kernels(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    out, logsumexp, rest = salient_cross_attention_forward_triton(*inputs)
    grads = salient_cross_attention_backward_triton(inputs.upstream(), *inputs, out, logsumexp, rest)
    return out, logsumexp, grads if inputs.points is not None else grads[:3]


@pytest.mark.parametrize("case", CASES)
def test_reference_and_op_equal_the_definition_with_gradients(case):
    inputs = case.inputs().leaves()
    expected = attend(inputs)
    expected_grads = gradients(expected, inputs)
    for function in (salient_cross_attention_reference, salient_cross_attention):
        out = inputs.call(function)
        assert (out - expected).abs().max() < 1e-12
        for name, grad, expected_grad in zip(NAMES, gradients(out, inputs), expected_grads, strict=False):
            assert (grad - expected_grad).abs().max() < 1e-11, (function.__name__, name)


@pytest.mark.parametrize("smca", [True, False])
def test_gradcheck(smca):
    inputs = Case(((3, 2), (2, 3)), 3, 3, 2, 2, 5, 3, smca, 0.3).inputs().leaves()

    def attention(query, key, value, points=None, scales=None):
        changed = inputs._replace(query=query, key=key, value=value, points=points, scales=scales)
        return changed.call(salient_cross_attention)

    assert torch.autograd.gradcheck(attention, tuple(inputs.differentiable()))


def test_softmax_scale_defaults_to_the_root_of_the_width():
    inputs = CASES[0].inputs()
    default = inputs.call(salient_cross_attention, softmax_scale=None)
    assert torch.equal(default, inputs.call(salient_cross_attention, softmax_scale=32**-0.5))
    assert (default - inputs.call(salient_cross_attention, softmax_scale=0.5)).abs().max() > 0.1


def check_kernels(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Each result's error against float64 is at most twice that of the definition run eagerly in the same dtype."""
    inputs = case.inputs(dtype, device)
    exact = inputs.leaves(torch.float64)
    expected = attend(exact)
    exact_grads = torch.autograd.grad(expected, exact.differentiable(), inputs.upstream().double(), allow_unused=True)
    eager_inputs = inputs.leaves()
    eager = attend(eager_inputs)
    eager_grads = gradients(eager, eager_inputs)
    out, logsumexp, grads = run_kernels(inputs)
    assert out.dtype == dtype and logsumexp.dtype == torch.float32
    exact_logsumexp, eager_logsumexp = (
        torch.ops.samdetr.salient_cross_attention(*inputs.to("cpu").leaves(wide))[1].detach().to(device)
        for wide in (torch.float64, torch.float32)
    )
    assert torch.equal(logsumexp.isfinite(), exact_logsumexp.isfinite())
    finite = exact_logsumexp.isfinite()
    # fp32 sums over D products and a logarithm, relative to the size of the scores; where a score is the small
    # difference of a product and a prior, the definition in fp32 loses more as well
    unit = 8 * torch.finfo(torch.float32).eps * (1 + exact_logsumexp[finite].abs())
    lost, eager_lost = (
        ((found.double() - exact_logsumexp)[finite].abs() / unit).max() if finite.any() else torch.zeros(())
        for found in (logsumexp, eager_logsumexp)
    )
    assert lost <= max(1.0, 2 * eager_lost.item()), (lost, eager_lost)
    results = [("out", out, eager, expected)]
    for name, grad, eager_grad, exact_grad in zip(NAMES[: len(grads)], grads, eager_grads, exact_grads, strict=True):
        exact_grad = torch.zeros_like(grad, dtype=torch.float64) if exact_grad is None else exact_grad
        results.append((name, grad, eager_grad, exact_grad))
    for name, found, eager_found, right in results:
        assert found.dtype == eager_found.dtype and found.shape == right.shape, name
        error, lost = (found.double() - right).abs(), (eager_found.double() - right).abs()
        # beside twice eager's loss: one rounding of the result, and the rounding of the logsumexp, which moves all
        # weights of its row alike (eager subtracts a row's maximum instead, which is exact)
        rounding = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * (
            1 + exact_logsumexp[finite].abs().max()
        )
        rounding = rounding * right.abs().max() + torch.finfo(torch.float32).eps
        assert error.max() <= 2 * lost.max() + rounding, (name, error.max(), lost.max(), right.abs().max())
        assert error.square().mean().sqrt() <= 2 * lost.square().mean().sqrt() + rounding / 2, name


@pytest.mark.parametrize("case", CASES)
def test_kernels_lose_no_more_than_eager_float32(case, kernel_device):
    check_kernels(case, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SMALL + CASES[6:7])
def test_kernels_lose_no_more_than_eager_half(case, dtype, kernel_device):
    check_kernels(case, dtype, kernel_device)


def test_kernels_without_queries(kernel_device):
    inputs = CASES[0]._replace(queries=0).inputs(torch.float32, kernel_device)
    out, logsumexp, grads = run_kernels(inputs)
    assert out.shape == (3, 0, 36) and logsumexp.shape == (3, 3, 0) and grads[0].shape == (3, 0, 3, 32)
    assert not grads[1].any() and not grads[2].any()
    assert inputs.call(salient_cross_attention).shape == (3, 0, 36)
    leaves = inputs.leaves()
    assert not any(grad.any() for grad in gradients(leaves.call(salient_cross_attention), leaves))


@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
def test_padded_cells_are_never_read_and_get_zero_gradients(case, kernel_device):
    inputs = case.inputs(torch.float32, kernel_device)
    padding = torch.ones(len(case.sizes), case.height, case.width, dtype=torch.bool, device=kernel_device)
    for image, (height, width) in enumerate(case.sizes):
        padding[image, :height, :width] = False
    padding = padding.flatten(1)
    spoiled = inputs._replace(key=inputs.key.clone(), value=inputs.value.clone())
    spoiled.key[padding] = math.nan
    spoiled.value[padding] = math.nan
    clean_out, clean_logsumexp, clean_grads = run_kernels(inputs)
    out, logsumexp, grads = run_kernels(spoiled)
    assert torch.equal(out, clean_out) and torch.equal(logsumexp, clean_logsumexp)
    assert all(torch.equal(grad, clean) for grad, clean in zip(grads, clean_grads, strict=True))
    leaves = spoiled.leaves()
    reference = leaves.call(salient_cross_attention_reference)
    assert torch.equal(reference, inputs.call(salient_cross_attention_reference))
    for found in (grads, gradients(reference, leaves), gradients(leaves.call(salient_cross_attention), leaves)):
        assert all(grad.isfinite().all() for grad in found)
        assert found[1][~padding].any() and not found[1][padding].any() and not found[2][padding].any()
    empty = torch.tensor([0 in size for size in case.sizes], device=kernel_device)
    for result in (out, reference, *grads):
        assert not result[empty].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's word for what is tested
@pytest.mark.parametrize("part", ["query", "key", "points"])
def test_nan_shows_with_dropout_too(part, kernel_device):
    inputs = CASES[0].inputs(torch.float32, kernel_device)
    spoiled = getattr(inputs, part)
    row = (0, 2, 1) if part != "key" else (0, 7)
    spoiled[row] = math.nan
    found, expected = run_kernels(inputs), inputs.call(salient_cross_attention_reference)
    assert found[0].isnan().any() and torch.equal(found[0].isnan(), expected.isnan())
    leaves = inputs.leaves()
    grads = gradients(leaves.call(salient_cross_attention_reference), leaves)
    for name, grad, expected_grad in zip(NAMES, found[2], grads, strict=True):
        # where dropout drops, the kernel has 0 and the reference 0 * NaN
        assert grad.isnan().any() and not grad[~expected_grad.isnan()].isnan().any(), name


def test_valid_sizes_are_clamped(kernel_device):
    inputs = CASES[0].inputs(torch.float32, kernel_device)
    inputs = inputs._replace(valid_sizes=torch.tensor([[7, 5], [4, 0], [1, 1]], device=kernel_device))
    beyond = inputs._replace(valid_sizes=torch.tensor([[2**40, 60], [4, -3], [1, 1]], device=kernel_device))
    expected = run_kernels(inputs)
    for found in (run_kernels(beyond), run_kernels(inputs)):
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(one, other) for one, other in zip(found[2], expected[2], strict=True))
    assert torch.equal(beyond.call(salient_cross_attention), inputs.call(salient_cross_attention))


@pytest.mark.parametrize("case", [CASES[0], CASES[3]])
def test_kernels_repeat_by_bits(case, kernel_device):
    inputs = case.inputs(torch.float32, kernel_device)
    first, second = run_kernels(inputs), run_kernels(inputs)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2], strict=True))


def test_heads_are_split_by_a_rule_of_the_shape(launches):
    def splits(batch: int, cells: int, heads: int) -> int:
        query = torch.empty(batch, 300, heads, 256, dtype=torch.bfloat16, device="meta")
        key = torch.empty(batch, cells, 256, dtype=torch.bfloat16, device="meta")
        value = torch.empty(batch, cells, heads, 32, dtype=torch.bfloat16, device="meta")
        inputs = (query, key, value, torch.empty(batch, 2, dtype=torch.int64, device="meta"), 38, None, None, 1.0, 0.0)
        results = salient_cross_attention_forward_triton(*inputs, None)
        salient_cross_attention_backward_triton(torch.empty_like(results[0]), *inputs, None, *results)
        assert launches[-1].grid[1] * launches[-1].arguments[-1] == heads
        return launches[-1].grid[1]

    # 30 programs an image and split: as few splits as reach 128 programs
    assert [splits(batch, 950, 8) for batch in (1, 2, 4, 5, 16)] == [8, 4, 2, 1, 1]
    assert splits(4, 950, 3) == 3
    assert splits(1, 3800, 8) == 2


def test_dropout_is_what_the_kernel_drops(kernel_device):
    """Value e of cell e is one and the weights are equal, so the output shows the kernel's mask bit by bit."""
    queries, heads, width, dropout = 40, 3, 5, 0.3
    cells, seed = 5 * width, torch.tensor([-(5 << 33) + 3], device=kernel_device)
    query = torch.zeros(2, queries, heads, 16, device=kernel_device)
    key = torch.zeros(2, cells, 16, device=kernel_device)
    value = torch.eye(cells, device=kernel_device)[None, :, None].repeat(2, 1, heads, 1)
    valid = torch.tensor([[5, 5], [5, 5]], device=kernel_device)
    out, _, _ = salient_cross_attention_forward_triton(query, key, value, valid, width, None, None, 1.0, dropout, seed)
    kept = out.view(2, queries, heads, cells).transpose(1, 2) > 0
    for image in range(2):
        assert torch.equal(kept[image], dropout_mask(seed, dropout, image, heads, queries, cells))
    assert (out[out > 0] - 1 / (cells * (1 - dropout))).abs().max() < 1e-6


def test_dropout_mask_is_a_function_of_its_place():
    seed = torch.tensor([5])
    mask = dropout_mask(seed, 0.4, 1, 4, 30, 60)
    assert torch.equal(mask[:2, :20, :50], dropout_mask(seed, 0.4, 1, 2, 20, 50))
    assert torch.equal(mask, dropout_mask(seed[0], 0.4, 1, 4, 30, 60))
    more = dropout_mask(seed, 0.7, 1, 4, 30, 60)
    assert not (more & ~mask).any()  # what a larger share keeps, a smaller one keeps
    for other in (dropout_mask(seed + 1, 0.4, 1, 4, 30, 60), dropout_mask(seed, 0.4, 2, 4, 30, 60)):
        assert 0.45 < (other == mask).double().mean() < 0.59  # 0.4^2 + 0.6^2 = 0.52
    assert dropout_mask(seed, 0.0, 0, 4, 30, 60).all()


def test_dropout_generator_is_uniform_and_uncorrelated():
    seeds = [torch.tensor([seed]) for seed in (0, 1, 2, 1 << 32, -1)]
    masks = torch.stack([dropout_mask(seed, 0.1, image, 8, 300, 950) for seed in seeds for image in (0, 1)]).double()
    count = masks[0].numel()
    deviation = (masks.mean((1, 2, 3)) - 0.9) * math.sqrt(count / 0.09)
    assert deviation.abs().max() < 4
    # rows, columns and heads as wholes: variances of their means are those of independent draws
    for axes in ((3,), (2,), (2, 3)):
        means = masks.mean(axes)
        expected = 0.09 / (count / masks[0].mean(tuple(axis - 1 for axis in axes)).numel())
        spread = math.sqrt(2 / means.numel())
        assert abs(means.var() / expected - 1) < 4 * spread
    normal = (masks - 0.9) / 0.3
    limit = 4.5 / math.sqrt(count)
    for shift in (1, 2, 38, 64):
        assert (normal[..., shift:] * normal[..., :-shift]).mean((1, 2, 3)).abs().max() < limit * 1.1
        assert (normal[:, :, shift:] * normal[:, :, :-shift]).mean((1, 2, 3)).abs().max() < limit * 1.2
    assert (normal[:, 1:] * normal[:, :-1]).mean((1, 2, 3)).abs().max() < limit * 1.1
    pairs = torch.einsum("ahns,bhns->ab", normal, normal) / count
    assert (pairs - torch.eye(len(masks))).abs().max() < limit  # seeds and images


def test_dropout_generator_bytes_are_uniform():
    """Count how often the hash's top byte takes each value, found through the thresholds."""
    seed, shape = torch.tensor([12345]), (1, 300, 950)
    above = [dropout_mask(seed, byte / 256, 0, *shape).sum() for byte in range(256)]
    frequencies = -torch.stack([*above, torch.tensor(0)]).diff()
    expected = math.prod(shape) / 256
    chi_square = ((frequencies - expected).square() / expected).sum()
    assert abs(chi_square - 255) < 4 * math.sqrt(2 * 255)


@triton.jit
def _cells_kernel(p_out, width, map_width, count, BLOCK: tl.constexpr):
    o_j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_s, b_x, b_y = map_cells(o_j, width, map_width)
    tl.store(p_out + o_j, o_s, mask=o_j < count)
    tl.store(p_out + count + o_j, (b_x - 0.5).to(tl.int32), mask=o_j < count)
    tl.store(p_out + 2 * count + o_j, (b_y - 0.5).to(tl.int32), mask=o_j < count)


@pytest.mark.parametrize("width", [1, 3, 38, 41, 47, 49, 61, 76, 333, 1000, 1024, 1 << 19, MAX_CELLS])
def test_cells_are_found_without_division(width, kernel_device):
    count = MAX_CELLS // width * width
    out = torch.empty(3, count, dtype=torch.int32, device=kernel_device)
    block = 1 << 18 if kernel_device.type == "cpu" else 1024  # the interpreter's time goes by programs
    _cells_kernel[(triton.cdiv(count, block),)](out, width, width + 2, count, BLOCK=block)
    cell = torch.arange(count, device=kernel_device)
    x, y = cell % width, cell // width
    assert torch.equal(out.long(), torch.stack((y * (width + 2) + x, x, y)))


@pytest.mark.parametrize(
    ("case", "dtype", "compact"),
    [
        (CASES[0], torch.float32, True),
        (CASES[0], torch.float32, False),
        (CASES[0], torch.bfloat16, False),
        (CASES[1], torch.float32, False),
    ],
)
def test_opcheck_compact_and_permuted(case, dtype, compact):
    inputs = case.inputs(dtype)
    inputs = inputs if compact else permuted(inputs)
    assert inputs.value.is_contiguous() == compact
    torch.library.opcheck(BACKWARD_OP, (inputs.upstream(), *inputs, *OP(*inputs)))
    trained = [
        part.detach().requires_grad_() if isinstance(part, Tensor) and part.is_floating_point() else part
        for part in inputs
    ]
    torch.library.opcheck(OP, tuple(trained))


def permuted(inputs: Inputs) -> Inputs:
    """Return the same numbers in other strides."""
    return inputs._replace(
        query=inputs.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=inputs.key.transpose(1, 2).contiguous().transpose(1, 2),
        value=inputs.value.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        points=None if inputs.points is None else inputs.points.transpose(0, 3).contiguous().transpose(0, 3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_launchers_take_permuted_inputs_and_allocate_as_the_fakes_say(dtype, kernel_device):
    inputs = CASES[0].inputs(dtype, kernel_device)
    meta = Inputs(*(part.to("meta") if isinstance(part, Tensor) else part for part in permuted(inputs)))
    fakes = OP(*meta)
    fakes = [*fakes, *BACKWARD_OP(meta.upstream(), *meta, *fakes)]
    found, expected = (
        [*results, *salient_cross_attention_backward_triton(inputs.upstream(), *candidate, *results)]
        for candidate in (permuted(inputs), inputs)
        for results in [salient_cross_attention_forward_triton(*candidate)]
    )
    for one, other, fake in zip(found, expected, fakes, strict=True):
        assert torch.equal(one, other)
        assert one.shape == fake.shape and one.dtype == fake.dtype and one.stride() == fake.stride()


def test_compiles_whole_with_dynamic_sizes():
    compiled = torch.compile(salient_cross_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for case in (CASES[0], CASES[3], CASES[0]._replace(sizes=((5, 4), (2, 6)), height=5, width=6)):
        inputs = case.inputs(torch.float32).leaves()
        out, expected = inputs.call(compiled), inputs.call(salient_cross_attention)
        assert torch.equal(out, expected)
        for grad, expected_grad in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert torch.equal(grad, expected_grad)


def test_bad_inputs_are_named():
    inputs = CASES[0].inputs(torch.float32)

    def refuses(match: str, **changes: object) -> None:
        with pytest.raises(ValueError, match="salient_cross_attention: " + match):
            inputs._replace(**changes).call(salient_cross_attention)

    refuses(r"query must be a floating \[B, N, M, D\]", query=inputs.query[0])
    refuses(r"query must be a floating .* D <= 512", query=torch.zeros(3, 5, 3, 513))
    refuses(r"key must be a torch.float32 \[3, S, 32\], got torch.float16", key=inputs.key.half())
    refuses(r"value must be a torch.float32 \[3, 35, 3, E\]", value=inputs.value[:, :-1])
    refuses(r"value's width must be 1 to 64, got 65", value=torch.zeros(3, 35, 3, 65))
    refuses(r"S must be a multiple of map_width .* got S = 35, map_width = 6", map_width=6)
    refuses(r"valid_sizes must be an integer \[3, 2\]", valid_sizes=torch.ones(3, 2))
    refuses(r"points and scales must be given together", scales=None)
    refuses(r"points must be a floating \[3, 5, 3, 2\]", points=inputs.points[:, :4])
    refuses(r"scales must be a floating \[3, 5, 3, 2\]", scales=inputs.scales[..., :1])
    refuses(r"dropout must be at least 0 and less than 1, got 1.0", dropout=1.0)
    refuses(r"dropout needs a seed, an int64 tensor of one element, got None", seed=None)
    refuses(r"dropout needs a seed", seed=torch.tensor([1.0]))
    for scale in (math.inf, math.nan):
        refuses("softmax_scale must be finite, got ", softmax_scale=scale)
    refuses(r"query must be a floating", query=inputs.query.to(torch.float8_e5m2))
    refuses(r"points must be a floating", points=inputs.points.long())
    for dtype in (torch.bool, torch.complex64):
        refuses(r"valid_sizes must be an integer \[3, 2\]", valid_sizes=inputs.valid_sizes.to(dtype))


@pytest.mark.parametrize("name", ["key", "value", "valid_sizes", "points", "scales", "seed"])
def test_a_tensor_on_another_device_is_named(name):
    inputs = CASES[0].inputs(torch.float32)
    inputs = inputs._replace(**{name: getattr(inputs, name).to("meta")})
    with pytest.raises(ValueError, match=f"salient_cross_attention: {name} must be on cpu, got .* on meta"):
        inputs.call(salient_cross_attention)


def test_what_rounding_took_is_kept_for_the_gradient_of_points_only(kernel_device):
    for case in (CASES[0], CASES[1]):
        inputs = case.inputs(torch.bfloat16, kernel_device)
        for results in (salient_cross_attention_forward_triton(*inputs), OP(*inputs)):
            assert results[2].shape == (results[0].shape if case.smca else (0,))


def test_no_images():
    inputs = CASES[0].inputs(torch.bfloat16)
    parts = [part[:0] if isinstance(part, Tensor) and part is not inputs.seed else part for part in inputs]
    inputs = Inputs(*parts).leaves()
    out = inputs.call(salient_cross_attention)
    assert out.shape == (0, 5, 36) and inputs.call(salient_cross_attention_reference).shape == out.shape
    assert [grad.shape for grad in gradients(out, inputs)] == [part.shape for part in inputs.differentiable()]
    assert [part.shape for part in run_kernels(inputs)[2]] == [part.shape for part in inputs.differentiable()]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("smca", "dropout"), [(True, 0.1), (False, 0.0)])
def test_gpu_training_shape(dtype, smca, dropout):
    case = Case(((25, 38), (19, 30)), 25, 38, 300, 8, 256, 32, smca, dropout)
    check_kernels(case, dtype, torch.device("cuda"))
    inputs = case.inputs(dtype, "cuda")
    first, second = run_kernels(inputs), run_kernels(inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, other) for one, other in zip(first[2], second[2], strict=True))


@pytest.mark.gpu
def test_gpu_reference_can_be_forced():
    inputs = CASES[3].inputs(torch.float32, "cuda")
    kernel = inputs.call(salient_cross_attention)
    force_reference(True)
    try:
        forced = inputs.call(salient_cross_attention)
    finally:
        force_reference(False)
    assert torch.equal(forced, inputs.call(salient_cross_attention_reference))
    assert (forced - kernel).abs().max() < 1e-5


@pytest.mark.gpu
def test_gpu_tf32():
    inputs = CASES[6].inputs(torch.float32, "cuda")._replace(dropout=0.0, seed=None)
    exact = inputs.leaves(torch.float64).call(salient_cross_attention)
    torch.set_float32_matmul_precision("high")
    try:
        rough = inputs.call(salient_cross_attention)
    finally:
        torch.set_float32_matmul_precision("highest")
    fine = inputs.call(salient_cross_attention)
    errors = [(found.double() - exact).abs().max() for found in (rough, fine)]
    # scores of about 10 move by 2^-10 of themselves, and so do the weights that they are exponents of
    assert errors[1] < 1e-5 < errors[0] < 0.05 * exact.abs().max()


@pytest.mark.gpu
def test_gpu_graph_capture_and_new_seed():
    inputs = CASES[3].inputs(torch.bfloat16, "cuda").leaves()

    def step() -> list[Tensor]:
        out = inputs.call(salient_cross_attention)
        return [out, *gradients(out, inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    upstream = inputs.upstream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = inputs.call(salient_cross_attention)
        grads = torch.autograd.grad(out, inputs.differentiable(), upstream)
    for number in (1, 2):
        inputs.seed.fill_(number)
        with torch.no_grad():
            inputs.points.add_(number)
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip((out, *grads), step(), strict=True))
