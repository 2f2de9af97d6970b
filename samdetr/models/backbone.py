"""The convolutional backbone: torchvision's residual blocks up to one or a few feature maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model_weights
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1
from torchvision.ops import FrozenBatchNorm2d

from samdetr.errors import CheckpointError
from samdetr.models.position import covered_cells, valid_mask
from samdetr.models.state import differences, first_of

if TYPE_CHECKING:
    from samdetr.recipe.model import BackboneSection

Block = type[BasicBlock] | type[Bottleneck]
DEPTHS: dict[str, tuple[Block, tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class Backbone(nn.Module):
    """A ResNet without its classifier. Parameter names are torchvision's.

    norm: "frozen" keeps BatchNorm's statistics and gains constant (pretrained weights), "batch" trains them.
    dilation: DC5, the last stage dilates by 2 in place of its stride (Bottleneck models only).
    frozen_stages: how many stages get no gradient; 1 is the stem, 2 also layer1. stages: residual stages in use.
    width: channels of the stem. levels: how many of the last stages give a map. mask_padding: zero the padded cells
    before every spatial convolution, so that the valid cells do not depend on the padding (the published model does
    not).
    """

    def __init__(
        self,
        *,
        name: str = "resnet50",
        norm: str = "frozen",
        dilation: bool = False,
        frozen_stages: int = 2,
        stages: int = 4,
        width: int = 64,
        levels: int = 1,
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = _norm_layer(norm)
        self.name, self.width, self.mask_padding = name, width, mask_padding
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        stride = 4
        strides, outputs = [], []
        for stage in range(stages):
            dilate = dilation and stage == 3
            self.add_module(f"layer{stage + 1}", _residual_stage(name, norm, width, stage, dilate=dilate))
            stride *= 1 if stage == 0 or dilate else 2
            outputs.append(width * 2**stage * DEPTHS[name][0].expansion)
            strides.append(stride)
        self.layers = [f"layer{stage + 1}" for stage in range(stages)]
        # of the maps, fine to coarse
        self.channels, self.strides = tuple(outputs[-levels:]), tuple(strides[-levels:])
        # stages of the same ResNet that another part of the model holds and runs; they load its weights
        self.elsewhere: Mapping[str, nn.Module] = {}
        _initialise(self)
        frozen = ["conv1", "bn1"][: 2 * frozen_stages] + self.layers[: max(0, frozen_stages - 1)]
        self.frozen = frozen
        for part in frozen:
            self.get_submodule(part).requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # convolutions then keep NHWC

    def train(self, mode: bool = True) -> Self:
        """Leave frozen parts in evaluation mode, so that live BatchNorm does not drift there."""
        super().train(mode)
        for part in self.frozen:
            self.get_submodule(part).eval()
        return self

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """Make the map [B, channels, ceil(H / stride), ceil(W / stride)] of each level.

        images [B, 3, H, W]; image_sizes [B, 2] int, valid (h, w).
        """
        x = functional.relu(_conv_norm(self.conv1, self.bn1, images))
        stride = 4
        if self.mask_padding:
            x = _zero_padding(x, image_sizes, 2)
        x = self.maxpool(x)
        sizes, maps = image_sizes if self.mask_padding else None, []
        for name in self.layers:
            x, stride = _run_blocks(self.get_submodule(name), x, stride, sizes)
            maps.append(x)
        return tuple(maps[-len(self.strides) :])


def _conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise; a frozen norm is folded into the weights, so that the map is written once."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    weight = conv.weight * scale[:, None, None, None]
    return functional.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


def _block(block: Any, x: Tensor, stride: int, image_sizes: Tensor | None) -> tuple[Tensor, int]:
    """Run torchvision's residual block on a map of ``stride``, and return the stride of its output too.

    With image_sizes [B, 2] the padded cells are zeroed before each 3x3 convolution.
    """
    identity = x if block.downsample is None else _conv_norm(block.downsample[0], block.downsample[1], x)
    last = 3 if isinstance(block, Bottleneck) else 2
    for number in range(1, last + 1):
        conv = getattr(block, f"conv{number}")
        if image_sizes is not None and conv.kernel_size != (1, 1):
            x = _zero_padding(x, image_sizes, stride)
        x = _conv_norm(conv, getattr(block, f"bn{number}"), x)
        stride *= conv.stride[0]
        x = x if number == last else functional.relu(x)
    return functional.relu(x + identity), stride


def _run_blocks(stage: nn.Module, x: Tensor, stride: int, image_sizes: Tensor | None) -> tuple[Tensor, int]:
    for block in stage.children():
        x, stride = _block(block, x, stride, image_sizes)
    return x, stride


def run_stage(stage: nn.Sequential, x: Tensor) -> Tensor:
    """Run a stage that stands outside a `Backbone`, on a map [N, C, H, W] without padding."""
    return _run_blocks(stage, x, 1, None)[0]


def _residual_stage(name: str, norm: str, width: int, stage: int, *, dilate: bool) -> nn.Sequential:
    """Build stage ``stage`` (from 0) of a ResNet, with torch's own start."""
    block: Any
    block, depths = DEPTHS[name]
    norm_layer, planes = _norm_layer(norm), width * 2**stage
    return _stage(
        partial(block, norm_layer=norm_layer),
        planes // 2 * block.expansion if stage else width,
        planes,
        planes * block.expansion,
        depth=depths[stage],
        stride=2 if stage else 1,
        dilate=dilate,
        norm_layer=norm_layer,
    )


