"""SAM-DETR on several maps against the official implementation: forward, matching, losses, gradients."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from torch import Tensor

from samdetr.engine.evaluate import best_detections
from samdetr.loss import SetCriterion
from samdetr.models import EncoderDecoder
from samdetr.structures import Outputs
from tests.parity.checks import (
    check_aligned_layers,
    check_detections,
    check_encoded_maps,
    check_gradients,
    check_losses,
    check_matching,
    check_parameter_counts,
    check_predictions,
    record_aligned_layers,
)
from tests.parity.reference import RECIPE_OF_MULTI_SCALE, Inputs, arrays, inputs_of, model_of

OTHER_LAYOUT = ("point2.0.weight",)  # our order of its inputs differs, and a head is of the first eight


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    name: str
    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    recorded: dict[str, list[Tensor]]


@pytest.fixture(scope="module", params=RECIPE_OF_MULTI_SCALE)
def run(request: pytest.FixtureRequest) -> Run:
    name: str = request.param
    model, inputs = model_of(name), inputs_of(name)
    assert isinstance(model, EncoderDecoder)
    return Run(name, model, inputs, *record_aligned_layers(model, inputs))


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(run.name, run.model)


def test_encoded_maps(run: Run) -> None:
    check_encoded_maps(run.name, run.model, run.inputs)


def test_layers(run: Run) -> None:
    check_aligned_layers(run.name, run.recorded)


def test_logits_and_boxes_of_all_layers(run: Run) -> None:
    check_predictions(run.name, run.outputs)


def test_detections(run: Run) -> None:
    check_detections(run.name, best_detections(run.outputs, run.inputs.original_sizes, 100), run.inputs)


def test_matching_and_losses(run: Run) -> None:
    criterion = SetCriterion()
    check_matching(criterion, run.outputs, run.inputs, arrays(run.name), "")
    check_losses(criterion(run.outputs, run.inputs.targets), arrays(run.name), "")


@pytest.mark.parametrize("prefix", ["solo_", ""])
def test_gradients(run: Run, prefix: str) -> None:
    noisy = (*OTHER_LAYOUT, "sampling_offsets.bias")  # few numbers that all kinks of sampling reach
    check_gradients(run.name, run.model, SetCriterion(), run.inputs, prefix, norms_within=5e-2, without_heads=noisy)
