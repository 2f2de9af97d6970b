"""``samdetr report``: parameters, operations and memory of recipes' models, beside what is published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from samdetr.errors import RecipeError
from samdetr.recipe import load_recipe

SMALLEST, LARGEST = 32, 10_000  # sides of an image, pixels
SHIPPED = Path(__file__).parents[2] / "recipes"


def report(
    recipes: Annotated[list[str] | None, typer.Argument(metavar="RECIPE", help="Recipe files.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All recipes of this repository.")] = False,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--sizes",
            metavar="HxW[,HxW...]",
            help="Image sizes to count at, height and width in pixels; by default what the recipe's evaluation makes "
            "of photos of 640 x 480 and 640 x 426 pixels.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of every recipe; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, as in docs/models.md.")] = False,
) -> None:
    """Show what a recipe's model costs: parameters, GFLOPs, training memory. Needs no data, no weights and no GPU."""
    if as_json and as_markdown:
        raise typer.BadParameter("give one of --json and --markdown.", param_hint="--json")
    counted = list(dict.fromkeys(_size(word) for value in sizes or [] for word in value.split(",")))
    paths = _chosen(recipes or [], every)
    loaded = {path: load_recipe(path, overrides or []) for path in paths}
    from samdetr.cost.report_text import report_recipes

    report_recipes(loaded, counted, "json" if as_json else "markdown" if as_markdown else "table")


def _chosen(recipes: list[str], every: bool) -> list[Path]:
    if bool(recipes) == every:
        raise typer.BadParameter("give recipe files, or --all.", param_hint="RECIPE")
    for word in recipes:
        if re.fullmatch(r"\d+x\d+", word):
            raise typer.BadParameter(f"separate sizes by commas: --sizes HxW,{word}", param_hint="--sizes")
    if not every:
        return [Path(recipe) for recipe in recipes]
    found = sorted(SHIPPED.glob("*.toml"))
    if not found:
        raise RecipeError(
            f"--all: there are no recipes in {SHIPPED}; an installed package does not hold them. "
            "Name recipe files, or run it from a clone of the repository with `pip install -e .`."
        )
    return found


def _size(word: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", word.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise typer.BadParameter(
            f'"{word}" is not HEIGHTxWIDTH in pixels, each from {SMALLEST} to {LARGEST}, such as 800x1066.',
            param_hint="--sizes",
        )
    return size
