"""Runs that are stopped, interrupted or killed, and continued: the same numbers as without."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import samdetr.engine.build
import samdetr.engine.checkpoint.format
import samdetr.engine.evaluate
import samdetr.engine.train
from samdetr.cli.main import main_train
from samdetr.data.splits import Splits, load_splits
from samdetr.engine.checkpoint.folder import newest_first
from samdetr.engine.checkpoint.format import MODEL, OPTIMIZER, load_checkpoint, read_meta
from samdetr.engine.distributed.decision import Decision, agree
from samdetr.engine.distributed.signals import SAVING, StopSignal
from samdetr.engine.distributed.world import World
from samdetr.engine.run.folder import find_run
from samdetr.engine.train import train
from samdetr.errors import CheckpointError, RecipeError
from samdetr.recipe import Recipe, dump_recipe
from tests.engine.runs import (
    Command,
    MakeRecipe,
    assert_same_weights,
    captured,
    end,
    losses,
    metrics,
    sentence,
    signal_at,
    start_train,
    train_and_die,
)

PARTS = (MODEL, OPTIMIZER)
SLOW_STEPS = """
import time, samdetr.engine.train as engine
step = engine.train_step
def slow(*arguments, **options):
    time.sleep(0.2)
    return step(*arguments, **options)
engine.train_step = slow
"""


def assert_as_uninterrupted(run: Path, trained: Path) -> None:
    """Weights, moments, logged losses and AP are those of the run that nothing stopped; no line is there twice."""
    assert losses(run) == losses(trained)
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 13))
    for kind in ("epoch", "eval"):
        key = "loss" if kind == "epoch" else "AP"
        here, there = ([(line["epoch"], line["step"], line[key]) for line in metrics(f, kind)] for f in (run, trained))
        assert here == there
    assert_same_weights(run, trained)
    progress = read_meta(run / "checkpoints" / "last" / "meta.json")["progress"]
    assert progress == read_meta(trained / "checkpoints" / "last" / "meta.json")["progress"]
    assert progress["finished"] is True
    assert_tidy(run)


def assert_tidy(run: Path) -> None:
    """Nothing but the two links, what they name, and the newest two, of which one is the last."""
    folder = run / "checkpoints"
    newest, *others = newest_first(folder)
    assert newest == (folder / "last").resolve()
    kept = {newest.name, *(other.name for other in others[:1]), (folder / "best").resolve().name}
    assert {entry.name for entry in folder.iterdir()} == kept | {"last", "best"}
    assert all({file.name for file in (folder / name).iterdir()} == {"meta.json", *PARTS} for name in kept)


def interrupted(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, function: str, call: int) -> Path:
    """A new run that gets a Ctrl-C before the call of a function of the training loop."""
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.train, function, call, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    return Path(recipe.run.folder) / "tiny" / "1"


def test_one_epoch_and_the_other_after_a_resume(make_recipe: MakeRecipe, trained: Path) -> None:
    run = train(make_recipe("train.epochs=1"))
    assert read_meta(run / "checkpoints" / "last" / "meta.json")["progress"]["finished"] is True
    assert train(make_recipe(), resume=str(run)) == run
    assert_as_uninterrupted(run, trained)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_ctrl_c_between_two_steps(
    make_recipe: MakeRecipe, trained: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = interrupted(monkeypatch, make_recipe(), "train_step", step)
    progress = load_checkpoint((run / "checkpoints" / "last").resolve(), with_optimizer=True).progress
    assert (progress.step, progress.epoch, progress.finished) == (step, (step - 1) // 6, False)
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, step + 1))
    assert train(make_recipe("data.workers=1"), resume="") == run
    assert_as_uninterrupted(run, trained)


def test_ctrl_c_in_an_epoch_of_buckets(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        "data.batching=buckets", "data.buckets=3", "data.bucket_grid=16", "data.pixels=fast", "train.micro_batch=2"
    )
    run = interrupted(monkeypatch, recipe, "train_step", 4)
    assert "batches: 3 shapes, " in capfd.readouterr().out
    assert train(recipe, resume="") == run
    assert_as_uninterrupted(run, train(recipe))


def test_lines_of_several_steps_survive_a_resume(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that averages 5 steps is the same when the run was stopped between them, or at the end of an epoch."""
    straight = train(make_recipe("train.log_every=5"))
    run = Path(make_recipe().run.folder) / "tiny" / "2"
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.train, "train_step", 3, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe("train.log_every=5", "train.epochs=1"))
    train(make_recipe("train.log_every=5", "train.epochs=1"), resume=str(run))
    train(make_recipe("train.log_every=5"), resume=str(run))
    assert [line["step"] for line in metrics(straight, "train")] == [5, 10]
    assert losses(run) == losses(straight)
    epochs = [[line["loss"] for line in metrics(folder, "epoch")] for folder in (run, straight)]
    assert epochs[0] == epochs[1]


