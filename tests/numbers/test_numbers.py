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

from tests.numbers.record import VARIANTS, compare, environment, record_recipes, record_run, train_variant

HERE = Path(__file__).parent
RECIPES, STEPS = (json.loads((HERE / name).read_text()) for name in ("recipes.json", "steps.json"))
VANISHED: frozenset[str] = frozenset()  # keys in recipes.json that a resolved recipe may lack
# CPUs and numbers of threads round differently. On one CPU, 1 and 2 threads differed by at most LARGEST in five steps
TOLERANCE = 1e-4


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
    assert found.keys() == RECIPES.keys() - {"defaults"}
    differences = [
        f"{name}: {key} = {found[name].get(key)!r}, recorded {value!r}"
        for name in found
        for key, value in {**RECIPES["defaults"], **RECIPES[name]}.items()
        if (found[name][key] != value if key in found[name] else key not in VANISHED)
    ]
    assert differences == []


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_five_steps(name: str, tmp_path: Path, shapes_folder: Path) -> None:
    found, recorded = record_run(train_variant(name, tmp_path, shapes_folder)), STEPS["runs"][name]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found["steps"]] == pytest.approx(recorded[key], rel=TOLERANCE)
    if environment().items() <= STEPS["environment"].items():  # bits are of one torch on one CPU
        parts = ("model", "optimizer", "average")
        assert {part: found[part] for part in parts} == {part: recorded[part] for part in parts}


def test_a_comparison_tells_numbers_from_keys(capsys: pytest.CaptureFixture[str]) -> None:
    run = {"steps": [{"loss": 1.0}], "model": "a"}
    one = {"environment": {}, "runs": {"detr": run}, "recipes": {"a": {"x.y": 1, "x.z": 2}}}
    assert compare(one, {**one, "recipes": {"a": {"x.y": 1, "x.new": 3}}}) == 0
    assert "vanished: x.z = 2, in 1 recipes" in (out := capsys.readouterr().out) and "appeared: x.new = 3" in out
    assert compare(one, {**one, "recipes": {"a": {"x.y": 2, "x.z": 2}}}) == 1
    assert compare(one, {**one, "runs": {"detr": {**run, "steps": [{"loss": math.nextafter(1.0, 2.0)}]}}}) == 1
    assert "runs.detr.steps[0].loss: 1.0 != 1.0000000000000002" in capsys.readouterr().out
