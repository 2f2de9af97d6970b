"""Faster R-CNN (NeurIPS 2015) of torchvision's detection parts, on the C4, the dilated C5 or an FPN of the backbone."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder, encode_boxes
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from samdetr.models.backbone import Backbone, build_backbone, build_stage, run_stage
from samdetr.models.system import System
from samdetr.structures import Outputs, RegionLosses, Targets

if TYPE_CHECKING:
    from samdetr.recipe.model import FasterRCNNSection

Maps = dict[str, Tensor]  # of each level, fine to coarse [B, C, h, w]
Sizes = list[tuple[int, int]]  # (height, width) of each image's valid pixels
Truth = list[dict[str, Tensor]]  # of each image: boxes [n, 4] (x0, y0, x1, y1) in pixels, labels [n] from 1
ANCHORS: tuple[int, ...] = (32, 64, 128, 256, 512)  # square roots of areas, pixels
RATIOS = (0.5, 1.0, 2.0)  # heights over widths
GRID = 32  # images are padded to multiples of it, as torchvision's are
DRAWN_ANCHORS, DRAWN_PROPOSALS = 256, 512  # of an image, for the losses


class Anchors(AnchorGenerator):
    """Anchors in float32, as bfloat16 holds no coordinates, around the cells of maps with the given strides.

    torchvision divides the padded image by its map, which is another stride where the padding ends within a cell.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: tuple[int, ...]) -> None:
        super().__init__(sizes, (RATIOS,) * len(sizes))
        self.strides = strides

    def forward(self, images: ImageList, maps: list[Tensor]) -> list[Tensor]:
        """Make the anchors [A, 4] of each image, (x0, y0, x1, y1) in pixels."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        strides = [[stride] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([list(level.shape[-2:]) for level in maps], strides))
        return [anchors] * len(images.image_sizes)


class Coder(BoxCoder):
    """torchvision's numbers to the bit, without the constants that it copies to the device in every call."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Compute the changes [R, 4] that make reference_boxes [R, 4] of proposals [R, 4]."""
        return encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Change each of boxes [R, 4] by each of its K changes in rel_codes [R, 4 K]: [R, 4 K]."""
        boxes = boxes.to(rel_codes.dtype)
        sides = boxes[:, 2:] - boxes[:, :2]
        centres = boxes[:, :2] + 0.5 * sides
        changes = torch.stack([rel_codes[:, i::4] / weight for i, weight in enumerate(self.weights)], -1)
        middles = changes[..., :2] * sides[:, None] + centres[:, None]
        halves = 0.5 * (changes[..., 2:].clamp(max=self.bbox_xform_clip).exp() * sides[:, None])
        return torch.cat((middles - halves, middles + halves), -1).flatten(1)


class Fp32RPNHead(RPNHead):
    """Scores and box changes are computed in float32: thousands of scores are compared."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict scores [B, A, h, w] and box changes [B, 4 A, h, w] of each level, for A anchors a cell."""
        features = [self.conv(level) for level in maps]
        with without_autocast(maps[0]):
            scores = [self.cls_logits(level.float()) for level in features]
            return scores, [self.bbox_pred(level.float()) for level in features]


class Res5Head(nn.Module):
    """The backbone's fourth residual stage, with its stride, on every RoI."""

    def __init__(self, layer4: nn.Sequential) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, rois: Tensor) -> Tensor:
        """Compute features [R, 2 C] of rois [R, C, 14, 14]."""
        return run_stage(self.layer4, rois).mean((2, 3))


