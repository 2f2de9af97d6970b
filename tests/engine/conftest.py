"""The tiny recipe, a finished run of it, the commands in this process, and a process group of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from samdetr.cli.main import main, main_train
from samdetr.engine.train import train
from samdetr.recipe import Recipe, load_recipe
from tests.engine.runs import TINY, Command, MakeRecipe, Result, captured


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="package")
def recipe_file(tmp_path_factory: pytest.TempPathFactory, shapes_folder: Path) -> Path:
    """The tiny recipe; commands add `--set run.folder=...`."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    file.write_text(TINY.replace("max_objects = 5\n", f"max_objects = 5\nfolder = {json.dumps(str(shapes_folder))}\n"))
    return file


@pytest.fixture
def make_recipe(recipe_file: Path, tmp_path: Path) -> MakeRecipe:
    """The tiny recipe with changes, without SMCA where these name a system; its runs are made in tmp_path / "runs"."""

    def make(*overrides: str) -> Recipe:
        file = recipe_file
        if any(override.startswith("model.system=") for override in overrides):
            file = tmp_path / "tiny.toml"
            file.write_text(recipe_file.read_text().replace("smca = true\n", ""))
        return load_recipe(file, [f"run.folder={json.dumps(str(tmp_path / 'runs'))}", *overrides])

    return make


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path, one_thread: None) -> Path:
    """A finished run of the tiny recipe: two epochs of six steps, each evaluated. Read it only."""
    return train(load_recipe(recipe_file, [f"run.folder={json.dumps(str(tmp_path_factory.mktemp('runs')))}"]))


@pytest.fixture
def train_command(recipe_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """``samdetr-train`` with the tiny recipe in this process; options as for the command."""

    def run(*options: str, recipe: Path = recipe_file) -> Result:
        return captured(main_train, [str(recipe), "--set", f"run.folder={tmp_path / 'runs'}", *options], capfd)

    return run


@pytest.fixture
def samdetr_command(capfd: pytest.CaptureFixture[str]) -> Command:
    """``samdetr ...`` in this process."""
    return lambda *arguments: captured(main, list(arguments), capfd)


@pytest.fixture
def one_of_one() -> Iterator[None]:
    """A process group of this process alone, with a limit that is neither torch's nor a recipe's."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=99))
    yield
    dist.destroy_process_group()
