"""Cases and variants of an op, and the gate that every speed has to pass.

For each case every variant is compared with the float64 reference, results and gradients: its error may be `FACTOR`
times what the plain composition loses in the same dtype, and a rounding of the result.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perf.inputs import cast, to_fp32

Args = tuple[Any, ...]
Run = Callable[..., Any]  # arguments of the case -> a tensor or a tuple of tensors

FACTOR = 2.0  # times the eager loss


class Work(NamedTuple):
    """The least work of an op: bytes to and from memory, floating-point operations; ``vector``: not as products."""

    bytes: float
    operations: float
    vector: bool = False


def total(forward: Work, backward: Work) -> Work:
    """Add the work of both directions."""
    return Work(forward.bytes + backward.bytes, forward.operations + backward.operations, forward.vector)


class Variant(NamedTuple):
    """One way to compute the op."""

    name: str
    run: Run
    ours: bool = False  # its failure is an error; its memory is poisoned in the gate
    compile: bool = False  # run by torch.compile
    prepare: Callable[[Args], Args] | None = None  # of the arguments, outside the clock
    gate: Run | None = None  # what the gate runs instead, where ``run`` draws random numbers of its own
    tolerance: float | None = None  # for a baseline with roundings of its own: root mean square error of the result's


def published_variants(
    dtype: torch.dtype, run: Run, name: str = "published", gate: Run | None = None, tolerance: float | None = None
) -> list[Variant]:
    """Make variants of the published code in fp32, in which it was published, and in the case's dtype, as ours.

    tolerance: of the first, whose convolutions may be in TF32.
    """
    variants = [Variant(f"{name} (fp32)", run, prepare=to_fp32, gate=gate, tolerance=tolerance)]
    if dtype != torch.float32:
        own = str(dtype).removeprefix("torch.")
        variants.append(Variant(f"{name} ({own})", run, gate=gate))
    return variants


class Case(NamedTuple):
    """One op at one shape and dtype."""

    name: str
    dtype: torch.dtype
    make: Callable[[int], Args]  # seed -> arguments on the device
    variants: Sequence[Variant]
    reference: Run  # exact in float64
    eager: Run  # the published composition, whose loss in ``dtype`` is the unit of the error budget
    work: Mapping[str, Work]  # by direction
    wanted: tuple[int, ...] = ()  # positions of the arguments that get a gradient
    shared: tuple[int, ...] = ()  # positions of tensors without a batch dimension
    images: tuple[int, ...] = (0,)  # of the batch, compared in the gate
    compiled: bool = False  # run once more at the end, then with the variants marked so
    judge: Callable[[Args, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None  # results -> what is compared


def results(outputs: Any) -> tuple[Tensor, ...]:
    """Return a tensor or tuple of tensors as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def leaves(args: Args, wanted: Sequence[int]) -> Args:
    """Return the arguments with differentiable copies at the positions ``wanted``."""
    return tuple(arg.detach().clone().requires_grad_() if at in wanted else arg for at, arg in enumerate(args))


def differentiate(run: Run, args: Args, wanted: Sequence[int], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the results and their gradients by the arguments ``wanted``."""
    outs = results(run(*args))
    grads = torch.autograd.grad(outs, [args[at] for at in wanted], list(upstream))
    return (*(out.detach() for out in outs), *grads)


@contextmanager
def poisoned(enabled: bool) -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(enabled or before, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def reason(error: BaseException) -> str:
    """Write an error in one line, for a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split()) or "no message"
    return f"failed: {type(error).__name__}: {text[:300]}"


class _Comparison:
    """The exact results of a case's gate and the budgets that eager leaves; `worst` judges a variant."""

    def __init__(self, case: Case, args: Args) -> None:
        self.case, self.args = case, args
        part = tuple(
            arg[list(case.images)] if isinstance(arg, Tensor) and at not in case.shared else arg
            for at, arg in enumerate(args)
        )
        exact_args = leaves(cast(part, torch.float64), case.wanted)
        outs = results(case.reference(*exact_args))
        random = torch.Generator().manual_seed(7)
        self.upstream = [
            torch.randn(out.shape, generator=random).to(case.dtype).to(out.device) for out in outs if case.wanted
        ]
        exact: tuple[Tensor, ...] = tuple(out.detach() for out in outs)
        if case.wanted:
            wanted = [exact_args[at] for at in case.wanted]
            exact += torch.autograd.grad(outs, wanted, [grad.double() for grad in self.upstream])
        self.exact = case.judge(part, exact) if case.judge else exact
        self.losses = [
            self._errors(found, right)
            for found, right in zip(self.run(case.eager, args, True), self.exact, strict=True)
        ]

    def run(self, run: Run, args: Args, same_dtype: bool) -> tuple[Tensor, ...]:
        """Return results and gradients of the compared images, out of a run on the whole batch."""
        case, images = self.case, list(self.case.images)
        args = leaves(args, case.wanted)
        with torch.set_grad_enabled(bool(case.wanted)):
            outs = results(run(*args))
        found = [out.detach() for out in outs]
        if case.judge:
            return tuple(part[images] for part in case.judge(self.args, tuple(found)))
        if same_dtype and any(out.dtype != case.dtype for out in outs):
            raise TypeError(f"the result is {[out.dtype for out in outs]}, not {case.dtype}")
        found = [out[images] for out in found]
        if case.wanted:
            upstream = [torch.zeros_like(out) for out in outs]
            for whole, part in zip(upstream, self.upstream, strict=True):
                whole[images] = part.to(whole.dtype)
            grads = torch.autograd.grad(outs, [args[at] for at in case.wanted], upstream)
            found += [grad if at in case.shared else grad[images] for at, grad in zip(case.wanted, grads, strict=True)]
        return tuple(found)

    @staticmethod
    def _errors(found: Tensor, right: Tensor) -> tuple[float, float]:
        if found.shape != right.shape:
            raise ValueError(f"the result has shape {list(found.shape)}, not {list(right.shape)}")
        error = (found.double() - right.double()).abs()
        return error.max().item(), error.square().mean().sqrt().item()

    def worst(self, variant: Variant) -> float:
        """Return the largest error over its budget, of all results and gradients; NaN counts as infinite."""
        args = variant.prepare(self.args) if variant.prepare else self.args
        with poisoned(variant.ours):
            found = self.run(variant.gate or variant.run, args, variant.prepare is None)
        ratios = [0.0]
        for part, right, lost in zip(found, self.exact, self.losses, strict=True):
            errors, right = self._errors(part, right), right.double()
            if variant.tolerance is not None:
                ratios.append(errors[1] / (variant.tolerance * right.square().mean().sqrt().item() + 1e-30))
                continue
            # what a judge compares is summed in float64 from the same numbers: only its own rounding is allowed
            epsilon = torch.finfo(self.case.dtype).eps + 16 * torch.finfo(torch.float32).eps
            epsilon, least = (1e-9, 1e-12) if self.case.judge else (epsilon, 1e-30)
            rounding = epsilon * right.abs().max().item() + least
            ratios.append(errors[0] / (FACTOR * lost[0] + rounding))
            ratios.append(errors[1] / (FACTOR * lost[1] + rounding / 2))
        return max(ratio if math.isfinite(ratio) else math.inf for ratio in ratios)


def check(case: Case, args: Args) -> dict[str, float | str]:
    """Return for each variant its largest error over budget (green up to 1), or why it did not run."""
    comparison = _Comparison(case, args)
    found: dict[str, float | str] = {}
    for variant in case.variants:
        try:
            found[variant.name] = comparison.worst(variant)
        except Exception as error:
            found[variant.name] = reason(error)
    return found