class RegionHeads(RoIHeads):
    """torchvision's second stage: classes and boxes of proposals."""

    def predict(self, maps: Maps, proposals: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Predict logits [R, K] (0: no object) and box changes [R, 4 K] of all images' proposals, float32."""
        features = self.box_head(self.box_roi_pool(maps, proposals, sizes))
        with without_autocast(features):
            logits, changes = self.box_predictor(features.float())
        return logits, changes

    def subsample(self, labels: list[Tensor]) -> list[Tensor]:
        """Draw DRAWN_PROPOSALS at most; the slice says so on the meta device too, where values are unknown."""
        return [drawn[:DRAWN_PROPOSALS] for drawn in super().subsample(labels)]

    def losses(self, maps: Maps, proposals: list[Tensor], sizes: Sizes, truth: Truth) -> tuple[Tensor, Tensor, Tensor]:
        """Compute class loss, box loss, and the percentage of drawn proposals with an object whose class is wrong."""
        proposals, _, labels, changes = self.select_training_samples(proposals, truth)
        logits, predicted = self.predict(maps, proposals, sizes)
        class_loss, box_loss = fastrcnn_loss(logits, predicted, labels, changes)
        wanted = torch.cat(labels)
        correct = ((logits.detach().argmax(-1) == wanted) & (wanted > 0)).sum()
        return class_loss, box_loss, 100 - 100 * correct / (wanted > 0).sum().clamp(min=1)

    def detections(self, maps: Maps, proposals: list[Tensor], sizes: Sizes, scale: Tensor) -> Outputs:
        """Find the best detections after non-maximum suppression, as `FasterRCNN` gives them. scale: of `pixels_of`."""
        logits, changes = self.predict(maps, proposals, sizes)
        found = self.postprocess_detections(logits, changes, proposals, sizes)
        # of each row the log of its score at its class, and of the rest at no object, the last: softmax gives the score
        whole = logits.new_full((1, len(sizes), self.detections_per_img, logits.shape[-1]), -math.inf)
        whole[..., -1] = 0
        corners = logits.new_zeros(1, len(sizes), self.detections_per_img, 4)
        for image, (boxes, scores, labels) in enumerate(zip(*found, strict=True)):
            rows = torch.arange(len(boxes), device=boxes.device)
            whole[0, image, rows, labels - 1] = scores.log()
            whole[0, image, rows, -1] = (-scores).log1p()
            corners[0, image, rows] = boxes
        return Outputs(whole, box_convert(corners / scale, "xyxy", "cxcywh"))


class FasterRCNN(nn.Module):
    """Proposals from anchors on the maps of ``neck``, then a class and a box of each proposal.

    The host waits for numbers of the device, so only the backbone is compiled. In training, with a micro-batch of B
    images, it waits once for sizes and counts together; in torchvision's parts B times for a copy of a constant, and
    9 B + 3 times (with the four maps of the FPN 9 B + 7) for a number of rows. Of an image: twice the proposals that
    are left, suppression, the best anchors, five times what is drawn; of a batch: three times what was drawn, and the
    proposals of each map.
    """

    layers: tuple[nn.Module, ...] = ()  # no stack of transformer layers
    compiled_parts: tuple[nn.Module, ...] = ()  # besides the backbone all has sizes that only data tell

    def __init__(self, backbone: Backbone, neck: nn.Module, rpn: RegionProposalNetwork, roi_heads: RegionHeads) -> None:
        super().__init__()
        self.system = SYSTEM
        self.backbone, self.neck, self.rpn, self.roi_heads = backbone, neck, rpn, roi_heads

    def forward(self, images: Tensor, image_sizes: Tensor, targets: Targets | None = None) -> Outputs | RegionLosses:
        """Detect objects in images [B, 3, H, W], normalised, zero-padded bottom/right; in training compute losses.

        image_sizes [B, 2] int, valid (h, w) in pixels. The losses are those of ``targets``; anchors and proposals for
        them are drawn by torch's generator. Detections have L = 1 and Q at most, best first, one class each: the
        logits' softmax is its score, the last logit no object; rows left over have no object for certain.
        """
        images = functional.pad(images, (0, -images.shape[-1] % GRID, 0, -images.shape[-2] % GRID))
        maps = self.neck({str(level): x for level, x in enumerate(self.backbone(images, image_sizes))})
        numbers = on_host(image_sizes if targets is None else torch.cat((image_sizes, targets.counts[:, None]), 1))
        sizes, scale = [(height, width) for height, width, *_ in numbers], pixels_of(image_sizes)
        batch = ImageList(images, sizes)
        if not self.training:
            return self.roi_heads.detections(maps, self.rpn(batch, maps)[0], sizes, scale)
        if targets is None:
            raise ValueError("Faster R-CNN needs targets in training: model(images, image_sizes, targets)")
        truth = pixel_truth(targets, [count for *_, count in numbers], scale)
        proposals, losses = self.rpn(batch, maps, truth)
        second = self.roi_heads.losses(maps, proposals, sizes, truth)
        return RegionLosses(losses["loss_objectness"], losses["loss_rpn_box_reg"], *second)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves float32 alone, on the device of x."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # meta has no autocast


def on_host(numbers: Tensor) -> list[list[int]]:
    """Read the rows of numbers [n, m] in one transfer, not one a number."""
    if numbers.is_meta:  # whoever counts there answers each read
        return [[int(number) for number in row] for row in numbers]
    return numbers.tolist()


def pixels_of(image_sizes: Tensor) -> Tensor:
    """Return the factor from [0, 1] to pixels for corners: [B, 1, 4] int (w, h, w, h) of image_sizes [B, 2] (h, w)."""
    return image_sizes.flip(-1).repeat(1, 2)[:, None]


def pixel_truth(targets: Targets, counts: list[int], scale: Tensor) -> Truth:
    """Convert targets to torchvision's form. counts: theirs, on the host; scale: of `pixels_of`."""
    boxes = box_convert(targets.boxes * scale, "cxcywh", "xyxy")
    return [
        {"boxes": boxes[image, :count], "labels": targets.labels[image, :count] + 1}
        for image, count in enumerate(counts)
    ]


def region_align(strides: tuple[int, ...], size: int) -> MultiScaleRoIAlign:
    """Build a RoIAlign of ``size`` x ``size`` bins, from the level that fits a proposal's area.

    The scales are given: torchvision would infer them from the first batch, whose padding may be large.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def build_faster_rcnn(section: FasterRCNNSection) -> FasterRCNN:
    """Build the detector of a recipe, with random weights: C4 with three stages, DC5 with dilation, else FPN."""
    keys, stages = section.regions, section.backbone
    one_map = stages.stages < 4 or stages.dilation
    backbone = build_backbone(stages, padding="published", levels=1 if one_map else 4)
    neck, channels = nn.Identity(), backbone.channels[-1]
    if one_map:
        anchors = Anchors((ANCHORS,), backbone.strides)
    else:
        channels = section.width
        neck = FeaturePyramidNetwork(list(backbone.channels), channels, LastLevelMaxPool())
        anchors = Anchors(tuple((size,) for size in ANCHORS), (*backbone.strides, 2 * backbone.strides[-1]))
    if stages.stages < 4:
        align, head, features = region_align(backbone.strides, 14), Res5Head(build_stage(stages, 3)), 2 * channels
        backbone.elsewhere = {"layer4": head.layer4}
    else:
        align, features = region_align(backbone.strides, 7), keys.hidden
        head = TwoMLPHead(channels * 7 * 7, features)
    rpn = RegionProposalNetwork(
        anchors,
        Fp32RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=DRAWN_ANCHORS,
        positive_fraction=0.5,
        pre_nms_top_n={"training": keys.candidates_train, "testing": keys.candidates_eval},
        post_nms_top_n={"training": keys.proposals_train, "testing": keys.proposals_eval},
        nms_thresh=0.7,
    )
    roi_heads = RegionHeads(
        align,
        head,
        FastRCNNPredictor(features, section.num_classes),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=DRAWN_PROPOSALS,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=keys.score_threshold,
        nms_thresh=0.5,
        detections_per_img=section.num_queries,
    )
    for part in (rpn, roi_heads):
        part.box_coder = Coder(part.box_coder.weights)
    return FasterRCNN(backbone, neck, rpn, roi_heads)


SYSTEM = System(
    name="faster_rcnn",
    build=build_faster_rcnn,
    class_heads="roi_heads.box_predictor.",  # with boxes of every class beside the logits
    published=None,
)
