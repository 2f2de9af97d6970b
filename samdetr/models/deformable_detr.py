"""Deformable DETR (ICLR 2021): on one map or several, with box refinement, and with a first stage that proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samdetr.errors import SamdetrError
from samdetr.models.deformable_encoder import (
    CONVOLUTIONS,
    PUBLISHED_ATTENTION,
    PUBLISHED_ENCODER_LAYER,
    PUBLISHED_PYRAMID,
    SAMPLING,
    DeformableAttention,
    EncodedPyramid,
    Pyramid,
    build_pyramid_encoder,
    check_levels,
    published_sampling_flops,
    reset_deformable,
)
from samdetr.models.detector import EncoderDecoder
from samdetr.models.layers import (
    MLP,
    Attention,
    FeedForward,
    Fp32Linear,
    LayerSizes,
    box_head_flops,
    boxes_around,
    build_layer_sizes,
    inverse_sigmoid,
    make_box_head,
    make_class_head,
)
from samdetr.models.position import sine_boxes
from samdetr.models.system import REPEATED, PublishedLayout, System, check_settings
from samdetr.structures import Outputs, Proposals

if TYPE_CHECKING:
    from samdetr.models.system import State
    from samdetr.recipe.model import DeformableDETRSection

INITIAL_SIZE = -2.0  # of boxes around reference points, before the sigmoid
PROPOSAL_SIDE = 0.05  # of the finest level's proposals, a share of the image; each level doubles it
BORDER = 0.01  # a proposal closer to 0 or 1 than this is none
PADDED_LOGIT = -100.0  # of proposals at padded cells: its focal loss is zero, and it is chosen last


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the maps, feed-forward; the query's position is added before."""

    def __init__(self, sizes: LayerSizes, *, levels: int) -> None:
        super().__init__()
        width, heads, ffn, dropout = sizes
        self.self_attention = Attention(width=width, heads=heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width=width, heads=heads, levels=levels)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width=width, hidden=ffn, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, reference: Tensor, memory: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layer on x, query_position [B, Q, width]: [B, Q, width]. The others: see `DeformableAttention`."""
        positioned = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(positioned, positioned, x)))
        attended = self.cross_attention(x + query_position, reference, memory, pyramid)
        return self.feed_forward(self.norm2(x + self.dropout(attended)))


class LearnedQueries(nn.Module):
    """Queries that are the same for every image, with a reference point each."""

    def __init__(self, num_queries: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_queries, 2 * width))
        self.reference_head = Fp32Linear(width, 2)
        nn.init.xavier_uniform_(self.reference_head.weight)
        nn.init.zeros_(self.reference_head.bias)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give contents and positions of the queries [Q, width], and reference points (x, y) in [0, 1], [Q, 2]."""
        position, content = self.embedding.chunk(2, dim=-1)
        return content, position, self.reference_head(position).sigmoid()


class CellProposals(nn.Module):
    """Every cell proposes a box around itself (appendix A.4)."""

    def __init__(self, *, width: int, num_queries: int, mask_padding: bool) -> None:
        super().__init__()
        self.num_queries, self.mask_padding = num_queries, mask_padding
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, memory: Tensor, pyramid: Pyramid, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Proposals, Tensor]:
        """Propose boxes from memory [B, S, width], and find the cells of the best by the first logit, [B, Q] int64.

        Raises SamdetrError where there are fewer cells than queries.
        """
        cells = memory.shape[1]
        if cells < self.num_queries:
            raise SamdetrError(
                f"the maps of a batch have {cells} cells, fewer than model.num_queries = {self.num_queries}, "
                "which model.two_stage takes from them: use larger images, or fewer queries."
            )
        sides = torch.cat(
            [
                pyramid.points.new_full((height * width,), PROPOSAL_SIDE * 2**level)
                for level, (height, width) in enumerate(pyramid.spatial_shapes)
            ]
        )
        around = torch.cat((pyramid.points, sides[None, :, None].expand(len(memory), -1, 2)), dim=-1)
        inside = ((around > BORDER) & (around < 1 - BORDER)).all(-1, keepdim=True)  # no padded cell is
        x = self.norm(self.project(memory.masked_fill(~inside, 0)))
        logits = class_head(x)
        if self.mask_padding:
            logits = logits.masked_fill(~pyramid.mask[..., None], PADDED_LOGIT)
        start = torch.log(around / (1 - around)).masked_fill(~inside, torch.inf)
        boxes = boxes_around(box_head(x), start)
        return Proposals(logits, boxes), logits[..., 0].topk(self.num_queries, dim=1).indices


