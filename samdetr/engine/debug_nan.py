"""Where a number stopped being finite: the step of a replay file again, eagerly, with hooks on every module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from samdetr.data.device import to_device
from samdetr.data.splits import load_splits
from samdetr.engine.build import build_loaders
from samdetr.engine.checkpoint.format import EXPORTED, find_checkpoint, meta_file, read_meta
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.compute.precision import choose_device, choose_precision
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.failures.out_of_memory import explain_place
from samdetr.engine.failures.replay import REPLAY
from samdetr.engine.run.log import print_line
from samdetr.engine.step import forward_backward
from samdetr.errors import CheckpointError
from samdetr.loss import Criterion, build_criterion
from samdetr.recipe import Recipe
from samdetr.structures import Batch

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass
class Replayed:
    """The result of a step in one precision."""

    loss: float
    grad_norm: float
    terms: list[str]  # of the loss that are not finite, in the criterion's order
    first: str = ""  # what was not finite first in time, and its module; empty where all was finite
    micro_batch: int = -1  # in which that was, from 0

    @property
    def finite(self) -> bool:
        """Whether the run would have continued."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Watch:
    """Hooks on every module of a model and its criterion, which record what was not finite first in time."""

    terms: list[str] = field(default_factory=list)
    first: str = ""
    micro_batch: int = -1
    _now: int = -1
    _names: dict[nn.Module, str] = field(default_factory=dict)
    _within: list[str] = field(default_factory=list)  # the modules whose forward pass is under way

    def attach(self, model: nn.Module, criterion: nn.Module) -> list[Any]:
        """Register the hooks and return their handles. Modules have their own names, the model is ``model``."""
        self._names = {part: name or "model" for name, part in model.named_modules()} | {criterion: "criterion"}
        handles: list[Any] = [criterion.register_forward_hook(self._losses)]
        for part in self._names:
            handles.append(part.register_forward_pre_hook(self._before, with_kwargs=True))
            handles.append(part.register_forward_hook(self._after))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._gradient_of, name)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        return handles

    def begin(self, micro_batch: int) -> None:
        """Note which micro-batch is next."""
        self._now = micro_batch

    def _see(self, what: str, tensor: Tensor, *, masks: bool = False) -> None:
        """Record ``what`` if ``tensor`` is the first that is not finite. masks: minus infinity is allowed."""
        if self.first or not tensor.is_floating_point():
            return
        bad = tensor.isnan() | (tensor == math.inf) if masks else ~tensor.isfinite()
        if bad.any():
            self.first, self.micro_batch = what, self._now

    def _before(self, module: nn.Module, arguments: Any, named: Any) -> Any:
        """Check the inputs, and give the module views of them, whose gradients are then this module's alone."""
        name, made = self._names[module], self._made()
        self._within.append(name)
        views: dict[int, Tensor] = {}  # an input that is passed twice stays one tensor

        def view(tensor: Tensor) -> Tensor:
            if name == "model" or tensor.requires_grad:
                self._see(f"an input of {name}{made}", tensor, masks=True)
            if not tensor.requires_grad:
                return tensor
            if id(tensor) not in views:
                views[id(tensor)] = tensor.view_as(tensor)
                self._look_back(f"a gradient that the backward pass of {name} gives", views[id(tensor)])
            return views[id(tensor)]

        return tree_map_only(Tensor, view, (arguments, named))

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        name = self._within.pop()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._see(f"an output of {name}", tensor)
                self._look_back(f"the gradient that comes to an output of {name}{self._made()}", tensor)

    def _made(self) -> str:
        """Name the module that computes what is between two modules."""
        return f", made in {self._within[-1]}" if self._within else ""

    def _look_back(self, what: str, tensor: Tensor) -> None:
        """Check ``what``, the gradient of ``tensor``, when backward reaches it."""
        if tensor.requires_grad:
            tensor.register_hook(partial(self._see, what))  # type: ignore[no-untyped-call]

    def _gradient_of(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._see(f"the gradient of {name}", parameter.grad)

    def _losses(self, _: nn.Module, __: Any, losses: Any) -> None:
        self.terms += [name for name, value in losses.terms.items() if not value.isfinite() and name not in self.terms]


def debug_nan(file: str) -> bool:
    """Replay ``file``, print what was not finite and where it began; return whether all is finite as configured.

    The step is computed as configured and in the other precision (float32 or bfloat16), eagerly, in one process: the
    micro-batches of all processes in their order. Raises CheckpointError where the file is no replay, or the data have
    changed.
    """
    path = find_checkpoint(file.removesuffix(".json") + EXPORTED if file.endswith(".json") else file)
    meta = read_meta(meta_file(path))
    if REPLAY not in meta:
        raise CheckpointError(f"{file} is not a replay: expected nonfinite-step-....safetensors of a run's folder.")
    replay = meta[REPLAY]
    model, recipe, _, _ = load_trained(str(path))
    device = choose_device("cpu" if recipe.run.device == "cpu" else "auto", recipe.compute.kernels)
    with explain_place(device, "the replay"):
        batches = [to_device(batch, device) for batch in _load(recipe, meta, device)]
        say = partial(print_line, Console())
        values = ", ".join(f"{name} {value}" for name, value in replay["values"].items())
        say(f"step {replay['step']} (epoch {replay['epoch'] + 1}), in the run: {values}")
        for sentence in [*_bad_images(batches), *_bad_weights(model)]:
            say(sentence)
        model.to(device).train()
        seeds = [micro["seed"] for micro in replay["micro_batches"]]
        configured = choose_precision(recipe.compute.precision, device)
        criterion, found = build_criterion(recipe), {}
        for precision in sorted(PRECISIONS, key=lambda one: one != configured):
            found[precision] = result = compute(model, criterion, batches, seeds, precision=precision)
            how = "as configured" if precision == configured else "for comparison"
            say(f"{PRECISIONS[precision]}, {how}: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}")
            if not result.finite:
                image_ids = ", ".join(map(str, replay["micro_batches"][result.micro_batch]["image_ids"]))
                say(f"  not finite in the loss: {', '.join(result.terms) or 'nothing, the gradient alone'}")
                say(f"  first: {result.first}, in micro-batch {result.micro_batch + 1} (image ids {image_ids})")
    say(_verdict(found, configured))
    return found[configured].finite


def compute(
    model: nn.Module, criterion: Criterion, batches: Sequence[Batch], seeds: Sequence[int], *, precision: torch.dtype
) -> Replayed:
    """Run forward, loss and backward over a step's micro-batches, on their device, each with its dropout seed."""
    num_boxes = torch.stack([batch.targets.counts.sum() for batch in batches]).sum()
    model.zero_grad(set_to_none=True)
    watch, total = Watch(), 0.0
    handles = watch.attach(model, criterion)
    try:
        for place, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            torch.manual_seed(seed)
            watch.begin(place)
            total += float(forward_backward(model, criterion, batch, num_boxes, precision=precision)[0])
    finally:
        for handle in handles:
            handle.remove()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return Replayed(total, float(nn.utils.get_total_norm(gradients)), watch.terms, watch.first, watch.micro_batch)


def _load(recipe: Recipe, meta: Mapping[str, Any], device: torch.device) -> list[Batch]:
    """Load the micro-batches of all processes in their order, as the loader gives them."""
    splits = load_splits(
        recipe.data,
        num_queries=recipe.model.most_objects,
        num_classes=recipe.model.num_classes,
        no_object=recipe.loss.classification == "softmax",
    )
    replay = meta[REPLAY]
    wanted = [micro["image_ids"] for micro in replay["micro_batches"]]
    alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})
    loader, _ = build_loaders(alone, splits, device, ALONE)
    batches = (
        next(loader.epoch(replay["epoch"], replay["step_in_epoch"])) if meta["data"] == splits.fingerprint() else []
    )
    if [batch.image_ids.tolist() for batch in batches] != wanted:
        raise CheckpointError("the training split is not the one that the replay was written with: restore its files.")
    return batches


