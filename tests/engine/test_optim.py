"""The learning rate of every step, the parameter groups, and what a run starts from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from samdetr.engine.checkpoint.format import load_checkpoint
from samdetr.engine.checkpoint.weights import load_initial_weights
from samdetr.engine.compute.precision import choose_device
from samdetr.engine.optim import GuardedSGD, build_optimizer, lr_factor, set_learning_rate
from samdetr.engine.train import train
from samdetr.errors import CheckpointError, RecipeError, SamdetrError
from samdetr.models import build_model
from samdetr.models.official import to_official
from samdetr.recipe import OptimSection
from samdetr_kernels.launch import reference_forced
from tests.engine.runs import Command, MakeRecipe, metrics


def test_warm_up_and_drops() -> None:
    section = OptimSection(warmup_steps=4, drop_epochs=(2, 3), drop_factor=0.1)
    steps_per_epoch = 3
    factors = [lr_factor(section, step=step, epoch=step // steps_per_epoch, total_steps=12) for step in range(12)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01], rel=1e-12)
    assert lr_factor(OptimSection(drop_epochs=(40,)), step=0, epoch=0, total_steps=1) == 1.0


def test_cosine() -> None:
    section = OptimSection(schedule="cosine", warmup_steps=2)
    factors = [lr_factor(section, step=step, epoch=0, total_steps=8) for step in (0, 4, 8)]
    assert factors == pytest.approx([0.5, 0.5, 0.0], abs=1e-12)
    assert lr_factor(section, step=2, epoch=0, total_steps=8) == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))


def test_groups(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        'model.backbone.norm="frozen"', "model.backbone.frozen_stages=2", "optim.lr=0.01", "optim.backbone_lr=0.002"
    )
    model = build_model(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    rest, backbone = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_backbone = {names[id(parameter)] for parameter in backbone["params"]}
    assert in_backbone == {name for name in names.values() if name.startswith("encoder.backbone.layer2.")}
    assert {names[id(parameter)] for parameter in rest["params"]} == {
        name for name in names.values() if not name.startswith("encoder.backbone.")
    }
    assert (rest["weight_decay"], backbone["weight_decay"]) == (1e-4, 1e-4)
    assert (rest["lr"], backbone["lr"]) == (0.01, 0.002)
    set_learning_rate(optimizer, 0.5)
    assert (rest["lr"], backbone["lr"]) == (0.005, 0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_on_a_gpu_start_at_their_own_rates_too(make_recipe: MakeRecipe, optimizer: str) -> None:
    recipe = make_recipe("optim.lr=0.01", "optim.backbone_lr=0.002", f"optim.optimizer={optimizer}")
    groups = build_optimizer(build_model(recipe.model).cuda(), recipe.optim).param_groups
    assert all(group["lr"].is_cuda for group in groups)
    assert [group["lr"].item() for group in groups] == pytest.approx([0.01, 0.002])


def test_sampling_has_a_group_of_its_own(make_recipe: MakeRecipe) -> None:
    deformable = ('model.system="deformable_detr"', "optim.lr=0.01")
    recipe = make_recipe(*deformable, "optim.sampling_lr_factor=0.1")
    model = build_model(recipe.model)
    optimizer = build_optimizer(model, recipe.optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in optimizer.param_groups[2]["params"]}
    attentions = [
        "encoder.transformer.layers.0.attention",
        *(f"decoder.layers.{layer}.cross_attention" for layer in range(2)),
    ]
    modules = [f"{attention}.offsets" for attention in attentions] + ["decoder.queries.reference_head"]
    assert found == {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.001, 0.001])
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.0005, 0.0005])
    assert len(build_optimizer(model, make_recipe(*deformable).optim).param_groups) == 2
    with pytest.raises(
        RecipeError, match=r"sampling_lr_factor has no meaning with model.system = \"sam_detr\": leave it"
    ):
        make_recipe("optim.sampling_lr_factor=0.1")


def test_sgd_by_hand() -> None:
    """Momentum 0.9, decay 0.1: v = 0.9 v + g + 0.1 p, then p - rate v; guarded from the first step, nothing moves."""
    guarded, parameter = (nn.Parameter(torch.tensor([2.0, -1.0])) for _ in range(2))
    for each, bad in ((guarded, True), (parameter, False)):
        optimizer = GuardedSGD([{"params": [each], "base_lr": 0.5}], lr=0.5, momentum=0.9, weight_decay=0.1)
        optimizer.guard(torch.tensor(float("nan") if bad else 1.0))
        for factor in (1.0, 0.1):
            each.grad = torch.tensor([1.0, 3.0])
            set_learning_rate(optimizer, factor)
            optimizer.step()
        if bad:
            assert optimizer.state[each]["momentum_buffer"].tolist() == [0, 0]
    assert guarded.tolist() == [2, -1]
    first = [2 - 0.5 * 1.2, -1 - 0.5 * 2.9]
    second = [p - 0.05 * (0.9 * v + g + 0.1 * p) for p, v, g in zip(first, (1.2, 2.9), (1, 3), strict=True)]
    assert parameter.tolist() == pytest.approx(second, rel=1e-6)


def test_skips_in_a_row_are_counted_on_the_device() -> None:
    """Of SGD at rate 1 and gradient 1: two in a row are skipped, with a third nothing moves any more."""
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = GuardedSGD([{"params": [parameter], "base_lr": 1.0}], lr=1.0, momentum=0.0)
    optimizer.max_skips = 2
    seen = []
    for value in (1.0, math.nan, math.inf, 1.0, -math.inf, 1.0, *[math.nan] * 3, 1.0, 1.0):
        parameter.grad = torch.ones(())
        optimizer.guard(torch.ones(()), torch.tensor(value))
        optimizer.step()
        seen.append((-parameter.item(), optimizer.found_inf.item(), optimizer.consecutive_skips.item()))
    taken, switch, in_row = (list(column) for column in zip(*seen, strict=True))
    assert taken == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert switch == [0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1]
    assert in_row == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5]
    optimizer.consecutive_skips.fill_(1)
    with optimizer.held():
        optimizer.guard(torch.ones(()))
        optimizer.step()
    assert (-parameter.item(), optimizer.found_inf.item(), optimizer.consecutive_skips.item()) == (3, 0, 1)


def test_a_frozen_backbone_has_no_group(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("model.backbone.frozen_stages=3")
    assert len(build_optimizer(build_model(recipe.model), recipe.optim).param_groups) == 1


def test_frozen_parameters_do_not_move(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe('model.backbone.norm="frozen"', "model.backbone.frozen_stages=2", "train.epochs=1")
    torch.manual_seed(recipe.run.seed)
    before = build_model(recipe.model).state_dict()
    after = load_checkpoint((train(recipe) / "checkpoints" / "last").resolve(), with_optimizer=False).model
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {key for key in moved if key.startswith("encoder.backbone.")} == {
        key for key in before if key.startswith("encoder.backbone.layer2.") and ("conv" in key or "downsample.0" in key)
    }
    assert "decoder.reference_boxes" in moved


def test_the_logged_rate(make_recipe: MakeRecipe, trained: Path) -> None:
    assert [line["lr"] for line in metrics(trained, "train")] == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, *[1e-3] * 4, *[1e-4] * 6]
    )


def test_starting_from_a_checkpoint(make_recipe: MakeRecipe, trained: Path) -> None:
    recipe = make_recipe(f'init.checkpoint="{trained}"')
    model = build_model(recipe.model)
    best = (trained / "checkpoints" / "best").resolve()
    assert load_initial_weights(model, recipe) == f"weights: {best}"
    saved = load_checkpoint(best, with_optimizer=False).model
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_another_number_of_classes_makes_the_heads_anew(
    make_recipe: MakeRecipe, trained: Path, train_command: Command
) -> None:
    options = (f'init.checkpoint="{trained}"', 'data.class_index="category_id"', "model.num_classes=9")
    recipe = make_recipe(*options)
    model = build_model(recipe.model)
    heads = {key: value.clone() for key, value in model.state_dict().items() if key.startswith("decoder.class_heads.")}
    sentence = load_initial_weights(model, recipe)
    assert sentence.endswith("; class heads are made anew, for 9 classes (it has 8)")
    saved = load_checkpoint((trained / "checkpoints" / "best").resolve(), with_optimizer=False).model
    for key, value in model.state_dict().items():
        assert torch.equal(value, heads.get(key, saved[key])), key
    assert heads["decoder.class_heads.0.weight"].shape == (9, 32)
    result = train_command(*(f"--set={option}" for option in options), "--set", "train.epochs=1")
    assert result.code == 0
    assert sentence in result.out


def test_starting_from_a_published_checkpoint(make_recipe: MakeRecipe, tmp_path: Path, train_command: Command) -> None:
    frozen = 'model.backbone.norm="frozen"'
    torch.manual_seed(1)
    source = build_model(make_recipe(frozen).model)
    torch.save({"model": to_official(source)}, tmp_path / "published.pth")
    official = f'init.official="{tmp_path / "published.pth"}"'
    model = build_model(make_recipe(frozen).model)
    assert "anew" not in load_initial_weights(model, make_recipe(frozen, official))
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    options = (frozen, official, 'data.class_index="category_id"', "model.num_classes=11", "train.epochs=1")
    result = train_command(*(f"--set={option}" for option in options))
    assert result.code == 0
    assert "class heads are made anew, for 11 classes (it has 8)" in result.out
    deeper = make_recipe(frozen, official, "model.encoder_layers=2")
    with pytest.raises(CheckpointError, match=r"transformer\.encoder\.layers\.1"):
        load_initial_weights(build_model(deeper.model), deeper)


def test_choice_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu", "triton").type == "cpu"
    for present, auto in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert choose_device("auto", "triton").type == auto
    with pytest.raises(SamdetrError, match="torch finds no GPU"):
        choose_device("cuda", "triton")


def test_the_recipe_can_force_the_references(make_recipe: MakeRecipe) -> None:
    assert make_recipe().compute.kernels == "triton"
    try:
        choose_device("cpu", make_recipe('compute.kernels="reference"').compute.kernels)
        assert reference_forced()
    finally:
        choose_device("cpu", "triton")
    assert not reference_forced()
