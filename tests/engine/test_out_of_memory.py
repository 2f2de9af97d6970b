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

import samdetr.engine.evaluate
import samdetr.engine.failures.debug_nan
import samdetr.engine.predict
import samdetr.engine.step
import samdetr.engine.train
from samdetr.cost.memory import training_memory
from samdetr.cost.meta import build_on_meta
from samdetr.engine.failures.out_of_memory import GIB, evaluation_advice, savings, training_advice
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
        first, counted, *advice, last = message_of(lambda: train(recipe))
    place = r"cpu is out of memory in step 3, at 2 images of \d+ x \d+ pixels, with up to \d boxes each: (.*)"
    found = re.fullmatch(place, first)
    assert found and found[1] == SAID
    assert counted.startswith("A step with 2 images of 64x96 keeps about 0.0")
    assert [line.partition(":")[0].strip() for line in advice] == [
        "train.micro_batch = 1",
        'compute.activation_checkpointing = "layers"',
        "augment.train_sizes up to 48 and augment.max_size = 72",
        'compute.precision = "bf16"',
    ]
    run = Path(recipe.run.folder) / "tiny" / "1"
    assert last.startswith(f"Go on with samdetr-train --resume {run} --set KEY=VALUE")
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
    assert advice[:2] == ["It needs less with", "  eval.batch = 2 (now 4)"]
    run = Path(make_recipe().run.folder) / "tiny" / "1"
    assert last.startswith(f"Go on with samdetr-train --resume {run} ")
    train(make_recipe("eval.batch=2"), resume=str(run))
    assert_same_weights(run, trained)


def test_evaluating_a_checkpoint(monkeypatch: pytest.MonkeyPatch, samdetr_command: Command, trained: Path) -> None:
    fill_at(monkeypatch, samdetr.engine.evaluate, "autocast", 1)
    result = samdetr_command("eval", str(trained), "--set", "eval.batch=1")
    assert result.code == 1 and "Traceback" not in result.err
    first, second, third = result.err.splitlines()
    assert first.startswith("error: cpu is out of memory in the evaluation, at 1 images of ") and first.endswith(SAID)
    assert second == "It needs less with" and third.startswith("  augment.eval_size and augment.eval_max_size below 64")


STARTED = f"error: cpu is out of memory in the start-up: {SAID} If other programs hold the rest ("


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
    fill_at(monkeypatch, samdetr.engine.failures.debug_nan, "forward_backward", 2)
    (file,) = Path(recipe.run.folder).glob("*/*/nonfinite-*.safetensors")
    result = samdetr_command("debug-nan", str(file))
    assert result.code == 1 and result.err.startswith(f"error: cpu is out of memory in the replay: {SAID} If other")
    assert result.err.count("\n") == 1


def published(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / "r50_12ep.toml", ["train.micro_batch=4", *overrides])


def test_what_each_key_saves_is_counted() -> None:
    recipe = published("data.batching=random")
    memory = training_memory(build_on_meta(recipe.model), recipe)
    found = {one.keys: one for one in savings(recipe, memory, processes=4, precision=torch.float32)}
    two, layers, smaller, bf16, fsdp = found.values()
    assert two.keys == "train.micro_batch = 2" and two.resumable
    assert two.bytes == pytest.approx(memory.activations / 2, rel=0.05)
    assert layers.bytes == pytest.approx(1.778 * GIB, rel=0.01) and layers.resumable
    reduced = published("data.batching=random", "augment.train_sizes=[600]", "augment.max_size=999")
    assert smaller.keys == "augment.train_sizes up to 600 and augment.max_size = 999" and not smaller.resumable
    assert smaller.bytes == memory.total - training_memory(build_on_meta(reduced.model), reduced).total
    assert 0.25 * memory.activations < smaller.bytes < (1 - 0.75**2) * memory.activations
    assert bf16.bytes is None
    assert fsdp.bytes == (memory.total - memory.activations) * 3 // 4
    assert training_advice(recipe, processes=4, precision=torch.float32)[:3] == [
        "A step with 4 images of 800x1333 keeps about 4.79 GiB, counted in fp32 (weights 0.22, gradients 0.22, "
        "optimizer 0.43, activations 3.93). It needs less with",
        "  train.micro_batch = 2: about 1.91 GiB less",
        '  compute.activation_checkpointing = "layers": about 1.78 GiB less, for more time',
    ]


def test_only_what_is_left_to_change_is_named() -> None:
    recipe = published("train.micro_batch=1", 'compute.activation_checkpointing="layers"', 'parallel.strategy="fsdp"')
    memory = training_memory(build_on_meta(recipe.model), recipe)
    found = [one.keys for one in savings(recipe, memory, processes=4, precision=torch.bfloat16)]
    assert found == ["augment.train_sizes up to 600 and augment.max_size = 999"]
    buckets = published("data.batching=buckets")
    first, *_ = savings(buckets, memory._replace(batch=4), processes=1, precision=torch.bfloat16)
    assert first.keys == "train.micro_batch = 2" and not first.resumable


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


def test_one_process_ends_the_others(recipe_file: Path, tmp_path: Path) -> None:
    options = ("train.micro_batch=1", "model.backbone.norm=frozen", f"run.folder={tmp_path}", "parallel.timeout=20")
    begun = time.monotonic()
    result = end(start_in(2, recipe_file, *(word for o in options for word in ("--set", o)), before=PATCH))
    assert time.monotonic() - begun < 60
    assert result.code == 1, result.err
    assert "error in process 1: cpu is out of memory in step 2, at 1 images of " in result.err
    assert '  parallel.strategy = "fsdp": about 0.00 GiB less' in result.err