def test_ctrl_c_during_an_evaluation_keeps_the_epoch(
    make_recipe: MakeRecipe, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.train.RunLog, "evaluating", 1, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe())
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert re.search(f"stopped after step 6; continue with.* --resume {run}\n", capfd.readouterr().out)
    progress = read_meta(run / "checkpoints" / "last" / "meta.json")["progress"]
    assert (progress["epoch"], progress["step"], progress["evaluation_due"]) == (0, 6, True)
    assert metrics(run, "eval") == []
    saved = (run / "checkpoints" / "last").resolve()
    assert saved.name == "step-00000006"
    signal_at(monkeypatch, samdetr.engine.train, "train_step", 1, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), resume="")
    assert [line["epoch"] for line in metrics(run, "eval")] == [0]  # it was done first
    monkeypatch.undo()
    train(make_recipe(), resume="")
    assert_as_uninterrupted(run, trained)


def test_ctrl_c_at_the_end_of_an_evaluation_takes_no_further_step(
    make_recipe: MakeRecipe, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signal_at(patch, samdetr.engine.evaluate, "draw_validation", 1, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            train(make_recipe())
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    progress = read_meta(run / "checkpoints" / "last" / "meta.json")["progress"]
    assert (progress["epoch"], progress["step"], progress["evaluation_due"]) == (1, 6, False)
    assert len(metrics(run, "train")) == 6
    train(make_recipe(), resume="")
    assert_as_uninterrupted(run, trained)


def test_ctrl_c_before_the_first_step(train_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Such as during the generation of the data, or a download: there is nothing to save."""
    signal_at(monkeypatch, samdetr.engine.build, "build_model", 1, signal.SIGINT)
    result = train_command()
    assert (result.code, result.err) == (130, "")
    assert not (tmp_path / "runs").exists()


def test_signals_of_a_process(recipe_file: Path, make_recipe: MakeRecipe, trained: Path, tmp_path: Path) -> None:
    """SIGINT, then SIGTERM to a run with loader processes; each ends cleanly, and the numbers stay the same."""
    run, options = tmp_path / "runs" / "tiny" / "1", ("--set", f"run.folder={tmp_path / 'runs'}")
    for number, code, after, resume in ((signal.SIGINT, 130, 2, ()), (signal.SIGTERM, 143, 8, ("--resume",))):
        process = start_train(recipe_file, *options, "--set", "data.workers=2", *resume, before=SLOW_STEPS)
        deadline = time.monotonic() + 180
        while process.poll() is None and time.monotonic() < deadline:
            if (run / "metrics.jsonl").is_file() and len(metrics(run, "train")) >= after:
                process.send_signal(number)
                break
            time.sleep(0.02)
        result = end(process)
        assert result.code == code, result
        assert result.err == (SAVING if number == signal.SIGINT else "")
        step = load_checkpoint((run / "checkpoints" / "last").resolve(), with_optimizer=True).progress.step
        assert after <= step < 12
        assert re.fullmatch(f"stopped after step {step}; continue with.* --resume {run}", result.out.splitlines()[-1])
        assert len(metrics(run, "train")) == step
    train(make_recipe(), resume=str(run))
    assert_as_uninterrupted(run, trained)


@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        ("train", "train_step", 9),
        ("checkpoint.saving", "HuggingFaceStorageWriter", 4),  # the second checkpoint has its model, no optimizer yet
        ("checkpoint.saving", "write_meta", 2),  # all is written but the file that names it
        ("checkpoint.saving", "publish", 2),  # the second checkpoint is whole, but has no name
        ("checkpoint.folder", "link", 3),  # it has, but is not the last one yet
        ("checkpoint.saving", "remove_old", 3),
        ("evaluate", "coco_evaluate", 2),
        ("evaluate", "draw_validation", 2),  # the line of the evaluation is written, its result is not saved
        ("checkpoint.saving", "update_progress", 1),
        ("checkpoint.folder", "write_meta", 1),  # best is linked, the result is not saved
        ("train", "plot_curves", 1),
    ],
)
def test_kill(make_recipe: MakeRecipe, trained: Path, module: str, function: str, call: int) -> None:
    """SIGKILL just before a call: the run goes on from the last checkpoint, and no line is there twice."""

    # not a fork of this process: with a GPU, autograd's threads would not survive it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "scipy.optimize", "pycocotools.cocoeval", "matplotlib.figure"]
    )
    process = context.Process(target=train_and_die, args=(make_recipe(), module, function, call))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert train(make_recipe(), resume="") == run
    assert_as_uninterrupted(run, trained)


def test_a_torn_last_line_is_dropped(make_recipe: MakeRecipe, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(monkeypatch, make_recipe(), "train_step", 8)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "epoch": 1, "step": 9, "lo')
    train(make_recipe(), resume=str(run))
    assert_as_uninterrupted(run, trained)


def test_a_changed_recipe_is_refused(make_recipe: MakeRecipe, trained: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        find_run(make_recipe("model.system=detr"), str(trained))
    assert str(caught.value).startswith(
        f"--resume: model.system is 'detr', but {trained} was trained with 'sam_detr'; "
    )
    with pytest.raises(RecipeError) as caught:
        find_run(make_recipe("optim.lr=0.5", "model.dropout=0.2", "train.epochs=9", "eval.top_k=3"), str(trained))
    assert str(caught.value).splitlines() == [
        f"--resume: model.dropout is 0.2, but {trained} was trained with 0.1",
        f"--resume: optim.lr is 0.5, but {trained} was trained with 0.001; start a new run from its weights with "
        f"--set init.checkpoint={trained}, or continue it unchanged with samdetr-train --resume {trained}",
    ]
    free = make_recipe("train.epochs=9", "train.log_every=7", "eval.batch=1", "data.workers=3", 'run.device="auto"')
    assert find_run(free, str(trained)) == trained


def test_a_copy_without_links_goes_on(make_recipe: MakeRecipe, trained: Path, tmp_path: Path) -> None:
    """Some copying (cp -L, object storage) makes folders of links."""
    run = train(make_recipe("train.epochs=1"))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert not (copy / "checkpoints" / "last").is_symlink()
    assert train(make_recipe(), resume=str(copy)) == copy
    assert_as_uninterrupted(copy, trained)


def test_a_cosine_schedule_fixes_the_epochs(make_recipe: MakeRecipe, trained: Path, tmp_path: Path) -> None:
    """Its rates depend on the length of the whole run, those of a step schedule do not."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    cosine = 'optim.schedule="cosine"'
    (run / "recipe.toml").write_text(dump_recipe(make_recipe(cosine)))
    assert find_run(make_recipe(cosine, "eval.every=2"), str(run)) == run
    with pytest.raises(RecipeError, match=r"train\.epochs is 9, but .* was trained with 2, on which the learning rate"):
        find_run(make_recipe(cosine, "train.epochs=9"), str(run))


def test_buckets_fix_the_micro_batch(make_recipe: MakeRecipe, trained: Path, tmp_path: Path) -> None:
    """Another one would make other steps of the epoch under way; of random batches it does not."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    assert find_run(make_recipe("train.micro_batch=2"), str(run)) == run
    buckets = 'data.batching="buckets"'
    (run / "recipe.toml").write_text(dump_recipe(make_recipe(buckets)))
    assert find_run(make_recipe(buckets, "eval.every=2"), str(run)) == run
    with pytest.raises(
        RecipeError, match=r"train\.micro_batch is 2, but .* was trained with 4, and which images share"
    ):
        find_run(make_recipe(buckets, "train.micro_batch=2"), str(run))


def test_the_command_names_a_changed_key(train_command: Command, trained: Path) -> None:
    result = train_command("--resume", str(trained), "--set", "optim.lr=0.5")
    message = sentence(result, 2)
    assert message.startswith(f"--resume: optim.lr is 0.5, but {trained} was trained with 0.001; ")
    assert message.endswith(f" or continue it unchanged with samdetr-train --resume {trained}")


def test_the_newest_unfinished_run_is_found(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe("train.epochs=1")
    runs = Path(recipe.run.folder) / "tiny"
    with pytest.raises(CheckpointError, match=f"there is no unfinished run with a checkpoint in {runs}"):
        find_run(recipe, "")
    interrupted(monkeypatch, recipe, "train_step", 1)
    train(recipe)
    (runs / "3").mkdir()  # killed before its first checkpoint
    (runs / "notes").mkdir()
    assert find_run(recipe, "") == runs / "1"
    (runs / "10").symlink_to("1")
    assert find_run(recipe, "") == runs / "10"  # 10 is newer than 3


def test_a_run_that_is_trained_longer_is_unfinished_again(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(make_recipe("train.epochs=1"))
    with pytest.raises(CheckpointError, match="no unfinished run"):
        find_run(make_recipe(), "")
    signal_at(monkeypatch, samdetr.engine.train, "train_step", 2, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(), resume=str(run))
    assert find_run(make_recipe(), "") == run


def test_nothing_to_resume(train_command: Command, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    assert "no unfinished run with a checkpoint in" in sentence(train_command("--resume"))
    assert f"{tmp_path / 'nowhere'} is not a run folder" in sentence(
        train_command("--resume", str(tmp_path / "nowhere"))
    )
    bare = samdetr.engine.run.folder.new_run(make_recipe(), {})
    assert f"the run {bare} has no checkpoint yet; start it again" in sentence(train_command("--resume", str(bare)))


def test_a_finished_run_has_nothing_left(make_recipe: MakeRecipe, train_command: Command) -> None:
    run = train(make_recipe("train.epochs=1"))
    before = (run / "metrics.jsonl").read_text(), torch.cat([w.flatten().double() for w in weights_of(run)])
    result = train_command("--resume", str(run), "--set", "train.epochs=1")
    assert result.code == 0
    assert "finished: " in result.out
    after = (run / "metrics.jsonl").read_text(), torch.cat([w.flatten().double() for w in weights_of(run)])
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])


def weights_of(run: Path) -> list[torch.Tensor]:
    return list(load_checkpoint((run / "checkpoints" / "last").resolve(), with_optimizer=False).model.values())


def test_a_second_ctrl_c_ends_at_once() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


TWO_SIGNALS = """
import os, signal, time, samdetr.engine.checkpoint.saving as saving, samdetr.engine.train as engine
step, write, calls = engine.train_step, saving.save_checkpoint, [0, 0]
def stepping(*arguments, **options):
    calls[0] += 1
    if calls[0] == STEP:
        os.kill(os.getpid(), signal.SIGINT)
    return step(*arguments, **options)
def writing(*arguments, **options):
    calls[1] += 1
    if calls[1] == SAVE:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    return write(*arguments, **options)
engine.train_step, saving.save_checkpoint = stepping, writing
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_torch_cannot_spoil_the_exit_code_of_a_signal(
    recipe_file: Path, tmp_path: Path, number: int, code: int
) -> None:
    """Its threads, cut off anywhere, may abort an orderly exit: here one that always does."""
    before = f"import atexit, os; atexit.register(os.abort)\n{TWO_SIGNALS}"
    before = before.replace("signal.SIGINT", str(int(number))).replace("STEP", "2").replace("SAVE", "9")
    result = end(start_train(recipe_file, "--set", f"run.folder={tmp_path / 'runs'}", before=before))
    assert result.code == code
    assert "stopped after step 2; continue with: samdetr-train --resume" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("saves", [0, 1])
def test_a_second_ctrl_c_while_saving_tells_what_is_left(
    make_recipe: MakeRecipe, recipe_file: Path, trained: Path, tmp_path: Path, saves: int
) -> None:
    """The first in the second step of an epoch, the second while its checkpoint is written, which takes long."""
    run = tmp_path / "runs" / "tiny" / "1"
    before = TWO_SIGNALS.replace("STEP", str(2 + 6 * saves)).replace("SAVE", str(1 + saves))
    begin = time.monotonic()
    result = end(start_train(recipe_file, "--set", f"run.folder={tmp_path / 'runs'}", before=before))
    assert time.monotonic() - begin < 40
    way = f"continue with: samdetr-train --resume {run}" if saves else "there is no checkpoint yet, start it again"
    assert result.out.splitlines()[-1] == f"stopped at once; what came after the last checkpoint is lost; {way}"
    assert (result.code, result.err) == (130, SAVING)
    if saves:
        train(make_recipe(), resume=str(run))
        assert_as_uninterrupted(run, trained)


def test_a_second_sigterm_ends_at_once_unless_it_is_the_first_passed_on_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignal(prints=False) as stop:
        stop.number = signal.SIGTERM  # another process's, which this one was told before its own came
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM and not stop.at_once
        monkeypatch.setattr(samdetr.engine.distributed.signals, "REPEAT_AFTER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.at_once
        with pytest.raises(SystemExit) as caught:
            stop.exit()
    assert caught.value.code == 143


def test_sigterm_is_exit_code_143() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as caught:
            stop.exit()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_comes_while_the_processes_agree_is_heard_the_next_time() -> None:
    class Agreeing(World):
        def all_reduce_max(self, value: int) -> int:
            if value == 0:
                os.kill(os.getpid(), signal.SIGTERM)  # between what this process told and what it hears
            return value

    with StopSignal() as stop:
        assert agree(Agreeing(), stop) is Decision.CONTINUE  # none of them knew
        assert agree(Agreeing(), stop) is Decision.STOP and stop.number == signal.SIGTERM


def test_one_call_carries_the_decision_and_the_signal() -> None:
    told: list[int] = []

    class Together(World):
        def all_reduce_max(self, value: int) -> int:
            told.append(value)
            return max(told)

    def asked(number: int | None) -> StopSignal:
        stop = StopSignal()
        stop.number = number
        return stop

    interrupted, terminated, neither = asked(signal.SIGINT), asked(signal.SIGTERM), asked(None)
    assert agree(Together(), interrupted) is Decision.STOP and interrupted.number == signal.SIGINT
    assert agree(Together(), terminated) is agree(Together(), neither) is Decision.STOP
    assert agree(Together(), interrupted) is Decision.STOP
    assert interrupted.number == neither.number == signal.SIGTERM
    assert agree(Together(), neither, bad_image=True) is agree(Together(), terminated) is Decision.BAD_IMAGE
    assert agree(Together(), asked(None), save_failed=True, bad_image=True) is Decision.SAVE_FAILED
    assert agree(Together(), terminated, not_finite=True, save_failed=True) is Decision.NOT_FINITE
    assert agree(Together(), asked(None)) is Decision.NOT_FINITE
    told.clear()
    assert agree(Together(), asked(None)) is Decision.CONTINUE and told == [0]


def test_other_data_is_refused(make_recipe: MakeRecipe, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Splits, "fingerprint", lambda self: "of other data")
    with pytest.raises(CheckpointError, match="the training split is not the one that"):
        train(make_recipe("train.epochs=3"), resume=str(trained))


def test_a_run_copied_without_links_goes_on(make_recipe: MakeRecipe, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copied"
    shutil.copytree(trained, copy, symlinks=False)
    assert not (copy / "checkpoints" / "last").is_symlink()
    train(make_recipe("train.epochs=3"), resume=str(copy))
    progress = load_checkpoint((copy / "checkpoints" / "last").resolve(), with_optimizer=True).progress
    assert (progress.epoch, progress.step, progress.finished) == (3, 18, True)
    assert_tidy(copy)
    assert (copy / "environment-after-step-12.json").is_file()
    train(make_recipe("train.epochs=3"), resume=str(copy))  # there is nothing left to do
    assert [file.name for file in copy.glob("environment-*")] == ["environment-after-step-12.json"]


def test_a_run_can_be_used_from_any_folder(
    make_recipe: MakeRecipe,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    samdetr_command: Command,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Relative paths of data and weights are those of the folder where the run began."""
    splits = load_splits(make_recipe().data, num_queries=12, num_classes=8)
    files = {
        **{f"data.{data.split}_images": data.image_root for data in (splits.train, splits.val)},
        **{f"data.{data.split}_annotations": data.annotation_file for data in (splits.train, splits.val)},
        "init.checkpoint": trained,
    }

    def here(*overrides: str) -> Recipe:
        paths = [f"{key}={os.path.relpath(path)}" for key, path in files.items()]
        return make_recipe("data.format=coco", *paths, *overrides)

    (tmp_path / "one").mkdir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    run = train(here("train.epochs=1"))
    monkeypatch.chdir(tmp_path / "other" / "deep")
    assert samdetr_command("eval", str(run)).code == 0
    assert find_run(here(), str(run)) == run  # the same checkpoint by another relative path
    result = captured(main_train, ["--resume", os.path.relpath(run), "--set", "train.epochs=2"], capfd)
    assert (result.code, result.err) == (0, "")
    assert [line["epoch"] for line in metrics(run, "eval")] == [0, 1]
