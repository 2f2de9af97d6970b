"""The semantic aligner: SAM-DETR's contribution (CVPR 2022, section 3.2-3.4).

Before cross-attention every object query is replaced by features sampled from the encoded image itself: in its
reference box each attention head picks one salient point, whose feature becomes the content query and whose
position becomes the position query. Query and key then live in one semantic space.

What the paper compares it with (table 2) are `PooledAligner`, and one point for all heads, no reweighting and points
anywhere in the image as options of `SemanticAligner`. They were never published as code: where the paper is silent,
what stands here is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.models.layers import MLP, joint_linear
from samdetr.models.position import MapGeometry, sine_points
from samdetr.models.system import Reordering
from samdetr_kernels import roi_align, salient_points

if TYPE_CHECKING:
    from samdetr.recipe.model import MultiScaleSAMDETRSection, SAMDETRSection

ROI_SIZE = 7
CHANNEL_REDUCTION = 4  # 256 -> 64 before the point branch
POINT_HIDDEN = 2  # hidden layers of the point branch, in widths


class AlignedQueries(NamedTuple):
    """New queries of one decoder layer: P of each kind, one for every head or one for all."""

    content: Tensor  # [B, Q, P, width]
    position: Tensor  # [B, Q, P, width]
    locations: Tensor  # [B, Q, P, 2] (x, y) in [0, 1] of the valid image
    scales: Tensor | None  # [B, Q, P, 2] (x, y), raw; SMCA only


class SemanticAligner(nn.Module):
    """Reference boxes and decoder embeddings -> content and position queries taken from the image.

    points: salient points of a query. reweighting: weigh their features and embeddings by the previous query.
    whole_image: points lie anywhere in the valid image instead of in the reference box, from which they are still
    predicted.
    """

    def __init__(
        self,
        *,
        width: int,
        points: int,
        smca: bool = False,
        initial_scale: float = 0.0,
        reweighting: bool = True,
        whole_image: bool = False,
    ) -> None:
        super().__init__()
        self.points, self.whole_image = points, whole_image
        reduced = width // CHANNEL_REDUCTION
        self.reduce = nn.Linear(width, reduced)
        hidden = POINT_HIDDEN * width
        outputs = points * (4 if smca else 2)
        self.point_mlp = MLP(ROI_SIZE * ROI_SIZE * reduced, width, hidden, hidden, outputs, fp32_output=True)
        nn.init.zeros_(self.point_mlp.last.bias[: 2 * points])
        nn.init.constant_(self.point_mlp.last.bias[2 * points :], initial_scale)
        self.content_gate = nn.Linear(width, points * width) if reweighting else None
        self.position_gate = nn.Linear(width, points * width) if reweighting else None

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, geometry: MapGeometry) -> AlignedQueries:
        """Align queries x [B, Q, width] with memory [B, H, W, width] in boxes [B, Q, 4], (cx, cy, w, h) in [0, 1]."""
        batch, queries, width = x.shape
        rois = rois_from_boxes(boxes, geometry)
        # ReLU(conv(RoIAlign(F)) + b) = ReLU(RoIAlign(F W^T) + b): align a quarter of the channels
        reduced = functional.linear(memory, self.reduce.weight)
        bins = functional.relu(roi_align(reduced, rois, ROI_SIZE, geometry.sampling_limit) + self.reduce.bias)
        numbers = self.point_mlp(bins.flatten(2)).view(batch, queries, -1, self.points, 2)
        points = numbers[:, :, 0].tanh()

        searched = boxes
        if self.whole_image:
            searched = torch.cat((torch.full_like(boxes[..., :2], 0.5), torch.ones_like(boxes[..., 2:])), dim=-1)
            rois = rois_from_boxes(searched, geometry)
        locations = searched[:, :, None, :2] + 0.5 * searched[:, :, None, 2:] * points
        content = salient_points(memory, rois, points, ROI_SIZE, geometry.sampling_limit)
        # constant for autograd, as published: points learn through what is sampled at them
        position = sine_points(locations.detach(), width).to(x.dtype)
        if self.content_gate is not None and self.position_gate is not None:
            gates = joint_linear(x, self.content_gate, self.position_gate)
            content_gate, position_gate = (gate.sigmoid().unflatten(-1, (self.points, width)) for gate in gates)
            content, position = content * content_gate, position * position_gate
        scales = numbers[:, :, 1] if numbers.shape[2] == 2 else None
        return AlignedQueries(content, position, locations, scales)


def published_projection_flops(aligner: SemanticAligner, args: Sequence[Any], out: AlignedQueries) -> int:
    """Count what projecting the cells of all RoIs, as published, costs beyond projecting the map, as here."""
    memory, rois = args[2], out.content.shape[0] * out.content.shape[1]
    return int((rois * ROI_SIZE**2 - memory[..., 0].numel()) * aligner.reduce.weight.numel())


class PooledAligner(nn.Module):
    """One query from the mean ("mean") or the maximum ("max") of the reference box's bins, at the box's centre."""

    def __init__(self, mode: Literal["mean", "max"]) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, geometry: MapGeometry) -> AlignedQueries:
        """See `SemanticAligner.forward`."""
        wide = memory.to(torch.promote_types(memory.dtype, torch.float32))  # the bins are not rounded before they meet
        bins = roi_align(wide, rois_from_boxes(boxes, geometry), ROI_SIZE, geometry.sampling_limit).flatten(2, 3)
        # of equal bins the first alone has the gradient, which amax would share
        pooled = bins.mean(2) if self.mode == "mean" else bins.max(2).values
        content = pooled.to(memory.dtype)
        centres = boxes[:, :, None, :2]
        position = sine_points(centres.detach(), x.shape[-1]).to(x.dtype)
        return AlignedQueries(content[:, :, None], position, centres, None)


def rois_from_boxes(boxes: Tensor, geometry: MapGeometry) -> Tensor:
    """Convert boxes [B, Q, 4] (cx, cy, w, h) in [0, 1] of the valid image to (x0, y0, x1, y1) in cells, constants."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    cells = geometry.valid.flip(-1)[:, None].to(boxes.dtype)
    return torch.cat(((centre - size / 2) * cells, (centre + size / 2) * cells), dim=-1).detach()


def build_aligner(section: SAMDETRSection | MultiScaleSAMDETRSection) -> SemanticAligner | PooledAligner:
    """Build the aligner of one decoder layer of a recipe, with random weights."""
    if section.resampling == "average":
        return PooledAligner("mean")
    if section.resampling == "max":
        return PooledAligner("max")
    return SemanticAligner(
        width=section.width,
        points=section.heads if section.resampling == "points" else 1,
        smca=section.smca,
        initial_scale=section.smca_initial_scale,
        reweighting=section.reweighting,
        whole_image=section.search_range == "image",
    )


# the inputs of the first point layer are published as channel, row, column; ours are row, column, channel
PUBLISHED_POINT_BRANCH = {
    "aligner.point_mlp.0.weight": Reordering(
        published=lambda weight: weight.unflatten(1, (ROI_SIZE * ROI_SIZE, -1)).transpose(1, 2).flatten(1),
        ours=lambda weight: weight.unflatten(1, (-1, ROI_SIZE * ROI_SIZE)).transpose(1, 2).flatten(1),
    )
}
