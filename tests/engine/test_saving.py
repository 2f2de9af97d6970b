"""Saves within an epoch, in one process and in several: what they hold, how they fail, and on what they go on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import samdetr.engine.checkpoint.saving
import samdetr.engine.train
from samdetr.engine.checkpoint.folder import newest_first
from samdetr.engine.checkpoint.format import load_checkpoint
from samdetr.engine.train import train
from samdetr.errors import CheckpointError, RecipeError
from samdetr.recipe import load_recipe
from tests.engine.runs import (
    MakeRecipe,
    assert_same_weights,
    end,
    losses,
    metrics,
    signal_at,
    start_in,
    weights,
)

OFTEN = ("checkpoint.every=2", "checkpoint.keep=9", "optim.ema_decay=0.9", "train.micro_batch=2")
# The main process cannot name what all have written; the second one's disk refuses its share.
FAILING = {
    0: "from samdetr.engine.checkpoint import saving\ndef fail(*_): raise OSError(28, 'No space left on device')\n"
    "saving.write_meta = fail",
    1: "import os\nfrom samdetr.engine.checkpoint import saving\n"
    "def fail(*_): raise OSError(28, 'No space left on device')\n"
    "if os.environ['RANK'] == '1': saving.HuggingFaceStorageWriter.write_data = fail",
}


@pytest.fixture(scope="module")
def straight(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six steps, saved at their ends only. Read it only."""
    return train(load_recipe(recipe_file, [f"run.folder={tmp_path_factory.mktemp('straight')}", *OFTEN[2:]]))


