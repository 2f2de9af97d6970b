"""AdamW with a slower backbone, and the learning-rate schedule as a function of the step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from samdetr.recipe import OptimSection


def build_optimizer(model: nn.Module, section: OptimSection) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that have a gradient, in two groups: the backbone and the rest."""
    backbone: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.") else rest).append(parameter)
    groups = [{"params": rest, "base_lr": section.lr}]
    if backbone:
        groups.append({"params": backbone, "base_lr": section.backbone_lr})
    return torch.optim.AdamW(groups, lr=section.lr, weight_decay=section.weight_decay, fused=True)


def lr_factor(section: OptimSection, *, step: int, epoch: int, total_steps: int) -> float:
    """What every base learning rate is multiplied by at a step (from 0, of ``total_steps``) of an epoch (from 0)."""
    warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    if section.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return warmup * section.drop_factor ** sum(epoch >= drop for drop in section.drop_epochs)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to ``factor`` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
