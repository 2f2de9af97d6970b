"""Detectors. `build_model` makes the one a recipe names; each system stands in a file of that name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from samdetr.models import (
    conditional_detr,
    dab_detr,
    deformable_detr,
    detr,
    faster_rcnn,
    sam_detr,
    sam_detr_ms,
    smca_detr,
    smca_detr_ms,
)
from samdetr.models.detector import EncoderDecoder
from samdetr.models.faster_rcnn import FasterRCNN
from samdetr.models.system import System

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection

__all__ = ["SYSTEMS", "Detector", "EncoderDecoder", "FasterRCNN", "build_model"]

# A call with images and sizes (and in training whatever the criterion adds) -> Outputs, in training what the criterion
# takes. The engine also needs its backbone, layers and compiled_parts, and its system.
Detector = EncoderDecoder | FasterRCNN

# A published checkpoint is of the first system whose landmark it has.
SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        deformable_detr.SYSTEM,
        sam_detr_ms.SYSTEM,
        sam_detr.SYSTEM,
        dab_detr.SYSTEM,
        conditional_detr.SYSTEM,
        smca_detr_ms.SYSTEM,
        smca_detr.SYSTEM,
        detr.SYSTEM,
        faster_rcnn.SYSTEM,
    )
}


def build_model(section: ModelSection) -> Detector:
    """Build the detector of a recipe's model section, with random weights; needs no download and no GPU."""
    return SYSTEMS[section.system].build(section)
