"""Detectors. `build_model` makes the one a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samdetr.models.sam_detr import SAMDETR, build_sam_detr

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection

__all__ = ["SAMDETR", "build_model"]


def build_model(section: ModelSection) -> SAMDETR:
    """The detector of a recipe's model section, with random weights; needs no download and no GPU."""
    return build_sam_detr(section)
