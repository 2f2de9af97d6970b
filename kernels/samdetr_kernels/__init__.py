"""Custom ops of SAM-DETR, usable in any detector. Each op has a plain-torch ``<op>_reference``.

Maps are channels-last ``[B, H, W, C]``, boxes ``[B, N, 4]`` are (x0, y0, x1, y1) in map cells, points
``[B, N, P, 2]`` are (x, y) in [-1, 1] of their box.
"""

from samdetr_kernels.deformable_attention import deformable_attention, deformable_attention_reference
from samdetr_kernels.launch import force_reference
from samdetr_kernels.linear_assignment import linear_assignment, linear_assignment_reference
from samdetr_kernels.roi_align import roi_align, roi_align_reference
from samdetr_kernels.salient_cross_attention import salient_cross_attention, salient_cross_attention_reference
from samdetr_kernels.salient_points import salient_points, salient_points_reference

__all__ = [
    "deformable_attention",
    "deformable_attention_reference",
    "force_reference",
    "linear_assignment",
    "linear_assignment_reference",
    "roi_align",
    "roi_align_reference",
    "salient_cross_attention",
    "salient_cross_attention_reference",
    "salient_points",
    "salient_points_reference",
]
