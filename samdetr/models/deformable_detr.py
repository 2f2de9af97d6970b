"""Deformable DETR (ICLR 2021): on one map or several, with box refinement, and with a first stage that proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samdetr.errors import SamdetrError
from samdetr.models.deformable_encoder import (
    DeformableAttention,
    Pyramid,
    PyramidDetector,
    PyramidHalf,
    build_pyramid_half,
    initialise_deformable,
)
from samdetr.models.layers import MLP, Attention, FeedForward, Fp32Linear, box_head, class_head, inverse_sigmoid
from samdetr.models.position import sine_boxes
from samdetr.structures import Outputs, Proposals

if TYPE_CHECKING:
    from samdetr.recipe import DeformableDETRSection

INITIAL_SIZE = -2.0  # of boxes around reference points, before the sigmoid
PROPOSAL_SIDE = 0.05  # of the finest level's proposals, a share of the image; each level doubles it
BORDER = 0.01  # a proposal closer to 0 or 1 than this is none
PADDED_LOGIT = -100.0  # of proposals at padded cells: its focal loss is zero, and it is chosen last


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the maps, feed-forward; the query's position is added before."""

    def __init__(self, *, width: int, heads: int, levels: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width=width, heads=heads, levels=levels)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, reference: Tensor, memory: Tensor, pyramid: Pyramid) -> Tensor:
        """x, query_position [B, Q, width]; reference, memory as of `DeformableAttention`. Returns [B, Q, width]."""
        placed = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))
        attended = self.cross_attention(x + query_position, reference, memory, pyramid)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class FirstStage(nn.Module):
    """Every cell proposes a box around itself; the most certain ones become the decoder's queries (appendix A.4)."""

    def __init__(self, *, width: int, num_queries: int, mask_padding: bool) -> None:
        super().__init__()
        self.num_queries, self.mask_padding = num_queries, mask_padding
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(2 * width, 2 * width)
        self.queries_norm = nn.LayerNorm(2 * width)
        for layer in (self.project, self.queries):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, memory: Tensor, pyramid: Pyramid, classify: nn.Module, locate: nn.Module
    ) -> tuple[Proposals, Tensor]:
        """memory [B, S, width] -> the proposals, and the cells of the best ones by the first logit, [B, Q] int64."""
        cells = memory.shape[1]
        if cells < self.num_queries:
            raise SamdetrError(
                f"the maps of a batch have {cells} cells, fewer than model.num_queries = {self.num_queries}, "
                "which model.two_stage takes from them: use larger images, or fewer queries."
            )
        sides = torch.cat(
            [
                pyramid.points.new_full((height * width,), PROPOSAL_SIDE * 2**level)
                for level, (height, width) in enumerate(pyramid.shapes)
            ]
        )
        around = torch.cat((pyramid.points, sides[None, :, None].expand(len(memory), -1, 2)), dim=-1)
        inside = ((around > BORDER) & (around < 1 - BORDER)).all(-1, keepdim=True)  # no padded cell is
        x = self.norm(self.project(memory.masked_fill(~inside, 0)))
        logits = classify(x)
        if self.mask_padding:
            logits = logits.masked_fill(~pyramid.mask[..., None], PADDED_LOGIT)
        start = torch.log(around / (1 - around)).masked_fill(~inside, torch.inf)
        boxes = (locate(x) + start).sigmoid()
        return Proposals(logits, boxes), logits[..., 0].topk(self.num_queries, dim=1).indices

    def queries_at(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and contents [B, Q, width] of queries for boxes [B, Q, 4]."""
        code = sine_boxes(boxes, self.queries.in_features).to(boxes.dtype)
        position, content = self.queries_norm(self.queries(code)).chunk(2, dim=-1)
        return position, content


class DeformableDETR(PyramidDetector):
    """A detector whose queries, learned or proposed by a first stage, each look around a reference.

    box_refine: a layer's boxes are the next layer's references, and each layer has heads of its own; otherwise
    references are points, and one pair of heads reads every layer. The last pair is the first stage's.
    """

    def __init__(
        self,
        half: PyramidHalf,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
        box_refine: bool,
        two_stage: bool,
    ) -> None:
        super().__init__(half)
        self.box_refine = box_refine
        self.methods = ("embed", "propose" if two_stage else "refer", "predict")
        self.decoder = nn.ModuleList(layers)
        heads = (len(layers) if box_refine else 1) + two_stage
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(box_head(width) for _ in range(heads))
        initialise_deformable(self.decoder)
        self.first_stage = None
        if two_stage:
            self.first_stage = FirstStage(width=width, num_queries=num_queries, mask_padding=half.mask_padding)
        else:
            self.queries = nn.Parameter(torch.randn(num_queries, 2 * width))
            self.reference_head = Fp32Linear(width, 2)
            nn.init.xavier_uniform_(self.reference_head.weight)
            nn.init.zeros_(self.reference_head.bias)
            first = self.box_heads[0]
            assert isinstance(first, MLP)
            nn.init.constant_(first.last.bias[2:], INITIAL_SIZE)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised, zero-padded bottom/right; image_sizes [B, 2] int valid (h, w)."""
        memory, _, pyramid = self.encode(images, image_sizes)
        proposals = None
        if self.first_stage is None:
            x, position, reference = (part.expand(len(memory), -1, -1) for part in self.refer())
        else:
            x, position, reference, proposals = self.propose(memory, pyramid)
        logits, boxes = [], []
        for number, layer in enumerate(self.decoder):
            x = layer(x, position, reference, memory, pyramid)
            head = number if self.box_refine else 0
            layer_logits, layer_boxes = self.predict(self.class_heads[head], self.box_heads[head], x, reference)
            reference = layer_boxes.detach() if self.box_refine else reference
            logits.append(layer_logits)
            boxes.append(layer_boxes)
        return Outputs(torch.stack(logits), torch.stack(boxes), proposals)

    def refer(self) -> tuple[Tensor, Tensor, Tensor]:
        """Contents and positions of the learned queries [Q, width], their reference points (x, y) in [0, 1], [Q, 2]."""
        position, content = self.queries.chunk(2, dim=-1)
        return content, position, self.reference_head(position).sigmoid()

    def propose(self, memory: Tensor, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor, Proposals]:
        """Contents and positions of queries [B, Q, width] at the best boxes [B, Q, 4], constants; all proposals."""
        assert self.first_stage is not None
        proposals, best = self.first_stage(memory, pyramid, self.class_heads[-1], self.box_heads[-1])
        reference = proposals.boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        position, content = self.first_stage.queries_at(reference)
        return content, position, reference, proposals

    @staticmethod
    def predict(classify: nn.Module, locate: nn.Module, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Q, K] and boxes [B, Q, 4] from what a layer gives and its references [B, Q, 2 or 4]."""
        start = inverse_sigmoid(reference)
        if reference.shape[-1] == 2:
            start = torch.cat((start, torch.zeros_like(start)), dim=-1)
        return classify(x), (locate(x) + start).sigmoid()


def build_deformable_detr(section: DeformableDETRSection) -> DeformableDETR:
    """The model of a recipe with random weights."""
    half = build_pyramid_half(section, ffn=section.ffn)
    layers = [
        DecoderLayer(
            width=section.width,
            heads=section.heads,
            levels=section.feature_levels,
            ffn=section.ffn,
            dropout=section.dropout,
        )
        for _ in range(section.decoder_layers)
    ]
    return DeformableDETR(
        half,
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        box_refine=section.box_refine,
        two_stage=section.two_stage,
    )
