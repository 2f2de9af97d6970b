"""``train.micro_batch = "auto"``: the choice, that its trials leave no trace, and that the run keeps it."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from samdetr.data.splits import build_dataset, largest_shape, load_splits
from samdetr.engine import micro_batch as memory
from samdetr.engine.compute.precision import EXACT
from samdetr.engine.distributed.launch import processes_wanted
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.micro_batch import (
    GIB,
    Trial,
    choose_micro_batch,
    divisors,
    memory_table,
    peak_bytes,
    try_sizes,
)
from samdetr.engine.step import train_step
from samdetr.engine.train import train
from samdetr.errors import RecipeError
from samdetr.recipe import load_recipe
from samdetr.structures import Batch
from tests.engine.runs import MakeRecipe, assert_same_weights, end, losses, start_in

CPU = torch.device("cpu")
AUTO = "train.micro_batch=auto"


def tried(patch: pytest.MonkeyPatch, share: int, needed: dict[int, int | None], usable: int) -> list[Trial]:
    """The trials of a process's ``share`` of images, of which a micro-batch needs so many bytes."""
    patch.setattr(memory, "largest_shape", lambda dataset, section, images: (96, 80))
    patch.setattr(memory, "peak_bytes", lambda recipe, compute, device, shape, counts: needed[counts[0]])
    dataset: Any = SimpleNamespace(max_objects=5)
    recipe: Any = SimpleNamespace(data=None)
    return try_sizes(recipe, EXACT, CPU, dataset, share, usable)


def test_the_most_that_leaves_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [divisors(share) for share in (1, 4, 12)] == [[1], [1, 2, 4], [1, 2, 3, 4, 6, 12]]
    needed = {1: 3 * GIB, 2: 9 * GIB, 4: 9 * GIB + 1, 8: None}
    trials = tried(monkeypatch, 8, needed, 10 * GIB)
    assert [(trial.images, trial.fits(10 * GIB)) for trial in trials] == [(1, True), (2, True), (4, False)]
    assert [trial.images for trial in tried(monkeypatch, 2, needed, 10 * GIB)] == [1, 2]
    assert [trial.fits(GIB) for trial in tried(monkeypatch, 8, {1: None}, GIB)] == [False]


def test_the_table() -> None:
    trials = [Trial(1, (800, 1344), 3 * GIB), Trial(2, (800, 1344), 10 * GIB), Trial(4, (1344, 1344), None)]
    assert memory_table(trials, 10 * GIB, boxes=63) == [
        "memory of a step with 63 boxes an image; 10.00 GiB are usable, 10% stay free",
        "micro_batch   largest batch       peak   fits",
        "          1      800 x 1344   3.00 GiB   yes",
        "          2      800 x 1344  10.00 GiB   no",
        "          4     1344 x 1344   too much   no",
    ]


def test_a_cpu_is_refused_before_a_run_is_made(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'micro_batch = "auto" tries steps on a GPU.*: set it to a number'):
        train(make_recipe(AUTO))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("value", ["0", "true", "1.5", '"most"'])
def test_what_else_is_refused(recipe_file: Path, value: str) -> None:
    with pytest.raises(RecipeError, match=r'train\.micro_batch: expected a whole number >= 1 or "auto", got') as caught:
        load_recipe(recipe_file, [f"train.micro_batch={value}"])
    assert "\n" not in str(caught.value)


def test_processes_share_a_batch_that_is_still_open(make_recipe: MakeRecipe) -> None:
    assert [processes_wanted(None, make_recipe(AUTO, "train.total_batch=12"), gpus) for gpus in (1, 4, 8)] == [1, 4, 6]
    with pytest.raises(RecipeError, match="is a number once a run has begun"):
        _ = make_recipe(AUTO).train.images


@pytest.mark.parametrize("batching", ["random", "buckets"])
def test_no_batch_is_larger_than_the_one_tried(make_recipe: MakeRecipe, batching: str) -> None:
    recipe = make_recipe(f"data.batching={batching}", "data.bucket_grid=16", "data.buckets=3")
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    dataset = build_dataset(splits.train, splits.categories, recipe.data, recipe.augment, seed=5, training=True)
    sizes = np.concatenate([dataset.planned_sizes(epoch, np.arange(24)) for epoch in range(50)])
    alone, together = (largest_shape(dataset, recipe.data, images) for images in (1, 4))
    assert sizes.prod(axis=1).max() <= np.prod(alone) <= np.prod(together)
    assert batching == "buckets" or (sizes <= together).all()
    assert np.prod(together) <= 1.35 * np.prod(sizes.max(axis=0))


