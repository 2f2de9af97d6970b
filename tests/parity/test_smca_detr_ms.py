"""Multi-scale SMCA-DETR against the released implementation.

That gives all images of a batch the first one's weights of the maps. Here each has its own, except in this comparison.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from samdetr.engine.evaluate import best_detections
from samdetr.loss import build_criterion
from samdetr.models import EncoderDecoder
from samdetr.structures import Outputs
from tests.parity.checks import (
    check_detections,
    check_encoded_maps,
    check_gradients,
    check_losses,
    check_matching,
    check_parameter_counts,
    check_predictions,
    close,
)
from tests.parity.reference import Inputs, arrays, inputs_of, model_of, recipe_of

NAME = "smca_detr_r50_multiscale"


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    normed: Tensor  # [L, B, Q, width] what the heads read
    gaussians: list[tuple[Tensor, ...]]  # of each layer: centre, offsets, scales


def weigh_as_the_first(_: object, __: object, out: tuple[Any, ...]) -> tuple[Any, ...]:
    biases, weights, *others = out
    return biases, weights[:1].expand_as(weights), *others


@pytest.fixture(scope="module")
def run() -> Run:
    model, inputs = model_of(NAME), inputs_of(NAME)
    assert isinstance(model, EncoderDecoder)
    normed: list[Tensor] = []
    gaussians: list[tuple[Tensor, ...]] = []
    handles = [model.decoder.heads.norm.register_forward_hook(lambda _, __, out: normed.append(out))]
    for layer in model.decoder.layers:
        layer.gaussian.register_forward_hook(weigh_as_the_first)
        handles.append(layer.gaussian.register_forward_hook(lambda _, __, out: gaussians.append(out[2:])))
    with torch.no_grad():
        outputs = model(inputs.images, inputs.image_sizes)
    for handle in handles:
        handle.remove()
    return Run(model, inputs, outputs, normed[0], gaussians)


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(NAME, run.model)


def test_encoded_maps(run: Run) -> None:
    check_encoded_maps(NAME, run.model, run.inputs, finest=1)


def test_gaussians_and_what_the_heads_read(run: Run) -> None:
    reference = arrays(NAME)
    queries, channels = reference["q_idx"], reference["ch_idx"]
    close(run.normed[:, :, queries][..., channels], reference["hs"], most=3e-3, all_within=2e-2)
    centres, offsets, scales = (torch.stack(values) for values in zip(*run.gaussians, strict=True))
    for centre in centres:
        close(centre, reference["ref_points_logit"], most=1e-4, all_within=1e-4)
    for ours, key in ((offsets, "point_offset"), (scales, "gauss_scale")):
        close(ours[:, :, queries], reference[key], most=3e-3, all_within=2e-2)


def test_logits_and_boxes_of_all_layers(run: Run) -> None:
    check_predictions(NAME, run.outputs)


def test_detections(run: Run) -> None:
    check_detections(NAME, best_detections(run.outputs, run.inputs.original_sizes, 100), run.inputs)


def test_matching_and_losses(run: Run) -> None:
    criterion = build_criterion(recipe_of(NAME))
    check_matching(criterion, run.outputs, run.inputs, arrays(NAME), "")
    check_losses(criterion(run.outputs, run.inputs.targets), arrays(NAME), "")


@pytest.mark.parametrize("prefix", ["solo_", ""])
def test_gradients(run: Run, prefix: str) -> None:
    check_gradients(NAME, run.model, build_criterion(recipe_of(NAME)), run.inputs, prefix)
