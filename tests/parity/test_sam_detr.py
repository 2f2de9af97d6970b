"""SAM-DETR against the official implementation: forward, intermediate values, matching, losses, gradients."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from samdetr.engine.compute.compile import compile_parts, graphs_compiled
from samdetr.engine.evaluate import best_detections
from samdetr.loss import SetCriterion
from samdetr.models import EncoderDecoder
from samdetr.structures import Outputs
from tests.parity.checks import (
    EncodedMap,
    check_aligned_layers,
    check_encoded_map,
    check_gradients,
    check_losses,
    check_matching,
    check_parameter_counts,
    check_predictions,
    close,
    record_aligned_layers,
)
from tests.parity.reference import MODELS, Inputs, arrays, inputs_of, model_of

OTHER_LAYOUT = ("point2.0.weight",)  # our order of its inputs differs, and a head is of the first eight


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    name: str
    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    memory: Tensor
    position: Tensor
    mask: Tensor
    recorded: dict[str, list[Tensor]]


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest) -> Run:
    name: str = request.param
    model, inputs = model_of(name), inputs_of(name)
    recorded: dict[str, list[Tensor]] = {key: [] for key in ("backbone", "src")}
    embed = model.encoder.embed
    handles = [
        model.backbone.register_forward_hook(lambda _, __, out: recorded["backbone"].extend(out)),
        (embed.input_norm or embed.input_proj).register_forward_hook(lambda _, __, out: recorded["src"].append(out)),
    ]
    with torch.no_grad():
        outputs, of_layers = record_aligned_layers(model, inputs)
        for handle in handles:
            handle.remove()
        recorded |= of_layers
        memory, position, geometry, _ = model.encoder(inputs.images, inputs.image_sizes)
    return Run(name, model, inputs, outputs, memory, position, geometry.mask, recorded)


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(run.name, run.model)


def test_encoded_map(run: Run) -> None:
    features, source = run.recorded["backbone"][0], run.recorded["src"][0]
    check_encoded_map(run.name, EncodedMap(features, source, run.memory, run.position, run.mask))


def test_position_code_at_padded_cells_is_the_published_one(run: Run) -> None:
    # numerically arbitrary, but RoIAlign reads what the encoder makes of it
    reference = arrays(run.name)
    step = -(-run.mask.shape[1] * run.mask.shape[2] // 64)
    position = run.position.flatten(1, 2)[:, ::step][..., reference["ch_idx"]].transpose(1, 2)
    close(position, reference["pos0"], most=1e-4, all_within=1e-4)


def test_aligner(run: Run) -> None:
    check_aligned_layers(run.name, run.recorded)


def test_logits_and_boxes_of_all_layers(run: Run) -> None:
    check_predictions(run.name, run.outputs)


def test_detections(run: Run) -> None:
    reference = arrays(run.name)
    found = best_detections(run.outputs, run.inputs.original_sizes, 100)
    close(found.scores, reference["post_scores"], most=3e-3, all_within=3e-3)
    clear = reference["post_gap"] > 3e-3
    assert np.array_equal(found.labels.numpy()[clear], reference["post_labels"][clear])
    scale = run.inputs.original_sizes.max()
    difference = np.abs(found.boxes_xyxy.numpy() - reference["post_boxes"])[clear]
    assert difference.max(initial=0) <= 1e-2 * scale


def test_matching_and_losses(run: Run) -> None:
    criterion = SetCriterion()
    check_matching(criterion, run.outputs, run.inputs, arrays(run.name), "")
    check_losses(criterion(run.outputs, run.inputs.targets), arrays(run.name), "")


@pytest.mark.parametrize("prefix", ["solo_", ""])
def test_gradients(run: Run, prefix: str) -> None:
    check_gradients(run.name, run.model, SetCriterion(), run.inputs, prefix, without_heads=OTHER_LAYOUT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("samdetr_r50_50ep", marks=pytest.mark.long), "samdetr_r50_dc5_smca_12ep"]
)
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts as torch.compile captures and differentiates them; generating code of them is left to others."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, criterion = model_of(name), SetCriterion()
    compile_parts(model, criterion, shapes=2)
    before = graphs_compiled()
    check_gradients(name, model, criterion, inputs_of(name), "", without_heads=OTHER_LAYOUT)
    assert graphs_compiled() > before
    torch.compiler.reset()
