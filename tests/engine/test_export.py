"""Weights for others: the same detector after a round trip, and nothing damaged or overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samdetr.engine.checkpoint.format import read_meta
from samdetr.engine.checkpoint.weights import load_initial_weights, load_trained
from samdetr.engine.export import export
from samdetr.engine.train import train
from samdetr.errors import CheckpointError
from samdetr.models import build_model
from samdetr.models.official import load_official, read_official
from samdetr.recipe import Recipe
from tests.engine.runs import Command, MakeRecipe, metrics, sentence


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("export") / "tiny.safetensors"
    assert export(str(trained), weights=str(file), official=None) == [file, file.with_suffix(".json")]
    return file


def test_the_pair_says_what_it_is(exported: Path, trained: Path) -> None:
    own = load_trained(str(trained))
    tensors = load_file(exported)
    assert all(torch.equal(tensors[name], value) for name, value in own.model.state_dict().items())
    assert tensors.keys() == own.model.state_dict().keys()
    meta = read_meta(exported.with_suffix(".json"))
    best = (trained / "checkpoints" / "best").resolve().name
    assert meta["progress"]["step"] == int(best.removeprefix("step-"))
    assert meta["metrics"] == next(
        line for line in metrics(trained, "eval") if line["step"] == meta["progress"]["step"]
    )
    assert Recipe.model_validate_json(json.dumps(meta["recipe"])) == own.recipe
    assert meta["categories"] == own.categories.to_json()
    assert (meta["system"], meta["averaged"]) == ("sam_detr", False)
    assert meta["parameters"] == sum(value.numel() for value in own.model.parameters())
    assert str(trained) not in exported.with_suffix(".json").read_text()


def test_eval_predict_and_training_read_it(
    exported: Path, trained: Path, samdetr_command: Command, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    tables = [samdetr_command("eval", str(target)).out.splitlines()[-3:] for target in (exported, trained)]
    assert tables[0] == tables[1] and any("." in line for line in tables[0])
    picture = next((trained).glob("val_predictions.png"))
    result = samdetr_command("predict", str(exported), str(picture), "--output", str(tmp_path / "found"))
    assert (result.code, result.err) == (0, "")
    recipe = make_recipe(f"init.checkpoint={exported}")
    model = build_model(recipe.model)
    assert load_initial_weights(model, recipe) == f"weights: {exported}"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(exported).items())


def test_averaged_weights_are_exported(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = train(make_recipe("optim.ema_decay=0.9", "train.epochs=1"))
    file = tmp_path / "averaged.safetensors"
    export(str(run), weights=str(file), official=None)
    own = load_trained(str(run)).model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in load_file(file).items())
    assert read_meta(file.with_suffix(".json"))["averaged_steps"] == 6


def test_the_published_layout(make_recipe: MakeRecipe, samdetr_command: Command, tmp_path: Path) -> None:
    recipe = make_recipe("model.backbone.norm=frozen", "train.epochs=1")
    run = train(recipe)
    file = tmp_path / "tiny.pth"
    result = samdetr_command("export", str(run), "--official", str(file))
    assert (result.code, result.out, result.err) == (0, f"{file}\n", "")
    model = build_model(recipe.model)
    assert load_official(model, read_official(file)) == 0
    own = load_trained(str(run)).model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_what_is_refused(exported: Path, trained: Path, samdetr_command: Command, tmp_path: Path) -> None:
    result = samdetr_command("export", str(trained))
    assert result.code == 2 and "give --weights OUT.safetensors" in result.err
    command = ("export", str(trained), "--weights")
    assert f"{exported} is there already" in sentence(samdetr_command(*command, str(exported)))
    assert "must end in .safetensors" in sentence(samdetr_command(*command, str(tmp_path / "a.bin")))
    (tmp_path / "file").touch()
    there = tmp_path / "file" / "a.safetensors"
    assert f"cannot write {there} (File exists)" in sentence(samdetr_command(*command, str(there)))
    learning_norm = sentence(samdetr_command("export", str(trained), "--official", str(tmp_path / "a.pth")))
    assert "has no place in the published layout" in learning_norm
    assert {entry.name for entry in tmp_path.iterdir()} == {"file"}


def test_a_damaged_or_renamed_export_is_named(exported: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    for name in ("a", "tiny"):
        for suffix in (".safetensors", ".json"):
            shutil.copy(exported.with_suffix(suffix), tmp_path / f"{name}{suffix}")
    with pytest.raises(CheckpointError, match=r"a\.json is of tiny\.safetensors: keep the names"):
        load_trained(str(tmp_path / "a.safetensors"))
    file = tmp_path / "tiny.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-1], content[:-5] + b"!" + content[-4:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            load_initial_weights(build_model(make_recipe().model), make_recipe(f"init.checkpoint={file}"))
    file.unlink()
    with pytest.raises(CheckpointError, match=f"cannot read {file}"):
        load_trained(str(file))
