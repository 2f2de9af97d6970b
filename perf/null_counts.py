"""One training step of a recipe on the null GPU, counted: launches, waits, copies, memory, as a whole and by phase."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from perf import null_library
from perf.sides import Side, build_model_on, build_ours
from samdetr.engine.compute.precision import choose_compute, choose_device
from samdetr.recipe import Recipe
from samdetr.structures import Batch

WARM_UPS = 2  # the optimizer's state comes with the first step
TIMED_STEPS = 5
GIB = 2**30
BILINEAR_IN_ZEROS = (0, 0, True)  # what cuDNN samples: interpolation, padding, whether corners are centres of pixels


@dataclass
class Part:
    """Requests of a step, or of a phase, to the GPU, and the host's time to make them."""

    launches: int  # by the host: a CUDA graph is one
    kinds: dict[str, int]  # the launches by one of `null_library.KINDS`
    copies: dict[str, int]
    fills: int
    waits: dict[str, int]
    refused: list[str]  # what a driver would not have done
    nodes: int  # of CUDA graphs
    host_ms: float  # to ask for it, no time of a GPU

    @classmethod
    def since_reset(cls, seconds: float) -> Part:
        """Read the counters, and begin to count anew."""
        found, refused = null_library.counts(), null_library.refused()
        null_library.reset()
        return cls(
            launches=sum(found.launches.values()),
            kinds=found.launches,
            copies=found.copies,
            fills=found.fills,
            waits=found.waits,
            refused=refused,
            nodes=found.nodes,
            host_ms=round(seconds * 1e3, 2),
        )


@dataclass
class StepCounts(Part):
    """Requests of a recipe's step in one way. ``refused`` holds the start-up's too, ``host_ms`` is a median."""

    recipe: str
    way: str
    precision: str
    node_kinds: dict[str, int]  # of the CUDA graphs, as they were recorded
    state_gib: float  # parameters, buffers, the optimizer's state
    peak_gib: float  # the state and the most that a step allocates; with CUDA graphs all that torch holds
    start_up_seconds: float  # the step is compiled, recorded and checked
    phases: dict[str, Part]  # empty with CUDA graphs, which know none


@contextmanager
def grid_sample_without_cudnn() -> Iterator[None]:
    """Keep `grid_sample` from calling cuDNN, whose sampler the library does not answer, within the context.

    Torch's own kernel takes their place, with one launch instead of one call.
    """

    def forward(images: Tensor, grid: Tensor) -> Tensor:
        return torch.ops.aten.grid_sampler_2d(images, grid, *BILINEAR_IN_ZEROS)

    def backward(images: Tensor, grid: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.grid_sampler_2d_backward(upstream, images, grid, *BILINEAR_IN_ZEROS, [True, True])

    with torch.library._scoped_library("aten", "IMPL", "CUDA") as operators:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an operator that is registered twice, as it is meant to be
            operators.impl("cudnn_grid_sampler", forward, allow_override=True)
            operators.impl("cudnn_grid_sampler_backward", backward, allow_override=True)
        yield


@grid_sample_without_cudnn()
def count_step(recipe: Recipe, batch: Batch, way: str) -> StepCounts:
    """Build the recipe's step as training does, take it, and count the third.

    batch: on the host. way: what the row is called. Raises SamdetrError where the step cannot be compiled or recorded.
    """
    torch.compiler.reset()  # what was compiled of the recipe before
    device = choose_device("cuda", recipe.compute.kernels)
    compute = choose_compute(recipe.compute, device, buckets=True)
    model = build_model_on(recipe, device)
    null_library.reset()
    begin = time.monotonic()
    side = build_ours(recipe, model, [batch], device, compute=compute, note=lambda text: None)
    started = time.monotonic() - begin
    recorded = null_library.counts().captured
    free_memory()  # of the start-up's check, which computes in float32
    for _ in range(WARM_UPS):
        side.step(0)
    refused = null_library.refused()
    part, peak = count_one(side)
    return StepCounts(
        **vars(part) | {"refused": refused + part.refused, "host_ms": host_ms(side)},
        recipe=recipe.run.name,
        way=way,
        precision=str(compute.precision).removeprefix("torch."),
        node_kinds=recorded,
        state_gib=round(side.state_bytes() / GIB, 3),
        peak_gib=round(peak / GIB, 3),
        start_up_seconds=round(started, 1),
        phases={} if side.recorded else count_phases(side),
    )


def count_one(side: Side) -> tuple[Part, int]:
    """Count a step: its requests, and the most bytes at its time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    null_library.reset()
    begin = time.perf_counter()
    side.step(0)
    part = Part.since_reset(time.perf_counter() - begin)
    return part, torch.cuda.max_memory_reserved() if side.recorded else torch.cuda.max_memory_allocated()


def count_phases(side: Side) -> dict[str, Part]:
    """Count a step in parts, by the names of `perf.sides.PHASES`."""
    found: dict[str, Part] = {}
    null_library.reset()
    last = time.perf_counter()

    def mark(phase: str) -> None:
        nonlocal last
        found[phase] = Part.since_reset(time.perf_counter() - last)
        last = time.perf_counter()

    side.phases(0, mark)
    return found


def host_ms(side: Side) -> float:
    """Measure the median milliseconds in which the host starts a step."""
    times = []
    for _ in range(TIMED_STEPS):
        begin = time.perf_counter()
        side.step(0)
        times.append(time.perf_counter() - begin)
    return round(median(times) * 1e3, 2)


def free_memory() -> None:
    """Give back what is no longer used, so that nothing of it is in a peak."""
    gc.collect()
    torch.cuda.empty_cache()
