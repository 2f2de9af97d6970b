"""Detectors. `build_model` makes the one a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from samdetr.models.conditional_detr import ConditionalDETR, build_conditional_detr
from samdetr.models.deformable_detr import DeformableDETR, build_deformable_detr
from samdetr.models.detr import DETR, build_detr
from samdetr.models.faster_rcnn import FasterRCNN, build_faster_rcnn
from samdetr.models.sam_detr import SAMDETR, build_sam_detr
from samdetr.models.sam_detr_ms import MultiScaleSAMDETR, build_sam_detr_ms
from samdetr.models.smca_detr import SMCADETR, build_smca_detr
from samdetr.models.smca_detr_ms import MultiScaleSMCADETR, build_smca_detr_ms

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection

__all__ = [
    "DETR",
    "SAMDETR",
    "SMCADETR",
    "ConditionalDETR",
    "DeformableDETR",
    "Detector",
    "FasterRCNN",
    "MultiScaleSAMDETR",
    "MultiScaleSMCADETR",
    "build_model",
]

# what the engine needs: a call with images and sizes (and what the criterion adds in training) -> Outputs, in training
# whatever the criterion takes; a backbone, regions
Detector = (
    SAMDETR | MultiScaleSAMDETR | DETR | ConditionalDETR | SMCADETR | MultiScaleSMCADETR | DeformableDETR | FasterRCNN
)


def build_model(section: ModelSection) -> Detector:
    """The detector of a recipe's model section, with random weights; needs no download and no GPU."""
    match section.system:
        case "sam_detr":
            return build_sam_detr(section)
        case "sam_detr_ms":
            return build_sam_detr_ms(section)
        case "detr":
            return build_detr(section)
        case "conditional_detr":
            return build_conditional_detr(section)
        case "smca_detr":
            return build_smca_detr(section)
        case "smca_detr_ms":
            return build_smca_detr_ms(section)
        case "deformable_detr":
            return build_deformable_detr(section)
        case "faster_rcnn":
            return build_faster_rcnn(section)
