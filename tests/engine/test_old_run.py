"""A run that version 0.1.0 began before parameters, recipe keys and rooms had their names of today goes on.

old_run/ was stopped after two of six steps; continued.json has the steps of the version that began it, to the end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.train import train
from samdetr.recipe import load_recipe
from tests.engine.runs import metrics

OLD_RUN = Path(__file__).parent / "old_run"
STEPS = json.loads((OLD_RUN / "continued.json").read_text())["steps"]


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A copy, with the link that a run has."""
    run = shutil.copytree(OLD_RUN, tmp_path / "old" / "1")
    (run / "checkpoints" / "last").symlink_to("step-00000002")
    return run


def test_it_goes_on_to_the_same_losses(old_run: Path, shapes_folder: Path) -> None:
    recipe = load_recipe(old_run / "recipe.toml", [f"data.shapes.folder={json.dumps(str(shapes_folder))}"])
    assert train(recipe, resume=str(old_run)) == old_run
    lines = metrics(old_run, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # weights, moments, order, augmentation and dropout are those of the old run; other CPUs round otherwise
    assert lines[2]["loss"] == pytest.approx(STEPS["3"]["loss"], rel=1e-4)
    assert lines[2]["grad_norm"] == pytest.approx(STEPS["3"]["grad_norm"], rel=1e-3)
    for line in lines[3:]:
        assert line["loss"] == pytest.approx(STEPS[str(line["step"])]["loss"], rel=1e-2)


def test_its_checkpoint_is_read(old_run: Path) -> None:
    trained = load_trained(str(old_run))
    assert trained.recipe.model.system == "sam_detr"
    assert trained.recipe.model.resampling == "average"
    assert sum(parameter.numel() for parameter in trained.model.parameters()) > 20_000
