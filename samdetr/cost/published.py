"""Published numbers of the recipes that reproduce a row of the SAM-DETR paper's comparison.

AP is of COCO val2017; GFLOPs, counted as in flops.py, are the mean over its first 100 images at 800/1333.
Source: Zhang et al., CVPR 2022, and the tables of the published code. Counted numbers were counted in that code:
parameters to the unit, flops by fvcore (and baddbmm, which fvcore leaves out). Nothing here was measured with this
package.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Row of the table."""

    system: str
    backbone: str
    ap: float | None  # None: the table has no such schedule
    gflops: int | None  # None: not published
    millions: int | None  # of parameters, as the table has it
    parameters: int | None  # of the published code, counted; None: it was never released
    trainable: int | None
    counted: tuple[float, float] | None  # GFLOPs of the published code at 800x1066 and 800x1201, counted
    compared: bool = False  # with outputs, matching, losses and gradients of the published code, in tests/parity


_SAM = "SAM-DETR"
_SAM_SMCA = "SAM-DETR w/ SMCA"
_SAM_MS, _SAM_MS_SMCA = "SAM-DETR, three maps", "SAM-DETR w/ SMCA, three maps"
_DETR = "DETR"
_DETR_FOCAL = "DETR, 300 queries, focal loss"
_CONDITIONAL = "Conditional-DETR"
_DAB = "DAB-DETR"
_SMCA = "SMCA-DETR, one scale"
_SMCA_CONVOLUTIONS = "SMCA-DETR, four scales, convolutions"
_SMCA_ATTENTION = "SMCA-DETR, three scales, attention"
_DEFORMABLE = "Deformable-DETR, one level"
_DEFORMABLE_MS = "Deformable-DETR, four levels"
_C4, _RCNN, _FPN = "Faster R-CNN C4", "Faster R-CNN", "Faster R-CNN FPN"
_R50, _DC5 = "R50", "R50-DC5"

