"""NaN in an image, a weight and a gradient: nothing changes, the run skips, or stops with a file, and that is read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import samdetr.engine.step
import samdetr.engine.train
from samdetr.data.batching import Sample, epoch_order
from samdetr.data.datasets import DetectionDataset
from samdetr.data.transforms import TrainTransform
from samdetr.engine.checkpoint.format import MODEL, Progress, model_tensors
from samdetr.engine.checkpoint.saving import Staging, save_checkpoint
from samdetr.engine.debug_nan import compute
from samdetr.engine.run.metrics import AsyncMetrics
from samdetr.engine.start_up import random_batch
from samdetr.engine.train import train
from samdetr.errors import NonFiniteError
from samdetr.loss import build_criterion
from samdetr.models import build_model
from samdetr.models.layers import FeedForward
from samdetr.recipe import Recipe
from tests.engine.runs import META, Command, MakeRecipe, end, losses, metrics, sentence, start_in, weights

KEEP_ALL = ("checkpoint.every=1", "checkpoint.keep=50", "optim.ema_decay=0.9")
COMPILED = ("compute.compile=on", "data.batching=buckets", "data.buckets=2", "data.bucket_grid=16", "data.pixels=fast")
SKIP = ("train.on_nonfinite=skip", "train.max_skips=2")


def poison_steps(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """A pixel of the first image of these steps, counted from 1 over all runs, is NaN."""
    step, calls = samdetr.engine.train.train_step, 0

    def poisoned(model: Any, criterion: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in steps:
            batch[0].images[0, 0, 3, 3] = torch.nan
        return step(model, criterion, optimizer, batch, **options)

    patch.setattr(samdetr.engine.train, "train_step", poisoned)


def poison_image(patch: pytest.MonkeyPatch, row: int) -> None:
    """A pixel of the training image of this row, whose id is one more, is NaN whenever it is loaded."""
    load = DetectionDataset.load

    def poisoned(self: DetectionDataset, keys: Sequence[tuple[int, int]]) -> list[Sample]:
        samples = load(self, keys)
        for key, sample in zip(keys, samples, strict=True):
            if isinstance(self.transform, TrainTransform) and key[1] == row:
                sample.image[0, 3, 3] = torch.nan
        return samples

    patch.setattr(DetectionDataset, "load", poisoned)


class _BadBackward(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def poison_gradient(patch: pytest.MonkeyPatch) -> None:
    """The backward pass of every feed-forward part is infinite."""
    forward = FeedForward.forward
    patch.setattr(FeedForward, "forward", lambda self, x: forward(self, _BadBackward.apply(x)))


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe.run.folder) / "tiny" / "1"


def replay_of(run: Path) -> Path:
    (file,) = run.glob("nonfinite-*.safetensors")
    return file


def assert_weights_of_step(run: Path, step: int) -> None:
    """The replay has the parameters that the checkpoint of ``step`` has, to the last bit."""
    found, saved = load_file(replay_of(run)), weights(run, f"step-{step:08d}")
    names = [name for name in found if "running_" not in name and "num_batches" not in name]
    assert len(names) > 50
    assert [name for name in names if not torch.equal(found[name], saved[f"model/{name}"])] == []


def test_a_bad_image_stops_and_is_named(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, samdetr_command: Command
) -> None:
    """With the weights of its step; then the run goes on without that step."""
    row, recipe = int(epoch_order(24, 5, 0)[9]), make_recipe(*KEEP_ALL)  # in the third step
    with monkeypatch.context() as patch:
        poison_image(patch, row)
        with pytest.raises(NonFiniteError, match=r"not finite at step 3 \(epoch 1, image ids ") as caught:
            train(recipe)
        run = folder_of(recipe)
        file = replay_of(run)
        assert f"samdetr debug-nan {file}. Lower" in str(caught.value)
        assert f"skip such steps with samdetr-train --resume {run} --set train.on_nonfinite=skip; what" in str(
            caught.value
        )
        assert_weights_of_step(run, 2)
        result = samdetr_command("debug-nan", str(file))
        train(make_recipe(*KEEP_ALL, *SKIP), resume=str(run))
    assert (result.code, result.err) == (1, "")
    assert f"image id {row + 1}: its pixels are not finite\n" in result.out
    assert result.out.count("  first: an input of model, in micro-batch 1 (image ids ") == 2  # in both precisions
    assert "not finite in both precisions; look at: an input of model" in result.out
    content = json.loads(file.with_suffix(".json").read_text())["replay"]
    assert (content["step"], content["epoch"], content["step_in_epoch"]) == (3, 0, 2)
    assert content["values"]["loss"] == "nan"
    assert row + 1 in content["micro_batches"][0]["image_ids"]
    skipped = [line["step"] for line in metrics(run, "skip")]
    assert skipped[0] == 3 and len(skipped) == 2  # once an epoch
    assert len(metrics(run, "train")) == 10
    assert samdetr_command("debug-nan", str(file)).code == 0  # the picture is whole again


def test_what_is_noticed_late_has_changed_nothing_meanwhile(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: five more steps were taken before the host heard of the first of the second epoch."""
    monkeypatch.setattr(AsyncMetrics, "ready", lambda self: iter(()))
    poison_steps(monkeypatch, 7)
    recipe = make_recipe()
    with pytest.raises(NonFiniteError, match=r"not finite at step 7 \(epoch 2"):
        train(recipe)
    assert_weights_of_step(folder_of(recipe), 6)


