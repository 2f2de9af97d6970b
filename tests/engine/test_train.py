"""One optimizer step, and whole runs that must repeat to the last bit."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdetr.data.batching import collate
from samdetr.data.loader import EvalLoader
from samdetr.data.splits import build_dataset, load_splits
from samdetr.engine.failures.replay import step_seed
from samdetr.engine.optim import GuardedAdamW, build_optimizer
from samdetr.engine.step import train_step
from samdetr.engine.train import is_evaluated, train
from samdetr.loss import SetCriterion, build_criterion
from samdetr.models import EncoderDecoder, build_model
from samdetr.recipe import Recipe
from samdetr.structures import Batch, Losses, Outputs, Targets
from tests.engine.runs import MakeRecipe, assert_same_weights, losses, metrics

CPU = torch.device("cpu")


def random_batch(counts: tuple[int, ...], side: int = 64) -> Batch:
    """Images of one size with ``counts`` random objects."""
    generator = torch.Generator().manual_seed(3)
    most = max(1, *counts)
    boxes = torch.rand(len(counts), most, 4, generator=generator) * 0.4 + 0.2
    labels = torch.randint(0, 8, (len(counts), most), generator=generator)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    sizes = torch.tensor([[side, side]] * len(counts))
    return Batch(
        images=torch.randn(len(counts), 3, side, side, generator=generator),
        image_sizes=sizes,
        targets=Targets(labels * valid, boxes * valid[..., None], torch.tensor(counts)),
        image_ids=torch.arange(100, 100 + len(counts)),
        original_sizes=sizes,
    )


def part(batch: Batch, rows: slice) -> Batch:
    targets = Targets(*(value[rows] for value in batch.targets))
    return Batch(
        batch.images[rows], batch.image_sizes[rows], targets, batch.image_ids[rows], batch.original_sizes[rows]
    )


def first_batch(recipe: Recipe) -> Batch:
    splits = load_splits(recipe.data, num_queries=recipe.model.num_queries, num_classes=recipe.model.num_classes)
    dataset = build_dataset(
        splits.train, splits.categories, recipe.data, recipe.augment, seed=recipe.run.seed, training=True
    )
    return collate([dataset[0, row] for row in range(4)], dataset.max_objects)


def model_of(recipe: Recipe) -> EncoderDecoder:
    torch.manual_seed(recipe.run.seed)
    return build_model(recipe.model).train()


def test_train_step_is_short_and_importable() -> None:
    source = inspect.getsource(train_step)
    body = source[source.rindex('"""') + 3 :]
    assert 5 < len(body.strip().splitlines()) <= 40


