"""Faster R-CNN in the engine: every recipe's two steps and evaluation, the step's mean, resuming, processes, cost."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch

import samdetr.engine.train
from samdetr.cost.flops import count_flops
from samdetr.cost.memory import training_memory
from samdetr.cost.meta import Size, build_on_meta
from samdetr.engine.compute.compile import compile_parts
from samdetr.engine.compute.precision import choose_compute
from samdetr.engine.optim import build_optimizer, set_learning_rate
from samdetr.engine.predict import predict
from samdetr.engine.start_up import random_batch
from samdetr.engine.step import train_step
from samdetr.engine.train import train
from samdetr.loss import build_criterion
from samdetr.models import build_model
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import RegionLosses
from tests.engine.runs import MakeRecipe, assert_same_weights, metrics, signal_at
from tests.engine.test_overfit import eight_pictures

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("faster_rcnn_*.toml"))
CPU = torch.device("cpu")
NUMBERS = {
    "data.workers": 0,
    "data.shapes.train_images": 8,
    "data.shapes.val_images": 2,
    "data.shapes.image_size": 64,
    "data.shapes.max_objects": 5,
    "data.buckets": 2,
    "augment.train_sizes": [64],
    "augment.max_size": 96,
    "augment.eval_size": 64,
    "augment.eval_max_size": 96,
    "model.num_classes": 9,
    "model.num_queries": 12,
    "model.width": 32,
    "model.backbone.width": 16,
    "model.regions.candidates_train": 100,
    "model.regions.candidates_eval": 50,
    "model.regions.proposals_train": 30,
    "model.regions.proposals_eval": 20,
    "model.regions.hidden": 16,
    "optim.warmup_steps": 2,
    "train.epochs": 1,
    "train.total_batch": 4,
    "train.micro_batch": 2,
    "train.log_every": 1,
    "eval.every": 1,
}
WORDS = {
    "run.device": "cpu",
    "compute.precision": "fp32",
    "data.format": "shapes",
    "model.backbone.weights": "none",
    "model.backbone.norm": "batch",  # random weights without it overflow
}


@pytest.fixture
def reduced(tmp_path: Path, shapes_folder: Path) -> MakeRecipe:
    """A recipe with a narrow model and a few small pictures; what it says of heads, loss and optimizer stays."""

    def make(name: str, *overrides: str) -> Recipe:
        folders = {"run.folder": str(tmp_path), "data.shapes.folder": str(shapes_folder)}
        keys = {**NUMBERS, **WORDS, **folders}
        return load_recipe(
            RECIPES / f"{name}.toml", [*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides]
        )

    return make


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_and_an_evaluation(name: str, reduced: MakeRecipe) -> None:
    run = train(reduced(name))
    steps = metrics(run, "train")
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        parts = [line[key] for key in RegionLosses._fields[:-1]]
        assert min(parts) >= 0 and line["grad_norm"] > 0
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
        assert 0 <= line["class_error"] <= 100
    assert [line["lr"] for line in steps] == pytest.approx([0.01, 0.02])
    assert [0 <= line["AP"] <= 1 for line in metrics(run, "eval")] == [True]
    assert (run / "curves.png").is_file()


@pytest.mark.parametrize("name", ["faster_rcnn_r50_c4_12ep", "faster_rcnn_r50_fpn_108ep"])
def test_every_trained_parameter_has_a_gradient_also_without_objects(name: str, reduced: MakeRecipe) -> None:
    """Check that no process would wait for the gradient of another."""
    recipe = reduced(name)
    model, criterion = build_model(recipe.model).train(), build_criterion(recipe)
    batch = random_batch((64, 96), 2, 3)
    for counts in (batch.targets.counts, torch.zeros(2, dtype=torch.int64)):
        model.zero_grad()
        targets = batch.targets._replace(counts=counts)
        losses = criterion(model(batch.images, batch.image_sizes, targets), targets, counts.sum())
        losses.total.backward()
        assert losses.total.isfinite()
        assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_step_is_the_mean_of_its_micro_batches(reduced: MakeRecipe) -> None:
    """With a seed of its own each; the gradient is the mean of theirs."""
    recipe = reduced(
        "faster_rcnn_r50_fpn_108ep", 'model.backbone.norm="frozen"', "train.total_batch=2", "train.micro_batch=1"
    )
    torch.manual_seed(0)
    model, batch = build_model(recipe.model).train(), random_batch((64, 96), 1, 3)
    gradients, values = [], []
    for seeds in ([1], [2], [1, 2]):
        criterion = build_criterion(recipe)
        criterion.step_images = len(seeds)
        optimizer = build_optimizer(model, recipe.optim.model_copy(update={"lr": 1e-30, "backbone_lr": 0.0}))
        step = [batch] * len(seeds)
        values.append(train_step(model, criterion, optimizer, step, device=CPU, clip_norm=0.0, seeds=seeds))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(values[2][:-1], (values[0] + values[1])[:-1] / 2)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.equal(values[0], values[1])


def test_a_continued_run_is_the_same_bit_for_bit(reduced: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = reduced("faster_rcnn_r50_fpn_108ep", "train.epochs=2", "optim.drop_epochs=[1]")
    whole = train(recipe)
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.train, "train_step", 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    run = whole.with_name("2")
    assert len(metrics(run, "train")) == 3  # in the middle of the second epoch
    train(recipe, resume=str(run))
    keys = ("step", "loss", *RegionLosses._fields, "grad_norm", "lr")
    here, there = ([[line[key] for key in keys] for line in metrics(each, "train")] for each in (run, whole))
    assert here == there
    assert [line["AP"] for line in metrics(run, "eval")] == [line["AP"] for line in metrics(whole, "eval")]
    assert_same_weights(run, whole)


def test_bfloat16_passes_the_start_up_check(reduced: MakeRecipe) -> None:
    run = train(reduced("faster_rcnn_r50_fpn_108ep", 'compute.precision="bf16"'))
    assert all(math.isfinite(line["loss"]) for line in metrics(run, "train"))


def test_only_the_backbone_is_compiled(reduced: MakeRecipe) -> None:
    recipe = reduced("faster_rcnn_r50_fpn_108ep")
    assert choose_compute(recipe.compute, torch.device("cuda"), buckets=True).compile
    model, criterion = build_model(recipe.model), build_criterion(recipe)
    compile_parts(model, criterion, shapes=1)
    assert {name for name, part in model.named_modules() if part._compiled_call_impl is not None} == {"backbone"}


@pytest.mark.slow
def test_predictions_and_evaluation_of_a_checkpoint(reduced: MakeRecipe, tmp_path: Path, shapes_folder: Path) -> None:
    run = train(reduced("faster_rcnn_r50_dc5_12ep", "model.regions.score_threshold=0.0"))
    photos = next(shapes_folder.rglob("val*/"))
    predict(str(run), str(photos), output=str(tmp_path / "out"), threshold=0.0)
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found["images"]) == 2
    assert 0 < len(found["annotations"]) <= 2 * 12
    for line in found["annotations"]:
        image = found["images"][line["image_id"] - 1]
        x, y, w, h = line["bbox"]
        assert line["score"] > 0 and min(x, y) >= -1e-3
        assert x + w <= image["width"] + 1e-3 and y + h <= image["height"] + 1e-3


def test_cost_at_a_number_of_proposals() -> None:
    """One more proposal costs the box head's share; regions drawn for the loss are no more than 512 an image."""
    file = RECIPES / "faster_rcnn_r50_dc5_12ep.toml"
    flops, kept = [], []
    for proposals in (500, 1000):
        recipe = load_recipe(
            file,
            [f"model.regions.proposals_{when}={proposals + 1000 * (when == 'train')}" for when in ("eval", "train")],
        )
        model = build_on_meta(recipe.model)
        flops.append(count_flops(model, Size(320, 416)).run)
        kept.append(training_memory(model, recipe))
    assert flops[1] - flops[0] == 500 * (2048 * 49 * 1024 + 1024 * 1024 + 1024 * 81 * 5)
    assert kept[1].optimizer == kept[1].gradients == 4 * 165_363_168
    assert kept[1].activations == pytest.approx(kept[0].activations, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["faster_rcnn_r50_c4_12ep", "faster_rcnn_r50_dc5_12ep", "faster_rcnn_r50_fpn_108ep"])
