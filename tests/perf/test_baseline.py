"""The published algorithm agrees with our model and criterion, and asks for as many ops as the published code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from perf.baseline import (
    PUBLISHED_OPS,
    PUBLISHED_SMCA_OPS,
    BaselineCriterion,
    BaselineSAMDETR,
    PublishedBatch,
    baseline_loss,
    baseline_step,
    build_baseline_optimizer,
    count_step,
    published_batch,
)
from perf.inputs import training_batch
from samdetr.engine.optim import build_optimizer
from samdetr.engine.step import train_step
from samdetr.errors import RecipeError
from samdetr.loss import build_criterion
from samdetr.models import EncoderDecoder, build_model
from samdetr.models.official import to_official
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import Batch

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ("model.encoder_layers=1", "model.decoder_layers=3", "model.num_queries=20", "model.ffn=64")
SMALL += ("model.dropout=0.0", 'model.backbone.weights="none"', 'model.backbone.name="resnet10"')
# float64; the baseline's valid ratios and both position codes are float32
NOISE = 2e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml", [*SMALL, *overrides])


def pair(recipe: Recipe, dtype: torch.dtype) -> tuple[EncoderDecoder, BaselineSAMDETR]:
    """Build our model and the baseline with the same weights, none at a start that hides a part (zero, equal)."""
    torch.manual_seed(1)
    model = build_model(recipe.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        for head in model.decoder.box_heads:
            head.last.weight.normal_(std=0.02)
    baseline = BaselineSAMDETR(recipe.model)
    baseline.load_from(model)
    return model.to(dtype).train(), baseline.to(dtype).train()


def inputs(recipe: Recipe, padded: bool, dtype: torch.dtype) -> Batch:
    batch = training_batch(2, 96, 128, classes=recipe.model.num_classes, seed=3, least=0.6 if padded else 1.0)
    return batch._replace(images=batch.images.to(dtype))


def published_in(batch: Batch, dtype: torch.dtype) -> PublishedBatch:
    published = published_batch(batch)
    targets = tuple(target._replace(boxes=target.boxes.to(dtype)) for target in published.targets)
    return published._replace(targets=targets)


def close(found: Tensor, right: Tensor, noise: float) -> None:
    assert (found - right).abs().max() <= noise * max(1.0, right.abs().max().item())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "padded"),
    [("r50_12ep", False), ("r50_12ep", True), ("r50_smca_12ep", True), ("r50_smca_50ep", False)],
    ids=["clean", "padded", "smca padded", "smca clean, no input norm"],
)
def test_outputs_losses_and_gradients_agree(name: str, padded: bool) -> None:
    recipe = small(name, "loss.giou_weight=3.0", "loss.l1_cost=4.0")
    model, baseline = pair(recipe, torch.float64)
    batch = inputs(recipe, padded, torch.float64)
    published = published_in(batch, torch.float64)
    ours = model(batch.images, batch.image_sizes)
    theirs = baseline(published.images, published.mask)
    close(theirs.logits, ours.logits, NOISE)
    close(theirs.boxes, ours.boxes, NOISE)

    losses = build_criterion(recipe)(ours, batch.targets)
    loss = baseline_loss(BaselineCriterion(recipe.loss), theirs, published.targets)
    assert {f"{term}_unscaled" for term in losses.terms} == set(loss.unscaled)
    for term, value in losses.terms.items():
        close(loss.unscaled[f"{term}_unscaled"].double(), value.double(), NOISE)
    close(loss.total, losses.total, NOISE)
    assert loss.value == pytest.approx(losses.total.item(), rel=NOISE)

    losses.total.backward()
    loss.total.backward()
    # the gradients of our model, under the published names
    own, found = to_official(with_gradients(model)), gradients(baseline)
    assert {n for n in found if own[n].abs().max() > 0} == {n for n in found if found[n].abs().max() > 0}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    largest = max(grad.abs().max().item() for grad in found.values())
    for key, grad in found.items():
        assert (grad - own[key]).abs().max() <= 20 * NOISE * largest, key


def with_gradients(model: EncoderDecoder) -> EncoderDecoder:
    """Replace every parameter of the model by its gradient (zero where it has none)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return model