def test_twenty_steps_on_a_fixed_batch_repeat(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0")
    batch = first_batch(recipe)

    def twenty_steps() -> list[list[float]]:
        model = model_of(recipe)
        optimizer = build_optimizer(model, recipe.optim)
        criterion = build_criterion(recipe)
        return [train_step(model, criterion, optimizer, [batch], device=CPU, clip_norm=1.0).tolist() for _ in range(20)]

    first, second = twenty_steps(), twenty_steps()
    assert first == second
    assert first[-1][0] < 0.9 * first[0][0]  # and it learns


def test_workers_change_nothing(make_recipe: MakeRecipe, trained: Path) -> None:
    run = train(make_recipe("data.workers=2"))
    assert len(losses(trained)) == 12
    assert losses(run) == losses(trained)
    assert_same_weights(run, trained)
    for kind in ("epoch", "eval"):
        without_time = [
            [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(folder, kind)]
            for folder in (run, trained)
        ]
        assert without_time[0] == without_time[1]


def test_another_seed_is_another_run(make_recipe: MakeRecipe, trained: Path) -> None:
    run = train(make_recipe("run.seed=8", "train.epochs=1"))
    assert not {loss for _, _, loss, *_ in losses(run)} & {loss for _, _, loss, *_ in losses(trained)}


@pytest.mark.parametrize("micro", [2, 1])
def test_gradients_do_not_depend_on_the_micro_batch(make_recipe: MakeRecipe, micro: int) -> None:
    recipe = make_recipe("model.dropout=0.0", 'model.backbone.norm="frozen"')
    batch = random_batch((3, 0, 1, 5))

    def gradients(size: int) -> tuple[list[Tensor], list[float]]:
        model = model_of(recipe)
        optimizer = GuardedAdamW(model.parameters(), lr=0.0)
        pieces = [part(batch, slice(start, start + size)) for start in range(0, 4, size)]
        values = train_step(model, build_criterion(recipe), optimizer, pieces, device=CPU, clip_norm=0.0)
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert len(found) == len(list(model.parameters()))
        return found, values.tolist()

    whole, whole_values = gradients(4)
    split, split_values = gradients(micro)
    norm = torch.stack([gradient.norm() for gradient in whole]).norm()
    difference = torch.stack([(a - b).norm() for a, b in zip(whole, split, strict=True)]).norm()
    assert difference / norm < 1e-5
    for index in (0, 1, 2, 3, 5):  # all but class_error, which is a mean over micro-batches
        assert split_values[index] == pytest.approx(whole_values[index], rel=1e-4)
    assert whole_values[5] == pytest.approx(norm.item(), rel=1e-5)


def test_a_run_means_the_same_with_another_micro_batch(make_recipe: MakeRecipe) -> None:
    """Images of different sizes: padding="masked" makes each independent of its neighbours."""
    options = ("model.dropout=0.0", 'model.backbone.norm="frozen"', "train.epochs=1")
    whole, split = (train(make_recipe(*options, f"train.micro_batch={size}")) for size in (4, 1))
    pairs = list(zip(losses(whole), losses(split), strict=True))
    assert len(pairs) == 6
    for first, second in pairs:
        assert second[2] == pytest.approx(first[2], rel=1e-3)


def test_clipping(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.dropout=0.0")
    model = model_of(recipe)
    optimizer = GuardedAdamW(model.parameters(), lr=0.0)
    values = train_step(model, build_criterion(recipe), optimizer, [random_batch((2, 2))], device=CPU, clip_norm=0.125)
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.125, rel=1e-4)
    assert values[5].item() > 1  # what is reported is the norm before clipping


class Exploding(SetCriterion):
    """A criterion whose gradient overflows while the matching cost is finite."""

    def forward(self, outputs: Outputs, targets: Targets, num_boxes: Tensor | None = None) -> Losses:
        losses = super().forward(outputs, targets, num_boxes)
        return losses._replace(total=losses.total * 1e38)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("place", ["image", "gradient"])
def test_a_step_that_is_not_finite_changes_no_parameter(make_recipe: MakeRecipe, place: str, kind: str) -> None:
    recipe = make_recipe("model.dropout=0.0", f'optim.optimizer="{kind}"')
    model, criterion = model_of(recipe), build_criterion(recipe)
    optimizer = build_optimizer(model, recipe.optim)
    train_step(model, criterion, optimizer, [random_batch((2, 2))], device=CPU, clip_norm=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    bad = random_batch((2, 2))
    if place == "image":
        bad.images[1, 0, 5, 5] = torch.nan
    failing = criterion if place == "image" else Exploding()
    pieces = [random_batch((1, 1)), bad]
    values = train_step(model, failing, optimizer, pieces, device=CPU, clip_norm=1.0)
    assert not torch.isfinite(values[0] + values[5])
    train_step(model, criterion, optimizer, [random_batch((2, 2))], device=CPU, clip_norm=1.0)  # nor does the next
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_which_epochs_are_evaluated(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("train.epochs=7", "eval.every=3")
    assert [epoch for epoch in range(7) if is_evaluated(recipe, epoch)] == [2, 5, 6]


def test_step_seeds_differ() -> None:
    seeds = {step_seed(seed, step, place) for seed in range(10) for step in range(100) for place in range(4)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_loaders_see_every_image_once(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    dataset = build_dataset(splits.val, splits.categories, recipe.data, recipe.augment, seed=0, training=False)
    loader = EvalLoader(dataset, batch=4, workers=0, pin_memory=False)
    assert [batch.image_ids.tolist() for batch in loader] == [[1, 2, 3, 4], [5, 6]]


def test_fast_pixels_train_the_same_weights(make_recipe: MakeRecipe, trained: Path) -> None:
    """On a CPU the 8-bit path gives the published bits."""
    folder = train(make_recipe("data.pixels=fast", "data.workers=1"))
    assert_same_weights(folder, trained)
