"""One optimizer step: `train_step`, which calls `forward_backward` for each micro-batch, then `update`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from samdetr.engine.compute.cuda_graph import StepGraphs
from samdetr.engine.compute.precision import autocast
from samdetr.engine.distributed.parallel import full_tensor, no_grad_sync
from samdetr.engine.distributed.world import ALONE, World
from samdetr.engine.failures.out_of_memory import batch_size, note_place
from samdetr.engine.optim import NonFiniteGuard
from samdetr.loss import Criterion
from samdetr.structures import Batch


def train_step(
    model: nn.Module,
    criterion: Criterion,
    optimizer: NonFiniteGuard,
    batch: Sequence[Batch],
    *,
    device: torch.device,
    clip_norm: float,
    precision: torch.dtype = torch.float32,
    graphs: StepGraphs | None = None,
    world: World = ALONE,
    seeds: Sequence[int] | None = None,
) -> Tensor:
    """Take one step of the whole batch and return its values, float [V] on the device (`metrics.step_values`).

    The loss is divided by the boxes of the whole step, however it is split into micro-batches and processes. The split
    does change Faster R-CNN's loss (`RegionCriterion`), the statistics of live BatchNorm and the padding.
    ``batch`` is this process's share, the values are of all processes. clip_norm: 0 clips nothing. precision: float32
    or bfloat16, for matrix products and convolutions; parameters, boxes, costs and losses are float32 either way.
    graphs: replayed in place of the eager step. seeds: one dropout seed per micro-batch; None: torch's generator
    continues. The host never waits for the device, except in Faster R-CNN. If the matching cost, the loss or the
    gradient is not finite, the optimizer changes nothing (`NonFiniteGuard`).
    """
    optimizer.zero_grad(set_to_none=graphs is None)
    moved = [micro.to(device) for micro in batch]
    num_boxes = world.sum(torch.stack([micro.targets.counts.sum() for micro in moved]).sum())
    values: list[Tensor] = []
    for place, micro in enumerate(moved):
        if seeds is not None:
            torch.manual_seed(seeds[place])
        with no_grad_sync(model, keep=place < len(moved) - 1):
            if graphs:
                values.append(graphs.forward_backward(micro, num_boxes))
            else:
                values.append(forward_backward(model, criterion, micro, num_boxes, precision=precision))
    *sums, class_error = world.sum(torch.stack(values).sum(0)).unbind()
    grad_norm = graphs.update(sums[0]) if graphs else update(optimizer, clip_norm, sums[0])
    return torch.stack([*sums, class_error / (len(moved) * world.size), grad_norm])


def forward_backward(
    model: nn.Module, criterion: Criterion, batch: Batch, num_boxes: Tensor, *, precision: torch.dtype
) -> Tensor:
    """Add one micro-batch's gradients to the parameters' and return its values, all of `step_values` but grad_norm."""
    with note_place(batch_size(batch)):
        with autocast(precision, batch.images.device):
            outputs = model(batch.images, batch.image_sizes, *criterion.model_targets(batch.targets))
        losses = criterion(outputs, batch.targets, num_boxes)
        losses.total.backward()
    terms = losses.terms
    return torch.stack([losses.total.detach(), *(terms[name] for name in criterion.logged), terms["class_error"]])


def update(optimizer: NonFiniteGuard, clip_norm: float, loss: Tensor) -> Tensor:
    """Clip the gradients, take the optimizer's step, and return the gradient norm before clipping, on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm else float("inf")))
    optimizer.guard(loss, grad_norm)
    optimizer.step()
    return grad_norm
