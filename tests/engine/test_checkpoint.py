"""Checkpoints: whole or absent, every damage noticed and named, nothing pickled."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import samdetr
import samdetr.engine.checkpoint as checkpoint_module
from samdetr.engine.checkpoint import (
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_model_state,
    load_optimizer_state,
    model_tensors,
    optimizer_tensors,
    save_checkpoint,
    update_progress,
)
from samdetr.errors import CheckpointError
from tests.engine.runs import ROOT

FILES = ("model.safetensors", "optimizer.safetensors", "meta.json")


class Small(nn.Module):
    """A model with a buffer, and a parameter that never gets a gradient."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2)
        self.second = nn.Linear(2, 2)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("steps", torch.tensor(5))


def trained_model(seed: int = 0) -> tuple[Small, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model.second(model.first(torch.randn(4, 3))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def save(folder: Path, progress: Progress, seed: int = 0) -> Path:
    model, optimizer = trained_model(seed)
    tensors = model_tensors(model), optimizer_tensors(model, optimizer)
    return save_checkpoint(
        folder, model=tensors[0], optimizer=tensors[1], progress=progress, meta={"name": "größe", "n": [1]}
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, Progress(epoch=2, step=9, evaluation_due=True))


def test_round_trip(saved: Path) -> None:
    model, optimizer = trained_model()
    assert saved.name == "epoch-0002"
    assert {file.name for file in saved.iterdir()} == set(FILES)
    loaded = load_checkpoint(saved, with_optimizer=True)
    assert loaded.meta["name"] == "größe"
    assert loaded.progress == Progress(epoch=2, step=9, evaluation_due=True)
    other = Small()
    again = torch.optim.AdamW(other.parameters(), fused=True)
    assert load_model_state(other, loaded) == 0
    load_optimizer_state(other, again, loaded)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == again.state[theirs].keys()
        assert all(torch.equal(value, again.state[theirs][key]) for key, value in optimizer.state[mine].items())
    assert again.state[other.unused] == {}
    assert load_checkpoint(saved, with_optimizer=False).optimizer == {}


def test_names_and_links(tmp_path: Path) -> None:
    """A link moves once the new checkpoint is whole; what no link names is removed."""

    def state() -> tuple[set[str], str, str | None]:
        best = (tmp_path / "best").resolve().name if (tmp_path / "best").is_symlink() else None
        return {entry.name for entry in tmp_path.iterdir()}, (tmp_path / "last").resolve().name, best

    save(tmp_path, Progress(epoch=0, step=1, step_in_epoch=1))
    assert state() == ({"epoch-0000-step-000001", "last"}, "epoch-0000-step-000001", None)
    save(tmp_path, Progress(epoch=0, step=4, step_in_epoch=4, evaluation_due=True))
    update_progress(tmp_path, Progress(epoch=1, step=4, best_ap=0.5, best_epoch=0), best=True)
    assert state() == ({"epoch-0000", "last", "best"}, "epoch-0000", "epoch-0000")
    assert load_checkpoint(tmp_path / "last", with_optimizer=True).progress.best_ap == 0.5
    (tmp_path / ".epoch-0001.tmp").mkdir()  # what a killed run may leave
    (tmp_path / "epoch-0001").mkdir()
    (tmp_path / ".last.tmp").symlink_to("epoch-0001")
    save(tmp_path, Progress(epoch=2, step=12, evaluation_due=True))
    update_progress(tmp_path, Progress(epoch=3, step=12), best=False)
    assert state() == ({"epoch-0000", "epoch-0002", "last", "best"}, "epoch-0002", "epoch-0000")


def test_the_same_point_can_be_saved_again(tmp_path: Path) -> None:
    """What a link names is not removed to make room, so that there is no moment without a checkpoint."""
    first = save(tmp_path, Progress(epoch=1, evaluation_due=True))
    second = save(tmp_path, Progress(epoch=1, evaluation_due=True), seed=1)
    assert first != second
    assert (tmp_path / "last").resolve() == second
    assert not first.exists()
    assert load_checkpoint(second, with_optimizer=True).progress.epoch == 1


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(saved: Path, name: str) -> None:
    file = saved / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            load_checkpoint(saved, with_optimizer=True)
    file.write_bytes(whole)
    load_checkpoint(saved, with_optimizer=True)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_named(saved: Path, name: str) -> None:
    file = saved / name
    whole = file.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            load_checkpoint(saved, with_optimizer=True)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read {file} \(No such file or directory\)"):
        load_checkpoint(saved, with_optimizer=True)


def test_another_architecture_names_the_first_key(saved: Path) -> None:
    loaded = load_checkpoint(saved, with_optimizer=True)
    with pytest.raises(CheckpointError, match=r"first\.weight is \[2, 3\], the model needs \[2, 7\]\. Use the recipe"):
        load_model_state(Small(width=7), loaded)
    with pytest.raises(CheckpointError, match=r"of another architecture: weight is missing \(and 7 more differences\)"):
        load_model_state(nn.Linear(3, 2), loaded)
    model = Small()
    model.register_buffer("more", torch.zeros(1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="of another architecture: more is missing"):
        load_model_state(model, loaded)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_optimizer_state_of_another_shape(saved: Path) -> None:
    model = Small(width=7)
    with pytest.raises(CheckpointError, match=r"optimizer state of first\.weight in .* has another shape"):
        load_optimizer_state(model, torch.optim.AdamW(model.parameters()), load_checkpoint(saved, with_optimizer=True))


@pytest.mark.parametrize("function", ["save_file", "_sync", "_write_meta", "_link"])
def test_a_failed_save_leaves_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    first = save(tmp_path, Progress(epoch=0, step=1, evaluation_due=True))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, function, full)
        with pytest.raises(CheckpointError, match=r"epoch-0001 \(No space left on device\); the previous .* is intact"):
            save(tmp_path, Progress(epoch=1, step=2, evaluation_due=True))
    assert (tmp_path / "last").resolve() == first
    assert load_checkpoint(tmp_path / "last", with_optimizer=True).progress.step == 1
    assert not list(tmp_path.glob(".epoch*"))
    second = save(tmp_path, Progress(epoch=1, step=2, evaluation_due=True))
    assert (tmp_path / "last").resolve() == second
    assert {entry.name for entry in tmp_path.iterdir()} == {second.name, "last"}


def test_a_failed_update_leaves_the_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_sync", full)
        with pytest.raises(CheckpointError, match=r"cannot update .*No space left on device.*it is as before"):
            update_progress(saved.parent, Progress(epoch=3), best=False)
    assert load_checkpoint(saved, with_optimizer=True).progress.epoch == 2


def test_what_a_person_may_name(trained: Path, tmp_path: Path) -> None:
    best = (trained / "checkpoints" / "best").resolve()
    for path in (trained, best, trained / "checkpoints" / "best", best / "model.safetensors", best / "meta.json"):
        assert find_checkpoint(path) == best
    moved = tmp_path / "moved"
    shutil.copytree(best, moved)
    assert find_checkpoint(moved) == moved
    without_best = tmp_path / "run"
    shutil.copytree(trained, without_best, symlinks=True)
    (without_best / "checkpoints" / "best").unlink()
    assert find_checkpoint(without_best) == (without_best / "checkpoints" / "last").resolve()
    with pytest.raises(CheckpointError, match="is neither a run folder nor a checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "published.pth").touch()
    with pytest.raises(CheckpointError, match="use samdetr eval --official"):
        find_checkpoint(tmp_path / "published.pth")


def test_nothing_is_pickled(trained: Path) -> None:
    suffixes = {file.suffix for file in trained.rglob("*") if file.is_file()}
    assert suffixes == {".toml", ".json", ".jsonl", ".png", ".safetensors"}
    forbidden = re.compile(
        r"weights_only\s*=\s*False|\b(pickle|cPickle|dill|joblib)\b\s*\.|\bimport pickle|torch\.save\("
        r"|\bfrom pickle import (?!UnpicklingError\n)"
    )
    sources = [file for base in (Path(samdetr.__file__).parent, ROOT / "kernels") for file in base.rglob("*.py")]
    assert len(sources) > 30
    assert [str(file) for file in sources if forbidden.search(file.read_text())] == []
    loads = [
        (file.name, line.strip())
        for file in sources
        for line in file.read_text().splitlines()
        if "torch.load(" in line and "weights_only=True" not in line
    ]
    assert loads == []
