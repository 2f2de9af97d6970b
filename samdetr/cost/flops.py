"""Operations of a forward pass, by torch's flop counter on its meta device.

A multiply-accumulate counts one here, as in the papers' GFLOPs; torch counts it two. Convolutions, linear layers and
the products of attention are counted; RoIAlign, sampling, softmax, norms and all that goes element by element are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from samdetr.cost.meta import KeepAll, Size, empty_images
from samdetr.models import SAMDETR, DeformableDETR, Detector, MultiScaleSAMDETR
from samdetr.models.aligner import ROI_SIZE, AlignedQueries, SemanticAligner
from samdetr.models.deformable_encoder import POINTS, DeformableAttention
from samdetr.structures import Outputs


class Flops(NamedTuple):
    """Operations of one image's forward pass, a multiply-accumulate counting one."""

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
    """Count one image that fills its batch. The model must be on the meta device.

    Raises NotImplementedError at an op of ours without a formula.
    """
    more: list[int] = []

    def note(formula: Callable[..., int], *call: Any) -> None:
        more.append(formula(*call))

    handles = [
        module.register_forward_hook(partial(note, formula))
        for module in model.modules()
        for kind, formula in PUBLISHED_MORE.items()
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


def _projection_of_regions(aligner: SemanticAligner, args: Sequence[Any], out: AlignedQueries) -> int:
    """Count what projecting the cells of all regions costs beyond projecting the map.

    The published code projects after RoIAlign, this package before it.
    """
    memory, regions = args[2], out.content.shape[0] * out.content.shape[1]
    return int((regions * ROI_SIZE**2 - memory[..., 0].numel()) * aligner.reduce.weight.numel())


def _box_heads(heads: Iterable[nn.Module], out: Outputs) -> int:
    """Count box heads, each for the queries of one layer."""
    weights = (weight for head in heads for weight in head.parameters() if weight.dim() > 1)
    return sum(weight.numel() for weight in weights) * out.boxes[0, ..., 0].numel()


def _repeated_box_heads(model: SAMDETR | MultiScaleSAMDETR, args: Sequence[Any], out: Outputs) -> int:
    """Count all box heads but the last: the published code runs them for the next reference and for the prediction."""
    return _box_heads(model.box_heads[:-1], out)


def _refining_box_heads(model: DeformableDETR, args: Sequence[Any], out: Outputs) -> int:
    """Count the box heads that the published code runs twice with box refinement: all of them."""
    return _box_heads(model.box_heads[: len(model.decoder)], out) if model.box_refine else 0


def _sampling(attention: DeformableAttention, args: Sequence[Any], out: Tensor) -> int:
    """Count 4 for each sampled value of deformable attention, as the tool does that counted the published numbers."""
    return 4 * out.numel() * attention.levels * POINTS


# Operations of the published code beyond this package, from a module, its arguments and its result.
PUBLISHED_MORE: Mapping[type[nn.Module], Callable[..., int]] = {
    SemanticAligner: _projection_of_regions,
    SAMDETR: _repeated_box_heads,
    MultiScaleSAMDETR: _repeated_box_heads,
    DeformableDETR: _refining_box_heads,
    DeformableAttention: _sampling,
}
