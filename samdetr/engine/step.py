"""One optimizer step: `train_step`, which calls `forward_backward` for each micro-batch, then `update`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from samdetr.engine.compute.precision import autocast
from samdetr.engine.distributed.parallel import full_tensor, no_grad_sync
from samdetr.engine.distributed.world import ALONE, World
from samdetr.engine.failures.out_of_memory import described, named
from samdetr.structures import Batch, Outputs, RegionLosses

if TYPE_CHECKING:
    from samdetr.engine.compute.cuda_graph import StepGraphs
    from samdetr.engine.optim import NonFiniteGuard
    from samdetr.loss import Criterion


class StepResult(NamedTuple):
    """What one optimizer step reports, still on the device."""

    values: Tensor  # float, in the order of `log.step_values`


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
) -> StepResult:
    """Forward, loss, backward over the micro-batches, then clip and update: one step of the whole batch.

    The loss is divided by the number of boxes of the whole step, so that its gradient does not depend on how the batch
    is split, nor among how many processes: ``batch`` is this one's share, the values are the world's. clip_norm 0: no
    clipping. precision: what matrix products and convolutions compute in, float32 or bfloat16; parameters, boxes, costs
    and losses are float32 either way. graphs: replayed instead, if given. seeds: of each micro-batch's dropout; None:
    torch's generator goes on. Nothing waits for the device: where the matching cost, the loss or the gradient is not
    finite, the optimizer changes nothing in this step, nor in later ones where it may not skip so many in a row.
    """
    optimizer.zero_grad(set_to_none=graphs is None)
    moved = [micro.to(device) for micro in batch]
    num_boxes = world.sum(torch.stack([micro.targets.counts.sum() for micro in moved]).sum())
    run = graphs.forward_backward if graphs else partial(forward_backward, model, criterion, precision=precision)
    values: list[Tensor] = []
    for place, micro in enumerate(moved, start=1):
        if seeds is not None:
            torch.manual_seed(seeds[place - 1])
        with no_grad_sync(model, keep=place < len(moved)):
            values.append(run(micro, num_boxes))
    *sums, class_error = world.sum(torch.stack(values).sum(0)).unbind()
    grad_norm = graphs.update(sums[0]) if graphs else update(optimizer, clip_norm, sums[0])
    return StepResult(torch.stack([*sums, class_error / (len(moved) * world.size), grad_norm]))


def forward_backward(
    model: nn.Module, criterion: Criterion, batch: Batch, num_boxes: Tensor, *, precision: torch.dtype
) -> Tensor:
    """Add the gradients of one micro-batch to those of the parameters; its values, as in `log.step_values`."""
    with named(partial(described, batch)):
        outputs = forward(model, criterion, batch, precision=precision)
        losses = criterion(outputs, batch.targets, num_boxes)
        losses.total.backward()
    terms = losses.terms
    return torch.stack([losses.total.detach(), *(terms[name] for name in criterion.logged), terms["class_error"]])


def forward(model: nn.Module, criterion: Criterion, batch: Batch, *, precision: torch.dtype) -> Outputs | RegionLosses:
    """Call the model on a micro-batch as training does; the result is for the criterion. precision: of products."""
    with autocast(precision, batch.images.device):
        outputs: Outputs | RegionLosses = model(
            batch.images, batch.image_sizes, *criterion.model_targets(batch.targets)
        )
    return outputs


def update(optimizer: NonFiniteGuard, clip_norm: float, loss: Tensor) -> Tensor:
    """Clip the gradients and take the optimizer's step; returns their norm before. All on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, clip_norm if clip_norm else float("inf")))
    optimizer.guard(loss, grad_norm)
    optimizer.step()
    return grad_norm
