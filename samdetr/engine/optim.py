"""AdamW or SGD with a slower backbone and slower sampling; the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from samdetr.recipe import OptimSection


class Guarded(torch.optim.Optimizer):
    """An optimizer that changes nothing any more once a number was not finite; nobody waits to find out.

    The switch is ``found_inf`` ([] float32, 0 or 1), which torch's fused optimizers read on the device, made for
    loss scaling. Parameters must be on their device already.
    """

    found_inf: Tensor

    def prepare(self) -> None:
        """Put the switch, and on a GPU the rates, where the fused step reads them."""
        device = self.param_groups[0]["params"][0].device
        if device.type == "cuda":  # a rate that a CUDA graph reads must be a tensor there, of each group its own
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=device)
        self.found_inf = torch.zeros((), device=device)

    def guard(self, value: Tensor) -> None:
        """Leave everything as it is from now on if ``value`` (a scalar) is NaN or infinite."""
        torch.maximum(self.found_inf, (~torch.isfinite(value)).to(torch.float32), out=self.found_inf)


class GuardedAdamW(Guarded, torch.optim.AdamW):
    """Fused AdamW with the guard."""

    def __init__(self, groups: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        groups = list(groups)
        first = groups[0]["params"][0] if isinstance(groups[0], dict) else groups[0]
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True, capturable=first.device.type == "cuda")
        self.prepare()


class GuardedSGD(Guarded, torch.optim.SGD):
    """Fused SGD with momentum and the guard."""

    def __init__(self, groups: Iterable[Any], *, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        self.prepare()
        if momentum:
            for group in self.param_groups:
                for parameter in group["params"]:  # torch would leave them unset in a first step that is guarded
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def build_optimizer(model: nn.Module, section: OptimSection) -> GuardedAdamW | GuardedSGD:
    """The recipe's optimizer over the parameters that have a gradient, in groups: the rest, backbone, what samples."""
    backbone: list[nn.Parameter] = []
    sampling: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            backbone.append(parameter)
        elif section.sampling_lr_factor != 1 and (".offsets." in name or name.startswith("reference_head.")):
            sampling.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "base_lr": section.lr}]
    for parameters, rate in ((backbone, section.backbone_lr), (sampling, section.lr * section.sampling_lr_factor)):
        if parameters:
            groups.append({"params": parameters, "base_lr": rate})
    if section.optimizer == "sgd":
        return GuardedSGD(groups, lr=section.lr, momentum=section.momentum, weight_decay=section.weight_decay)
    return GuardedAdamW(groups, lr=section.lr, weight_decay=section.weight_decay)


def lr_factor(section: OptimSection, *, step: int, epoch: int, total_steps: int) -> float:
    """What every base learning rate is multiplied by at a step (from 0, of ``total_steps``) of an epoch (from 0)."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return warmup * section.drop_factor ** sum(epoch >= drop for drop in section.drop_epochs)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to ``factor`` times its base rate; what is a tensor stays that tensor."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
