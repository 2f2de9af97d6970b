"""The cheapest one-to-one assignment of queries to targets, many problems at once, without leaving the device.

Replaces a loop over ``scipy.optimize.linear_sum_assignment`` on the host: of all ways to give each of a problem's
``n`` targets a query of its own (each query a target, where ``n > Q``), one with the least ``sum cost[query, target]``.

Algorithm: successive shortest augmenting paths (Jonker and Volgenant 1987, in the rectangular form of Crouse, "On
implementing 2D rectangular assignment algorithms", 2016, which scipy runs). The smaller side are the rows, the larger
side the columns. Rows join one by one: Dijkstra's search over the reduced costs ``cost[i, j] - u[i] - v[j] >= 0`` finds
the cheapest alternating path from the new row to a free column, the duals of the visited part move so that reduced
costs stay non-negative, and the path flips. Only ``v`` is stored: a matched pair has reduced cost 0, which gives ``u``.

Kernel: one program a problem. Whatever belongs to columns is a vector in registers, a step of the search is one row of
``cost``, one minimum and the first index that attains it (of a free column, if one does); no shared state, no atomics.
Dims: P problems, Q queries, T padded targets, n = n_targets[p], R = min(Q, n) rows, C = max(Q, n) columns, S steps of
the search: at least R, at most R (R + 1) / 2, with 300 queries and 7 to 93 targets R (spread) to 4 R (crowded).
Bytes: P Q T read and written once to lay queries side by side (not if they are), then S C read a problem, from the L1
or L2 cache; P T indices written. Operations: about 6 S C in float64 a problem, and a chain of 3 S reductions over C.
Dtypes: fp16, bf16, fp32, fp64; all arithmetic is in float64, as scipy's, so that total costs are equal.
Deterministic: the same bits in every run. Where several assignments cost the same, which one is returned may differ
between the kernel and the reference. Not differentiable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from samdetr_kernels.checks import DTYPES, check_devices, describe, is_integer
from samdetr_kernels.launch import Tile, launch, next_power_of_2, reference_forced

UNMATCHED = -1
MIN_COLUMNS, MAX_COLUMNS = 32, 4096  # of the kernel: one a thread; as many as 13 bits count and registers hold
# One warp needs no shared memory to reduce; at 16 columns a thread all vectors stay in registers (ahead-of-time report,
# not yet timed on a GPU).
COLUMNS_OF_WARP = 512
# One int32 holds a row (13 bits), a column (13 bits) and a flag.
_BITS, _MASK = tl.constexpr(13), tl.constexpr((1 << 13) - 1)
_FLAG, _NO_KEY = tl.constexpr(1 << 26), tl.constexpr(1 << 27)


def linear_assignment_reference(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Run scipy on the host, with the signature and result of `linear_assignment`: one transfer there, two back."""
    problems, _, targets = cost.shape
    on_host = cost.detach().cpu().double().numpy()
    counts = n_targets.cpu().long().clamp(0, targets).tolist()
    indices = torch.full((problems, targets), UNMATCHED, dtype=torch.int64)
    bad = torch.zeros(problems, dtype=torch.bool)
    for problem, count in enumerate(counts):
        try:
            query, target = linear_sum_assignment(on_host[problem, :, :count])
        except ValueError:  # scipy's word for NaN, -inf and infeasible
            bad[problem] = True
        else:
            indices[problem, torch.from_numpy(target)] = torch.from_numpy(query)
    return indices.to(cost.device), bad.to(cost.device)


