"""The two halves of a step as CUDA graphs: recorded once, replayed with one launch each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.errors import SamdetrError
from samdetr.structures import Batch

if TYPE_CHECKING:
    from samdetr.engine.optim import NonFiniteGuard


@dataclass
class Recorded:
    """A graph, the tensors that it reads and the one that it leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the function's result for ``inputs``, which have the recorded shapes."""
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output.clone()  # the next replay of any graph may use its memory


class StepGraphs:
    """Graphs that share one memory pool: forward, loss and backward for every bucket shape, and clip and update.

    They are recorded on one stream, since memory is reused within a stream only. Record the largest shape first: the
    images of the others then use its memory. Gradients are allocated once: set them to zero between steps, not to None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: NonFiniteGuard,
        forward_backward: Callable[[Batch, Tensor], Tensor],
        update: Callable[[Tensor], Tensor],
    ) -> None:
        """Allocate the gradients. forward_backward: (micro-batch, number of boxes) -> values. update: loss -> norm."""
        self._model, self._optimizer = model, optimizer
        self._forward_backward, self._update = forward_backward, update
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pixels: Tensor | None = None
        self._passes: dict[torch.Size, Recorded] = {}
        self._last: Recorded | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
                self._gradients.append((parameter, parameter.grad))

    def forward_backward(self, batch: Batch, num_boxes: Tensor) -> Tensor:
        """Replay the graph of the batch's shape; run a shape that was not recorded eagerly."""
        recorded = self._passes.get(batch.images.shape)
        if recorded is None:
            return self._forward_backward(batch, num_boxes)
        return recorded.replay((*batch.step_tensors(), num_boxes))

    def update(self, loss: Tensor) -> Tensor:
        """Clip the gradients, take the optimizer's step, and return their norm before clipping.

        Raises RuntimeError where a parameter's gradient is no longer the tensor that the graphs write.
        """
        if any(parameter.grad is not gradient for parameter, gradient in self._gradients):
            raise RuntimeError("a gradient that a CUDA graph writes was replaced: zero_grad(set_to_none=False)")
        return self._update(loss) if self._last is None else self._last.replay((loss,))

    def record(self, batch: Batch) -> None:
        """Record the graph for batches of this one's shape, which must be compiled already.

        Changes the buffers of live BatchNorm: the caller restores them. Raises SamdetrError.
        """
        num_boxes = batch.targets.counts.sum()

        def run(*tensors: Tensor) -> Tensor:
            return self._forward_backward(batch.with_step_tensors(tensors[:-1]), tensors[-1])

        images, *others = batch.step_tensors()
        inputs = (self._placed(images), *(tensor.clone() for tensor in (*others, num_boxes)))
        self._passes[batch.images.shape] = self._recorded(run, inputs)
        self._optimizer.zero_grad(set_to_none=False)

    def record_update(self) -> None:
        """Record the update; parameters and moments stay as they are. Raises SamdetrError."""
        with self._optimizer.held():
            self._last = self._recorded(self._update, (torch.zeros_like(self._optimizer.found_inf),))

    def _placed(self, images: Tensor) -> Tensor:
        """Copy the images into the memory that all bucket shapes share."""
        if self._pixels is None or self._pixels.numel() < images.numel():
            self._pixels = torch.empty(images.numel(), dtype=images.dtype, device=images.device)
        return self._pixels[: images.numel()].as_strided(images.shape, images.stride()).copy_(images)

    def _recorded(self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Recorded:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.get_sync_debug_mode()
        try:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function(*inputs)  # libraries choose algorithms and allocate their workspaces
                torch.cuda.set_sync_debug_mode("error")  # an error here names what would break the recording
                function(*inputs)
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.current_stream().wait_stream(self._stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = function(*inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise SamdetrError(
                f"recording a CUDA graph failed: {str(error.__context__ or error).splitlines()[0]} "
                'Set compute.cuda_graph = "off", or compute.on_failure = "eager" to continue without it.'
            ) from error
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return Recorded(graph, inputs, output)
