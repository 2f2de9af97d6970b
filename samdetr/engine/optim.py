"""AdamW or SGD with a slower backbone and slower sampling; the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, assert_never

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from samdetr.models import Detector
    from samdetr.recipe import OptimSection


class NonFiniteGuard(torch.optim.Optimizer):
    """An optimizer that skips a step whose loss or gradient is not finite; the host does not wait to find out.

    After more than ``max_skips`` such steps in a row it changes nothing any more: when the host learns of it, however
    late, everything is as it was at that step. The switch is ``found_inf`` ([] float32, 0 or 1), which torch's fused
    optimizers read on the device for loss scaling; ``consecutive_skips`` ([] float32) counts the skipped steps in a
    row. Parameters must be on their device already.
    """

    found_inf: Tensor
    consecutive_skips: Tensor
    max_skips: int = 0

    def prepare(self) -> None:
        """Put the switch, and on a GPU the learning rates, where the fused step reads them."""
        device = self.param_groups[0]["params"][0].device
        if device.type == "cuda":  # a rate that a CUDA graph reads must be a tensor there, of each group its own
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
        self.found_inf = torch.zeros((), device=device)
        self.consecutive_skips = torch.zeros((), device=device)

    def guard(self, *values: Tensor) -> None:
        """Skip this step if one of ``values`` (scalars) is NaN or infinite."""
        finite = torch.stack([torch.isfinite(value) for value in values]).all()
        self.found_inf.copy_(~finite | (self.consecutive_skips > self.max_skips))
        self.consecutive_skips.add_(1).mul_(self.found_inf)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Skip every step within the context, whatever `guard` finds."""
        before = self.consecutive_skips.clone()
        self.consecutive_skips.fill_(self.max_skips + 1)
        try:
            yield
        finally:
            self.consecutive_skips.copy_(before)
            self.found_inf.zero_()


class RunningStatistics:
    """The statistics of live BatchNorm, which a forward pass changes: `undo` restores them after a skipped step."""

    def __init__(self, model: nn.Module, *, kept: bool) -> None:
        """Find them. kept: whether a step may be skipped; without it the other calls do nothing."""
        live = [part for part in model.modules() if kept and isinstance(part, nn.modules.batchnorm._BatchNorm)]
        self._buffers = [buffer for part in live for buffer in part.buffers()]
        self._before: list[Tensor] = []

    def keep(self) -> None:
        """Copy the statistics, before a step."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def undo(self, skipped: Tensor) -> None:
        """Restore the statistics where ``skipped`` ([], on the device) is not 0."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skipped > 0, before, buffer))


class GuardedAdamW(NonFiniteGuard, torch.optim.AdamW):
    """Fused AdamW with the guard."""

    def __init__(self, groups: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        groups = list(groups)
        first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True, capturable=first.device.type == "cuda")
        self.prepare()


class GuardedSGD(NonFiniteGuard, torch.optim.SGD):
    """Fused SGD with momentum and the guard."""

    def __init__(self, groups: Iterable[Any], *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.prepare()
        if momentum:
            for group in self.param_groups:
                for parameter in group["params"]:  # torch would leave them unset in a first step that is guarded
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def build_optimizer(model: Detector, section: OptimSection, *, max_skips: int = 0) -> GuardedAdamW | GuardedSGD:
    """Build the recipe's optimizer of the parameters that have a gradient, in groups: the rest, backbone, sampling.

    Each group starts at its base rate, which `set_learning_rate` multiplies. max_skips: of `NonFiniteGuard`.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # learned queries and embeddings first: the gradient norm is summed in this order, so its last bits depend on it
    named.sort(key=lambda pair: pair[0].endswith((".weight", ".bias")))
    in_backbone = set(model.backbone.parameters())
    backbone: list[nn.Parameter] = []
    sampling: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter in in_backbone:
            backbone.append(parameter)
        elif section.sampling_lr_factor != 1 and any(part in name for part in model.system.sampling):
            sampling.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "lr": section.lr, "base_lr": section.lr}]
    for parameters, rate in ((backbone, section.backbone_lr), (sampling, section.lr * section.sampling_lr_factor)):
        if parameters:
            groups.append({"params": parameters, "lr": rate, "base_lr": rate})
    optimizer: GuardedAdamW | GuardedSGD
    if section.optimizer == "sgd":
        optimizer = GuardedSGD(groups, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    else:
        optimizer = GuardedAdamW(groups, lr=section.lr, weight_decay=section.weight_decay)
    optimizer.max_skips = max_skips
    return optimizer


def lr_factor(section: OptimSection, *, step: int, epoch: int, total_steps: int) -> float:
    """Return the factor of all base learning rates at a step (from 0, of ``total_steps``) of an epoch (from 0)."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    match section.schedule:
        case "step":
            return warmup * section.drop_factor ** sum(epoch >= drop for drop in section.drop_epochs)
        case "cosine":
            return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))
        case _:
            assert_never(section.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to ``factor`` times its base rate; a tensor stays the same tensor."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
