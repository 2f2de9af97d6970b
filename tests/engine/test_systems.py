"""Every recipe of an ablation or another system: its size, and two steps and an evaluation of a reduced version."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from _pytest.mark.structures import ParameterSet

from samdetr.engine.train import train
from samdetr.models import build_model
from samdetr.recipe import Recipe, load_recipe
from tests.engine.runs import metrics

RECIPES = Path(__file__).parents[2] / "recipes"
FROZEN = 222_400  # parameters of the stem and layer1
COUNTED = re.compile(r"# ([\d,]+) parameters, ([\d,]+) of them trainable")  # in a recipe's header


def header_counts() -> dict[str, tuple[int, int]]:
    """Read all and trainable parameters from the headers of the recipes; Faster R-CNN has tests of its own."""
    found = {file.stem: COUNTED.search(file.read_text()) for file in sorted(RECIPES.glob("*.toml"))}
    return {
        name: (int(counts[1].replace(",", "")), int(counts[2].replace(",", "")))
        for name, counts in found.items()
        if counts and not name.startswith("faster_rcnn")
    }


def with_repetitions_slow(names: Iterable[str]) -> list[ParameterSet]:
    """Mark recipes slow whose model and loss another one has: they differ in their schedule alone."""
    seen: list[object] = []
    parameters = []
    for name in names:
        recipe = load_recipe(RECIPES / f"{name}.toml")
        again = (recipe.model, recipe.loss) in seen
        seen.append((recipe.model, recipe.loss))
        parameters.append(pytest.param(name, marks=[pytest.mark.slow] if again else []))
    return parameters


PARAMETERS = header_counts()
SHAPES_CLASSES = 8


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = build_model(load_recipe(RECIPES / f"{name}.toml").model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable) == PARAMETERS[name]
    assert total - trainable == FROZEN


def test_the_headers_of_all_systems_have_counts() -> None:
    assert len(PARAMETERS) >= 41
    assert PARAMETERS["r50_12ep_1point"] == (51_937_334, 51_714_934)  # the branch's layers, computed by hand


def reduced(name: str, folder: Path, shapes_folder: Path) -> Recipe:
    """The recipe with a narrow, shallow model and a few small pictures; what it says of loss and system stays."""
    file = RECIPES / f"{name}.toml"
    no_object = load_recipe(file).loss.classification == "softmax"
    numbers = {
        "data.workers": 0,
        "data.shapes.train_images": 8,
        "data.shapes.val_images": 2,
        "data.shapes.image_size": 64,
        "data.shapes.max_objects": 5,
        "data.buckets": 2,
        "augment.train_sizes": [64],
        "augment.max_size": 96,
        "augment.crop": 0.0,
        "augment.eval_size": 64,
        "augment.eval_max_size": 96,
        "model.num_classes": SHAPES_CLASSES + no_object,
        "model.num_queries": 12,
        "model.width": 32,
        "model.heads": 4,
        "model.encoder_layers": 1,
        "model.decoder_layers": 2,
        "model.ffn": 32,
        "model.backbone.width": 16,
        "train.epochs": 1,
        "train.total_batch": 4,
        "train.micro_batch": 2,
        "train.log_every": 1,
        "eval.every": 1,
    }
    words = {
        "run.folder": str(folder),
        "run.device": "cpu",
        "compute.precision": "fp32",
        "data.format": "shapes",
        "data.class_index": "contiguous",
        "data.shapes.folder": str(shapes_folder),
        "model.backbone.weights": "none",
    }
    return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in (numbers | words).items()])


@pytest.mark.parametrize("name", with_repetitions_slow(PARAMETERS))
def test_two_steps_and_an_evaluation(name: str, tmp_path: Path, shapes_folder: Path) -> None:
    run = train(reduced(name, tmp_path, shapes_folder))
    steps = metrics(run, "train")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert [0 <= line["AP"] <= 1 for line in metrics(run, "eval")] == [True]