def test_eight_pictures_are_learned_by_heart(name: str, reduced: MakeRecipe) -> None:
    """As in test_overfit.py, with losses of drawn anchors and regions: their mean over five steps falls tenfold."""
    steps = 300
    settings = {
        "data.batching": "random",
        "data.pixels": "published",
        "data.shapes.image_size": 128,
        "data.shapes.max_objects": 3,
        "augment.train_sizes": [128],
        "augment.max_size": 128,
        "augment.flip": 0.0,
        "model.regions.hidden": 64,
        "model.backbone.frozen_stages": 0,
        "optim.optimizer": "adamw",
        "optim.lr": 1e-3,
        "optim.backbone_lr": 1e-3,
        "optim.clip_norm": 1.0,
        "train.total_batch": 8,
        "train.micro_batch": 8,
    }
    words = {"model.width": 64} if "fpn" in name else {}
    recipe = reduced(name, *(f"{key}={json.dumps(value)}" for key, value in (settings | words).items()))
    torch.manual_seed(0)
    model, criterion, batch = build_model(recipe.model), build_criterion(recipe), eight_pictures(recipe)
    optimizer = build_optimizer(model.train(), recipe.optim)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, min(1.0, (step + 1) / 20) * (0.1 if step > steps * 3 // 4 else 1.0))
        losses.append(train_step(model, criterion, optimizer, batch, device=CPU, clip_norm=1.0)[0].item())
    assert sum(losses[-5:]) / 5 < losses[0] / 10, losses[:: steps // 10]