PUBLISHED = {  # by name of the recipe's file
    "r50_12ep": Published(_SAM, _R50, 33.1, 100, 58, 58_296_458, 58_074_058, (96.0, 107.0), compared=True),
    "r50_50ep": Published(_SAM, _R50, 39.8, 100, 58, 58_295_946, 58_073_546, (96.0, 107.0), compared=True),
    "r50_dc5_12ep": Published(_SAM, _DC5, 38.3, 210, 58, 58_296_458, 58_074_058, (199.6, 229.9)),
    "r50_dc5_50ep": Published(_SAM, _DC5, 43.3, 210, 58, 58_295_946, 58_073_546, (199.6, 229.9), compared=True),
    "r50_smca_12ep": Published(_SAM_SMCA, _R50, 36.0, 100, 58, 58_345_706, 58_123_306, (96.0, 107.0)),
    "r50_smca_50ep": Published(_SAM_SMCA, _R50, 41.8, 100, 58, 58_345_194, 58_122_794, (96.0, 107.0), compared=True),
    "r50_dc5_smca_12ep": Published(
        _SAM_SMCA, _DC5, 40.6, 210, 58, 58_345_706, 58_123_306, (199.6, 229.9), compared=True
    ),
    "r50_dc5_smca_50ep": Published(_SAM_SMCA, _DC5, 45.0, 210, 58, 58_345_194, 58_122_794, (199.6, 229.9)),
    # the paper's ablations, of which no code was published
    "r50_12ep_average": Published(_SAM, _R50, 25.2, None, None, None, None, None),
    "r50_12ep_max": Published(_SAM, _R50, 27.0, None, None, None, None, None),
    "r50_12ep_1point": Published(_SAM, _R50, 28.6, None, None, None, None, None),
    "r50_12ep_1point_reweighted": Published(_SAM, _R50, 30.3, None, None, None, None, None),
    "r50_12ep_8points": Published(_SAM, _R50, 32.0, None, None, None, None, None),
    "r50_12ep_whole_image": Published(_SAM, _R50, 30.0, None, None, None, None, None),
    "r50_ms_12ep": Published(_SAM_MS, _R50, 41.1, 203, 55, 55_194_698, 54_972_298, (197.0, 220.7), compared=True),
    "r50_ms_50ep": Published(_SAM_MS, _R50, 46.1, 203, 55, 55_194_698, 54_972_298, (197.0, 220.7), compared=True),
    "r50_ms_smca_12ep": Published(
        _SAM_MS_SMCA, _R50, 42.8, 203, 55, 55_243_946, 55_021_546, (197.0, 220.7), compared=True
    ),
    "r50_ms_smca_50ep": Published(
        _SAM_MS_SMCA, _R50, 47.1, 203, 55, 55_243_946, 55_021_546, (197.0, 220.7), compared=True
    ),
    "detr_r50_500ep": Published(_DETR, _R50, 42.0, 86, 41, 41_524_768, 41_302_368, (81.3, 91.7), compared=True),
    "detr_r50_dc5_500ep": Published(_DETR, _DC5, 43.3, 187, 41, 41_524_768, 41_302_368, (173.3, 201.5), compared=True),
    "detr_focal_r50_12ep": Published(_DETR_FOCAL, _R50, 22.3, 86, 41, 41_575_968, 41_353_568, (84.0, 94.5)),
    "detr_focal_r50_50ep": Published(_DETR_FOCAL, _R50, 34.9, 86, 41, 41_575_968, 41_353_568, (84.0, 94.5)),
    "detr_focal_r50_dc5_12ep": Published(_DETR_FOCAL, _DC5, 25.9, 187, 41, 41_575_968, 41_353_568, (177.5, 206.0)),
    "detr_focal_r50_dc5_50ep": Published(_DETR_FOCAL, _DC5, 36.7, 187, 41, 41_575_968, 41_353_568, (177.5, 206.0)),
    "conditional_detr_r50_12ep": Published(
        _CONDITIONAL, _R50, 32.2, 90, 44, 43_418_401, 43_196_001, (85.3, 95.9), compared=True
    ),
    "conditional_detr_r50_50ep": Published(
        _CONDITIONAL, _R50, 40.9, 90, 44, 43_418_401, 43_196_001, (85.3, 95.9), compared=True
    ),
    "conditional_detr_r50_dc5_12ep": Published(
        _CONDITIONAL, _DC5, 35.9, 195, 44, 43_418_401, 43_196_001, (181.0, 209.8), compared=True
    ),
    "conditional_detr_r50_dc5_50ep": Published(
        _CONDITIONAL, _DC5, 43.8, 195, 44, 43_418_401, 43_196_001, (181.0, 209.8), compared=True
    ),
    # of DAB-DETR's paper (Liu et al., ICLR 2022, table 2) and code
    "dab_detr_r50_50ep": Published(_DAB, _R50, 42.2, 94, 44, 43_671_517, 43_449_117, (86.6, 97.3), compared=True),
    "smca_detr_r50_12ep": Published(_SMCA, _R50, 31.6, 86, 42, 41_760_482, 41_538_082, (84.0, 94.5), compared=True),
    "smca_detr_r50_50ep": Published(_SMCA, _R50, 41.0, 86, 42, 41_760_482, 41_538_082, (84.0, 94.5), compared=True),
    "smca_detr_r50_dc5_12ep": Published(_SMCA, _DC5, 32.5, 187, 42, 41_760_482, 41_538_082, (177.6, 206.0)),
    "smca_detr_r50_dc5_50ep": Published(_SMCA, _DC5, None, 187, 42, 41_760_482, 41_538_082, (177.6, 206.0)),
    "smca_detr_r50_ms_50ep": Published(
        _SMCA_CONVOLUTIONS, _R50, 44.4, None, None, 40_199_738, 39_977_338, None, compared=True
    ),
    "smca_detr_r50_ms_attention_50ep": Published(_SMCA_ATTENTION, _R50, 43.7, 152, 40, None, None, None),
    "deformable_detr_r50_12ep": Published(
        _DEFORMABLE, _R50, 31.8, 78, 34, 34_066_593, 33_844_193, (76.4, 85.9), compared=True
    ),
    "deformable_detr_r50_50ep": Published(
        _DEFORMABLE, _R50, 39.4, 78, 34, 34_066_593, 33_844_193, (76.4, 85.9), compared=True
    ),
    "deformable_detr_r50_dc5_12ep": Published(
        _DEFORMABLE, _DC5, 34.9, 128, 34, 34_066_593, 33_844_193, (125.1, 141.3), compared=True
    ),
    "deformable_detr_r50_dc5_50ep": Published(
        _DEFORMABLE, _DC5, 41.5, 128, 34, 34_066_593, 33_844_193, (125.1, 141.3), compared=True
    ),
    "deformable_detr_r50_ms_50ep": Published(
        _DEFORMABLE_MS, _R50, 43.8, 173, 40, 40_069_665, 39_847_265, (166.0, 187.0), compared=True
    ),
    # parameters are those of torchvision's model with frozen BatchNorm; flops depend on trained proposals
    "faster_rcnn_r50_c4_12ep": Published(_C4, _R50, 35.7, 547, 34, 33_799_840, 33_577_440, None),
    "faster_rcnn_r50_c4_36ep": Published(_C4, _R50, 38.4, 547, 34, 33_799_840, 33_577_440, None),
    "faster_rcnn_r50_dc5_12ep": Published(_RCNN, _DC5, 37.3, 320, 166, 165_585_568, 165_363_168, None),
    "faster_rcnn_r50_dc5_36ep": Published(_RCNN, _DC5, 39.0, 320, 166, 165_585_568, 165_363_168, None),
    "faster_rcnn_r50_dc5_108ep": Published(_RCNN, _DC5, 41.1, 320, 166, 165_585_568, 165_363_168, None),
    "faster_rcnn_r50_fpn_108ep": Published(_FPN, _R50, 42.0, 180, 42, 41_704_036, 41_481_636, None),
}
