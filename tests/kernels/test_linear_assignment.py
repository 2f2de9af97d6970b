"""Assignments against scipy called on each problem by itself: the op on the CPU, and the kernel."""

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from samdetr_kernels.linear_assignment import (
    MAX_COLUMNS,
    linear_assignment,
    linear_assignment_reference,
    linear_assignment_triton,
)

INF, NAN = float("inf"), float("nan")
# of random_problems; continuous costs have one optimum, others may have several
KINDS = ("continuous", "ties", "equal", "forbidden", "mostly forbidden", "nan", "-inf", "large")
UNIQUE = {"continuous", "large"}


def random_problems(problems: int, queries: int, targets: int, seed: int) -> tuple[Tensor, Tensor]:
    """Problem p is of kind p modulo len(KINDS); counts run over 0..T; padding columns hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randn(problems, queries, targets, generator=generator)
    chance = torch.rand(cost.shape, generator=generator)
    counts = torch.randint(0, targets + 1, (problems,), generator=generator)
    for problem in range(problems):
        kind, count, own = KINDS[problem % len(KINDS)], int(counts[problem]), cost[problem]
        if kind in ("ties", "forbidden", "mostly forbidden"):
            own.copy_((own * 2).round())
        elif kind == "equal":
            own.fill_(0.5)
        elif kind == "large":
            own.mul_(1e30)
        if kind == "forbidden":
            own[chance[problem] < 0.2] = INF
        elif kind == "mostly forbidden":
            own[chance[problem] < 0.7] = INF
        elif kind in ("nan", "-inf") and count and queries:
            flat = int(chance[problem].flatten()[0] * queries * count)
            own[flat // count, flat % count] = float(kind)
        own[:, count:] = NAN
    return cost, counts


def assert_optimal(cost: Tensor, counts: Tensor, indices: Tensor, bad: Tensor, unique: set[str] = UNIQUE) -> int:
    """Compare every problem with scipy; returns how many problems were bad."""
    assert indices.dtype == torch.int64 and indices.shape == (cost.shape[0], cost.shape[2])
    assert bad.dtype == torch.bool and bad.shape == (cost.shape[0],)
    on_host, found, flags = cost.double().cpu().numpy(), indices.cpu().numpy(), bad.tolist()
    for problem, count in enumerate(counts.clamp(0, cost.shape[2]).tolist()):
        valid, own = on_host[problem, :, :count], found[problem]
        assert (own[count:] == -1).all(), problem
        try:
            query, target = linear_sum_assignment(valid)
        except ValueError:
            assert flags[problem] and (own == -1).all(), problem
            continue
        assert not flags[problem], problem
        matched = (own >= 0).nonzero()[0]
        assert len(matched) == min(valid.shape) == len(set(own[matched])), problem
        expected = valid[query, target].sum()
        assert abs(valid[own[matched], matched].sum() - expected) <= 1e-9 * abs(expected) + 1e-12, problem
        if KINDS[problem % len(KINDS)] in unique:
            assert dict(zip(target, query, strict=True)) == dict(zip(matched, own[matched], strict=True)), problem
    return sum(flags)


def test_op_equals_scipy_on_ten_thousand_problems():
    shapes = list(itertools.product((1, 2, 5, 9, 16), (1, 2, 6, 11, 20)))
    bad = 0
    for seed, (queries, targets) in enumerate(shapes):
        cost, counts = random_problems(400, queries, targets, seed)
        bad += assert_optimal(cost, counts, *linear_assignment(cost, counts))
    # a quarter of the problems hold NaN or -inf unless n is 0, a fifth of the mostly forbidden ones are infeasible
    assert 400 * len(shapes) == 10_000 and 2_000 < bad < 2_500


# rows are targets, then queries; one of each; blocks that are full and not
KERNEL_SHAPES = [(1, 1), (1, 5), (6, 1), (4, 4), (3, 7), (8, 5), (5, 16), (24, 16), (32, 3), (2, 33)]


@pytest.mark.parametrize("shape", KERNEL_SHAPES)
def test_kernel_equals_scipy(shape, kernel_device):
    cost, counts = random_problems(64, *shape, seed=sum(shape))
    indices, bad = linear_assignment_triton(cost.to(kernel_device), counts.to(kernel_device))
    found = assert_optimal(cost, counts, indices, bad)
    assert 0 < found < 64


def test_kernel_equals_scipy_on_square_problems(kernel_device):
    # every query is needed, so paths are long: without its duals the kernel fails on a quarter of these; and float64
    # costs, unlike float32 ones, make its sums round
    cost = torch.randn(24, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.full((24,), 20)
    indices, bad = linear_assignment_triton(cost.to(kernel_device), counts.to(kernel_device))
    assert assert_optimal(cost, counts, indices, bad, unique=set(KINDS)) == 0


def test_kernel_equals_scipy_at_the_size_of_training(kernel_device):
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(4, 1, 4, 2, generator=generator).repeat_interleave(5, dim=2)
    targets = centres + 0.03 * torch.randn(4, 1, 20, 2, generator=generator)  # crowds of five, with too few queries
    queries = torch.rand(4, 300, 1, 2, generator=generator) * 8
    queries[:, ::20] = targets.transpose(1, 2)[:, :15] + 0.03 * torch.randn(4, 15, 1, 2, generator=generator)
    cost, counts = (queries - targets).abs().sum(-1), torch.tensor([20, 20, 13, 1])
    indices, bad = linear_assignment_triton(cost.to(kernel_device), counts.to(kernel_device))
    assert assert_optimal(cost, counts, indices, bad, unique=set(KINDS)) == 0


@pytest.mark.parametrize("run", [linear_assignment, linear_assignment_triton])
def test_strides_and_dtypes(run, kernel_device):
    device = kernel_device if run is linear_assignment_triton else torch.device("cpu")
    cost, counts = random_problems(8, 7, 6, seed=3)
    expected = linear_assignment_reference(cost, counts)
    wide = torch.full((6, 14, 16), NAN)
    wide[:, ::2, ::2] = cost.permute(2, 1, 0)
    strided_counts = torch.stack((counts, counts + 1), dim=1)[:, 0]
    for view in (wide[:, ::2, ::2].permute(2, 1, 0), cost.mT.contiguous().mT):
        assert not view.is_contiguous()
        indices, bad = run(view.to(device), strided_counts.to(device))
        assert_optimal(cost, counts, indices, bad)
        assert torch.equal(bad.cpu(), expected[1])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounded = cost.to(dtype)
        for integer in (torch.int32, torch.uint8):
            indices, bad = run(rounded.to(device), counts.to(device, integer))
            assert_optimal(rounded, counts, indices, bad, unique=set())


@pytest.mark.parametrize("run", [linear_assignment, linear_assignment_triton])
def test_float64_costs_keep_their_precision(run, kernel_device):
    device = kernel_device if run is linear_assignment_triton else torch.device("cpu")
    cost = torch.tensor([[[1.0, 1.0], [1.0, 1.0 + 2**-50]]], dtype=torch.float64, device=device)
    counts = torch.tensor([2], device=device)
    assert run(cost, counts)[0].tolist() == [[1, 0]]
    assert run(-cost, counts)[0].tolist() == [[0, 1]]
    # a float64 cost beyond float32 is a cost like others
    indices, bad = run(cost * -1e200, counts)
    assert indices.tolist() == [[0, 1]] and bad.tolist() == [False]


def test_kernel_prefers_the_first_of_equal_queries_and_repeats_its_bits(kernel_device):
    cost, counts = torch.zeros(2, 5, 7, device=kernel_device), torch.tensor([4, 7], device=kernel_device)
    indices, bad = linear_assignment_triton(cost, counts)
    assert indices.tolist() == [[0, 1, 2, 3, -1, -1, -1], [0, 1, 2, 3, 4, -1, -1]]
    assert not bad.any()
    cost, counts = (part.to(kernel_device) for part in random_problems(16, 6, 8, seed=5))
    for first, second in zip(*(linear_assignment_triton(cost, counts) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_counts_out_of_range_are_clamped(kernel_device):
    counts = torch.tensor([-(2**40), -1, 0, 4, 5, 2**40])
    cost = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(0))
    for indices, bad in (
        linear_assignment(cost, counts),
        linear_assignment_triton(cost.to(kernel_device), counts.to(kernel_device)),
    ):
        assert (indices[:3] == -1).all() and (indices[3:] >= 0).all()
        assert assert_optimal(cost, counts, indices, bad) == 0


def test_empty(kernel_device):
    for problems, queries, targets in ((0, 3, 2), (2, 0, 2), (2, 3, 0)):
        cost = torch.empty(problems, queries, targets)
        counts = torch.full((problems,), 2)
        for indices, bad in (
            linear_assignment(cost, counts),
            linear_assignment_triton(cost.to(kernel_device), counts.to(kernel_device)),
        ):
            assert indices.tolist() == [[-1] * targets] * problems
            assert bad.tolist() == [False] * problems


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy, as it overflows
def test_infinite_and_absurd_costs_end(kernel_device):
    greatest = torch.finfo(torch.float64).max
    cost = torch.tensor([INF, -INF, NAN, greatest, -greatest], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    cost = cost[torch.randint(0, 5, (16, 6, 6), generator=generator)]
    cost[12:] = torch.where(cost[12:].isfinite(), cost[12:], greatest)  # sums overflow, no entry is invalid
    cost[0] = INF
    indices, bad = linear_assignment_triton(cost.to(kernel_device), torch.full((16,), 6, device=kernel_device))
    assert bad[:12].all() and (indices[bad] == -1).all()
    # whatever overflow did to the total, queries are given once
    assert all(sorted(own) == list(range(6)) for own in indices[~bad].tolist())


def test_opcheck_compact_and_permuted():
    cost, counts = random_problems(8, 5, 4, seed=1)
    permuted = cost.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for candidate in (cost, permuted, cost.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.samdetr.linear_assignment.default, (candidate, counts))


def test_outputs_have_no_gradient():
    cost, counts = random_problems(8, 5, 4, seed=2)
    indices, bad = linear_assignment(cost.requires_grad_(), counts)
    assert not indices.requires_grad and not bad.requires_grad
    assert_optimal(cost.detach(), counts, indices, bad)


def test_compiles_to_one_graph_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_assignment, fullgraph=True, dynamic=True, backend=counter)
    for problems, targets in ((16, 3), (24, 9), (8, 5)):
        cost, counts = random_problems(problems, 6, targets, seed=targets)
        assert_optimal(cost, counts, *compiled(cost, counts))
    assert counter.frame_count == 1


def test_launcher_needs_no_values(launches):
    # what the launcher does with meta tensors cannot depend on a value, so that a CUDA graph can hold it
    cost, counts = torch.empty(96, 300, 100, device="meta"), torch.empty(96, dtype=torch.int64, device="meta")
    indices, bad = linear_assignment_triton(cost, counts)
    assert [launch.grid for launch in launches] == [(96,)]
    assert launches[0].tile.blocks == {"BLOCK": 512} and launches[0].tile.warps == 1
    assert (indices.shape, indices.dtype) == ((96, 100), torch.int64)
    assert (bad.shape, bad.dtype) == ((96,), torch.bool)


def test_bad_arguments_are_named():
    cost, counts = torch.zeros(2, 5, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"linear_assignment: cost must be a floating \[P, Q, T\] .*float32 \[5, 4\]"):
        linear_assignment(cost[0], counts)
    with pytest.raises(ValueError, match=r"cost must be a floating \[P, Q, T\] tensor, got torch.int64 \[2, 5, 4\]"):
        linear_assignment(cost.long(), counts)
    with pytest.raises(ValueError, match=r"n_targets must be an integer \[2\] tensor, got torch.int64 \[1\]"):
        linear_assignment(cost, counts[:1])
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=rf"n_targets must be an integer \[2\] tensor, got {dtype} \[2\]"):
            linear_assignment(cost, counts.to(dtype))
    with pytest.raises(ValueError, match=r"n_targets must be on cpu, got torch.int64"):
        linear_assignment(cost, counts.to("meta"))
    with pytest.raises(ValueError, match=r"at most 4096 queries and targets, got \[1, 1, 4097\]"):
        linear_assignment_triton(torch.empty(1, 1, MAX_COLUMNS + 1, device="meta"), counts[:1].to("meta"))


@pytest.mark.gpu
def test_kernel_on_the_gpu_at_the_size_of_training_and_in_a_cuda_graph():
    cost, counts = random_problems(2000, 300, 93, seed=0)
    on_gpu, counts_on_gpu = cost.cuda(), counts.cuda()
    indices, bad = linear_assignment(on_gpu, counts_on_gpu)
    assert 400 < assert_optimal(cost, counts, indices, bad) < 1000

    held = torch.zeros_like(on_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph_indices, graph_bad = linear_assignment(held, counts_on_gpu)
    held.copy_(on_gpu)
    graph.replay()
    assert torch.equal(graph_indices, indices) and torch.equal(graph_bad, bad)