def test_a_bad_weight_is_named(
    make_recipe: MakeRecipe, train_command: Command, samdetr_command: Command, tmp_path: Path
) -> None:
    model = build_model(make_recipe().model)
    with torch.no_grad():
        model.decoder.layers[1].cross_attention.value.weight[3, 5] = torch.nan
    parts, _ = Staging().copy({MODEL: model_tensors(model)})
    broken = save_checkpoint(tmp_path / "broken", parts, progress=Progress(), meta=META)
    message = sentence(train_command("--set", f"init.checkpoint={broken}"))
    assert "at step 1 (epoch 1" in message and "): loss_ce; no parameter was changed" in message
    file = replay_of(tmp_path / "runs" / "tiny" / "1")
    found = load_file(file)
    assert all(
        torch.equal(found[name], value)
        for name, value in model.named_parameters()
        if "cross_attention.value" not in name
    )
    result = samdetr_command("debug-nan", str(file.with_suffix(".json")))
    assert result.code == 1
    assert "weight decoder.layers.1.cross_attention.value.weight: not finite\n" in result.out
    assert "  not finite in the loss: loss_ce\n" in result.out
    place = "decoder.layers.1.cross_attention"  # which multiplies by its parts' weights itself
    assert f"  first: an input of {place}.out, made in {place}, in micro-batch 1 (image ids " in result.out


def test_a_bad_gradient_is_named(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, samdetr_command: Command
) -> None:
    recipe = make_recipe(*KEEP_ALL)
    with monkeypatch.context() as patch:
        poison_gradient(patch)
        with pytest.raises(NonFiniteError, match=r"at step 1 .*\): the gradient; no parameter was changed"):
            train(recipe)
        file = replay_of(folder_of(recipe))
        result = samdetr_command("debug-nan", str(file))
    assert result.code == 1
    assert "  not finite in the loss: nothing, the gradient alone\n" in result.out
    assert "  first: a gradient that the backward pass of decoder.layers.1.feed_forward gives, in" in result.out
    torch.manual_seed(recipe.run.seed)
    before, found = build_model(recipe.model), load_file(file)
    assert all(torch.equal(found[name], value) for name, value in before.named_parameters())
    again = samdetr_command("debug-nan", str(file))
    assert again.code == 0
    assert "finite in fp32 now, eagerly and in one process: what the run met does not come again\n" in again.out


