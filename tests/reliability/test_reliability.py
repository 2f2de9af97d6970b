"""A few turns of each script of this folder; all of them, as docs/reliability.md gives their figures, are slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.flip_bytes import Noticed, damage
from tests.reliability.kill_saves import kill_saves
from tests.reliability.random_resume import resumed_equal

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("count", "processes"), [(1, 1), pytest.param(20, 1, marks=SLOW), pytest.param(20, 2, marks=SLOW)]
)
def test_a_stopped_run_comes_to_the_same_numbers(tmp_path: Path, count: int, processes: int) -> None:
    assert resumed_equal(tmp_path, count=count, processes=processes, seed=1) == count


@pytest.mark.parametrize(
    ("count", "processes"), [(2, 1), pytest.param(50, 1, marks=SLOW), pytest.param(20, 2, marks=SLOW)]
)
def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path: Path, count: int, processes: int) -> None:
    found = kill_saves(tmp_path, count=count, processes=processes, seed=1)
    assert (found.kills, found.resumable, found.before) == (count, count, count)


@pytest.mark.parametrize(("count", "processes"), [(5, 1), pytest.param(100, 2, marks=SLOW)])
def test_every_damage_is_noticed(tmp_path: Path, count: int, processes: int) -> None:
    found = damage(tmp_path, count=count, processes=processes, seed=1)
    assert found == Noticed(count, count, found.files, found.files, found.files)
    assert found.files == 1 + 3 * processes
