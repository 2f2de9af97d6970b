"""DAB-DETR against the published code.

Its fixture has the arrays of the others and what DAB-DETR alone has. Two parts of its state dict take their values from
keys that other systems have (the last column of the .keys.txt): anchors and the last layer of the box head, which would
otherwise begin all alike. The terms loss_xy and loss_hw, which the published code only logs, are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from samdetr.engine.evaluate import best_detections
from samdetr.loss import build_criterion
from samdetr.models import EncoderDecoder, build_model
from samdetr.models.dab_detr import EPSILON, DABDETRDecoder
from samdetr.models.layers import inverse_sigmoid
from samdetr.models.official import load_official, to_official
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
from tests.parity.reference import Inputs, arrays, inputs_of, model_of, official_state_dict, recipe_of

NAME = "dab_detr_r50"


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    encoded: EncodedMap
    normed: Tensor  # [L, B, Q, width] what the heads read
    anchors: Tensor  # [L, B, Q, 4] in [0, 1]
    sizes: Tensor  # [L, B, Q, 2] (w, h), predicted for the modulation


@pytest.fixture(scope="module")
def run() -> Run:
    model, inputs = model_of(NAME), inputs_of(NAME)
    decoder = model.decoder
    assert isinstance(decoder, DABDETRDecoder)
    recorded: dict[str, list[Any]] = {key: [] for key in ("features", "source", "normed", "sizes", "anchors")}
    handles = [
        module.register_forward_hook(lambda _, __, out, key=key: recorded[key].append(out))
        for key, module in (
            ("features", model.backbone),
            ("source", model.encoder.embed.input_proj),
            ("normed", decoder.classes.norm),
            ("sizes", decoder.queries.size_head),
        )
    ]
    handles.append(decoder.queries.register_forward_pre_hook(lambda _, args: recorded["anchors"].append(args[1])))
    with torch.no_grad():
        outputs = model(inputs.images, inputs.image_sizes)
        memory, pos_embed, geometry, _ = model.encoder(inputs.images, inputs.image_sizes)
    for handle in handles:
        handle.remove()
    encoded = EncodedMap(recorded["features"][0][0], recorded["source"][0], memory, pos_embed, geometry.mask)
    sizes = torch.stack(recorded["sizes"]).sigmoid()
    return Run(model, inputs, outputs, encoded, recorded["normed"][0], torch.stack(recorded["anchors"]), sizes)


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(NAME, run.model)


def test_encoded_map(run: Run) -> None:
    check_encoded_map(NAME, run.encoded)


def test_anchors_and_sizes(run: Run) -> None:
    reference = arrays(NAME)
    close(run.anchors[:, :, reference["ref_idx"]], reference["ref_boxes"], most=5e-4, all_within=1e-2)
    close(run.sizes[:, :, reference["q_idx"]], reference["hw_cond"], most=5e-4, all_within=5e-3)


def test_what_the_heads_read(run: Run) -> None:
    reference = arrays(NAME)
    normed = run.normed[:, :, reference["q_idx"]][..., reference["ch_idx"]]
    close(normed, reference["hs"], most=3e-3, all_within=2e-2)


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


def test_published_checkpoint_in_and_out() -> None:
    published = official_state_dict(NAME)
    model = build_model(recipe_of(NAME).model)
    load_official(model, published)
    back = to_official(model)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], value) for key, value in published.items())


def test_the_inverse_sigmoid_is_clamped_as_published() -> None:
    found = inverse_sigmoid(torch.tensor([0.0, 5e-4, 0.5, 1.0]), EPSILON)
    expected = torch.tensor([1e-3 / 1, 1e-3 / (1 - 5e-4), 1.0, 1 / 1e-3]).log()
    torch.testing.assert_close(found, expected)