def test_what_is_not_finite_in_bf16_alone_is_said(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, samdetr_command: Command
) -> None:
    recipe = make_recipe("compute.precision=bf16")
    poison_steps(monkeypatch, 2)
    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        train(recipe)
    forward = FeedForward.forward

    def overflowing(self: FeedForward, x: Tensor) -> Tensor:
        return forward(self, x) * (torch.inf if torch.is_autocast_enabled("cpu") else 1)

    monkeypatch.setattr(FeedForward, "forward", overflowing)
    result = samdetr_command("debug-nan", str(replay_of(folder_of(recipe))))
    assert result.code == 1
    *_, bf16, terms, first, fp32, verdict = result.out.splitlines()
    assert bf16.startswith("bf16, as configured: loss nan, gradient norm nan")
    assert (terms, first.split(",")[0]) == (
        "  not finite in the loss: loss_ce, loss_ce_0",
        "  first: an output of encoder.transformer.layers.0.feed_forward",
    )
    numbers = re.fullmatch(r"fp32, for comparison: loss (\S+), gradient norm (\S+)", fp32)
    assert numbers and 1 < float(numbers[1]) < 30 and 0 < float(numbers[2]) < 1000
    where = "an output of encoder.transformer.layers.0.feed_forward"
    assert verdict == f'not finite in bf16 alone; set compute.precision = "fp32", or look at: {where}'


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("model.system=smca_detr",),
        ("model.system=conditional_detr",),
        ("model.system=detr", "loss.classification=softmax"),
        ("model.system=deformable_detr",),
    ],
)
def test_what_is_meant_to_be_infinite_is_not_reported(make_recipe: MakeRecipe, keys: tuple[str, ...]) -> None:
    """The watched step is the step: the same loss and norm, and nothing found in it."""
    recipe = make_recipe("model.num_classes=9", *keys)
    torch.manual_seed(0)
    model, criterion = build_model(recipe.model).train(), build_criterion(recipe)
    batches = [random_batch((64, 96), 2, 3), random_batch((48, 64), 2, 3)]
    found = compute(model, criterion, batches, [1, 2], precision=torch.float32)
    assert found.finite and not found.first and not found.terms
    num_boxes = sum(batch.targets.counts.sum() for batch in batches)
    model.zero_grad()
    losses = []
    for batch, seed in zip(batches, (1, 2), strict=True):
        torch.manual_seed(seed)
        losses.append(
            samdetr.engine.step.forward_backward(model, criterion, batch, num_boxes, precision=torch.float32)[0]
        )
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found.loss == pytest.approx(float(sum(losses)), rel=1e-6)
    assert found.grad_norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-5)


@pytest.mark.parametrize("keys", [(), pytest.param(COMPILED, marks=pytest.mark.long)], ids=["eager", "compiled"])
def test_a_skipped_step_changes_nothing(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, trained: Path, keys: tuple[str, ...]
) -> None:
    """No weight, statistic, average or moment; number and rate go on, and a line says so."""
    monkeypatch.setattr(AsyncMetrics, "ready", lambda self: iter(()))  # the host hears of it when it saves
    poison_steps(monkeypatch, 4, 5, 9)
    run = train(make_recipe(*KEEP_ALL, *SKIP, *keys))
    for before, after in ((3, 4), (4, 5), (8, 9)):
        one, other = (weights(run, f"step-{step:08d}") for step in (before, after))
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
        assert any(key.startswith("average/") for key in one)
        assert any("running_mean" in key for key in one)
    after = weights(run, "step-00000006")
    assert not torch.equal(after["model/decoder.reference_boxes"], one["model/decoder.reference_boxes"])
    assert [(line["step"], line["in_row"]) for line in metrics(run, "skip")] == [(4, 1), (5, 2), (9, 1)]
    assert metrics(run, "skip")[0]["terms"] == ["loss_ce"]  # nothing is matched
    assert len(metrics(run, "skip")[0]["image_ids"]) == 4
    taken = metrics(run, "train")
    assert [line["step"] for line in taken] == [1, 2, 3, 6, 7, 8, 10, 11, 12]
    rates = {line["step"]: line["lr"] for line in metrics(trained, "train")}
    assert all(line["lr"] == rates[line["step"]] for line in taken)
    assert keys or losses(run)[:3] == losses(trained)[:3]
    meta = json.loads((run / "checkpoints" / "last" / "meta.json").read_text())
    assert (meta["averaged_steps"], meta["progress"]["skips"], meta["progress"]["skips_in_row"]) == (12, 3, 0)
    assert torch.equal(weights(run)["optimizer/decoder.reference_boxes:step"], torch.tensor(9.0))


