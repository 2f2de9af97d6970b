"""Bytes that a training step holds, counted from shapes on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from samdetr.cost.meta import KeepAll, Size, empty_images
from samdetr.engine.compute.activation_checkpoint import checkpoint_activations
from samdetr.loss import build_criterion
from samdetr.models import Detector
from samdetr.structures import Targets

if TYPE_CHECKING:
    from samdetr.recipe import Recipe

MOMENTS = {"adamw": 2, "sgd": 1}  # for every trained parameter
BOXES = 20  # of each image, for the loss; the bytes hardly depend on it


class Memory(NamedTuple):
    """Bytes that a training step holds at its peak, between forward and backward, all in float32."""

    batch: int  # images
    size: Size
    parameters: int  # and buffers
    gradients: int
    optimizer: int  # with the average of the weights, if there is one
    activations: int  # the images, and what autograd saves for the backward pass

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations


class FusedAttention(TorchFunctionMode):
    """Mode in which scaled_dot_product_attention is one op, as on GPUs; the meta device would take it apart."""

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


def training_memory(model: Detector, recipe: Recipe) -> Memory:
    """Count the bytes of an eager step with ``train.micro_batch`` images of the largest training size.

    The model must be on the meta device; compute.activation_checkpointing changes it. Activations are the storages that
    autograd saves of forward and loss, each counted once, parameters left out; attention saves what its fused kernel
    saves. Temporary tensors, workspace of libraries and fragmentation are not in it.
    """
    size = Size(max(recipe.augment.train_sizes), recipe.augment.max_size)
    images, image_sizes = empty_images(recipe.train.images, size)
    saved = [images]

    def save(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    if recipe.compute.activation_checkpointing == "layers":
        checkpoint_activations(model)
    criterion, targets = build_criterion(recipe), _targets(len(images))
    with saved_tensors_hooks(save, lambda tensor: tensor), FusedAttention(), KeepAll():  # type: ignore[no-untyped-call]
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
    """Sum the storages of tensors, each once."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _targets(batch: int) -> Targets:
    with torch.device("meta"):
        labels, counts = (torch.empty(*shape, dtype=torch.int64) for shape in ((batch, BOXES), (batch,)))
        return Targets(labels, torch.empty(batch, BOXES, 4), counts)
