"""Models and images on torch's meta device: shapes without numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samdetr.models import Detector, build_model

if TYPE_CHECKING:
    from samdetr.recipe import ModelSection


class Size(NamedTuple):
    """Height and width of an image, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def build_on_meta(section: ModelSection) -> Detector:
    """Build the model of a recipe on the meta device."""
    with torch.device("meta"):
        return build_model(section)


def empty_images(batch: int, size: Size) -> tuple[Tensor, Tensor]:
    """Return images [B, 3, H, W] float32 and their valid sizes [B, 2] int64, on the meta device."""
    images = torch.empty(batch, 3, *size, device="meta")
    return images, torch.empty(batch, 2, dtype=torch.int64, device="meta")


def _kept_boxes(boxes: Tensor, *_: Any) -> Tensor:
    return boxes.new_empty(len(boxes), dtype=torch.int64)


def _kept_cells(x: Tensor) -> Tensor:
    return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)


def _one_value(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(1), x.new_empty(x.shape, dtype=torch.int64), x.new_empty(1, dtype=torch.int64)


def _number(x: Tensor) -> Any:
    return 2**20 if x.is_meta else torch.ops.aten._local_scalar_dense(x)


# Ops whose result has a size that only data tell: as if nothing were dropped. A number that is read, a size or a count,
# sets no limit.
_KEEP_ALL: Mapping[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": _number,
    "torchvision::nms": _kept_boxes,
    "aten::nonzero": _kept_cells,
    "aten::_unique2": _one_value,
}


class KeepAll(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode in which a detector with proposals runs on the meta device, with as many of them as its limits allow."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _KEEP_ALL.get(func.name().split(".")[0], func)(*args, **(kwargs or {}))