def test_more_skips_in_a_row_stop_also_after_a_resume(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 4 and 5 are skipped, the run ends at a bad image of step 6's place; it goes on and counts from there."""
    recipe = make_recipe(*KEEP_ALL, *SKIP)
    with monkeypatch.context() as patch:
        poison_steps(patch, 4, 5, 6)
        with pytest.raises(
            NonFiniteError, match=r"not finite at step 6 after 2 skipped in a row .*raise train\.max_skips"
        ):
            train(recipe)
    run = folder_of(recipe)
    assert_weights_of_step(run, 3)
    assert json.loads((run / "checkpoints" / "last" / "meta.json").read_text())["progress"]["step"] == 5
    with monkeypatch.context() as patch:
        poison_steps(patch, 1)  # step 6 again
        with pytest.raises(NonFiniteError, match="not finite at step 6 after 2 skipped in a row"):
            train(recipe, resume=str(run))
    train(make_recipe(*KEEP_ALL), resume=str(run))  # without the fault, and with the other policy
    assert [line["step"] for line in metrics(run, "train")] == [1, 2, 3, *range(6, 13)]
    assert [line["step"] for line in metrics(run, "skip")] == [4, 5]


POISON = """
import os, samdetr.engine.train as engine, samdetr.engine.run.metrics as metrics
step, calls = engine.train_step, 0
def poisoned(model, criterion, optimizer, batch, **options):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        batch[1].images[0, 0, 3, 3] = float("nan")
    return step(model, criterion, optimizer, batch, **options)
engine.train_step = poisoned
if os.environ["RANK"] == "0":
    metrics.AsyncMetrics.ready = lambda self: iter(())  # as on a GPU whose copy is still under way
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_processes_stop_together(
    recipe_file: Path, tmp_path: Path, samdetr_command: Command, strategy: str
) -> None:
    """One process's image is bad, and the other hears of it late: one sentence, one file with the images of both."""
    keys = ("train.micro_batch=1", "model.backbone.norm=frozen", f"parallel.strategy={strategy}", "checkpoint.every=2")
    options = [word for key in (f"run.folder={tmp_path}", *keys) for word in ("--set", key)]
    result = end(start_in(2, recipe_file, *options, before=POISON))
    assert result.code == 1
    assert result.err.count("the loss or its gradient is not finite at step 3 (epoch 1") == 1
    run = tmp_path / "tiny" / "1"
    assert_weights_of_step(run, 2)
    content = json.loads(replay_of(run).with_suffix(".json").read_text())["replay"]
    ids = [number + 1 for number in epoch_order(24, 5, 0)[8:12].tolist()]
    assert [micro["image_ids"] for micro in content["micro_batches"]] == [[number] for number in ids]
    assert [micro["process"] for micro in content["micro_batches"]] == [0, 1, 0, 1]
    assert samdetr_command("debug-nan", str(replay_of(run))).code == 0  # without the fault


def test_debug_nan_of_another_file(samdetr_command: Command, trained: Path, tmp_path: Path) -> None:
    assert "is not a replay" in sentence(samdetr_command("debug-nan", str(trained)))
    assert "a.safetensors: there is no such file" in sentence(samdetr_command("debug-nan", str(tmp_path / "a.json")))
