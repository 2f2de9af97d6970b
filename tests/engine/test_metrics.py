"""Values that arrive late, and a host that may not run far ahead: what a GPU does, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import samdetr.engine.train
from samdetr.data.loader import TrainLoader
from samdetr.engine.checkpoint.format import load_checkpoint
from samdetr.engine.run.metrics import AsyncMetrics, RunAheadLimit
from samdetr.engine.train import train
from samdetr.errors import DataError, NonFiniteError
from samdetr.structures import Batch
from tests.engine.runs import MakeRecipe, metrics


@pytest.fixture
def bad_fifth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late values, and an image at the fifth step that cannot be used."""
    epoch = TrainLoader.epoch

    def failing(self: TrainLoader, number: int, start_step: int = 0) -> Iterator[list[Batch]]:
        for step, batch in enumerate(epoch(self, number, start_step), start=start_step):
            if step == 4:
                raise DataError("this image")
            yield batch

    monkeypatch.setattr(TrainLoader, "epoch", failing)
    monkeypatch.setattr(AsyncMetrics, "ready", lambda self: iter(()))  # as if each copy were still under way


@pytest.mark.usefixtures("bad_fifth_step")
def test_values_on_their_way_are_not_lost(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.log_every=2")
    with pytest.raises(DataError, match="this image"):
        train(recipe)
    run = Path(recipe.run.folder) / "tiny" / "1"
    assert [line["step"] for line in metrics(run, "train")] == [2, 4]
    progress = load_checkpoint((run / "checkpoints" / "last").resolve(), with_optimizer=True).progress
    assert progress.step == 4
    assert progress.epoch_sums is not None and progress.epoch_sums["count"] == 4


@pytest.mark.usefixtures("bad_fifth_step")
def test_a_step_that_was_not_finite_is_not_saved_as_done(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = samdetr.engine.train.train_step, 0

    def second_is_nan(*arguments, **options):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        result = original(*arguments, **options)
        return result * torch.nan if calls == 2 else result

    monkeypatch.setattr(samdetr.engine.train, "train_step", second_is_nan)
    recipe = make_recipe("train.log_every=2")
    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        train(recipe)
    run = Path(recipe.run.folder) / "tiny" / "1"
    assert not (run / "checkpoints" / "last").exists()


def test_the_host_waits_for_the_step_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[FakeEvent] = []

    class FakeEvent:
        def __init__(self) -> None:
            self.waited = False
            events.append(self)

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            self.waited = True

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    lead = RunAheadLimit(torch.device("cuda"), steps=2)
    for step in range(5):
        lead.step()
        assert [event.waited for event in events] == [place < step - 1 for place in range(step + 1)]
    RunAheadLimit(torch.device("cpu")).step()
    assert len(events) == 5
