"""Multiply-accumulates of a forward pass and bytes of a training step, from shapes alone, on torch's meta device.

A multiply-accumulate counts one, as in the papers' GFLOPs. Convolutions, linear layers and the products of attention
are counted; RoIAlign, softmax, norms and all that goes element by element are not. Sampling is in the published form
of deformable attention alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from samdetr.engine.compute.activation_checkpoint import checkpoint_activations
from samdetr.loss import build_criterion
from samdetr.models import Detector, build_model
from samdetr.models.aligner import ROI_SIZE, AlignedQueries, SemanticAligner
from samdetr.models.deformable_detr import DeformableDETRDecoder
from samdetr.models.deformable_encoder import POINTS, DeformableAttention
from samdetr.models.sam_detr import SAMDETRDecoder
from samdetr.structures import Outputs, Targets

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection, Recipe

MOMENTS = {"adamw": 2, "sgd": 1}  # for every trained parameter
BOXES = 20  # of each image, for the loss; the bytes hardly depend on it
Formula = Callable[[Sequence[Any], Any], int]  # of an op's arguments and result


class Size(NamedTuple):
    """Of an image, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Macs(NamedTuple):
    """Multiply-accumulates of one image's forward pass."""

    published: int  # as the published code computes it
    run: int  # as this package computes it


class Memory(NamedTuple):
    """Bytes that a training step holds at its peak, between forward and backward, all in float32."""

    batch: int  # images
    size: Size
    parameters: int  # and buffers
    gradients: int
    optimizer: int  # with the average of the weights, if there is one
    activations: int  # the images, and what is kept for the backward pass, layers that compute again left out

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def _convolution(args: Sequence[Any], out: Any) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    return int((x if transposed else out).numel() * weight[0].numel())


def _product(args: Sequence[Any], out: Any) -> int:
    """Of matrices [..., n, k] and [..., k, m], the last two arguments that are tensors."""
    left, right = args[-2:]
    return int(left.numel() * right.shape[-1])


def _attention(args: Sequence[Any], out: Any) -> int:
    """query [..., Q, D], key [..., S, D], value [..., S, E]."""
    query, key, value = args[:3]
    return int(query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _salient_cross_attention(args: Sequence[Any], out: Any) -> int:
    """query [B, Q, M, D], key [B, S, D] of all heads, value [B, S, M, E]."""
    query, key, value = args[:3]
    return int(query[..., 0].numel() * key.shape[1] * (query.shape[-1] + value.shape[-1]))


def _none(args: Sequence[Any], out: Any) -> int:
    """RoIAlign, sampling with its weighted sum, matching: no products of matrices."""
    return 0


FORMULAS: Mapping[str, Formula] = {
    "aten::convolution": _convolution,
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _product,
    "aten::baddbmm": _product,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "samdetr::salient_cross_attention": _salient_cross_attention,
    "samdetr::roi_align": _none,
    "samdetr::roi_pool": _none,
    "samdetr::salient_points": _none,
    "samdetr::deformable_attention": _none,
    "samdetr::linear_assignment": _none,
}


def _kept_boxes(boxes: Tensor, *_: Any) -> Tensor:
    return boxes.new_empty(len(boxes), dtype=torch.int64)


def _kept_cells(x: Tensor) -> Tensor:
    return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)


