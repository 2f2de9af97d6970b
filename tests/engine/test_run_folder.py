"""The files that a run leaves in its folder."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samdetr
from samdetr.engine.checkpoint.format import read_meta, write_meta
from samdetr.engine.run.folder import environment_of, new_run, run_of_launch
from samdetr.errors import CheckpointError, SamdetrError
from samdetr.recipe import load_recipe, with_absolute_paths
from tests.engine.runs import MakeRecipe, metrics


def test_everything_is_there(trained: Path) -> None:
    assert {entry.name for entry in trained.iterdir()} == {
        "checkpoints",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "recipe.toml",
        "val_predictions.png",
    }


def test_runs_are_numbered_and_never_reused(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    parent = Path(recipe.run.folder) / "tiny"
    assert [new_run(recipe, {}).name for _ in range(3)] == ["1", "2", "3"]
    (parent / "7").mkdir()
    (parent / "notes").mkdir()
    (parent / "8").touch()
    assert new_run(recipe, {}) == parent / "9"
    assert new_run(make_recipe('run.name="other"'), {}).relative_to(parent.parent) == Path("other/1")


def test_runs_started_at_once_get_their_own_folders(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe()
    parent = Path(recipe.run.folder) / "tiny"
    mkdir = Path.mkdir

    def slower(self: Path, *arguments: object, **options: object) -> None:
        if self == parent / "1" and not self.exists():
            mkdir(self)  # another run was faster
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", slower)
    assert new_run(recipe, {}) == parent / "2"


def test_the_recipe_can_be_run_again(trained: Path, recipe_file: Path) -> None:
    again = load_recipe(trained / "recipe.toml")
    folder = str(trained.parents[1])
    assert again == with_absolute_paths(load_recipe(recipe_file, [f"run.folder={json.dumps(folder)}"]))
    assert again.run.name == "tiny"


def test_the_run_of_a_launch(
    trained: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest of this launch that is not finished and has a checkpoint."""
    recipe = make_recipe()
    parent = Path(recipe.run.folder) / recipe.run.name
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_of_launch(recipe) is None  # no launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert run_of_launch(recipe) is None  # no run
    for number, (launch, finished) in enumerate([("job 7", 0), ("job 7", 0), ("job 8", 0), ("job 7", 1)], start=1):
        run = parent / str(number)
        shutil.copytree(trained, run, symlinks=True)
        (run / "environment.json").write_text(json.dumps({"launch": launch}))
        for checkpoint in (run / "checkpoints").glob("step-*"):
            meta = read_meta(checkpoint / "meta.json")
            write_meta(checkpoint / "meta.json", {**meta, "progress": {**meta["progress"], "finished": bool(finished)}})
    new_run(recipe, environment_of(recipe, torch.device("cpu")))  # it has no checkpoint
    assert run_of_launch(recipe) == str(parent / "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 9")
    assert run_of_launch(recipe) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # of a torchrun that was given none
    assert run_of_launch(recipe) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(CheckpointError, match="give torchrun --rdzv-id"):
        run_of_launch(recipe)


def test_environment(trained: Path, make_recipe: MakeRecipe) -> None:
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["seed"] == 5
    assert environment["versions"]["torch"] == torch.__version__
    assert {"torchvision", "numpy", "scipy", "pycocotools", "hotcoco", "safetensors"} <= environment["versions"].keys()
    assert environment["device"] and environment["python"] and environment["platform"] and environment["command"]
    meta = json.loads((trained / "checkpoints" / "last" / "meta.json").read_text())
    assert meta["environment"] == environment
    if (Path(samdetr.__file__).parents[1] / ".git").exists():
        assert len(environment["commit"].removesuffix("+changes")) == 40
    else:
        assert environment["commit"] == ""
    assert environment_of(make_recipe("run.seed=3"), torch.device("cpu"))["seed"] == 3


def test_metrics(trained: Path) -> None:
    lines = metrics(trained)
    assert [line["kind"] for line in lines] == [*["train"] * 6, "epoch", "eval"] * 2
    for line in metrics(trained, "train"):
        assert line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_s"] > 0
        assert line["memory_mb"] > (-1 if torch.cuda.is_initialized() else 50)
        assert 0 <= line["data_wait"] <= 1 and 0 <= line["class_error"] <= 100
        assert line["epoch"] == (line["step"] - 1) // 6
    for epoch, line in enumerate(metrics(trained, "epoch")):
        steps = [entry["loss"] for entry in metrics(trained, "train") if entry["epoch"] == epoch]
        assert line["loss"] == pytest.approx(math.fsum(steps) / 6, rel=1e-12)
    for line in metrics(trained, "eval"):
        assert 0 <= line["AP"] <= line["AP50"] <= 1
        assert len(line["per_class"]) == 8
        assert line["seconds"] > 0


@pytest.mark.parametrize("name", ["curves.png", "val_predictions.png"])
def test_pictures(trained: Path, name: str) -> None:
    picture = Image.open(trained / name)
    picture.load()
    assert min(picture.size) > 300
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50


def test_a_folder_that_cannot_be_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recipe = make_recipe(f'run.folder="{tmp_path / "file"}"')
    with pytest.raises(SamdetrError, match=r"cannot write the run folder .*file/tiny \(Not a directory\): choose"):
        new_run(recipe, {})


def test_colleagues_may_read_every_file_of_a_checkpoint(trained: Path) -> None:
    """They follow the umask, as any new file does."""
    folder, plain = (trained / "checkpoints" / "last").resolve(), trained / "recipe.toml"
    assert {file.stat().st_mode for file in folder.rglob("*") if file.is_file()} == {plain.stat().st_mode}


def test_what_a_run_reads_is_named_from_the_root(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    options = ('data.val_images="etc/photos"', 'init.official="a.pth"', 'model.backbone.weights="b.pth"')
    recipe = with_absolute_paths(make_recipe(*options))
    assert recipe.data.val_images == "/etc/photos"
    assert recipe.init.official == "/a.pth" and recipe.init.checkpoint == ""
    assert recipe.model.backbone.weights == "/b.pth"
    assert with_absolute_paths(recipe) == recipe
    published = load_recipe(Path(__file__).parents[2] / "recipes" / "r50_12ep.toml")
    assert with_absolute_paths(published).model.backbone.weights == "imagenet"
