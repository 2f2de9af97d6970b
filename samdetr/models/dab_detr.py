"""DAB-DETR (ICLR 2022): queries are anchor boxes, refined by every layer; attention widens with the box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from samdetr.models.conditional_detr import PUBLISHED_LAYER, DecoderLayer, QueryScale
from samdetr.models.detector import EncoderDecoder
from samdetr.models.encoder import (
    CONVOLUTIONS,
    PUBLISHED_ENCODER_LAYER,
    EncodedMap,
    build_image_encoder,
    check_input_norm,
)
from samdetr.models.layers import (
    MLP,
    box_head_flops,
    build_layer_sizes,
    inverse_sigmoid,
    make_box_head,
    make_class_head,
    reset_matrices,
)
from samdetr.models.position import sine_points
from samdetr.models.system import REPEATED, PublishedLayout, System
from samdetr.structures import Outputs

if TYPE_CHECKING:
    from samdetr.recipe.model import DABDETRSection

MAP_TEMPERATURE = 20.0  # of the position embedding of map cells; anchors keep DETR's 10000 ("temperature tuning")
EPSILON = 1e-3  # of the inverse sigmoid, as published


class AnchorQueries(nn.Module):
    """From anchor boxes to the queries of a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position_head = MLP(2 * width, width, width)
        self.scale = MLP(width, width, width)
        self.size_head = MLP(width, width, 2, fp32_output=True)

    def forward(self, x: Tensor, anchors: Tensor, *, first: bool) -> tuple[Tensor, Tensor]:
        """Compute the queries' positions and the sine embedding of where they look in the map, both [B, Q, width].

        x [B, Q, width], input of the layer; anchors [B, Q, 4] (cx, cy, w, h) in [0, 1] of the valid image. PE: sine
        embedding. Positions: MLP(PE(cy, cx, w, h)). Where they look: (PE(cy) h_ref / h, PE(cx) w_ref / w) with h_ref,
        w_ref predicted from x (the paper's modulated attention); after the first layer times a scale [B, Q, width],
        also predicted from x.
        """
        width = x.shape[-1]
        centre = sine_points(anchors[..., :2], width)
        size = sine_points(anchors[..., 2:].flip(-1), width)  # w, then h
        query_position = self.position_head(torch.cat((centre, size), dim=-1).to(x.dtype))
        modulation = (self.size_head(x).sigmoid() / anchors[..., 2:]).flip(-1)  # of y, then of x
        sine_embed = (centre.unflatten(-1, (2, -1)) * modulation[..., None]).flatten(-2).to(x.dtype)
        return query_position, sine_embed if first else sine_embed * self.scale(x)


class BoxRefinement(nn.Module):
    """The box head, whose output is added to the anchors before the sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.box_head = make_box_head(width)

    def forward(self, x: Tensor, anchors: Tensor) -> Tensor:
        """Refine anchors [..., 4] by x [..., width]: boxes [..., 4], both in [0, 1] of the valid image."""
        boxes: Tensor = (self.box_head(x) + inverse_sigmoid(anchors, EPSILON)).sigmoid()
        return boxes


class ClassPrediction(nn.Module):
    """The norm of the layers' outputs, and the class head."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.class_head = make_class_head(width, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Norm x [L, B, Q, width] and predict logits [L, B, Q, K]: both."""
        x = self.norm(x)
        return x, self.class_head(x)


class DABDETRDecoder(nn.Module):
    """Each layer's boxes are the next layer's anchors; one pair of heads reads every layer.

    Next anchors use the un-normed layer output, detached; predictions use the normed output and keep the gradient to
    the anchors (as published).
    """

    def __init__(self, layers: Sequence[DecoderLayer], *, width: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.queries = AnchorQueries(width)
        self.anchors = nn.Parameter(torch.randn(num_queries, 4))  # before the sigmoid
        self.classes = ClassPrediction(width, num_classes)
        self.refine = BoxRefinement(width)
        self.compiled_parts = (self.queries, self.classes, self.refine)

    def forward(self, encoded: EncodedMap) -> Outputs:
        """Predict logits and boxes after every layer."""
        memory, pos_embed, mask = encoded.flatten()
        anchors = self.anchors.sigmoid().expand(len(memory), -1, -1)
        x = memory.new_zeros(*anchors.shape[:2], memory.shape[-1])
        outputs: list[Tensor] = []
        references = [anchors]
        for layer in self.layers:
            query_position, sine_embed = self.queries(x, anchors, first=not outputs)
            x = layer(x, query_position, sine_embed, memory, pos_embed, mask)
            outputs.append(x)
            if len(outputs) < len(self.layers):
                references.append(self.refine(x, anchors))
                anchors = references[-1].detach()
        normed, logits = self.classes(torch.stack(outputs))
        return Outputs(logits, self.refine(normed, torch.stack(references)))


def build_dab_detr(section: DABDETRSection) -> EncoderDecoder:
    """Build the detector of a recipe, with random weights."""
    width = section.width
    encoder = build_image_encoder(
        section, pos_temperature=MAP_TEMPERATURE, pos_scale=QueryScale(width), activation=nn.PReLU
    )
    sizes = build_layer_sizes(section)
    layers = [DecoderLayer(sizes, first=number == 0, activation=nn.PReLU) for number in range(section.decoder_layers)]
    decoder = DABDETRDecoder(layers, width=width, num_classes=section.num_classes, num_queries=section.num_queries)
    reset_matrices(encoder.transformer, decoder.layers, decoder.queries)
    return EncoderDecoder(SYSTEM, encoder, decoder)


def repeated_box_head(model: Any, names: Mapping[str, str]) -> dict[str, str]:
    """Return the published decoder's second copy of the box head: its key -> original. names: ours -> published."""
    return {REPEATED + names[name]: names[name] for name in names if name.startswith("decoder.refine.box_head.")}


def published_box_head_flops(decoder: DABDETRDecoder, args: Sequence[Any], out: Outputs) -> int:
    """Count the box head once more: the published code also runs it after the last layer."""
    return box_head_flops([decoder.refine.box_head], out)


SYSTEM = System(
    name="dab_detr",
    build=build_dab_detr,
    published_flops={DABDETRDecoder: published_box_head_flops},
    class_heads="decoder.classes.class_head.",
    published=PublishedLayout(
        landmark="transformer.decoder.ref_anchor_head.layers.0.weight",
        whole={
            "encoder.backbone.": "backbone.0.body.",
            "encoder.embed.input_proj.": "input_proj.",
            "encoder.transformer.pos_scale.scale.": "transformer.encoder.query_scale.layers.",
            "decoder.anchors": "refpoint_embed.weight",
            "decoder.queries.position_head.": "transformer.decoder.ref_point_head.layers.",
            "decoder.queries.scale.": "transformer.decoder.query_scale.layers.",
            "decoder.queries.size_head.": "transformer.decoder.ref_anchor_head.layers.",
            "decoder.classes.norm.": "transformer.decoder.norm.",
            "decoder.classes.class_head.": "class_embed.",
            "decoder.refine.box_head.": "bbox_embed.layers.",
        },
        encoder_layer=PUBLISHED_ENCODER_LAYER,
        decoder_layer=PUBLISHED_LAYER,
        check=check_input_norm,
        convolutions=CONVOLUTIONS,
        copies=repeated_box_head,
    ),
)