class FirstStage(nn.Module):
    """The most certain of all cells' proposals become the decoder's queries (appendix A.4)."""

    def __init__(self, *, width: int, num_queries: int, mask_padding: bool) -> None:
        super().__init__()
        self.propose = CellProposals(width=width, num_queries=num_queries, mask_padding=mask_padding)
        self.transform = nn.Linear(2 * width, 2 * width)
        self.transform_norm = nn.LayerNorm(2 * width)
        for layer in (self.propose.project, self.transform):
            nn.init.xavier_uniform_(layer.weight)

    def forward(
        self, memory: Tensor, pyramid: Pyramid, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, Proposals]:
        """Choose queries from memory [B, S, width].

        Returns their contents and positions [B, Q, width], their boxes [B, Q, 4] as constants, and all proposals.
        """
        proposals, best = self.propose(memory, pyramid, class_head, box_head)
        reference = proposals.boxes.detach().gather(1, best[..., None].expand(-1, -1, 4))
        sine_embed = sine_boxes(reference, self.transform.in_features).to(reference.dtype)
        position, content = self.transform_norm(self.transform(sine_embed)).chunk(2, dim=-1)
        return content, position, reference, proposals


class BoxPrediction(nn.Module):
    """A layer's predictions around its references. It has no weights: the heads are given."""

    def forward(
        self, x: Tensor, reference: Tensor, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Predict logits [B, Q, K] and boxes [B, Q, 4] from x [B, Q, width], reference [B, Q, 2 or 4] in [0, 1]."""
        start = inverse_sigmoid(reference)
        return class_head(x), boxes_around(box_head(x), start)


class DeformableDETRDecoder(nn.Module):
    """Queries, learned or proposed by a first stage, each look around a reference.

    box_refine: a layer's boxes are the next layer's references, and each layer has heads of its own; otherwise
    references are points, and one pair of heads reads every layer. The last pair is the first stage's.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        *,
        width: int,
        num_classes: int,
        num_queries: int,
        box_refine: bool,
        two_stage: bool,
        mask_padding: bool,
    ) -> None:
        super().__init__()
        self.box_refine = box_refine
        self.layers = nn.ModuleList(layers)
        heads = (len(layers) if box_refine else 1) + two_stage
        self.class_heads = nn.ModuleList(make_class_head(width, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(make_box_head(width) for _ in range(heads))
        self.predict = BoxPrediction()
        reset_deformable(self.layers)
        self.queries: LearnedQueries | FirstStage
        if two_stage:
            self.queries = FirstStage(width=width, num_queries=num_queries, mask_padding=mask_padding)
        else:
            self.queries = LearnedQueries(num_queries, width)
            first = self.box_heads[0]
            assert isinstance(first, MLP)
            nn.init.constant_(first.last.bias[2:], INITIAL_SIZE)
        self.compiled_parts = (self.queries, self.predict)

    def forward(self, encoded: EncodedPyramid) -> Outputs:
        """Predict logits and boxes after every layer, and in a first stage if there is one."""
        memory, pyramid, proposals = encoded.memory, encoded.pyramid, None
        if isinstance(self.queries, FirstStage):
            heads = self.class_heads[-1], self.box_heads[-1]
            x, position, reference, proposals = self.queries(memory, pyramid, *heads)
        else:
            x, position, reference = (part.expand(len(memory), -1, -1) for part in self.queries())
        logits, boxes = [], []
        for number, layer in enumerate(self.layers):
            x = layer(x, position, reference, memory, pyramid)
            head = number if self.box_refine else 0
            layer_logits, layer_boxes = self.predict(x, reference, self.class_heads[head], self.box_heads[head])
            reference = layer_boxes.detach() if self.box_refine else reference
            logits.append(layer_logits)
            boxes.append(layer_boxes)
        return Outputs(torch.stack(logits), torch.stack(boxes), proposals)


def build_deformable_detr(section: DeformableDETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights."""
    encoder = build_pyramid_encoder(section, ffn=section.ffn)
    sizes, levels = build_layer_sizes(section), section.feature_levels
    layers = [DecoderLayer(sizes, levels=levels) for _ in range(section.decoder_layers)]
    encoder.reset_parameters()  # after the decoder's layers: a seed means this order of draws
    decoder = DeformableDETRDecoder(
        layers,
        width=section.width,
        num_classes=section.num_classes,
        num_queries=section.num_queries,
        box_refine=section.box_refine,
        two_stage=section.two_stage,
        mask_padding=section.padding == "masked",
    )
    return EncoderDecoder(SYSTEM, encoder, decoder)


def check_form(model: Any, state: State) -> None:
    """Raise CheckpointError where the published checkpoint is of another form of Deformable-DETR than the model."""
    check_levels(model, state)
    decoder = model.decoder
    check_settings(
        box_refine=(f"{REPEATED}bbox_embed.0.layers.0.weight" in state, decoder.box_refine),
        two_stage=("transformer.pos_trans.weight" in state, isinstance(decoder.queries, FirstStage)),
    )


def repeated_heads(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Return the published keys that repeat another one, and that one. names: ours -> published.

    Without refinement they are those of the one pair of heads, for each layer; with it those of the box heads, and with
    a first stage those of the class heads too, which the published decoder holds once more.
    """
    heads, decoder = [names[name] for name in names if name.startswith("decoder.box_heads.")], model.decoder
    class_heads = [names[name] for name in names if name.startswith("decoder.class_heads.")]
    if not decoder.box_refine:
        numbers = range(1, len(decoder.layers))
        return {key.replace(".0.", f".{n}.", 1): key for key in heads + class_heads for n in numbers}
    if isinstance(decoder.queries, FirstStage):
        heads += class_heads
    return {REPEATED + key: key for key in heads}


def published_box_head_flops(decoder: DeformableDETRDecoder, args: Sequence[Any], out: Outputs) -> int:
    """Count the box heads that the published code runs twice with box refinement: all of them."""
    return box_head_flops(decoder.box_heads[: len(decoder.layers)], out) if decoder.box_refine else 0


SYSTEM = System(
    name="deformable_detr",
    build=build_deformable_detr,
    class_heads="decoder.class_heads.",
    published_flops={DeformableDETRDecoder: published_box_head_flops, DeformableAttention: published_sampling_flops},
    sampling=(SAMPLING, ".reference_head."),
    published=PublishedLayout(
        landmark="transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
        whole={
            **PUBLISHED_PYRAMID,
            "decoder.queries.embedding": "query_embed.weight",
            "decoder.queries.reference_head.": "transformer.reference_points.",
            "decoder.queries.propose.project.": "transformer.enc_output.",
            "decoder.queries.propose.norm.": "transformer.enc_output_norm.",
            "decoder.queries.transform.": "transformer.pos_trans.",
            "decoder.queries.transform_norm.": "transformer.pos_trans_norm.",
        },
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer={
            "self_attention.in_proj.": "self_attn.in_proj_",
            "self_attention.out_proj.": "self_attn.out_proj.",
            **{f"cross_attention.{ours}": f"cross_attn.{theirs}" for ours, theirs in PUBLISHED_ATTENTION.items()},
            "norm1.": "norm2.",
            "norm2.": "norm1.",
            "feed_forward.norm.": "norm3.",
            "feed_forward.": "",
        },
        check=check_form,
        convolutions=CONVOLUTIONS,
        copies=repeated_heads,
    ),
)
