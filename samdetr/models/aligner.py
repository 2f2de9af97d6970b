"""The semantic aligner: SAM-DETR's contribution (CVPR 2022, section 3.2-3.4).

Before cross-attention every object query is replaced by features sampled from the encoded image itself: in its
reference box each attention head picks one salient point, whose feature becomes the content query and whose
position becomes the position query. Query and key then live in one semantic space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samdetr.models.layers import MLP, joint_linear
from samdetr.models.position import MapGeometry, sine_points
from samdetr_kernels import roi_align, salient_points

ROI_SIZE = 7
CHANNEL_REDUCTION = 4  # 256 -> 64 before the point branch
POINT_HIDDEN = 2  # hidden layers of the point branch, in widths


class AlignedQueries(NamedTuple):
    """New queries of one decoder layer, one of each kind per head (P heads = salient points)."""

    content: Tensor  # [B, Q, P, width]
    position: Tensor  # [B, Q, P, width]
    points: Tensor  # [B, Q, P, 2] (x, y) in [-1, 1] of the reference box
    locations: Tensor  # [B, Q, P, 2] (x, y) in [0, 1] of the valid image
    scales: Tensor | None  # [B, Q, P, 2] (x, y), raw; SMCA only


class SemanticAligner(nn.Module):
    """Reference boxes and decoder embeddings -> content and position queries taken from the image."""

    def __init__(self, *, width: int, heads: int, smca: bool, initial_scale: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        reduced = width // CHANNEL_REDUCTION
        self.reduce = nn.Linear(width, reduced)
        hidden = POINT_HIDDEN * width
        outputs = heads * (4 if smca else 2)
        self.point_mlp = MLP(ROI_SIZE * ROI_SIZE * reduced, width, hidden, hidden, outputs, exact=True)
        nn.init.zeros_(self.point_mlp.last.bias[: 2 * heads])
        nn.init.constant_(self.point_mlp.last.bias[2 * heads :], initial_scale)
        self.content_gate = nn.Linear(width, heads * width)
        self.position_gate = nn.Linear(width, heads * width)

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, geometry: MapGeometry) -> AlignedQueries:
        """x [B, Q, width]; boxes [B, Q, 4] (cx, cy, w, h) in [0, 1]; memory [B, H, W, width]."""
        batch, queries, width = x.shape
        centre, size = boxes[..., :2], boxes[..., 2:]
        cells = geometry.valid.flip(-1)[:, None].to(boxes.dtype)
        rois = torch.cat(((centre - size / 2) * cells, (centre + size / 2) * cells), dim=-1).detach()

        # ReLU(conv(RoIAlign(F)) + b) = ReLU(RoIAlign(F W^T) + b): align a quarter of the channels
        reduced = functional.linear(memory, self.reduce.weight)
        regions = functional.relu(roi_align(reduced, rois, ROI_SIZE, geometry.sampling_limit) + self.reduce.bias)
        numbers = self.point_mlp(regions.flatten(2)).view(batch, queries, -1, self.heads, 2)
        points = numbers[:, :, 0].tanh()
        locations = centre[:, :, None] + 0.5 * size[:, :, None] * points

        content = salient_points(memory, rois, points, ROI_SIZE, geometry.sampling_limit)
        gates = joint_linear(x, self.content_gate, self.position_gate)
        content_gate, position_gate = (gate.sigmoid().unflatten(-1, (self.heads, width)) for gate in gates)
        content = content * content_gate
        # constant for autograd, as published: points learn through what is sampled at them
        position = sine_points(locations.detach(), width).to(x.dtype) * position_gate
        scales = numbers[:, :, 1] if numbers.shape[2] == 2 else None
        return AlignedQueries(content, position, points, locations, scales)
