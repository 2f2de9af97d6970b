"""The published numbers are the same in the table, in the recipes' headers and in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from samdetr.cost.published import PUBLISHED
from samdetr.recipe import load_recipe
from tests.parity.reference import RECIPES_COMPARED

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.toml"))}


def header_of(path: Path) -> str:
    """Return the comment that a recipe begins with, as one line."""
    lines = path.read_text().split("\n\n")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def number_before(words: str, text: str) -> float | None:
    found = re.search(rf"([\d.,]*\d),? {words}", text)
    return float(found[1].replace(",", "")) if found else None


def test_every_recipe_of_a_published_row_has_its_line() -> None:
    rows = {name for name, path in RECIPES.items() if re.search(r"AP [\d.]+ on COCO|\d GFLOPs", header_of(path))}
    assert rows == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_headers_of_recipes(name: str) -> None:
    row, header = PUBLISHED[name], header_of(RECIPES[name])
    ap = re.search(r"AP ([\d.]+) on COCO val2017", header)
    assert (float(ap[1]) if ap else None) == row.ap
    assert number_before("GFLOPs", header) == row.gflops
    if row.parameters is not None:
        assert number_before("parameters", header) == row.parameters
        assert number_before("of them trainable", header) == row.trainable
    assert f"{row.system}, {row.backbone}, ".lower() in header.lower().replace(" with ", ", ").replace(
        " and the ", ", "
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_compared_are_the_models_of_the_reference_outputs(name: str) -> None:
    compared = RECIPES_COMPARED.values()
    model = load_recipe(RECIPES[name]).model
    assert PUBLISHED[name].compared == any(model == load_recipe(RECIPES[other]).model for other in compared)


def test_the_table_of_the_readme() -> None:
    lines = re.findall(
        r"^\| (\[.*\)) \| ([\d, ]+) \| ([\d., ]+) \| ([\d.]+) M \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(lines) >= 8
    for links, epochs, aps, millions in lines:
        names = re.findall(r"\((?:recipes/)(\w+)\.toml\)", links)
        assert [str(load_recipe(RECIPES[name]).train.epochs) for name in names] == epochs.split(", ")
        assert [f"{PUBLISHED[name].ap:.1f}" for name in names] == aps.split(", ")
        for name in names:
            assert (PUBLISHED[name].parameters or 0) / 1e6 == pytest.approx(float(millions), abs=0.05)
