"""The published SAM-DETR (CVPR 2022), with and without SMCA, in plain eager torch: op for op, for comparison only.

Sequences are [S, B, C] and maps NCHW, everything is materialised, and what the published code computes again in every
layer is computed again here. Parameters have the published names, so that `to_official` loads them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d, roi_align

from samdetr.errors import RecipeError
from samdetr.models import Detector
from samdetr.models.backbone import DEPTHS
from samdetr.models.official import to_official
from samdetr.recipe import ModelSection
from samdetr.recipe.model import SAMDETRSection
from samdetr.structures import Outputs

ROI_SIZE = 7
REDUCED = 64  # channels of the point branch
POINT_HIDDEN = 512
GROUPS = 32
TEMPERATURE = 10000.0
EPSILON = 1e-6  # of the position code's normalisation
CLAMP = 1e-5  # of the inverse sigmoid
SMCA_SMOOTH = 8


class BaselineSAMDETR(nn.Module):
    """The published forward pass: images [B, 3, H, W] and their padding mask -> `Outputs`.

    Raises RecipeError for a recipe with what the published model does not have.
    """

    def __init__(self, section: SAMDETRSection) -> None:
        super().__init__()
        _check_published(section)
        block, depths = DEPTHS[section.backbone.name]
        resnet = ResNet(
            block,
            list(depths),
            norm_layer=FrozenBatchNorm2d,
            replace_stride_with_dilation=[False, False, section.backbone.dilation],
        )
        for name, parameter in resnet.named_parameters():
            parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
        channels = resnet.fc.in_features
        body = IntermediateLayerGetter(resnet, {"layer4": "map"})
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": body})])
        projection: list[nn.Module] = [nn.Conv2d(channels, section.width, 1)]
        if section.input_norm == "group_norm":
            projection.append(nn.GroupNorm(GROUPS, section.width))
        self.input_proj = nn.ModuleList([nn.Sequential(*projection)])
        self.query_embed = nn.Embedding(section.num_queries, 4)
        self.class_embed = nn.ModuleList(
            nn.Linear(section.width, section.num_classes) for _ in range(section.decoder_layers)
        )
        self.bbox_embed = nn.ModuleList(
            _MLP(section.width, section.width, section.width, 4) for _ in range(section.decoder_layers)
        )
        self.transformer = nn.ModuleDict({"encoder": _Encoder(section), "decoder": _Decoder(section, self.bbox_embed)})

    def load_from(self, model: Detector) -> None:
        """Take over the weights of our model, all of them (torch raises where one does not fit)."""
        self.load_state_dict(to_official(model))

    def forward(self, images: Tensor, mask: Tensor) -> Outputs:
        """images [B, 3, H, W] normalised; mask [B, H, W] bool, True: padding."""
        features = self.backbone[0]["body"](images)["map"]
        padding = functional.interpolate(mask[None].float(), size=features.shape[-2:]).to(torch.bool)[0]
        x = self.input_proj[0](features)
        position = sine_map(padding, x.shape[1]).to(x.dtype)
        position, sequence = (part.flatten(2).permute(2, 0, 1) for part in (position, x))
        memory = self.transformer["encoder"](sequence, position, padding.flatten(1))
        return self.decode(memory, position, padding)

    def decode(self, memory: Tensor, position: Tensor, padding: Tensor) -> Outputs:
        """memory, position [h * w, B, width]; padding [B, h, w] bool."""
        start = self.query_embed.weight[:, None].repeat(1, len(padding), 1)
        states, references = self.transformer["decoder"](memory, position, padding, start)
        logits, boxes = [], []
        for level, (state, reference) in enumerate(zip(states, references, strict=True)):
            offset = self.bbox_embed[level](state)  # evaluated in the decoder too, as published
            offset += inverse_sigmoid(reference)
            logits.append(self.class_embed[level](state))
            boxes.append(offset.sigmoid())
        return Outputs(torch.stack(logits), torch.stack(boxes))


def _check_published(section: ModelSection) -> None:
    for key, published in (
        ("system", "sam_detr"),
        ("padding", "published"),
        ("backbone.norm", "frozen"),
        ("backbone.frozen_stages", 2),
        ("backbone.stages", 4),
        ("backbone.width", 64),
    ):
        value = attrgetter(key)(section)
        if value != published:
            raise RecipeError(
                f"model.{key} is {value!r}, and the published model has {published!r} only: there is no baseline. "
                "perf/baseline.py is SAM-DETR on one map: take such a recipe of the published table, or --no-baseline."
            )


class _MLP(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class _EncoderLayer(nn.Module):
    def __init__(self, section: SAMDETRSection) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(section.width, section.heads, dropout=section.dropout)
        self.linear1 = nn.Linear(section.width, section.ffn)
        self.linear2 = nn.Linear(section.ffn, section.width)
        self.norm1, self.norm2 = nn.LayerNorm(section.width), nn.LayerNorm(section.width)
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        query = key = x + position
        attended, _ = self.self_attn(query, key, x, key_padding_mask=padding)
        x = self.norm1(x + self.dropout(attended))
        hidden = self.linear2(self.dropout(functional.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(hidden))


class _Encoder(nn.Module):
    def __init__(self, section: SAMDETRSection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_EncoderLayer(section) for _ in range(section.encoder_layers))

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, padding)
        return x


class _Attention(nn.Module):
    """Attention with a materialised matrix. The published parameters have only the output projection here."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """query [Q, B, heads D], key [S, B, heads D], value [S, B, C]; padding [B, S]; prior [B heads, Q, S].

        Returns [Q, B, C] and the mean of the heads' weights, [B, Q, S].
        """
        queries, batch, width = query.shape
        cells, heads = len(key), self.heads
        query = query * (width // heads) ** -0.5
        query, key, value = (
            part.contiguous().view(len(part), batch * heads, -1).transpose(0, 1) for part in (query, key, value)
        )
        scores = torch.bmm(query, key.transpose(1, 2))
        if prior is not None:
            scores = scores + prior
        if padding is not None:
            scores = scores.view(batch, heads, queries, cells).masked_fill(padding[:, None, None], float("-inf"))
            scores = scores.view(batch * heads, queries, cells)
        weights = functional.dropout(scores.softmax(-1), self.dropout, self.training)
        attended = torch.bmm(weights, value).transpose(0, 1).contiguous().view(queries, batch, -1)
        return self.out_proj(attended), weights.view(batch, heads, queries, cells).sum(1) / heads


class _DecoderLayer(nn.Module):
    def __init__(self, section: SAMDETRSection) -> None:
        super().__init__()
        width, heads = section.width, section.heads
        self.heads, self.smca = heads, section.smca
        for name in ("sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"):
            self.add_module(f"{name}_proj", nn.Linear(width, width))
        self.self_attn = _Attention(width, heads, section.dropout)
        self.point1 = nn.Sequential(nn.Conv2d(width, width * REDUCED // 256, 1), nn.ReLU())
        hidden = width * POINT_HIDDEN // 256
        self.point2 = nn.Sequential(
            nn.Linear(width * REDUCED // 256 * ROI_SIZE * ROI_SIZE, width),
            nn.ReLU(),
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, heads * (4 if section.smca else 2)),
        )
        self.attn1, self.attn2 = nn.Linear(width, heads * width), nn.Linear(width, heads * width)
        for name in ("ca_qcontent", "ca_kcontent", "ca_v"):
            self.add_module(f"{name}_proj", nn.Linear(width, width))
        self.ca_qpos_sine_proj, self.ca_kpos_sine_proj = _MLP(width, width, width), _MLP(width, width, width)
        self.cross_attn = _Attention(width, heads, section.dropout)
        self.linear1, self.linear2 = nn.Linear(width, section.ffn), nn.Linear(section.ffn, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, x: Tensor, memory: Tensor, position: Tensor, padding: Tensor, boxes: Tensor) -> Tensor:
        """x [Q, B, C]; memory, position [S, B, C]; padding [B, h, w]; boxes [Q, B, 4] (cx, cy, w, h) in [0, 1]."""
        code = sine_points(boxes[..., :2], x.shape[-1]).to(x.dtype)
        query = self.sa_qcontent_proj(x) + self.sa_qpos_proj(code)
        key = self.sa_kcontent_proj(x) + self.sa_kpos_proj(code)
        attended, _ = self.self_attn(query, key, self.sa_v_proj(x))
        x = self.norm1(x + self.dropout(attended))
        attended, _ = self._cross_attention(x, memory, position, padding, boxes)
        x = self.norm2(x + self.dropout(attended))
        hidden = self.linear2(self.dropout(functional.relu(self.linear1(x))))
        return self.norm3(x + self.dropout(hidden))

    def _cross_attention(
        self, x: Tensor, memory: Tensor, position: Tensor, padding: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        (queries, batch, width), heads, cells = x.shape, self.heads, len(memory)
        extent = valid_extent(padding)
        content, numbers = self._regions(memory, boxes, padding, extent)
        points = numbers[..., : 2 * heads].tanh().view(batch, queries, heads, 2)
        content = functional.grid_sample(content, points.flatten(0, 1)[:, :, None], align_corners=False)
        content = content.view(batch, queries, width, heads).permute(1, 0, 3, 2)
        content = content * self.attn1(x).sigmoid().view(queries, batch, heads, width)

        points = points.transpose(0, 1)
        locations = boxes[..., None, :2] + 0.5 * boxes[..., None, 2:] * points  # [Q, B, heads, 2]
        code = sine_points(locations.detach(), width).to(x.dtype)
        code = code * self.attn2(x).sigmoid().view(queries, batch, heads, width)

        query = (self.ca_qcontent_proj(content) + self.ca_qpos_sine_proj(code)).flatten(2)
        key, key_code = (
            part[:, :, None].expand(-1, -1, heads, -1)
            for part in (self.ca_kcontent_proj(memory), self.ca_kpos_sine_proj(position))
        )
        key = (key + key_code).view(cells, batch, heads * width)
        prior = None
        if self.smca:
            scales = numbers[..., 2 * heads :].view(batch, queries, heads, 2).transpose(0, 1)
            prior = gaussian(locations * extent[:, None], scales, padding.shape[1], padding.shape[2])
        return self.cross_attn(query, key, self.ca_v_proj(memory), padding.flatten(1), prior)

    def _regions(self, memory: Tensor, boxes: Tensor, padding: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
        """Return RoI features for the content [B Q, C, 7, 7], and the point branch's numbers [B, Q, 2 or 4 heads]."""
        cells = memory.permute(1, 2, 0).view(padding.shape[0], -1, *padding.shape[1:])
        rois = list((to_corners(boxes) * extent.repeat(1, 2)).unbind(1))
        regions = self.point1(roi_align(cells, rois, ROI_SIZE, aligned=True))
        numbers = self.point2(regions.flatten(1)).view(padding.shape[0], len(boxes), -1)
        return roi_align(cells, rois, ROI_SIZE, aligned=True), numbers