def _bad_images(batches: Sequence[Batch]) -> list[str]:
    """Describe each image whose pixels or boxes are not finite."""
    sentences = []
    for batch in batches:
        for row, image_id in enumerate(batch.image_ids.tolist()):
            for what, values in (("pixels", batch.images[row]), ("boxes", batch.targets.boxes[row])):
                if not values.isfinite().all():
                    sentences.append(f"image id {image_id}: its {what} are not finite")
    return sentences


def _bad_weights(model: nn.Module) -> list[str]:
    """Describe each parameter, and each buffer that a forward pass in training reads, that is not finite."""
    live = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for part in module.buffers()
    }
    named = [*model.named_parameters(), *((name, part) for name, part in model.named_buffers() if id(part) not in live)]
    return [f"weight {name}: not finite" for name, value in named if not value.isfinite().all()]


def _verdict(found: Mapping[torch.dtype, Replayed], configured: torch.dtype) -> str:
    other = next(precision for precision in found if precision != configured)
    mine, its = found[configured], found[other]
    if mine.finite:
        again = "now, eagerly and in one process: what the run met does not come again"
        return f"finite in {PRECISIONS[configured]} {again}" + (
            "" if its.finite else f"; in {PRECISIONS[other]} look at: {its.first}"
        )
    if its.finite:
        way = 'set compute.precision = "fp32", or look at: ' if other == torch.float32 else "look at: "
        return f"not finite in {PRECISIONS[configured]} alone; {way}{mine.first}"
    return f"not finite in both precisions; look at: {mine.first}"