# T changes with every batch: one compilation serves all, also within a graph capture
@triton.jit(do_not_specialize=["T"])
def _linear_assignment_kernel(  # type: ignore[no-untyped-def]
    cost,  # [P, T, Q] fp16, bf16, fp32 or fp64
    n_targets,  # [P] any integer dtype
    indices,  # [P, T] int64
    bad,  # [P] bool
    Q,
    T,
    BLOCK: tl.constexpr,
):
    """Solve a problem in each program; BLOCK >= max(Q, T)."""
    i_problem = tl.program_id(0).to(tl.int64)
    n = tl.load(n_targets + i_problem).to(tl.int64)
    n = tl.minimum(tl.maximum(n, 0), T).to(tl.int32)
    rows, columns = tl.minimum(n, Q), tl.maximum(n, Q)
    row_stride, column_stride = tl.where(n > Q, 1, Q), tl.where(n > Q, Q, 1)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < columns
    p_cost = cost + i_problem * Q * T

    b_dual = tl.zeros((BLOCK,), tl.float64)
    b_state = tl.zeros((BLOCK,), tl.int32)  # 1 + the row that has the column
    i_new, failed = 0, 0
    while (i_new < rows) & (failed == 0):
        b_path = tl.full((BLOCK,), float("inf"), tl.float64)  # length of the shortest path to each column
        b_state &= _MASK  # during a search also 1 + the column before it on that path, and a flag: path is final
        distance = tl.full((), 0.0, tl.float64)
        row, column, sink = i_new, tl.full((), -1, tl.int32), -1
        while (sink < 0) & (failed == 0):  # each step ends the search or makes one more path final
            o_cost = row * row_stride + o_column * column_stride
            b_cost = tl.load(p_cost + o_cost, mask=m_column, other=float("inf")).to(tl.float64)
            p_matched = p_cost + row * row_stride + column * column_stride
            matched = tl.load(p_matched, mask=column >= 0, other=0.0).to(tl.float64)
            start = distance - (matched - tl.sum(tl.where(o_column == column, b_dual, 0.0), axis=0))
            b_length = start + (b_cost - b_dual)
            # NaN becomes -inf, which ends the search: in the first step of a row all columns are open
            b_length = tl.where(b_length > float("-inf"), b_length, float("-inf"))
            b_closer = (b_length < b_path) & (b_state < _FLAG)  # rounding must not reopen a final path
            b_path = tl.where(b_closer, b_length, b_path)
            b_state = tl.where(b_closer, (b_state & _MASK) | ((column + 1) << _BITS), b_state)

            b_length = tl.where(b_state < _FLAG, b_path, float("inf"))
            distance = tl.min(b_length, axis=0)
            failed = tl.where(tl.abs(distance) < float("inf"), 0, 1)
            # the least key is a free column if there is one, then the first
            b_row = b_state & _MASK
            b_key = (o_column << _BITS) | tl.where(b_row == 0, 0, _FLAG | b_row)
            key = tl.min(tl.where(b_length == distance, b_key, _NO_KEY), axis=0)
            row, column = (key & _MASK) - 1, (key & (_FLAG - 1)) >> _BITS
            sink = tl.where(key < _FLAG, column, -1)
            b_state = tl.where(o_column == column, b_state | _FLAG, b_state)

        if failed == 0:
            b_dual = tl.where(b_state < _FLAG, b_dual, b_dual + (b_path - distance))
            state = tl.sum(tl.where(o_column == sink, b_state, 0), axis=0)
            while sink >= 0:  # a column's path was final before its successors' were: no cycle
                before = ((state & (_FLAG - 1)) >> _BITS) - 1
                state = tl.sum(tl.where(o_column == before, b_state, 0), axis=0)
                b_state = tl.where(o_column == sink, tl.where(before < 0, i_new + 1, state & _MASK), b_state)
                sink = before
        i_new += 1

    tl.store(bad + i_problem, failed != 0)
    b_row = tl.where(failed == 0, (b_state & _MASK) - 1, -1)
    p_out = indices + i_problem * T
    m_out = o_column < T
    if n > Q:
        tl.store(p_out + o_column, b_row.to(tl.int64), mask=m_out)
    else:
        b_none = tl.full((BLOCK,), -1, tl.int64)
        tl.store(p_out + o_column, b_none, mask=m_out & (o_column >= tl.where(failed == 0, n, 0)))
        tl.store(p_out + b_row, o_column.to(tl.int64), mask=b_row >= 0)


def _outputs(cost: Tensor) -> tuple[Tensor, Tensor]:
    problems, _, targets = cost.shape
    return cost.new_empty((problems, targets), dtype=torch.int64), cost.new_empty(problems, dtype=torch.bool)


def linear_assignment_triton(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the kernel, which the host does not wait for. Raises ValueError beyond MAX_COLUMNS."""
    problems, queries, targets = cost.shape
    if max(queries, targets) > MAX_COLUMNS:
        raise ValueError(
            f"linear_assignment: the kernel takes at most {MAX_COLUMNS} queries and targets, got {list(cost.shape)}"
        )
    indices, bad = _outputs(cost)
    block = next_power_of_2(max(queries, targets, MIN_COLUMNS))
    launch(
        _linear_assignment_kernel,
        (problems,),
        Tile({"BLOCK": block}, warps=max(block // COLUMNS_OF_WARP, 1), stages=1),
        # a step reads all queries of one target: side by side they are 32 times fewer cache lines
        (cost.mT.contiguous(), n_targets.contiguous(), indices, bad, queries, targets),
    )
    return indices, bad


@torch.library.custom_op("samdetr::linear_assignment", mutates_args=(), device_types="cuda")
def _linear_assignment(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    if reference_forced():
        return linear_assignment_reference(cost, n_targets)
    return linear_assignment_triton(cost, n_targets)


@_linear_assignment.register_kernel("cpu")
def _(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_assignment_reference(cost, n_targets)


@_linear_assignment.register_fake
def _(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(cost)


register_flop_formula(torch.ops.samdetr.linear_assignment)(lambda *_, **__: 0)  # a search: no product of matrices


def linear_assignment(cost: Tensor, n_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Find the query of each target in an assignment of least total cost, for every problem by itself.

    cost: [P, Q, T] floating, any strides ([P, T, Q] in memory saves the kernel a copy); +inf forbids a pair.
    n_targets: [P] integer, on the same device; columns at or beyond it may hold anything, NaN included. It is clamped
    to [0, T]. Returns indices [P, T] int64, -1 beyond ``n_targets`` and for the ``n_targets - Q`` targets that are
    left over when queries do not suffice; and bad [P] bool: the problem holds NaN or -inf, or its +inf entries
    leave no assignment of finite cost (sums beyond float64 may count so too), and all its indices are -1. Neither has
    a gradient; on a GPU nothing waits for it.
    Raises ValueError when shapes, dtypes or devices do not fit, and on a GPU when Q or T exceeds MAX_COLUMNS.
    """
    if cost.dim() != 3 or cost.dtype not in DTYPES:
        raise ValueError(f"linear_assignment: cost must be a floating [P, Q, T] tensor, got {describe(cost)}")
    if n_targets.shape != cost.shape[:1] or not is_integer(n_targets):
        raise ValueError(
            f"linear_assignment: n_targets must be an integer [{cost.shape[0]}] tensor, got {describe(n_targets)}"
        )
    check_devices("linear_assignment", cost, {"n_targets": n_targets})
    indices, bad = _linear_assignment(cost, n_targets)
    return indices, bad