class Gauge:
    """In place of the GPU: runs the steps, and says what they would need."""

    def __init__(self, patch: pytest.MonkeyPatch, needed: list[int | None]) -> None:
        self.needed, self.batches = iter(needed), list[list[Batch]]()
        patch.setattr(memory, "usable_bytes", lambda device: 1000)
        patch.setattr(memory, "peak_bytes", self.peak)
        patch.setattr(memory, "train_step", self.step)

    def peak(self, *arguments: Any) -> int | None:
        memory.try_steps(*arguments)
        return next(self.needed)

    def step(self, model: nn.Module, criterion: nn.Module, optimizer: object, batches: list[Batch], **options):  # type: ignore[no-untyped-def]
        self.batches.append(batches)
        return train_step(model, criterion, optimizer, batches, **options)  # type: ignore[arg-type]


def test_trials_are_whole_steps_and_leave_no_trace(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, said = make_recipe(AUTO, "optim.ema_decay=0.9"), list[str]()
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    gauge = Gauge(monkeypatch, [500, 900, None])
    before = torch.get_rng_state()
    found = choose_micro_batch(recipe, splits, EXACT, CPU, ALONE, said.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.train.images == 2 and found == recipe.model_copy(update={"train": found.train})
    assert said[-1] == "train.micro_batch = 2; the run keeps it when it is continued"
    # two steps each: 4 images are at least two micro-batches of one or two, or one of four
    assert [[len(batch.images) for batch in step] for step in gauge.batches] == [[1, 1]] * 2 + [[2, 2]] * 2 + [[4]] * 2
    dataset = build_dataset(splits.train, splits.categories, recipe.data, recipe.augment, seed=5, training=True)
    counts = {int(count) for step in gauge.batches for batch in step for count in batch.targets.counts}
    assert counts == {dataset.max_objects}


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["random", "buckets"])
def test_the_run_is_that_of_its_number_and_keeps_it(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    options = (f"data.batching={batching}", "data.bucket_grid=16", "data.buckets=3")
    expected = train(make_recipe(*options, "train.micro_batch=2"))
    with monkeypatch.context() as patch:
        Gauge(patch, [10, 20, 901])
        run = train(make_recipe(*options, AUTO, "train.epochs=1"))
    assert load_recipe(run / "recipe.toml").train.micro_batch == 2
    train(make_recipe(*options, AUTO), resume=str(run))  # on a CPU: nothing is tried again
    assert losses(run) == losses(expected)
    assert_same_weights(run, expected)


def test_one_image_too_many(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Gauge(monkeypatch, [None])
    with pytest.raises(RecipeError, match=r"one image does not fit into the memory; set compute\.act"):
        train(make_recipe(AUTO))
    assert not (tmp_path / "runs").exists()


def test_memory_is_freed_after_one_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that all that the failed step held, a model in a cycle too, is gone when the cache is emptied."""
    kept: list[weakref.ref[nn.Module]] = []
    alive_when_emptied: list[bool] = []

    def take_steps(*_: object) -> None:
        model = nn.Linear(2, 2)
        model.itself = [model]  # type: ignore[assignment]
        kept.append(weakref.ref(model))
        if len(kept) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "try_steps", take_steps)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive_when_emptied.append(kept[-1]() is not None))
    nothing: Any = None
    peaks = [peak_bytes(nothing, EXACT, CPU, (96, 80), (1, 1, 5)) for _ in range(2)]
    assert peaks == [None, 7]
    assert alive_when_emptied == [False, False]


PATCH = """
import os
from samdetr.engine import micro_batch as memory
needed = iter([[1, 2, 3], [1, 901]][int(os.environ["RANK"])])
memory.usable_bytes = lambda device: 1000
memory.peak_bytes = lambda *arguments: (memory.try_steps(*arguments), next(needed))[1]
"""


@pytest.mark.slow
def test_processes_agree_on_the_least(recipe_file: Path, tmp_path: Path) -> None:
    options = ("train.total_batch=8", AUTO, "train.epochs=1", "model.backbone.norm=frozen", f"run.folder={tmp_path}")
    result = end(start_in(2, recipe_file, *(word for o in options for word in ("--set", o)), before=PATCH))
    assert result.code == 0, result.err
    assert result.out.count("train.micro_batch = 1, the most that fits in every process; the run keeps it") == 1
    assert load_recipe(tmp_path / "tiny" / "1" / "recipe.toml").train.micro_batch == 1
