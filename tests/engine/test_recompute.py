"""Activation checkpointing: the same numbers with less kept for the backward pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdetr.engine.compile import Compute, choose_compute, compile_regions, random_batch
from samdetr.engine.recompute import counting_saved, recompute_layers
from samdetr.engine.train import forward_backward, train
from samdetr.errors import SamdetrError
from samdetr.loss import build_criterion
from samdetr.models import Detector, build_model
from samdetr.recipe import ComputeSection, Recipe
from tests.engine.runs import MakeRecipe, assert_same_weights, losses
from tests.engine.test_parallel import finished, train_in

SYSTEMS = [
    (),
    ("model.smca=false", 'model.system="detr"', "model.num_classes=9", 'loss.classification="softmax"'),
    ("model.smca=false", 'model.system="conditional_detr"'),
    ("model.smca=false", 'model.system="smca_detr"'),
]
LAYERS = 'compute.activation_checkpointing="layers"'


def passes(recipe: Recipe, *, recompute: bool, compiled: bool = False) -> tuple[int, list[Tensor], Detector]:
    """Bytes saved for the backward pass of a batch with dropout; its values and all gradients."""
    torch.manual_seed(0)
    model, criterion = build_model(recipe.model).train(), build_criterion(recipe)
    if compiled:
        compile_regions(model, criterion, shapes=1)
    if recompute:
        recompute_layers(model)
    batch = random_batch((96, 80), 2, 5)
    torch.manual_seed(1)
    with counting_saved(model) as saved:
        values = forward_backward(model, criterion, batch, batch.targets.counts.sum(), precision=torch.float32)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return saved.total, [values, *gradients], model


@pytest.mark.parametrize("options", SYSTEMS)
def test_numbers_are_the_same_bits_and_less_is_kept(make_recipe: MakeRecipe, options: tuple[str, ...]) -> None:
    recipe = make_recipe("model.dropout=0.3", "model.encoder_layers=2", *options)
    (whole, expected, _), (less, found, model) = (passes(recipe, recompute=on) for on in (False, True))
    assert less < 0.7 * whole
    assert [a.shape for a in found if not a.isfinite().all()] == []
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert build_model(recipe.model).state_dict().keys() == model.state_dict().keys()
    model.eval()
    with torch.no_grad(), counting_saved(model) as saved:
        model(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 64]]))
    assert saved.total == 0


def test_compiled_layers_are_computed_again(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    recipe = make_recipe("model.dropout=0.0")
    _, expected, _ = passes(recipe, recompute=False)
    (whole, _, _), (less, found, _) = (passes(recipe, recompute=on, compiled=True) for on in (False, True))
    torch.compiler.reset()
    assert less < 0.8 * whole
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_run_is_the_same_and_may_change_its_mind(make_recipe: MakeRecipe, trained: Path) -> None:
    run = train(make_recipe(LAYERS, "train.epochs=1"))
    train(make_recipe(), resume=str(run))
    assert losses(run) == losses(trained)
    assert_same_weights(run, trained)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_compute_again(
    recipe_file: Path, tmp_path: Path, make_recipe: MakeRecipe, strategy: str
) -> None:
    options = ("train.epochs=1", "model.backbone.norm=frozen", "train.micro_batch=1")
    expected = losses(train(make_recipe(*options)))
    options = (*options, LAYERS, f'parallel.strategy="{strategy}"')
    finished(train_in(2, recipe_file, tmp_path / "two", *(word for o in options for word in ("--set", o))))
    for one, other in zip(losses(tmp_path / "two/tiny/1"), expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_recorded_graphs_cannot_have_it() -> None:
    section = ComputeSection(precision="bf16", cuda_graph="on", activation_checkpointing="layers")
    with pytest.raises(SamdetrError, match=r"activation_checkpointing = \"layers\" does .* one of them to \"off\""):
        choose_compute(section, torch.device("cuda"), buckets=True)
    section = ComputeSection(precision="fp32", activation_checkpointing="layers")
    expected = Compute(torch.float32, compile=False, cuda_graph=False, recompute=True)
    assert choose_compute(section, torch.device("cpu"), buckets=False) == expected
