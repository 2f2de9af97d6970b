"""Resolved recipes, and five steps of every variant, equal what was recorded with `record.py`.

After a change that is meant to change them: ``python tests/numbers/record.py OUT.json`` before and after, ``--compare``
to see that nothing else changed, then ``--fixtures OUT.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.numbers.record import (
    VARIANTS,
    compare,
    differences,
    environment,
    make_photos,
    record_recipes,
    record_variant,
    summarise,
)

HERE = Path(__file__).parent
RECIPES, STEPS = (json.loads((HERE / name).read_text()) for name in ("recipes.json", "steps.json"))
QUICK = ("sam_detr", "deformable_detr", "faster_rcnn_fpn")
# CPUs round otherwise, and a sample, a match or a kink of a gradient then falls to the other side. Largest relative
# differences from the record, measured on its CPU with two threads, and with one and no AVX512 (AVX2 alone):
# - first step: losses 8e-7 (bf16 4e-5), gradient norms 2e-4 (bf16 8e-3);
# - later steps: losses 2e-3, but 0.3 in Faster R-CNN, which draws other regions; gradient norms up to 0.9.
FIRST_LOSS, FIRST_NORM, FIRST_NORM_BF16, LATER_LOSS = 1e-4, 1e-3, 5e-2, 1e-2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def test_resolved_recipes() -> None:
    found = record_recipes()
    recorded = {name: RECIPES["defaults"] | own for name, own in RECIPES.items() if name != "defaults"}
    assert list(differences(recorded, found, "recipes")) == []


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_five_steps(name: str, tmp_path: Path, shapes_folder: Path) -> None:
    run = record_variant(name, tmp_path, shapes_folder, make_photos(tmp_path / "photos"))
    found, recorded = summarise(run), STEPS["runs"][name]
    losses, norms = found["loss"], found["grad_norm"]
    assert len(losses) == len(recorded["loss"])
    assert losses[0] == pytest.approx(recorded["loss"][0], rel=FIRST_LOSS)
    assert norms[0] == pytest.approx(recorded["grad_norm"][0], rel=FIRST_NORM_BF16 if name == "bf16" else FIRST_NORM)
    if not name.startswith("faster_rcnn"):
        assert losses == pytest.approx(recorded["loss"], rel=LATER_LOSS)
    if environment().items() <= STEPS["environment"].items():  # bits are of one torch on one CPU
        assert found == recorded


def test_a_comparison_tells_numbers_from_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run = {"steps": [{"loss": 1.0}], "model": "a"}
    one = {"environment": {}, "runs": {"detr": run}, "recipes": {"a": {"x.y": 1, "x.z": 2}}}
    assert compare(one, {**one, "recipes": {"a": {"x.y": 1, "x.new": 3}}}) == 0
    assert "vanished: x.z = 2, in 1 recipes" in (out := capsys.readouterr().out) and "appeared: x.new = 3" in out
    assert compare(one, {**one, "recipes": {"a": {"x.y": 2, "x.z": 2}}}) == 1
    assert compare(one, {**one, "runs": {"detr": {**run, "steps": [{"loss": math.nextafter(1.0, 2.0)}]}}}) == 1
    assert "runs.detr.steps[0].loss: 1.0 != 1.0000000000000002" in capsys.readouterr().out
