"""``samdetr train``, which is also ``samdetr-train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from samdetr.errors import CheckpointError
from samdetr.recipe import RECIPE_FILE, dump_recipe, load_recipe


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", help="Recipe file, such as recipes/quickstart.toml; with --resume RUN that of the run."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[RUN]",
            help="Continue the run in folder RUN; without RUN the newest unfinished run of this name.",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            "--nproc",
            min=1,
            help="Processes on this machine; by default one for each visible GPU, as far as they can share a step.",
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Profile steps 10 to 15: a trace and a table in the run's folder profile.")
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the whole resolved recipe as TOML and stop.")
    ] = False,
) -> None:
    """Train a detector as RECIPE says."""
    changes = overrides or []
    resolved = load_recipe(recipe or _recipe_of_run(resume), changes)
    if print_recipe:
        sys.stdout.write(dump_recipe(resolved))
        return
    from samdetr.engine.distributed.launch import launch, processes_wanted, visible_gpus
    from samdetr.engine.distributed.world import is_launched
    from samdetr.engine.train import train as run_training

    processes = 1 if is_launched() else processes_wanted(nproc, resolved, visible_gpus(resolved))
    if processes > 1:
        sys.exit(launch(processes, _command_line(recipe, changes, resume, profile)))
    run_training(resolved, resume=resume, profile=profile)


def _command_line(recipe: str | None, overrides: list[str], resume: str | None, profile: bool) -> list[str]:
    """Return the arguments of the command in one process."""
    arguments = ["train", *([recipe] if recipe else [])]
    arguments += [word for override in overrides for word in ("--set", override)]
    arguments += [] if resume is None else ["--resume", *([resume] if resume else [])]
    return [*arguments, *(["--profile"] if profile else [])]


def _recipe_of_run(resume: str | None) -> Path:
    """Return the recipe file of the run to continue."""
    if not resume:
        raise typer.BadParameter("give a RECIPE, or --resume RUN to continue that run.", param_hint="RECIPE")
    file = Path(resume) / RECIPE_FILE
    if not file.is_file():
        raise CheckpointError(f"--resume: {resume} is not a run folder (it has no {file.name}).")
    return file


def mark_resume(arguments: list[str]) -> list[str]:
    """Write ``--resume [RUN]`` among the arguments as ``--resume=RUN``, without a RUN as ``--resume=``.

    The word after ``--resume`` is its RUN unless it is an option or a recipe file (it ends in .toml).
    """
    marked: list[str] = []
    rest = iter(enumerate(arguments))
    for index, argument in rest:
        if argument == "--":
            return marked + arguments[index:]
        if argument == "--set" and index + 1 < len(arguments):
            marked += [argument, next(rest)[1]]
        elif argument == "--resume":
            following = arguments[index + 1 : index + 2]
            is_run = bool(following) and not following[0].startswith("-") and not following[0].endswith(".toml")
            marked.append(f"--resume={next(rest)[1] if is_run else ''}")
        else:
            marked.append(argument)
    return marked