@pytest.fixture(scope="module")
def often(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved every second step. Read it only."""
    return train(load_recipe(recipe_file, [f"run.folder={tmp_path_factory.mktemp('often')}", *OFTEN]))


def test_saves_within_an_epoch_change_nothing_and_are_its_steps(straight: Path, often: Path) -> None:
    assert losses(often) == losses(straight)
    assert_same_weights(often, straight)
    found = newest_first(often / "checkpoints")
    assert [path.name for path in found] == [f"step-{step:08d}" for step in (12, 10, 8, 6, 4, 2)]
    kept = {path.name for path in newest_first(straight / "checkpoints")}
    assert kept == {"step-00000012", "step-00000006"}
    for path in found:
        loaded = load_checkpoint(path, with_optimizer=True)
        step = int(path.name.removeprefix("step-"))
        assert (loaded.progress.step, loaded.meta["averaged_steps"]) == (step, step)
        assert loaded.progress.step_in_epoch == (0 if step % 6 == 0 else step % 6)
        assert int(loaded.optimizer["decoder.class_heads.0.weight:step"]) == step


@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)])
def test_a_run_goes_on_from_any_of_them(
    make_recipe: MakeRecipe, straight: Path, often: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    shutil.copytree(often, run, symlinks=True)
    for path in newest_first(run / "checkpoints"):
        if path.name > f"step-{step:08d}":
            (path / "meta.json").unlink()
    assert train(make_recipe(*OFTEN, "data.workers=1"), resume=str(run)) == run
    assert losses(run) == losses(straight)
    assert_same_weights(run, straight)


def test_a_failed_save_ends_the_run_at_the_next_step(
    make_recipe: MakeRecipe, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = samdetr.engine.checkpoint.saving.write_meta, []

    def fail(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(*arguments)  # type: ignore[arg-type]

    save, saved = samdetr.engine.checkpoint.saving.Saver._write, []
    step, taken = samdetr.engine.train.train_step, []

    def saving(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        saved.append(1)

    def fifth_waits(*arguments: object, **options: object) -> object:
        taken.append(1)
        deadline = time.monotonic() + 60
        while len(taken) == 5 and len(saved) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return step(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(samdetr.engine.checkpoint.saving, "write_meta", fail)
        patch.setattr(samdetr.engine.checkpoint.saving.Saver, "_write", saving)
        patch.setattr(samdetr.engine.train, "train_step", fifth_waits)
        with pytest.raises(CheckpointError, match=r"step-00000004 \(No space left on device\); the previous .* intact"):
            train(make_recipe(*OFTEN))
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert len(metrics(run, "train")) == 5  # the save after step 4 fails during the fifth
    assert [path.name for path in newest_first(run / "checkpoints")] == ["step-00000002"]
    train(make_recipe(*OFTEN), resume="")
    assert losses(run) == losses(straight)


def test_a_stop_at_a_saved_step_saves_it_once(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.train, "train_step", 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(make_recipe(*OFTEN))
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert [path.name for path in newest_first(run / "checkpoints")] == ["step-00000004", "step-00000002"]


def test_the_keys_may_change_when_a_run_goes_on(make_recipe: MakeRecipe) -> None:
    run = train(make_recipe("train.epochs=1"))
    assert train(make_recipe("checkpoint.every=3", "checkpoint.keep=1"), resume=str(run)) == run
    assert {path.name for path in newest_first(run / "checkpoints")} <= {"step-00000006", "step-00000012"}
    with pytest.raises(RecipeError, match=r"checkpoint\.keep"):
        make_recipe("checkpoint.keep=0")


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.long)])
def test_processes_write_their_shares_and_another_number_goes_on(
    recipe_file: Path, make_recipe: MakeRecipe, tmp_path: Path, first: int
) -> None:
    """Some with ddp, then one more with fsdp; the steps are those of one process alone."""
    options = ("train.total_batch=12", "train.micro_batch=1", "model.backbone.norm=frozen", "checkpoint.every=1")
    options += ("optim.ema_decay=0.9",)
    run = tmp_path / "shared" / "tiny" / "1"
    settings = (f"run.folder={tmp_path / 'shared'}", *options)
    for processes, strategy, epochs in ((first, "ddp", 1), (first + 1, "fsdp", 2)):
        changes = (*settings, f"parallel.strategy={strategy}", f"train.epochs={epochs}")
        words = [word for change in changes for word in ("--set", change)]
        resume = ("--resume", str(run)) if epochs > 1 else ()
        result = end(start_in(processes, recipe_file, *words, *resume))
        assert result.code == 0, result.err
        newest = newest_first(run / "checkpoints")[0]
        assert newest.name == f"step-{2 * epochs:08d}"
        for part in ("model", "optimizer", "average"):
            sizes = [file.stat().st_size for file in (newest / part).iterdir()]
            assert len(sizes) == processes and max(sizes) < 2 * min(sizes)
    alone = train(make_recipe(*options))
    for mine, theirs in zip(losses(run), losses(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    one, two = weights(run), weights(alone)
    assert one.keys() == two.keys()
    moments = [key for key in one if key.endswith("exp_avg_sq")]
    assert {key.partition("/")[0] for key in one} == {"model", "optimizer", "average"}
    assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-9) for key in moments)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_save_that_fails_in_one_process_ends_all_with_its_reason(
    recipe_file: Path, tmp_path: Path, rank: int
) -> None:
    begin = time.monotonic()
    process = start_in(
        2,
        recipe_file,
        *("--set", f"run.folder={tmp_path / 'runs'}", "--set", "train.micro_batch=1", "--set", "train.epochs=50"),
        *("--set", "model.backbone.norm=frozen", "--set", "checkpoint.every=1"),
        before=FAILING[rank],
    )
    result = end(process)
    assert time.monotonic() - begin < 60 and result.code == 1
    message = next(line for line in result.err.splitlines() if line.startswith("error"))
    assert result.err.count("cannot save") == 1 and "Error" not in result.err.partition("torch/distributed/")[0]
    where = "process 1: " if rank else ""
    assert f"cannot save the checkpoint {tmp_path / 'runs/tiny/1/checkpoints'}{os.sep}step-0000000" in message
    assert f"({where}No space left on device); the previous checkpoint is intact" in message
