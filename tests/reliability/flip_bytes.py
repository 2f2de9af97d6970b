"""Damage to a checkpoint: flipped bytes, cut and missing files, each noticed and named, and the one before used.

    PYTHONPATH=.:kernels python -m tests.reliability.flip_bytes --count 100 [--processes 2]

Bytes are drawn evenly over all files of the newest checkpoint. Every file is also cut at a random length, and deleted.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from samdetr.engine.checkpoint.folder import load_newest, newest_first
from samdetr.engine.distributed.world import ALONE
from tests.reliability.children import finish, options, small_recipe


class Noticed(NamedTuple):
    """How many damages there were, and how many were named with their file and passed over."""

    flips: int
    flips_noticed: int
    files: int
    cuts_noticed: int
    deletions_noticed: int


def damage(folder: Path, *, count: int, processes: int, seed: int) -> Noticed:
    """Damage the newest checkpoint of a run again and again, each time from the same whole one."""
    draw = random.Random(seed)
    recipe = small_recipe(folder, "train.epochs=1", "checkpoint.every=3", "eval.every=9")
    finish(recipe, resume=None, processes=processes)
    whole = Path(recipe.run.folder) / "tiny" / "1" / "checkpoints"
    newest = newest_first(whole)[0]
    files = sorted(file.relative_to(whole) for file in newest.rglob("*") if file.is_file())
    sizes = [(whole / file).stat().st_size for file in files]

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)

    def cut(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: draw.randrange(len(content))])

    flipped = draw.choices(files, sizes, k=count)
    return Noticed(
        count,
        sum(_noticed(whole, file, flip) for file in flipped),
        len(files),
        sum(_noticed(whole, file, cut) for file in files),
        sum(_noticed(whole, file, Path.unlink) for file in files),
    )


def _noticed(whole: Path, file: Path, harm: Callable[[Path], None]) -> bool:
    """Whether the damaged file is named and the checkpoint before its own is used."""
    copy, said = whole.with_name("copy"), list[str]()
    shutil.copytree(whole, copy, symlinks=True)
    harm(copy / file)
    before = newest_first(copy)[1]
    used = load_newest(copy, ALONE, said.append).path
    shutil.rmtree(copy)
    return used == before and len(said) == 1 and str(copy / file) in said[0]


def main() -> None:
    """The figures, and exit code 1 where they are not what is promised."""
    given = options(__doc__ or "", 100)
    with tempfile.TemporaryDirectory() as folder:
        found = damage(Path(folder), count=given.count, processes=given.processes, seed=given.seed)
    print(
        f"torch {torch.__version__}, {given.processes} processes: {found.flips_noticed}/{found.flips} flipped bytes, "
        f"{found.cuts_noticed}/{found.files} cut files and {found.deletions_noticed}/{found.files} missing files "
        "noticed and named, each time with the checkpoint before in use"
    )
    sys.exit(found != Noticed(found.flips, found.flips, found.files, found.files, found.files))


if __name__ == "__main__":
    main()
