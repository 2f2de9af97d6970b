"""The start-up of a step: compile every bucket shape, record CUDA graphs, compare a step with eager float32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir

from samdetr.data.batching import Shape
from samdetr.data.device import to_device
from samdetr.engine.compute.activation_checkpoint import checkpoint_activations
from samdetr.engine.compute.compile import compile_parts, eagerly
from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.precision import EXACT, Compute
from samdetr.engine.distributed.parallel import full_tensor
from samdetr.engine.step import forward_backward, update
from samdetr.errors import SamdetrError
from samdetr.structures import Batch, Targets

if TYPE_CHECKING:
    from samdetr.engine.optim import NonFiniteGuard
    from samdetr.loss import Criterion
    from samdetr.models import Detector

# bf16 keeps 8 bits; the two results also differ by their dropout masks, some per cent at a small batch
MAX_LOSS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 0.1, 0.5

ForwardBackward = Callable[[Batch, Tensor], Tensor]  # a micro-batch, the number of boxes -> the values of the step


def arrange(model: Detector, criterion: Criterion, compute: Compute, *, num_shapes: int) -> None:
    """Change how the model computes, as ``compute`` says; activation checkpointing wraps what is compiled.

    num_shapes: how many padded shapes of batches to expect.
    """
    if compute.compile:
        compile_parts(model, criterion, shapes=num_shapes)
    if compute.activation_checkpoint:
        checkpoint_activations(model)


def prepare_step(
    model: Detector,
    parallel_model: nn.Module,
    criterion: Criterion,
    optimizer: NonFiniteGuard,
    *,
    compute: Compute,
    on_failure: str,
    clip_norm: float,
    bucket_shapes: Sequence[Shape],
    micro_batch: int,
    max_objects: int,
    device: torch.device,
    started: Callable[[str], None],
    note: Callable[[str], None],
) -> StepGraphs | None:
    """Compile and record what ``compute`` asks for, check a step, and return the CUDA graphs if there are any.

    Weights, buffers, moments and random states are left as they were. parallel_model: what a forward pass calls.
    bucket_shapes: the padded shapes of batches; none if they are not known. micro_batch: images in one. max_objects: of
    an image. started: called with the name of each part before it begins; it may raise to stop. note: prints a line.
    Raises SamdetrError when a part fails and on_failure is "error"; with "eager" the run continues without the part.
    """
    as_computed = partial(forward_backward, parallel_model, criterion, precision=compute.precision)
    graphs = None

    def batch_of(shape: Shape) -> Batch:
        return to_device(random_batch(shape, micro_batch, max_objects), device)

    def failed(error: SamdetrError) -> None:
        if on_failure == "error":
            raise error
        note(f"{error} Continuing without it, as compute.on_failure asks.")

    with preserve_buffers_and_rng(model, device):
        arrange(model, criterion, compute, num_shapes=len(bucket_shapes))
        if compute.compile:
            try:
                _compile_shapes(model, as_computed, bucket_shapes, batch_of, started, note)
            except SamdetrError as error:
                failed(error)
                torch.compiler.set_stance("force_eager")
        if compute.cuda_graph:
            try:
                started("recording CUDA graphs")
                graphs = StepGraphs(model, optimizer, as_computed, partial(update, optimizer, clip_norm))
                for shape in sorted(bucket_shapes, key=math.prod, reverse=True):
                    graphs.record(batch_of(shape))
                graphs.record_update()
            except SamdetrError as error:
                failed(error)
                graphs = None
                model.zero_grad(set_to_none=True)
    if compute != EXACT:
        started("checking a step")
        batch = batch_of(min(bucket_shapes, key=math.prod, default=(256, 256)))
        exact = partial(forward_backward, parallel_model, criterion, precision=torch.float32)
        note(check_step(model, graphs.forward_backward if graphs else as_computed, exact, batch))
        model.zero_grad(set_to_none=graphs is None)
    return graphs


def check_step(model: nn.Module, as_computed: ForwardBackward, exact: ForwardBackward, batch: Batch) -> str:
    """Compare loss and gradient norm of a batch as training computes them with eager float32; return a sentence.

    Raises SamdetrError when the relative difference exceeds MAX_LOSS_DIFFERENCE or MAX_GRADIENT_DIFFERENCE.
    """
    num_boxes, device = batch.targets.counts.sum(), batch.images.device
    found = []
    for run, way in ((as_computed, nullcontext()), (exact, eagerly())):
        model.zero_grad(set_to_none=False)
        with preserve_buffers_and_rng(model, device), way:
            loss = float(run(batch, num_boxes)[0])
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append({"loss": loss, "gradient norm": float(full_tensor(nn.utils.get_total_norm(gradients)))})
    for name, limit in (("loss", MAX_LOSS_DIFFERENCE), ("gradient norm", MAX_GRADIENT_DIFFERENCE)):
        fast, right = (values[name] for values in found)
        if not math.isclose(fast, right, rel_tol=limit):
            raise SamdetrError(
                f"the {name} of the start-up check is {fast:.4g} as configured, but {right:.4g} computed eagerly in "
                f'fp32: more than {limit:.0%} apart. Set compute.precision = "fp32", compute.compile = "off" or '
                'compute.cuda_graph = "off", and see which of them helps.'
            )
    configured, eager = (f"loss {values['loss']:.4f}, gradient norm {values['gradient norm']:.3g}" for values in found)
    return f"start-up check: {configured} as configured; {eager} eagerly in fp32"


@contextmanager
def preserve_buffers_and_rng(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the model's buffers (of live BatchNorm) and the random states at the end of the context."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def _compile_shapes(
    model: nn.Module,
    as_computed: ForwardBackward,
    bucket_shapes: Sequence[Shape],
    batch_of: Callable[[Shape], Batch],
    started: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Compile the step for every bucket shape. Raises SamdetrError."""
    begun = time.monotonic()
    for number, shape in enumerate(bucket_shapes):
        taken = time.monotonic() - begun
        left = f", about {taken / number * (len(bucket_shapes) - number):.0f} s left" if number else ""
        started(f"compiling {number + 1}/{len(bucket_shapes)} ({shape[0]} x {shape[1]}){left}")
        batch = batch_of(shape)
        try:
            as_computed(batch, batch.targets.counts.sum())
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:
            cause = getattr(error, "inner_exception", None) or error  # of a backend that failed
            reason = next((line for line in str(cause).splitlines() if line.strip()), repr(cause))
            raise SamdetrError(
                f"torch.compile failed at {shape[0]} x {shape[1]} pixels: {reason} "
                'Set compute.compile = "off", or compute.on_failure = "eager" to continue without it.'
            ) from error
        model.zero_grad(set_to_none=True)
    seconds = time.monotonic() - begun
    note(f"compiled for {len(bucket_shapes)} shapes in {seconds:.0f} s; the graphs are kept in {cache_dir()}")


def random_batch(shape: Shape, images: int, max_objects: int, *, least: int = 0) -> Batch:
    """Make a batch of noise with random boxes, as a loader gives it; every image fills ``shape``.

    An image has at least ``least`` and at most ``max_objects`` boxes. The same arguments give the same batch.
    """
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(images, max_objects, 4, generator=generator) * 0.4 + 0.3
    counts = torch.randint(least, max_objects + 1, (images,), generator=generator)
    valid = torch.arange(max_objects) < counts[:, None]
    sizes = torch.tensor([shape] * images)
    return Batch(
        images=torch.randn(images, 3, *shape, generator=generator),
        image_sizes=sizes,
        targets=Targets(torch.zeros(valid.shape, dtype=torch.int64), boxes * valid[..., None], counts),
        image_ids=torch.zeros(images, dtype=torch.int64),
        original_sizes=sizes,
    )
