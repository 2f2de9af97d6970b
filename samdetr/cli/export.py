"""``samdetr export``: the weights of a run for others."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="Run folder, of which the best checkpoint is taken, or a checkpoint such as RUN/checkpoints/last.",
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="OUT.safetensors",
            help="One safetensors file, and OUT.json beside it: recipe, categories, step, metrics, checksum.",
        ),
    ] = None,
    official: Annotated[
        str | None,
        typer.Option("--official", metavar="OUT.pth", help="A state dict in the layout of the published checkpoints."),
    ] = None,
) -> None:
    """Write the weights of a run or checkpoint for others; those of an average where it has one."""
    if weights is None and official is None:
        raise typer.BadParameter("give --weights OUT.safetensors, --official OUT.pth or both.")
    from samdetr.engine.export import export as write

    for file in write(checkpoint, weights=weights, official=official):
        sys.stdout.write(f"{file}\n")
