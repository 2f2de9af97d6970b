"""``samdetr eval``: the COCO numbers of a run, a checkpoint or a published checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from samdetr.recipe import load_recipe


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run folder, of which the best checkpoint is taken, or a checkpoint such as RUN/checkpoints/last; "
            "with --official the RECIPE to evaluate with.",
        ),
    ],
    official: Annotated[
        str | None, typer.Option("--official", metavar="FILE.pth", help="Evaluate this published checkpoint.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; repeatable."),
    ] = None,
) -> None:
    """Evaluate a run or checkpoint on the val split of its recipe."""
    if official is not None:
        recipe = load_recipe(target, overrides or [])
        from samdetr.engine.evaluate import evaluate_official

        evaluate_official(official, recipe)
        return
    if target.endswith(".toml"):
        raise typer.BadParameter("a recipe is evaluated with --official FILE.pth; else give a run or checkpoint.")
    from samdetr.engine.evaluate import evaluate_checkpoint

    evaluate_checkpoint(target, overrides=overrides or [])
