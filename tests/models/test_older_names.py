"""Checkpoints of earlier versions: every name is renamed, and no order changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from samdetr.engine.optim import build_optimizer
from samdetr.models import build_model
from samdetr.models.older_names import current_names
from samdetr.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
# of models before detectors were composed of an encoder and a decoder: the state dict without the backbone's stages
OLDER: dict[str, str] = json.loads((Path(__file__).parent / "older_names.json").read_text())


def recipe_of(name: str) -> Recipe:
    options = ["model.backbone.weights=none", "model.backbone.name=resnet18"]
    if not name.startswith("faster_rcnn"):
        options += ["model.encoder_layers=1", "model.decoder_layers=2"]
    return load_recipe(RECIPES / f"{name}.toml", options)


@pytest.mark.parametrize("name", OLDER)
def test_names_of_earlier_versions_become_current_ones(name: str) -> None:
    recipe, older = recipe_of(name), OLDER[name].split()
    meta = {"recipe": {"model": {"system": recipe.model.system}}}
    with torch.device("meta"):
        model = build_model(recipe.model)
    current = [key for key in model.state_dict() if "backbone.layer" not in key]
    renamed = current_names({key: key for key in older}, meta)
    assert renamed.keys() == set(current) and len(renamed) == len(older)
    assert list(current_names(dict.fromkeys(current), meta)) == current
    moments = current_names({f"{key}:exp_avg": key for key in older}, meta)
    assert moments == {f"{key}:exp_avg": value for key, value in renamed.items()}
    # a gradient norm's last bits depend on the order in which the optimizer holds the parameters
    optimizer = build_optimizer(model, recipe.optim.model_copy(update={"sampling_lr_factor": 1.0}))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    held = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    assert held == [key for key in renamed if key in set(held)]
