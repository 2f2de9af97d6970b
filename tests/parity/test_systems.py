"""Systems other than SAM-DETR against their official implementations."""

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
    EncodedMap,
    check_detections,
    check_encoded_map,
    check_gradients,
    check_losses,
    check_matching,
    check_parameter_counts,
    check_predictions,
    close,
)
from tests.parity.reference import OTHERS, Inputs, arrays, inputs_of, model_of, recipe_of


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    name: str
    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    encoded: EncodedMap
    normed: Tensor  # [L, B, Q, width] what the heads read


@pytest.fixture(scope="module", params=OTHERS)
def run(request: pytest.FixtureRequest) -> Run:
    name: str = request.param
    model, inputs = model_of(name), inputs_of(name)
    recorded: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, key=key: recorded.update({key: out}))
        for key, module in (
            ("features", model.backbone),
            ("source", model.encoder.embed.input_proj),
            ("normed", model.decoder.heads.norm),
        )
    ]
    with torch.no_grad():
        outputs = model(inputs.images, inputs.image_sizes)
        memory, position, geometry, _ = model.encoder(inputs.images, inputs.image_sizes)
    for handle in handles:
        handle.remove()
    encoded = EncodedMap(recorded["features"][0], recorded["source"], memory, position, geometry.mask)
    return Run(name, model, inputs, outputs, encoded, recorded["normed"])


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(run.name, run.model)


def test_encoded_map(run: Run) -> None:
    check_encoded_map(run.name, run.encoded)


def test_what_the_heads_read(run: Run) -> None:
    reference = arrays(run.name)
    normed = run.normed[:, :, reference["q_idx"]][..., reference["ch_idx"]]
    close(normed, reference["hs"], most=3e-3, all_within=2e-2)


def test_logits_and_boxes_of_all_layers(run: Run) -> None:
    check_predictions(run.name, run.outputs)


def test_detections(run: Run) -> None:
    classification = recipe_of(run.name).loss.classification
    found = best_detections(run.outputs, run.inputs.original_sizes, 100, classification)
    check_detections(run.name, found, run.inputs)


def test_matching_and_losses(run: Run) -> None:
    criterion = build_criterion(recipe_of(run.name))
    check_matching(criterion, run.outputs, run.inputs, arrays(run.name), "")
    check_losses(criterion(run.outputs, run.inputs.targets), arrays(run.name), "")


@pytest.mark.parametrize("prefix", ["solo_", ""])
def test_gradients(run: Run, prefix: str) -> None:
    check_gradients(run.name, run.model, build_criterion(recipe_of(run.name)), run.inputs, prefix)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("conditional")])
def test_reference_points_of_conditional_detr(name: str) -> None:
    decoder = model_of(name).decoder
    centre, _ = decoder.reference_points(decoder.query_positions, torch.float32)
    close(centre.sigmoid().expand(2, -1, -1), arrays(name)["ref_points"], most=1e-4, all_within=1e-4)


def test_gaussians_of_smca_detr() -> None:
    name = "smca_detr_r50"
    model, inputs, reference = model_of(name), inputs_of(name), arrays(name)
    recorded: list[tuple[Tensor, ...]] = []
    for layer in model.decoder.layers:
        layer.gaussian.register_forward_hook(lambda _, __, out: recorded.append(out[1:]))
    with torch.no_grad():
        model(inputs.images, inputs.image_sizes)
    centres, offsets, scales = (torch.stack(values) for values in zip(*recorded, strict=True))
    for centre in centres:
        close(centre, reference["ref_points_logit"], most=1e-4, all_within=1e-4)
    for ours, key in ((offsets, "point_offset"), (scales, "gauss_scale")):
        close(ours[:, :, reference["q_idx"]], reference[key], most=3e-3, all_within=2e-2)
