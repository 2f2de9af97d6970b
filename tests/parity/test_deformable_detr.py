"""Deformable-DETR against the official implementation: one level and four, refined, with a first stage."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from samdetr.engine.evaluate import best_detections
from samdetr.loss import build_criterion
from samdetr.models import EncoderDecoder
from samdetr.models.deformable_detr import FirstStage
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
from tests.parity.reference import RECIPE_OF_DEFORMABLE, Inputs, arrays, inputs_of, model_of, recipe_of

REFINED = "deformable_detr_r50_multiscale_refine"
TWO_STAGE = "deformable_detr_r50_multiscale_refine_two_stage"
NOISE_OF_SCORES = {REFINED: 3e-3, TWO_STAGE: 2e-3}  # a quarter of that of logits


class Run(NamedTuple):
    """One forward pass of the padded batch, with what the modules saw on the way."""

    name: str
    model: EncoderDecoder
    inputs: Inputs
    outputs: Outputs
    recorded: dict[str, list[Tensor]]


def aligned(name: str, model: EncoderDecoder) -> None:
    """From now on the first stage gives its best cells in the fixture's order: their scores differ by rounding."""
    if not isinstance(model.decoder.queries, FirstStage):
        return
    order = torch.from_numpy(arrays(name)["enc_topk"]).long()

    def reorder(_: object, __: object, out: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
        proposals, best = out
        wanted = order[: len(best)]
        assert torch.equal(best.sort(dim=1).values, wanted.sort(dim=1).values)
        return proposals, wanted

    model.decoder.queries.propose.register_forward_hook(reorder)


@pytest.fixture(scope="module", params=RECIPE_OF_DEFORMABLE)
def run(request: pytest.FixtureRequest) -> Run:
    name: str = request.param
    model, inputs = model_of(name), inputs_of(name)
    assert isinstance(model, EncoderDecoder)
    aligned(name, model)
    recorded: dict[str, list[Tensor]] = {"hs": [], "references": []}
    handles = []
    for layer in model.decoder.layers:
        handles.append(layer.register_forward_hook(lambda _, __, out: recorded["hs"].append(out)))
        handles.append(layer.register_forward_pre_hook(lambda _, args: recorded["references"].append(args[2])))
    with torch.no_grad():
        outputs = model(inputs.images, inputs.image_sizes)
    for handle in handles:
        handle.remove()
    return Run(name, model, inputs, outputs, recorded)


def test_parameter_counts(run: Run) -> None:
    check_parameter_counts(run.name, run.model)


def test_encoded_maps(run: Run) -> None:
    check_encoded_maps(run.name, run.model, run.inputs)


def test_references_and_what_the_heads_read(run: Run) -> None:
    reference = arrays(run.name)
    first, *later = run.recorded["references"]
    close(first, reference["init_reference"], most=1e-4, all_within=1e-2)
    queries, channels = reference["q_idx"], reference["ch_idx"]
    for ours, published in zip(later, reference["inter_references"], strict=False):
        close(ours[:, reference["ref_idx"]], published, most=5e-4, all_within=1e-2)
    hs = torch.stack(run.recorded["hs"])[:, :, queries][..., channels]
    close(hs, reference["hs"], most=3e-3, all_within=2e-2)


def test_logits_and_boxes_of_all_layers(run: Run) -> None:
    check_predictions(run.name, run.outputs)


def test_detections(run: Run) -> None:
    found = best_detections(run.outputs, run.inputs.original_sizes, 100)
    check_detections(run.name, found, run.inputs, noise=NOISE_OF_SCORES.get(run.name, 3e-4))


def test_matching_and_losses(run: Run) -> None:
    criterion = build_criterion(recipe_of(run.name))
    check_matching(criterion, run.outputs, run.inputs, arrays(run.name), "")
    check_losses(criterion(run.outputs, run.inputs.targets), arrays(run.name), "")


@pytest.mark.parametrize("prefix", ["solo_", ""])
def test_gradients(run: Run, prefix: str) -> None:
    noisy: tuple[str, ...] = ("sampling_offsets.bias",)  # few numbers that all kinks of sampling reach
    if run.name == REFINED:
        noisy = ("",)  # an ending of every name
    criterion = build_criterion(recipe_of(run.name))
    check_gradients(run.name, run.model, criterion, run.inputs, prefix, norms_within=5e-2, without_heads=noisy)


def test_proposals(run: Run) -> None:
    assert (run.outputs.proposals is not None) == (run.name == TWO_STAGE)
    if run.outputs.proposals is None:
        return
    reference, (logits, boxes) = arrays(run.name), run.outputs.proposals
    step = -(-logits.shape[1] // 100)
    close(logits[:, ::step, ::10], reference["enc_logits_sub"], most=1e-4, all_within=1e-3)
    close(boxes[:, ::step], reference["enc_boxes_sub"], most=1e-4, all_within=1e-3)
    criterion = build_criterion(recipe_of(run.name))
    targets = run.inputs.targets._replace(labels=torch.zeros_like(run.inputs.targets.labels))
    indices = criterion.match(Outputs(logits[None], boxes[None]), targets)[0][0].numpy()
    ends = np.cumsum(reference["match_counts"])
    for image, (start, end) in enumerate(zip(ends - reference["match_counts"], ends, strict=True)):
        cells, order = (reference[f"match_enc_{key}"][start:end] for key in ("src", "tgt"))
        assert np.array_equal(indices[image, order], cells)
