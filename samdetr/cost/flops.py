"""Flops of a forward pass, by torch's flop counter on its meta device.

A flop is a multiply-accumulate in all of this package, as in the papers' GFLOPs; torch's counter counts it two.
Convolutions, linear layers and the products of attention are counted; RoIAlign, sampling, softmax, norms and all that
goes element by element are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from samdetr.cost.meta import KeepAll, Size, empty_images
from samdetr.models import Detector
from samdetr.models.system import FlopFormula


class Flops(NamedTuple):
    """Flops of one image's forward pass."""

    published: int  # as the published code computes it
    run: int  # as this package computes it


class RequireFormula(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that raises NotImplementedError at an op of ours that torch's counter would silently leave out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "samdetr" and func.overloadpacket not in flop_registry:
            raise NotImplementedError(f"{func.name()} has no formula: call register_flop_formula in the op's file")
        return func(*args, **(kwargs or {}))


def count_flops(model: Detector, size: Size) -> Flops:
    """Count the flops of one image that fills its batch. The model must be on the meta device.

    Raises NotImplementedError at an op of ours without a formula.
    """
    more: list[int] = []

    def note(formula: FlopFormula, *call: Any) -> None:
        more.append(formula(*call))

    handles = [
        module.register_forward_hook(partial(note, formula))
        for module in model.modules()
        for kind, formula in model.system.published_flops.items()
        if isinstance(module, kind)
    ]
    # with gradients on: otherwise the counter's module hooks fail where a module is given a parameter
    counter = FlopCounterMode(display=False)
    with KeepAll(), RequireFormula(), counter:  # type: ignore[no-untyped-call]
        model.eval()(*empty_images(1, size))
    for handle in handles:
        handle.remove()
    run = counter.get_total_flops() // 2
    return Flops(published=run + sum(more), run=run)
