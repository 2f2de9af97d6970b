"""A device whose memory is full: one message that names the place and the keys that help, and every process ends."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import samdetr.engine.debug_nan
import samdetr.engine.evaluate
import samdetr.engine.predict
import samdetr.engine.step
import samdetr.engine.train
from samdetr.engine.failures.out_of_memory import evaluation_advice, smaller_steps, training_advice
from samdetr.engine.train import train
from samdetr.errors import NonFiniteError, SamdetrError
from samdetr.models import EncoderDecoder
from samdetr.recipe import Recipe, load_recipe
from tests.engine.runs import ROOT, Command, MakeRecipe, Result, assert_same_weights, end, sentence, start_in
from tests.engine.test_nonfinite import poison_steps

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."
FULL = f"{SAID} If reserved but unallocated memory is large try this.\nmore"


def fill_at(patch: pytest.MonkeyPatch, module: Any, function: str, call: int) -> None:
    """The device's memory is full at a call of a function, counted from 1."""
    original, calls = getattr(module, function), 0

    def filling(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise torch.OutOfMemoryError(FULL)
        return original(*arguments, **options)

    patch.setattr(module, function, filling)


def message_of(run: Callable[[], object]) -> list[str]:
    with pytest.raises(SamdetrError) as caught:
        run()
    return str(caught.value).splitlines()


def test_a_step_says_where_and_what_helps(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train.micro_batch=2", "checkpoint.every=2", "optim.ema_decay=0.9", "train.epochs=1")
    recipe = make_recipe(*options)
    with monkeypatch.context() as patch:
        fill_at(patch, samdetr.engine.step, "autocast", 6)  # of two micro-batches a step
        first, title, *advice, last = message_of(lambda: train(recipe))
    place = r"cpu is out of memory in step 3, at 2 images of \d+ x \d+ pixels, with up to \d boxes each: (.*)"
    found = re.fullmatch(place, first)
    assert found and found[1] == SAID
    run = Path(recipe.run.folder) / "tiny" / "1"
    assert f"(samdetr report {run / 'recipe.toml'} has the numbers)" in title
    assert advice == [
        "  train.micro_batch = 1 (now 2)",
        '  compute.activation_checkpointing = "layers"; slower',
        "  augment.train_sizes and augment.max_size below 64 and 96; in a new run",
        '  compute.precision = "bf16"; in a new run',
    ]
    assert last.startswith(f"Continue with samdetr-train --resume {run} --set KEY=VALUE")
    key = 'compute.activation_checkpointing="layers"'
    train(make_recipe(*options, key), resume=str(run))
    assert_same_weights(run, train(recipe))  # what was done before is not lost


def test_the_start_up_and_the_update_are_named(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fill_at(patch, samdetr.engine.train, "prepare_step", 1)
        first, *_, last = message_of(lambda: train(make_recipe()))
    assert (first, last) == (
        f"cpu is out of memory in the start-up: {SAID}",
        "There is no checkpoint yet: start it again.",
    )
    with monkeypatch.context() as patch:
        fill_at(patch, samdetr.engine.step, "update", 1)
        first, *_ = message_of(lambda: train(make_recipe()))
    assert first == f"cpu is out of memory in step 1: {SAID}"


def test_an_evaluation_names_its_batch_and_can_be_done_again(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    with monkeypatch.context() as patch:
        fill_at(patch, samdetr.engine.evaluate, "autocast", 2)
        first, *advice, last = message_of(lambda: train(make_recipe()))
    assert re.match(r"cpu is out of memory in the evaluation after step 6, at 2 images of \d+ x \d+ pixels", first)
    assert advice == evaluation_advice(make_recipe())
    assert advice[:2] == ["It needs less memory with", "  eval.batch = 2 (now 4)"]
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert last.startswith(f"Continue with samdetr-train --resume {run} ")
    train(make_recipe("eval.batch=2"), resume=str(run))
    assert_same_weights(run, trained)


def test_evaluating_a_checkpoint(monkeypatch: pytest.MonkeyPatch, samdetr_command: Command, trained: Path) -> None:
    fill_at(monkeypatch, samdetr.engine.evaluate, "autocast", 1)
    result = samdetr_command("eval", str(trained), "--set", "eval.batch=1")
    assert result.code == 1 and "Traceback" not in result.err
    first, second, third = result.err.splitlines()
    assert first.startswith("error: cpu is out of memory in the evaluation, at 1 images of ") and first.endswith(SAID)
    assert second == "It needs less memory with" and third.startswith(
        "  augment.eval_size and augment.eval_max_size below 64"
    )


STARTED = f"error: cpu is out of memory in the start-up: {SAID} If other programs use the rest ("


def test_a_model_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, train_command: Command, samdetr_command: Command, trained: Path, tmp_path: Path
) -> None:
    photo, output = tmp_path / "photo.png", tmp_path / "predictions"
    Image.new("RGB", (64, 48)).save(photo)
    commands: tuple[Callable[[], Result], ...] = (
        train_command,
        lambda: samdetr_command("eval", str(trained)),
        lambda: samdetr_command("predict", str(trained), str(photo), "--output", str(output)),
    )
    for command in commands:
        with monkeypatch.context() as patch:
            fill_at(patch, EncoderDecoder, "to", 1)
            assert sentence(command()).startswith(STARTED)
    fill_at(monkeypatch, samdetr.engine.predict, "autocast", 1)
    assert sentence(commands[-1]()).startswith(f"error: cpu is out of memory in the prediction of {photo}: {SAID} If")
    assert not (tmp_path / "runs").exists() and not list(output.glob("*"))


def test_a_replay_that_does_not_fit(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, samdetr_command: Command
) -> None:
    recipe = make_recipe()
    poison_steps(monkeypatch, 1)
    with pytest.raises(NonFiniteError):
        train(recipe)
    fill_at(monkeypatch, samdetr.engine.debug_nan, "forward_backward", 2)
    (file,) = Path(recipe.run.folder).glob("*/*/nonfinite-*.safetensors")
    result = samdetr_command("debug-nan", str(file))
    assert result.code == 1 and result.err.startswith(f"error: cpu is out of memory in the replay: {SAID} If other")
    assert result.err.count("\n") == 1


def published(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "r50_12ep.toml", ["train.micro_batch=4", *overrides])


def test_the_keys_that_help_are_named_and_whether_a_run_may_be_resumed_with_them() -> None:
    recipe = published("data.batching=random")
    keys = smaller_steps(recipe, processes=4, precision=torch.float32)
    assert [(key.setting, key.resumable) for key in keys] == [
        ("train.micro_batch = 2", True),
        ('compute.activation_checkpointing = "layers"', True),
        ("augment.train_sizes and augment.max_size below 800 and 1333", False),
        ('compute.precision = "bf16"', False),
        ('parallel.strategy = "fsdp"', True),
    ]
    title, *lines = training_advice(recipe, Path("a run"), processes=4, precision=torch.float32)
    assert "(samdetr report 'a run/recipe.toml' has the numbers)" in title
    assert lines[:3] == [
        "  train.micro_batch = 2 (now 4)",
        '  compute.activation_checkpointing = "layers"; slower',
        "  augment.train_sizes and augment.max_size below 800 and 1333; in a new run",
    ]


def test_only_what_is_left_to_change_is_named() -> None:
    recipe = published("train.micro_batch=1", 'compute.activation_checkpointing="layers"', 'parallel.strategy="fsdp"')
    keys = smaller_steps(recipe, processes=4, precision=torch.bfloat16)
    assert [key.setting for key in keys] == ["augment.train_sizes and augment.max_size below 800 and 1333"]
    first, *_ = smaller_steps(published("data.batching=buckets"), processes=1, precision=torch.bfloat16)
    assert first.setting == "train.micro_batch = 2" and not first.resumable
    recorded = published('compute.cuda_graph="on"', "data.batching=buckets")
    _, layers, *_ = smaller_steps(recorded, processes=1, precision=torch.bfloat16)
    assert layers.remark == ', with compute.cuda_graph = "off"; slower' and not layers.resumable


PATCH = f"""
import os, samdetr.engine.step as engine
original, calls = engine.autocast, 0
def filling(*arguments):
    global calls
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1":
        import torch
        raise torch.OutOfMemoryError({SAID!r})
    return original(*arguments)
engine.autocast = filling
"""


@pytest.mark.slow
def test_one_process_ends_the_others(recipe_file: Path, tmp_path: Path) -> None:
    options = ("train.micro_batch=1", "model.backbone.norm=frozen", f"run.folder={tmp_path}", "parallel.timeout=20")
    begun = time.monotonic()
    result = end(start_in(2, recipe_file, *(word for o in options for word in ("--set", o)), before=PATCH))
    assert time.monotonic() - begun < 60
    assert result.code == 1, result.err
    assert "error in process 1: cpu is out of memory in step 2, at 1 images of " in result.err
    assert '\n  parallel.strategy = "fsdp"\n' in result.err