def test_dc5_in_fp32() -> None:
    recipe = small("r50_dc5_smca_12ep", 'model.backbone.name="resnet50"')
    model, baseline = pair(recipe, torch.float32)
    batch = inputs(recipe, True, torch.float32)
    published = published_batch(batch)
    with torch.no_grad():
        ours, theirs = model(batch.images, batch.image_sizes), baseline(published.images, published.mask)
    close(theirs.logits, ours.logits, 1e-4)
    close(theirs.boxes, ours.boxes, 1e-4)


def test_a_step_changes_the_parameters_as_ours_does() -> None:
    recipe = small("r50_12ep", "optim.clip_norm=0.1")
    model, baseline = pair(recipe, torch.float64)
    batch, criterion = inputs(recipe, True, torch.float64), build_criterion(recipe)
    optimizer = build_baseline_optimizer(baseline, recipe.optim)
    assert [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in build_optimizer(model, recipe.optim).param_groups
    ]
    assert not any(group["foreach"] or group["fused"] for group in optimizer.param_groups)
    device, before = torch.device("cpu"), to_official(model)
    before = {key: value.clone() for key, value in before.items()}
    own = build_optimizer(model, recipe.optim)
    values = train_step(model, criterion, own, [batch], device=device, clip_norm=0.1)
    published = published_in(batch, torch.float64)
    logged = baseline_step(baseline, BaselineCriterion(recipe.loss), optimizer, published, device=device, clip_norm=0.1)
    assert logged["loss"] == pytest.approx(values[0].item(), rel=1e-6)
    assert logged["grad_norm"] == pytest.approx(values[5].item(), rel=1e-4)
    after = to_official(model)
    for key, value in baseline.state_dict().items():
        moved = (value - before[key]).abs().max().item()
        # where a gradient is nearly zero, AdamW's first step takes the sign of its rounding
        assert (value - after[key]).abs().double().mean() <= 0.01 * moved, key


def test_images_without_objects() -> None:
    recipe = small("r50_12ep")
    model, baseline = pair(recipe, torch.float64)
    batch = inputs(recipe, False, torch.float64)
    for counts in ([0, int(batch.targets.counts[1])], [0, 0]):
        targets = batch.targets._replace(counts=torch.tensor(counts))
        some = Batch(batch.images, batch.image_sizes, targets, batch.image_ids, batch.original_sizes)
        published = published_in(some, torch.float64)
        loss = baseline_loss(
            BaselineCriterion(recipe.loss), baseline(published.images, published.mask), published.targets
        )
        ours = build_criterion(recipe)(model(some.images, some.image_sizes), some.targets)
        close(loss.total, ours.total, NOISE)


@pytest.mark.parametrize(
    "change", ['model.padding="masked"', 'model.backbone.norm="batch"', "model.backbone.frozen_stages=0"]
)
def test_what_was_never_published_has_no_baseline(change: str) -> None:
    with pytest.raises(RecipeError, match=change.split("=")[0].split(".")[-1]):
        BaselineSAMDETR(small("r50_12ep", change).model)


@pytest.mark.long
def test_launching_ops_are_as_many_as_published() -> None:
    counts = {
        name: {
            part: counter.launches.total()
            for part, counter in count_step(
                load_recipe(RECIPES / f"{name}.toml"), batch=4, height=128, width=128
            ).items()
        }
        for name in ("r50_12ep", "r50_smca_12ep")
    }
    for part, published in PUBLISHED_OPS.items():
        assert counts["r50_12ep"][part] == pytest.approx(published, rel=0.05)
    assert sum(counts["r50_12ep"].values()) == pytest.approx(sum(PUBLISHED_OPS.values()), rel=0.02)
    assert sum(counts["r50_smca_12ep"].values()) == pytest.approx(PUBLISHED_SMCA_OPS, rel=0.05)
