"""``samdetr debug-nan``: where the numbers of a step stopped being finite."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def debug_nan(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="nonfinite-step-....safetensors, which a run wrote into its folder.")
    ],
) -> None:
    """Compute the step of FILE again and name the module, the loss terms and the images that are not finite.

    Exit code 0 where all is finite now, 1 where it is not. Needs the training data of the run.
    """
    from samdetr.engine.debug_nan import debug_nan as replay

    sys.exit(0 if replay(file) else 1)