def _one_value(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(1), x.new_empty(x.shape, dtype=torch.int64), x.new_empty(1, dtype=torch.int64)


def _number(x: Tensor) -> Any:
    return 2**20 if x.is_meta else torch.ops.aten._local_scalar_dense(x)


# Ops whose result has a size that only data tell: nothing is dropped, so that as many proposals remain as may. A number
# that is read, a size or a count, sets no limit.
KEEP_ALL: Mapping[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _number,
    "torchvision::nms": _kept_boxes,
    "aten::nonzero": _kept_cells,
    "aten::_unique2": _one_value,
}


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered, by op. Raises NotImplementedError at a product that has no formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        out = KEEP_ALL.get(name, func)(*args, **(kwargs or {}))
        if name in FORMULAS:
            self.macs[name] += FORMULAS[name](args, out)
        elif func.namespace == "samdetr" or func.overloadpacket in flop_registry:
            raise NotImplementedError(f"{name} has no formula in samdetr/cost/flops.py")
        return out


class FusedAttention(TorchFunctionMode):
    """scaled_dot_product_attention as one op, as GPUs run it; the meta device would take it apart."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        attends = func is functional.scaled_dot_product_attention
        return (_fused_attention if attends else func)(*args, **(kwargs or {}))


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, scale=scale)
    attended: Tensor = out[0]
    return attended


def _projection_of_regions(aligner: SemanticAligner, args: Sequence[Any], out: AlignedQueries) -> int:
    """The published code projects the cells of all regions after RoIAlign, this package the map before it."""
    memory, regions = args[2], out.content.shape[0] * out.content.shape[1]
    return int((regions * ROI_SIZE**2 - memory[..., 0].numel()) * aligner.reduce.weight.numel())


def _box_heads(heads: Iterable[nn.Module], out: Outputs) -> int:
    """What they take for the queries of one layer each."""
    weights = (weight for head in heads for weight in head.parameters() if weight.dim() > 1)
    return sum(weight.numel() for weight in weights) * out.boxes[0, ..., 0].numel()


def _repeated_box_heads(decoder: SAMDETRDecoder, args: Sequence[Any], out: Outputs) -> int:
    """The published code runs every box head but the last twice: for the next reference, and for the prediction."""
    return _box_heads(decoder.box_heads[:-1], out)


def _refining_box_heads(decoder: DeformableDETRDecoder, args: Sequence[Any], out: Outputs) -> int:
    """The same with box refinement, for which it also runs the last one twice."""
    return _box_heads(decoder.box_heads[: len(decoder.layers)], out) if decoder.box_refine else 0


def _sampling(attention: DeformableAttention, args: Sequence[Any], out: Tensor) -> int:
    """4 for each sampled value of deformable attention: the tool that counted the published numbers says so."""
    return 4 * out.numel() * attention.levels * POINTS


# What the published code computes beyond this package: multiply-accumulates from a module, its arguments and result.
PUBLISHED_MORE: Mapping[type[nn.Module], Callable[..., int]] = {
    SemanticAligner: _projection_of_regions,
    SAMDETRDecoder: _repeated_box_heads,
    DeformableDETRDecoder: _refining_box_heads,
    DeformableAttention: _sampling,
}


def build_on_meta(section: ModelSection) -> Detector:
    """The model of a recipe without any data."""
    with torch.device("meta"):
        return build_model(section)


def count_macs(model: Detector, size: Size) -> Macs:
    """Of one image that fills its batch. The model must be on the meta device."""
    more: list[int] = []

    def note(formula: Callable[..., int], *call: Any) -> None:
        more.append(formula(*call))

    handles = [
        module.register_forward_hook(partial(note, formula))
        for module in model.modules()
        for kind, formula in PUBLISHED_MORE.items()
        if isinstance(module, kind)
    ]
    with torch.no_grad(), FusedAttention(), MacCounter() as counter:
        model.eval()(*_images(1, size))
    for handle in handles:
        handle.remove()
    run = counter.macs.total()
    return Macs(published=run + sum(more), run=run)


def training_memory(model: Detector, recipe: Recipe) -> Memory:
    """Of ``train.micro_batch`` images of the largest training size, run eagerly.

    The model must be on the meta device; with compute.activation_checkpointing it is changed to recompute.
    Activations are the storages that autograd saves for the backward pass of forward and loss, each counted once,
    parameters left out; that of attention is what its fused kernel saves. Temporary tensors, workspace of libraries
    and fragmentation are not in it.
    """
    size = Size(max(recipe.augment.train_sizes), recipe.augment.max_size)
    images, image_sizes = _images(recipe.train.images, size)
    saved = [images]

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    if recipe.compute.activation_checkpointing == "layers":
        checkpoint_activations(model)
    criterion, targets = build_criterion(recipe), _targets(len(images))
    with saved_tensors_hooks(save, lambda tensor: tensor), FusedAttention(), MacCounter():
        criterion(model.train()(images, image_sizes, *criterion.model_targets(targets)), targets)
    held = [*model.parameters(), *model.buffers()]
    trained = _bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    return Memory(
        batch=len(images),
        size=size,
        parameters=_bytes(held),
        gradients=trained,
        optimizer=(MOMENTS[recipe.optim.optimizer] + bool(recipe.optim.ema_decay)) * trained,
        activations=_bytes([*held, *saved]) - _bytes(held),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of tensors, each counted once."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _images(batch: int, size: Size) -> tuple[Tensor, Tensor]:
    images = torch.empty(batch, 3, *size, device="meta")
    return images, torch.empty(batch, 2, dtype=torch.int64, device="meta")


def _targets(batch: int) -> Targets:
    with torch.device("meta"):
        labels, counts = (torch.empty(*shape, dtype=torch.int64) for shape in ((batch, BOXES), (batch,)))
        return Targets(labels, torch.empty(batch, BOXES, 4), counts)
