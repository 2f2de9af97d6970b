"""The checkpoints of a run: ``step-<n>`` folders, complete or absent, and the links ``last`` and ``best``.

A checkpoint is written under another name and renamed; the links move after it is on the disk, and only then are older
ones removed. So a run that is killed at any moment leaves at least the checkpoint before.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from samdetr.engine.checkpoint.format import (
    BEST,
    LAST,
    META_FILE,
    Checkpoint,
    Progress,
    load_checkpoint,
    read_meta,
    reason_of,
    sync,
    write_meta,
)
from samdetr.engine.distributed.world import World
from samdetr.errors import CheckpointError

_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_DAMAGED = "damaged-"


def name_of(step: int) -> str:
    """Return the name of the checkpoint after a step; a second one of the same step gets a number appended."""
    return f"step-{step:08d}"


def unfinished(folder: Path, name: str) -> Path:
    """Return where a checkpoint is written before it has its name."""
    return folder / f".{name}.tmp"


def newest_first(folder: Path) -> list[Path]:
    """List the checkpoints in a run's ``checkpoints``, damaged or not, newest first."""
    entries = folder.iterdir() if folder.is_dir() else ()
    names = {entry: _NAME.fullmatch(entry.name) for entry in entries if entry.is_dir() and not entry.is_symlink()}
    found = {entry: (int(name[1]), int(name[2] or 1)) for entry, name in names.items() if name}
    return sorted(found, key=lambda entry: found[entry], reverse=True)


def newest_progress(folder: Path) -> Progress | None:
    """Return the progress of the newest checkpoint whose meta.json can be read; None where there is none."""
    for path in newest_first(folder):
        try:
            return Progress(**read_meta(path / META_FILE)["progress"])
        except CheckpointError:
            continue  # an error names it when the run is loaded
    return None


def load_newest(folder: Path, world: World, say: Callable[[str], None]) -> Checkpoint:
    """Load the newest checkpoint that every process finds whole, make it ``last``, and remove leftovers.

    Damaged ones are renamed, and ``say`` prints which. Raises CheckpointError when none is left.
    """
    reason = "there is none"
    for path in world.broadcast_from_main(lambda: _tidy(folder)):
        checkpoint, reason = None, ""
        try:
            checkpoint = load_checkpoint(path, with_optimizer=True)
        except CheckpointError as error:
            reason = str(error)
        reason = world.first_message(reason)
        if checkpoint is not None and not reason:
            world.broadcast_from_main(lambda path=path: link(folder, LAST, path))  # type: ignore[misc]
            return checkpoint
        aside = world.broadcast_from_main(lambda path=path: _set_aside(path))  # type: ignore[misc]
        say(f"{reason} Its checkpoint is now {aside}, and the one before is used.")
    raise CheckpointError(f"--resume: no checkpoint in {folder} can be used: {reason}")


def publish(temporary: Path, target: Path) -> Path:
    """Give a checkpoint that is on the disk its name, make it ``last``, and return its path."""
    place = _free_place(target)
    temporary.rename(place)
    return link(target.parent, LAST, place)


def update_progress(folder: Path, progress: Progress, *, best: bool) -> Path:
    """Store the progress after an evaluation in ``folder/last`` and return its path.

    With ``best`` the link ``folder/best`` moves there first: a run killed in between evaluates, and moves it, again.
    Raises CheckpointError when the disk refuses.
    """
    checkpoint = (folder / LAST).resolve()
    meta = read_meta(checkpoint / META_FILE)
    try:
        if best:
            link(folder, BEST, checkpoint)
        write_meta(checkpoint / META_FILE, {**meta, "progress": asdict(progress)})
    except OSError as error:
        raise CheckpointError(
            f"cannot update the checkpoint {checkpoint} ({reason_of(error)}); it is as before. "
            "Free some space, then continue with --resume."
        ) from error
    return checkpoint


def remove_old(folder: Path, *, keep: int) -> list[str]:
    """Remove all checkpoints but the newest ``keep`` and the linked ones; return a warning for each that cannot be."""
    linked = {(folder / name).resolve() for name in (LAST, BEST)}
    problems = []
    for path in newest_first(folder)[keep:]:
        if path.resolve() not in linked:
            try:
                remove(path)
            except OSError as error:
                problems.append(f"cannot remove the old checkpoint {path} ({reason_of(error)}): it takes up space.")
    return problems


def remove(path: Path) -> None:
    """Remove a checkpoint; first its name, so that what is left of it is not taken for one."""
    doomed = path.with_name(f".{path.name}.removed")
    path.rename(doomed)
    shutil.rmtree(doomed)


def link(folder: Path, name: str, target: Path) -> Path:
    """Point ``folder/name`` at a checkpoint atomically, and return the checkpoint."""
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, folder / name)
    sync(folder)
    return target


def _tidy(folder: Path) -> list[Path]:
    """Clean up after a killed or copied run, and list the checkpoints, newest first."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(".") and (entry.is_symlink() or entry.is_file()):
            entry.unlink()
        elif entry.name.startswith("."):
            shutil.rmtree(entry, ignore_errors=True)
    for name in (LAST, BEST):
        copy = folder / name
        if copy.is_dir() and not copy.is_symlink():  # some copying makes folders of links
            place = _free_place(folder / name_of(read_meta(copy / META_FILE)["progress"]["step"]))
            copy.rename(place)
            link(folder, name, place)
    return newest_first(folder)


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is not taken for one again, and return its new path."""
    best = path.parent / BEST
    if best.resolve() == path.resolve():
        best.unlink()
    place = _free_place(path.with_name(_DAMAGED + path.name))
    return path.rename(place)


def _free_place(target: Path) -> Path:
    """Return the path, with a number appended where it exists already."""
    place, number = target, 2
    while place.exists():
        place, number = target.with_name(f"{target.name}-{number}"), number + 1
    return place
