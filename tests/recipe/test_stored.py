"""Recipes that earlier versions stored with runs and checkpoints: they had the keys of all systems."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from samdetr.errors import RecipeError
from samdetr.recipe import Recipe, dump_recipe, load_recipe, stored_recipe

OLD_RUN = Path(__file__).with_name("old_run.toml")  # of Deformable-DETR on four maps
FOR_ALL: dict[str, Any] = {  # keys of [model] that every stored recipe had
    "class_prior": 0.01,
    "resampling": "points",
    "reweighting": True,
    "search_range": "box",
    "smca": False,
    "smca_initial_scale": 0.0,
    "smca_stride": "published",
    "scale_encoder": "convolution",
    "feature_levels": 1,
    "box_refine": False,
    "two_stage": False,
    "heads": 8,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "ffn": 2048,
    "dropout": 0.1,
    "input_norm": "group_norm",
    "padding": "published",
    "regions": {
        "candidates_train": 2000,
        "candidates_eval": 1000,
        "proposals_train": 2000,
        "proposals_eval": 1000,
        "hidden": 1024,
        "score_threshold": 0.05,
    },
}
OF_SYSTEM: dict[str, dict[str, Any]] = {
    "sam_detr": {"smca": True},
    "sam_detr_ms": {"feature_levels": 4},
    "detr": {"class_prior": 0.0, "input_norm": "none"},
    "conditional_detr": {"heads": 4},
    "smca_detr": {"smca_stride": "feature"},
    "smca_detr_ms": {"input_norm": "none", "scale_encoder": "attention"},
    "deformable_detr": {"feature_levels": 2, "box_refine": True},
    "faster_rcnn": {"regions": {**FOR_ALL["regions"], "hidden": 8}},
}


def test_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    stored = shutil.copy(OLD_RUN, tmp_path / "recipe.toml")
    with pytest.raises(RecipeError, match=r"recipe\.toml:67: model\.smca: unknown key"):
        load_recipe(stored)
    (tmp_path / "environment.json").write_text("{}")  # which makes it a run folder
    recipe = load_recipe(stored, ["train.epochs=3"])
    with pytest.raises(RecipeError, match=r"^--set model\.smca=false: model\.smca: unknown key"):
        load_recipe(stored, ["model.smca=false"])
    assert (recipe.model.system, recipe.model.feature_levels, recipe.train.epochs) == ("deformable_detr", 4, 3)
    old, now = tomllib.loads(OLD_RUN.read_text()), tomllib.loads(dump_recipe(recipe))
    assert now["train"].pop("epochs") == 3 and old["train"].pop("epochs") == 2
    assert old["data"].pop("resize") == "worker"
    gone = old["model"].keys() - now["model"].keys()
    assert gone == FOR_ALL.keys() - {*now["model"]}
    assert now == {**old, "model": {key: value for key, value in old["model"].items() if key not in gone}}


def test_the_recipe_of_a_person_is_read_strictly(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(shutil.copy(OLD_RUN, tmp_path))
    assert len(str(caught.value).splitlines()) == 11
    assert "old_run.toml:67: model.smca: unknown key. It belongs to systems sam_detr, sam_detr_ms;" in str(caught.value)


@pytest.mark.parametrize("system", OF_SYSTEM)
def test_every_system(system: str) -> None:
    values = {"data": {"resize": "worker"}, "model": {"system": system, **FOR_ALL, **OF_SYSTEM[system]}}
    if system == "faster_rcnn":
        values["loss"] = {"classification": "softmax"}
    before = {name: dict(section) for name, section in values.items()}
    recipe = stored_recipe(values, "a checkpoint")
    assert values == before
    own = OF_SYSTEM[system].keys() & type(recipe.model).model_fields
    assert own and all(recipe.model.model_dump()[key] == OF_SYSTEM[system][key] for key in own)
    assert stored_recipe(tomllib.loads(dump_recipe(recipe)), "a checkpoint") == recipe


def test_a_former_key_that_changed_something_is_an_error() -> None:
    for section, key, value in (("data", "resize", "device"), ("model", "class_prior", 0.02), ("model", "heads", "8")):
        with pytest.raises(RecipeError, match=rf"^a checkpoint: {section}\.{key}: "):
            stored_recipe({section: {key: value}}, "a checkpoint")
    with pytest.raises(RecipeError, match=r"^a checkpoint: model: expected a section"):
        stored_recipe({"model": 3}, "a checkpoint")
    assert stored_recipe({}, "a checkpoint") == Recipe()