def _norm_layer(norm: str) -> Callable[[int], nn.Module]:
    return FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d


def _initialise(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _stage(
    block: Callable[..., nn.Module],
    in_channels: int,
    planes: int,
    out_channels: int,
    *,
    depth: int,
    stride: int,
    dilate: bool,
    norm_layer: Callable[[int], nn.Module],
) -> nn.Sequential:
    """Build ``depth`` blocks; with ``dilate`` the first has dilation 1 and stride 1, and the others dilate by 2."""
    stride = 1 if dilate else stride
    downsample = None
    if dilate or stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), norm_layer(out_channels))
    blocks = [block(in_channels, planes, stride, downsample)]
    for _ in range(1, depth):
        blocks.append(block(out_channels, planes, dilation=2) if dilate else block(out_channels, planes))
    return nn.Sequential(*blocks)


def _zero_padding(x: Tensor, image_sizes: Tensor, stride: int) -> Tensor:
    valid = covered_cells(image_sizes, stride)
    return x * valid_mask(valid, x.shape[2], x.shape[3])[:, None].to(x.dtype)


def load_backbone_weights(backbone: Backbone, weights: str) -> None:
    """Load ``weights``: "none", "imagenet" (torchvision's IMAGENET1K_V1), or the path of a torchvision state dict.

    Raises CheckpointError when the file cannot be had, or its tensors do not fit.
    """
    if weights == "none":
        return
    state = _imagenet_state_dict(backbone.name) if weights == "imagenet" else _read_state_dict(Path(weights))
    parts = {"": backbone, **{f"{name}.": stage for name, stage in backbone.elsewhere.items()}}
    own = {prefix + key: value for prefix, part in parts.items() for key, value in part.state_dict().items()}
    held = (*backbone.layers, *backbone.elsewhere)
    unused = ("fc.", *(f"layer{n}." for n in range(1, 5) if f"layer{n}" not in held))
    needed = {key: value for key, value in own.items() if not key.endswith("num_batches_tracked")}
    state = {
        key: value
        for key, value in state.items()
        if not key.startswith(unused) and not key.endswith("num_batches_tracked")
    }
    problems = differences(needed, state)
    if problems:
        raise CheckpointError(
            f'model.backbone.weights = "{weights}" does not fit {backbone.name} (width {backbone.width}): '
            f'{first_of(problems)}. Use weights of this model, or "none".'
        )
    for prefix, part in parts.items():
        part.load_state_dict({key.removeprefix(prefix): state[key] for key in needed if key.startswith(prefix)}, False)


def _imagenet_state_dict(name: str) -> dict[str, Tensor]:
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError) as error:
        raise CheckpointError(
            f"cannot download the ImageNet weights of {name} ({getattr(error, 'reason', error)}). "
            f"Without a network, fetch {weights.url} elsewhere and put it at {file}, "
            f'or set model.backbone.weights to its path or to "none".'
        ) from error
    except RuntimeError as error:  # a wrong hash, or an unreadable archive
        raise CheckpointError(f"{file} is damaged: {error}. Delete it and try again.") from error
    return state


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f'model.backbone.weights: there is no file {path} (nor is it "imagenet" or "none").')
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"cannot read the backbone weights {path}: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a plain state dict of tensors.")
    return state


def build_backbone(section: BackboneSection, *, padding: str, levels: int = 1) -> Backbone:
    """Build the backbone of a recipe, with random weights (`load_backbone_weights` loads others).

    levels: the number of maps that it gives.
    """
    return Backbone(
        name=section.name,
        norm=section.norm,
        dilation=section.dilation,
        frozen_stages=section.frozen_stages,
        stages=section.stages,
        width=section.width,
        levels=levels,
        mask_padding=padding == "masked",
    )


def build_stage(section: BackboneSection, stage: int) -> nn.Sequential:
    """Build one residual stage (from 0) of a recipe's ResNet, with random weights."""
    built = _residual_stage(section.name, section.norm, section.width, stage, dilate=False)
    _initialise(built)
    return built.to(memory_format=torch.channels_last)
