"""Activation checkpointing: the same numbers with less kept for the backward pass."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from samdetr.cost.memory import training_memory
from samdetr.cost.meta import build_on_meta
from samdetr.data.batching import Shape
from samdetr.engine.compute.activation_checkpoint import checkpoint_activations, counting_saved
from samdetr.engine.compute.compile import compile_parts
from samdetr.engine.compute.precision import Compute, choose_compute
from samdetr.engine.start_up import random_batch
from samdetr.engine.step import forward_backward
from samdetr.engine.train import train
from samdetr.errors import RecipeError, SamdetrError
from samdetr.loss import build_criterion
from samdetr.models import Detector, build_model
from samdetr.recipe import ComputeSection, Recipe, load_recipe
from tests.engine.runs import ROOT, MakeRecipe, assert_same_weights, losses, metrics, weights
from tests.engine.test_parallel import PUBLISHED, ROUNDING, finished, train_in

SYSTEMS = [
    (),
    ('model.system="detr"', "model.num_classes=9", 'loss.classification="softmax"'),
    ('model.system="conditional_detr"',),
    ('model.system="smca_detr"',),
    ('model.system="deformable_detr"', "model.feature_levels=2"),
]
LAYERS = 'compute.activation_checkpointing="layers"'
SHARED = ("train.epochs=1", "optim.ema_decay=0.9")


def passes(
    recipe: Recipe, *, activation_checkpoint: bool, compiled: bool = False, shape: Shape = (96, 80)
) -> tuple[int, list[Tensor], Detector]:
    """Return the bytes saved for the backward pass of a batch with dropout, its values and all gradients."""
    torch.manual_seed(0)
    model, criterion = build_model(recipe.model).train(), build_criterion(recipe)
    if compiled:
        compile_parts(model, criterion, shapes=1)
    if activation_checkpoint:
        checkpoint_activations(model)
    batch = random_batch(shape, 2, 5)
    torch.manual_seed(1)
    with counting_saved(model) as saved:
        values = forward_backward(model, criterion, batch, batch.targets.counts.sum(), precision=torch.float32)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return saved.total, [values, *gradients], model


@pytest.mark.parametrize("options", SYSTEMS)
def test_numbers_are_the_same_bits_and_less_is_kept(make_recipe: MakeRecipe, options: tuple[str, ...]) -> None:
    recipe = make_recipe("model.dropout=0.3", "model.encoder_layers=2", *options)
    (whole, expected, _), (less, found, model) = (passes(recipe, activation_checkpoint=on) for on in (False, True))
    assert less < 0.7 * whole
    assert [a.shape for a in found if not a.isfinite().all()] == []
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert build_model(recipe.model).state_dict().keys() == model.state_dict().keys()
    model.eval()
    with torch.no_grad(), counting_saved(model) as saved:
        model(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))
    assert saved.total == 0


@pytest.mark.slow
def test_compiled_layers_are_computed_again(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    recipe = make_recipe("model.dropout=0.3")
    (whole, expected, _), (less, found, _) = (
        passes(recipe, activation_checkpoint=on, compiled=True) for on in (False, True)
    )
    torch.compiler.reset()
    assert less < 0.8 * whole
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_kept_is_counted_before(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.micro_batch=2", "model.encoder_layers=2", LAYERS)
    kept, _, _ = passes(recipe, activation_checkpoint=True, shape=(64, 96))
    memory = training_memory(build_on_meta(recipe.model), recipe)
    assert memory.size == (64, 96)
    assert memory.activations == pytest.approx(kept, rel=0.02)


@pytest.mark.slow
def test_a_run_is_the_same_with_its_average_and_may_change_its_mind(make_recipe: MakeRecipe) -> None:
    plain = train(make_recipe("optim.ema_decay=0.9"))
    run = train(make_recipe("optim.ema_decay=0.9", LAYERS, "train.epochs=1"))
    train(make_recipe("optim.ema_decay=0.9"), resume=str(run))
    assert losses(run) == losses(plain)
    assert [line["AP"] for line in metrics(run, "eval")] == [line["AP"] for line in metrics(plain, "eval")]
    assert_same_weights(run, plain)


@pytest.fixture(scope="module")
def one_process(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = json.dumps(str(tmp_path_factory.mktemp("one")))
    return train(load_recipe(recipe_file, [f"run.folder={folder}", *SHARED, *PUBLISHED[1::2]]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def test_several_processes_compute_again(recipe_file: Path, tmp_path: Path, one_process: Path, strategy: str) -> None:
    options = (*SHARED, LAYERS, f'parallel.strategy="{strategy}"')
    finished(train_in(2, recipe_file, tmp_path, *(word for option in options for word in ("--set", option))))
    run = tmp_path / "tiny" / "1"
    assert np.allclose(losses(run), losses(one_process), rtol=ROUNDING, atol=0)
    assert weights(run).keys() == weights(one_process).keys()


def test_systems_without_layers_refuse_it(recipe_file: Path) -> None:
    message = 'has no layers for activation checkpointing: set compute.activation_checkpointing = "off"'
    with pytest.raises(RecipeError, match=message):
        load_recipe(ROOT / "recipes" / "faster_rcnn_r50_fpn_108ep.toml", [LAYERS])


def test_recorded_graphs_cannot_have_it() -> None:
    section = ComputeSection(precision="bf16", cuda_graph="on", activation_checkpointing="layers")
    with pytest.raises(SamdetrError, match=r"activation_checkpointing = \"layers\" does .* one of them to \"off\""):
        choose_compute(section, torch.device("cuda"), buckets=True)
    section = ComputeSection(precision="fp32", activation_checkpointing="layers")
    expected = Compute(torch.float32, compile=False, cuda_graph=False, activation_checkpoint=True)
    assert choose_compute(section, torch.device("cpu"), buckets=False) == expected
