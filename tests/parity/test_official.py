"""Published checkpoints: both directions, strictly."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from samdetr.errors import CheckpointError
from samdetr.models import build_model
from samdetr.models.official import load_official, read_official, to_official
from samdetr.recipe import load_recipe
from tests.parity.reference import RECIPES, RECIPES_COMPARED, model_of, official_state_dict


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES_COMPARED)
def test_round_trip_keeps_every_key_and_bit(name: str) -> None:
    state = official_state_dict(name)
    back = to_official(model_of(name))
    assert list(back) and set(back) == set(state)
    for key, value in state.items():
        assert back[key].shape == value.shape, key
        assert torch.equal(back[key], value), key


LANDMARK = "transformer.decoder.layers.0.ca_qpos_sine_proj.layers.0.weight"


def model(name: str = "r50_12ep", *overrides: str):
    return build_model(load_recipe(RECIPES / f"{name}.toml", overrides).model)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return official_state_dict("samdetr_r50_12ep")


def test_strict_errors_name_the_key(state: dict[str, torch.Tensor]) -> None:
    target = model()
    without = {key: value for key, value in state.items() if key != "query_embed.weight"}
    with pytest.raises(CheckpointError, match=r"query_embed\.weight is missing"):
        load_official(target, without)
    with pytest.raises(CheckpointError, match=r"surprise is not part of this model"):
        load_official(target, {**state, "surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"query_embed\.weight is \[100, 4\], the model needs \[300, 4\]"):
        load_official(target, {**state, "query_embed.weight": torch.zeros(100, 4)})
    copy = "transformer.decoder.bbox_embed.2.layers.1.bias"
    with pytest.raises(CheckpointError, match=r"bbox_embed\.2\.layers\.1\.bias differs"):
        load_official(target, {**state, copy: state[copy] + 1})
    with pytest.raises(CheckpointError, match=r"decoder\.bbox_embed\.2\.layers\.1\.bias is missing"):
        load_official(target, {key: value for key, value in state.items() if key != copy})


def test_group_norm_is_detected(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r'has a GroupNorm.*model\.input_norm = "group_norm"'):
        load_official(model("r50_50ep"), state)
    with pytest.raises(CheckpointError, match=r'has no GroupNorm.*model\.input_norm = "none"'):
        load_official(model(), official_state_dict("samdetr_r50_50ep"))


def test_another_systems_checkpoint_is_named(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r'another system\'s: set model\.system = "sam_detr"'):
        load_official(model("detr_r50_500ep"), state)
    with pytest.raises(CheckpointError, match=r'another system\'s: set model\.system = "detr"'):
        load_official(model(), official_state_dict("detr_r50"))
    several = {"transformer.decoder.layers.0.point3.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r'another system\'s: set model\.system = "smca_detr"'):
        load_official(model("smca_detr_r50_ms_50ep"), several)
    several["transformer.decoder.layers.0.point4.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r'another system\'s: set model\.system = "smca_detr_ms"'):
        load_official(model("smca_detr_r50_50ep"), several)
    with pytest.raises(CheckpointError, match=r'no norm after its input .*: set model\.input_norm = "none"'):
        to_official(model("detr_r50_500ep", 'model.input_norm="group_norm"'))


def test_other_number_of_classes_remakes_the_heads_only(state: dict[str, torch.Tensor]) -> None:
    target = model("r50_12ep", "model.num_classes=4")
    before = target.decoder.class_heads[3].weight.clone()
    with pytest.raises(CheckpointError, match=r"class_embed\.0\.weight is \[91, 256\], the model needs \[4, 256\]"):
        load_official(target, state)
    assert load_official(target, state, remake_class_heads=True) == 91
    assert torch.equal(target.decoder.class_heads[3].weight, before)
    assert torch.equal(target.decoder.reference_boxes, state["query_embed.weight"])
    assert load_official(model(), state, remake_class_heads=True) == 0


def test_live_batch_norm_has_no_published_layout() -> None:
    live = model("r50_12ep", 'model.backbone.norm="batch"')
    with pytest.raises(CheckpointError, match=r'model\.backbone\.norm = "frozen"'):
        to_official(live)


def test_read_official_takes_the_published_file_layout(tmp_path: Path) -> None:
    state = {LANDMARK: torch.arange(3.0)}
    path = tmp_path / "published.pth"
    torch.save({"model": state, "epoch": 11, "args": argparse.Namespace(lr=1e-4, backbone="resnet50")}, path)
    assert torch.equal(read_official(path)[LANDMARK], state[LANDMARK])


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_state_dict_of_something_else_is_called_so(tmp_path: Path) -> None:
    """It gets no advice about the input's norm, which any other model lacks."""
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(1), "input_proj.0.0.weight": torch.zeros(1)}, path)
    missing = rf"it has no .* and no {LANDMARK} and no transformer\..*multihead_attn\.in_proj_weight\. Use one"
    with pytest.raises(CheckpointError, match=rf"resnet\.pth is a published checkpoint of none .*: {missing}"):
        read_official(path)


def test_read_official_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "args": _Evil()}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"cannot read evil\.pth .* holds more than tensors") as caught:
        read_official("evil.pth")
    assert "weights_only" not in str(caught.value)
    assert not Path("executed").exists()
    with pytest.raises(CheckpointError, match="there is no published checkpoint"):
        read_official("absent.pth")
    Path("broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken\.pth is not a torch checkpoint file"):
        read_official("broken.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_official("list.pth")


def test_every_fixture_has_its_recipe() -> None:
    assert all((RECIPES / f"{recipe}.toml").is_file() for recipe in RECIPES_COMPARED.values())
