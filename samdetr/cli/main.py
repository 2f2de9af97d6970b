"""The entry points ``samdetr`` and ``samdetr-train``, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from samdetr import __version__
from samdetr.cli.debug_nan import debug_nan
from samdetr.cli.eval import evaluate
from samdetr.cli.export import export
from samdetr.cli.predict import predict
from samdetr.cli.report import report
from samdetr.cli.train import mark_resume, train
from samdetr.errors import NonFiniteError, RecipeError, SamdetrError


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
    app.command("report")(report)
    app.command("export")(export)
    app.command("debug-nan")(debug_nan)
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
        _report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit as error:  # typer makes one of KeyboardInterrupt
        for code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            if error.code == code:
                _leave(code)
        raise
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """End after a signal. What was to be saved is; torch's threads, cut off anywhere, can abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(error: SamdetrError) -> None:
    """One sentence for one mistake, of several processes too."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and isinstance(error, RecipeError | NonFiniteError):
        return  # the same in every process
    # The lines of a RecipeError begin with their own place, which editors can jump to.
    start = "" if isinstance(error, RecipeError) else "error: " if rank == 0 else f"error in process {rank}: "
    sys.stderr.write(f"{start}{error}\n")
