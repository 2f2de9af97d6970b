"""Train SAM-DETR and the detectors it is compared with, from one recipe file.

The names below are loaded when they are first used, so that ``import samdetr`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samdetr.loss import build_criterion
    from samdetr.models import build_model
    from samdetr.recipe import load_recipe

__version__ = "0.1.0"
__all__ = ["__version__", "build_criterion", "build_model", "load_recipe"]

_HOMES = {"load_recipe": "samdetr.recipe", "build_model": "samdetr.models", "build_criterion": "samdetr.loss"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'samdetr' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
