"""The moving average of the weights: its arithmetic, its place in evaluation, and that nothing of it is lost."""

from __future__ import annotations

import signal

import pytest
import torch
from torch import nn

import samdetr.engine.train
from samdetr.engine.checkpoint.format import load_checkpoint
from samdetr.engine.checkpoint.weights import load_trained
from samdetr.engine.ema import EMA
from samdetr.engine.train import train
from samdetr.errors import RecipeError
from tests.engine.runs import MakeRecipe, losses, metrics, signal_at, weights

AVERAGED = ("optim.ema_decay=0.9", "train.epochs=3")


def test_the_average_is_the_formula() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)).double()
    model[1].bias.requires_grad_(False)
    average = EMA(model, decay=0.75)
    assert sorted(average.averages) == ["0.weight", "1.weight"]
    expected = model[0].weight.detach().clone()
    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13]):
        with torch.no_grad():
            model[0].weight.add_(step + 1.0)
        average.update()
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    assert average.count == 4
    assert torch.allclose(average.averages["0.weight"], expected, rtol=1e-12)
    for _ in range(40):
        average.update()
    before = average.averages["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update()
    assert torch.allclose(average.averages["0.weight"], 0.75 * before + 0.25 * model[0].weight, rtol=1e-12)


def test_the_model_holds_its_averages_within_the_context_only() -> None:
    model = nn.Linear(3, 3)
    average = EMA(model, decay=0.5)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update()
    trained = model.weight.detach().clone()
    with average.in_place():
        assert torch.equal(model.weight, average.averages["weight"]) and not torch.equal(model.weight, trained)
    assert torch.equal(model.weight, trained)


@pytest.mark.slow
def test_a_run_evaluates_its_averages_and_goes_on_with_them(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(make_recipe(*AVERAGED))
    checkpoint = load_checkpoint((whole / "checkpoints" / "last").resolve(), with_optimizer=False)
    assert checkpoint.meta["averaged_steps"] == 18
    key = "decoder.class_heads.0.weight"
    assert not torch.equal(checkpoint.average[key], checkpoint.model[key])
    assert torch.equal(load_trained(str(checkpoint.path)).model.decoder.class_heads[0].weight, checkpoint.average[key])

    stopped = make_recipe(*AVERAGED)
    signal_at(monkeypatch, samdetr.engine.train, "train_step", 9, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.undo()
    run = train(stopped, resume="")
    assert losses(run) == losses(whole)
    one, other = weights(run), weights(whole)
    assert any(key.startswith("average/") for key in one) and one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert [line["AP"] for line in metrics(run, "eval")] == [line["AP"] for line in metrics(whole, "eval")]

    with pytest.raises(RecipeError, match=r"optim\.ema_decay is 0\.0, but"):
        train(make_recipe("train.epochs=3"), resume=str(run))
