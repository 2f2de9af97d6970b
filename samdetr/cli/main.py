"""The entry points ``samdetr`` and ``samdetr-train``, and the one place where errors become exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from samdetr import __version__
from samdetr.cli.eval import evaluate
from samdetr.cli.predict import predict
from samdetr.cli.train import mark_resume, train
from samdetr.errors import RecipeError, SamdetrError


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"samdetr {__version__}\n")
        raise typer.Exit


def _family(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """Train, evaluate and use SAM-DETR detectors."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """``samdetr COMMAND ...``. Exit codes: 0 done, 1 a problem, 2 a wrong recipe or option, 130 Ctrl-C."""
    given = sys.argv[1:] if arguments is None else arguments
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=True, no_args_is_help=True)
    app.callback()(_family)
    app.command("train")(train)
    app.command("eval")(evaluate)
    app.command("predict")(predict)
    _run(app, mark_resume(given) if given[:1] == ["train"] else given, "samdetr")


def main_train(arguments: list[str] | None = None) -> NoReturn:
    """``samdetr-train RECIPE ...``, the same as ``samdetr train RECIPE ...``."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=True)
    app.command()(train)
    _run(app, mark_resume(sys.argv[1:] if arguments is None else arguments), "samdetr-train")


def _run(app: typer.Typer, arguments: list[str], name: str) -> NoReturn:
    try:
        app(args=arguments, prog_name=name)
    except SamdetrError as error:
        # The lines of a RecipeError begin with their own place, which editors can jump to.
        sys.stderr.write(f"{error}\n" if isinstance(error, RecipeError) else f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