class _Decoder(nn.Module):
    def __init__(self, section: SAMDETRSection, bbox_embed: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DecoderLayer(section) for _ in range(section.decoder_layers))
        self.bbox_embed = bbox_embed  # the model's own: stands twice in a published state dict

    def forward(self, memory: Tensor, position: Tensor, padding: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """start [Q, B, 4] before the sigmoid. Returns states [L, B, Q, C] and reference boxes [L, B, Q, 4]."""
        x = torch.zeros(*start.shape[:2], memory.shape[-1], dtype=memory.dtype, device=memory.device)
        states, references, before = [], [], start
        for number, layer in enumerate(self.layers):
            if number > 0:
                before = (self.bbox_embed[number - 1](x) + before).detach()
            boxes = before.sigmoid()
            x = layer(x, memory, position, padding, boxes)
            states.append(x)
            references.append(boxes)
        return torch.stack(states).transpose(1, 2), torch.stack(references).transpose(1, 2)


def valid_extent(padding: Tensor) -> Tensor:
    """Compute the valid width and height of a map from its mask [B, h, w] (True: padding): [B, 2]."""
    height, width = padding.shape[1:]
    rows, columns = (~padding[:, :, 0]).sum(1), (~padding[:, 0, :]).sum(1)
    return torch.stack((columns.float() / width * width, rows.float() / height * height), -1)


def gaussian(points: Tensor, scales: Tensor, height: int, width: int) -> Tensor:
    """Compute SMCA's term: points and scales [Q, B, heads, 2] in cells -> [B heads, Q, height width]."""
    y, x = torch.meshgrid(
        torch.arange(height, dtype=points.dtype, device=points.device),
        torch.arange(width, dtype=points.dtype, device=points.device),
        indexing="ij",
    )
    grid = torch.stack((x, y), -1).flatten(0, 1) + 0.5
    distance = (points.flatten(1, 2)[:, None] - grid[:, None]).pow(2)  # [Q, S, B heads, 2]
    return (-(distance * scales.flatten(1, 2)[:, None].pow(2)).sum(-1) / SMCA_SMOOTH).permute(2, 0, 1)


def sine_map(padding: Tensor, channels: int) -> Tensor:
    """Compute the position code of a mask [B, h, w] (True: padding): [B, channels, h, w] float32."""
    valid = ~padding
    y, x = (valid.cumsum(axis, dtype=torch.float32) - 0.5 for axis in (1, 2))
    y = y / (y[:, -1:, :] + EPSILON + 0.5) * (2 * math.pi)
    x = x / (x[:, :, -1:] + EPSILON + 0.5) * (2 * math.pi)
    period = _periods(channels // 2, padding.device)
    return torch.cat((_waves(y, period), _waves(x, period)), -1).permute(0, 3, 1, 2)


def sine_points(points: Tensor, channels: int) -> Tensor:
    """Compute the position code of points [..., 2] (x, y) in [0, 1]: [..., channels] float32, y first."""
    scaled = points.float() * (2 * math.pi)
    period = _periods(channels // 2, points.device)
    return torch.cat((_waves(scaled[..., 1], period), _waves(scaled[..., 0], period)), -1)


def _periods(channels: int, device: torch.device) -> Tensor:
    index = torch.arange(channels, dtype=torch.float32, device=device)
    return TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / channels)


def _waves(coordinate: Tensor, period: Tensor) -> Tensor:
    angle = coordinate[..., None] / period
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2)


def to_corners(boxes: Tensor) -> Tensor:
    """Convert (cx, cy, w, h) -> (x0, y0, x1, y1), [..., 4]."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height), -1)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Compute log(x / (1 - x)), clamped as published."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=CLAMP) / (1 - x).clamp(min=CLAMP))
