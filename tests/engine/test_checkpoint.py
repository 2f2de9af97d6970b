"""Checkpoints: whole or absent, every damage noticed and named, nothing pickled."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import samdetr
import samdetr.engine.checkpoint.folder as folder_module
import samdetr.engine.checkpoint.format as checkpoint_module
import samdetr.engine.checkpoint.saving as saving_module
from samdetr.engine.checkpoint.folder import load_newest, newest_first, newest_progress, remove_old, update_progress
from samdetr.engine.checkpoint.format import (
    AVERAGE,
    MODEL,
    OPTIMIZER,
    Progress,
    find_checkpoint,
    load_checkpoint,
    load_model_state,
    load_optimizer_state,
    model_tensors,
    optimizer_tensors,
)
from samdetr.engine.checkpoint.saving import Saver, Staging, save_checkpoint
from samdetr.engine.distributed.world import ALONE
from samdetr.errors import CheckpointError
from tests.engine.runs import META, ROOT

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = (f"model/{SHARD}", f"optimizer/{SHARD}", f"average/{SHARD}", "meta.json")


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


def parts_of(model: Small, optimizer: torch.optim.AdamW) -> dict[str, dict[str, torch.Tensor]]:
    average = {name: 2 * value.detach() for name, value in model.named_parameters()}
    tensors = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizer), AVERAGE: average}
    return Staging().copy(tensors)[0]


def save(folder: Path, progress: Progress, seed: int = 0) -> Path:
    parts = parts_of(*trained_model(seed))
    return save_checkpoint(folder, parts, progress=progress, meta={**META, "name": "größe", "n": [1]})


def newest(folder: Path, said: list[str] | None = None) -> int:
    """The step of the checkpoint that a run would go on from."""
    return load_newest(folder, ALONE, (said if said is not None else []).append).progress.step


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path, Progress(epoch=2, step=9, evaluation_due=True))


def test_round_trip(saved: Path) -> None:
    model, optimizer = trained_model()
    assert saved.name == "step-00000009"
    assert {str(file.relative_to(saved)) for file in saved.rglob("*") if file.is_file()} == set(FILES)
    loaded = load_checkpoint(saved, with_optimizer=True)
    assert loaded.meta["name"] == "größe"
    assert loaded.progress == Progress(epoch=2, step=9, evaluation_due=True)
    other = Small()
    again = torch.optim.AdamW(other.parameters(), fused=True)
    assert load_model_state(other, loaded, averaged=False) == 0
    load_optimizer_state(other, again, loaded)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[mine].keys() == again.state[theirs].keys()
        assert all(torch.equal(value, again.state[theirs][key]) for key, value in optimizer.state[mine].items())
    assert again.state[other.unused] == {}
    assert torch.equal(loaded.weights["first.weight"], 2 * model.first.weight)
    assert int(loaded.weights["steps"]) == 5
    assert load_checkpoint(saved, with_optimizer=False).optimizer == {}


def test_large_parts_are_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving_module, "FILE_BYTES", 40)
    tensors = {name: torch.randn(4, 3) for name in "abc"}
    saved = save_checkpoint(tmp_path, {MODEL: tensors}, progress=Progress(), meta=META)
    assert names(saved / "model") == {f"shard-00001-model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
    loaded = load_checkpoint(saved, with_optimizer=True).model
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def test_names_and_links(tmp_path: Path) -> None:
    """A link moves once the new checkpoint is whole; only then are older ones removed."""

    def state() -> tuple[set[str], str, str | None]:
        best = (tmp_path / "best").resolve().name if (tmp_path / "best").is_symlink() else None
        return names(tmp_path), (tmp_path / "last").resolve().name, best

    save(tmp_path, Progress(epoch=0, step=1, step_in_epoch=1))
    assert state() == ({"step-00000001", "last"}, "step-00000001", None)
    save(tmp_path, Progress(epoch=0, step=4, step_in_epoch=4, evaluation_due=True))
    update_progress(tmp_path, Progress(epoch=1, step=4, best_ap=0.5, best_epoch=0), best=True)
    assert remove_old(tmp_path, keep=1) == []
    assert state() == ({"step-00000004", "last", "best"}, "step-00000004", "step-00000004")
    assert load_checkpoint(tmp_path / "last", with_optimizer=True).progress.best_ap == 0.5
    for step in (12, 8, 11):
        save(tmp_path, Progress(epoch=2, step=step, evaluation_due=True))
    assert remove_old(tmp_path, keep=1) == []
    kept = {"step-00000004", "step-00000011", "step-00000012", "last", "best"}
    assert state() == (kept, "step-00000011", "step-00000004")  # the best, the last and the newest
    assert newest_progress(tmp_path) == Progress(epoch=2, step=12, evaluation_due=True)


def test_the_same_point_can_be_saved_again(tmp_path: Path) -> None:
    """Check that the older checkpoint stays until the newer one is whole: there is no moment without one."""
    first = save(tmp_path, Progress(epoch=1, step=100, evaluation_due=True))
    second = save(tmp_path, Progress(epoch=2, step=100), seed=1)
    assert (first.name, second.name) == ("step-00000100", "step-00000100-2")
    assert (tmp_path / "last").resolve() == second
    assert newest_first(tmp_path) == [second, first]
    assert newest(tmp_path) == 100
    assert load_checkpoint(second, with_optimizer=True).progress.epoch == 2


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(saved: Path, name: str) -> None:
    file = saved / name
    whole = file.read_bytes()
    for place in range(0, len(whole), 1 if name == "meta.json" else 5):
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


def test_a_folder_of_something_else_is_refused(saved: Path) -> None:
    checkpoint_module.write_meta(saved / "meta.json", {"name": "another"})
    with pytest.raises(CheckpointError, match=r"meta\.json is of an earlier version of samdetr, or no checkpoint"):
        load_checkpoint(saved, with_optimizer=False)


@pytest.mark.parametrize("recipe", [None, {}, {"model": {}}])
def test_a_meta_file_that_names_no_system_is_refused(saved: Path, recipe: dict[str, Any] | None) -> None:
    """The system decides which older names of parameters are known."""
    meta = checkpoint_module.read_meta(saved / "meta.json")
    del meta["recipe"]
    checkpoint_module.write_meta(saved / "meta.json", meta if recipe is None else {**meta, "recipe": recipe})
    with pytest.raises(CheckpointError, match=r"meta\.json names no model\.system in its recipe: use another"):
        load_checkpoint(saved, with_optimizer=False)


def test_a_file_too_many_is_refused(saved: Path) -> None:
    """It would be read as another process's share."""
    (saved / "model" / "more.safetensors").write_bytes((saved / FILES[1]).read_bytes())
    with pytest.raises(CheckpointError, match=r"model/more\.safetensors is not one of the checkpoint's files"):
        load_checkpoint(saved, with_optimizer=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "absent", "flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, name: str, damage: str) -> None:
    paths = [save(tmp_path, Progress(step=step), seed=step) for step in (3, 5, 8)]
    update_progress(tmp_path, Progress(step=8, best_ap=0.5), best=True)
    for path in paths[1:]:
        file = path / name
        content = file.read_bytes()
        if damage == "absent":
            file.unlink()
        else:
            file.write_bytes(content[:-9] if damage == "truncated" else content[:-9] + b"~" + content[-8:])
    said: list[str] = []
    assert newest(tmp_path, said) == 3
    assert (tmp_path / "last").resolve() == paths[0]
    for path, sentence in zip(reversed(paths[1:]), said, strict=True):
        reason = f"cannot read {path / name} (No such" if damage == "absent" else f"{path / name} is damaged: "
        assert sentence.startswith(reason)
        assert sentence.endswith(f"is now {tmp_path / f'damaged-{path.name}'}, and the one before is used.")
    assert names(tmp_path) == {"damaged-step-00000005", "damaged-step-00000008", "step-00000003", "last"}
    assert newest(tmp_path, said) == 3 and len(said) == 2
    again = save(tmp_path, Progress(step=5))
    assert again.name == "step-00000005" and newest(tmp_path) == 5


def test_no_checkpoint_that_can_be_used(saved: Path) -> None:
    (saved / FILES[0]).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: cannot read .*step-00000009/model/"):
        newest(saved.parent)


def test_leftovers_of_interrupted_saves_are_removed(tmp_path: Path) -> None:
    path = save(tmp_path, Progress(step=4))
    (tmp_path / ".step-00000006.tmp" / "model").mkdir(parents=True)
    (tmp_path / ".step-00000006.tmp" / "model" / SHARD).touch()
    (tmp_path / ".step-00000002.removed").mkdir()
    (tmp_path / ".last.tmp").symlink_to("step-00000006")
    (tmp_path / "last").unlink()
    assert newest(tmp_path) == 4
    assert names(tmp_path) == {"step-00000004", "last"}
    assert (tmp_path / "last").resolve() == path


def test_a_deletion_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise PermissionError(1, "Operation not permitted")

    said: list[str] = []
    saver = Saver(tmp_path, ALONE, keep=1, timeout=9, say=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        for step in (1, 2, 3):
            saver.save(parts_of(*trained_model(step)), Progress(step=step), META)
            saver.wait()
    assert said == [
        f"cannot remove the old checkpoint {tmp_path / f'step-0000000{step}'} (Operation not permitted): "
        "it takes up space."
        for step in (1, 2)
    ]
    assert newest(tmp_path) == 3
    assert names(tmp_path) == {"step-00000003", "last"}


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


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (saving_module.HuggingFaceStorageWriter, "write_data"),
        (checkpoint_module, "sync"),
        (saving_module, "write_meta"),
        (folder_module, "link"),
        (saving_module, "_empty_folder"),
    ],
)
def test_a_failed_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, function: str
) -> None:
    first = save(tmp_path, Progress(epoch=0, step=1, evaluation_due=True))
    with monkeypatch.context() as patch:
        patch.setattr(module, function, full)
        with pytest.raises(
            CheckpointError, match=r"step-00000002 \(No space left on device\); the previous .* is intact"
        ):
            save(tmp_path, Progress(epoch=1, step=2, evaluation_due=True))
    assert (tmp_path / "last").resolve() == first
    assert load_checkpoint(tmp_path / "last", with_optimizer=True).progress.step == 1
    second = save(tmp_path, Progress(epoch=1, step=2, evaluation_due=True))
    assert (tmp_path / "last").resolve() == second
    assert not list(tmp_path.glob(".*"))


def test_a_failed_update_leaves_the_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "sync", full)
        with pytest.raises(CheckpointError, match=r"cannot update .*No space left on device.*it is as before"):
            update_progress(saved.parent, Progress(epoch=3), best=False)
    assert load_checkpoint(saved, with_optimizer=True).progress.epoch == 2


def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model changes while the thread writes; the next save, an update and the end wait for it."""
    begin = threading.Event()
    write = saving_module.save_checkpoint

    def late(*arguments: Any, **options: Any) -> Path:
        assert begin.wait(20)
        return write(*arguments, **options)

    monkeypatch.setattr(saving_module, "save_checkpoint", late)
    model, optimizer = trained_model()
    before = {name: value.clone() for name, value in model_tensors(model).items()}
    parts = {MODEL: model_tensors(model), OPTIMIZER: optimizer_tensors(model, optimizer)}
    saver = Saver(tmp_path, ALONE, keep=2, timeout=9, say=print)
    progress = Progress(step=4, best_ap=0.25)
    saver.save(parts, progress, META)
    progress.step = 5
    with torch.no_grad():
        model.first.weight.zero_()
        optimizer.state[model.first.weight]["exp_avg"].zero_()
    assert not (tmp_path / "last").exists() and not saver.failed
    begin.set()
    progress.best_ap = 0.5
    saver.update(progress, best=True)
    loaded = load_checkpoint((tmp_path / "best").resolve(), with_optimizer=True)
    assert (loaded.path.name, loaded.progress.best_ap) == ("step-00000004", 0.5)
    assert all(torch.equal(loaded.model[name], value) for name, value in before.items())
    assert loaded.optimizer["first.weight:exp_avg"].abs().sum() > 0
    saver.save(parts, progress, META)
    saver.save(parts, progress, META)  # the same point: once
    saver.wait()
    assert names(tmp_path) == {"step-00000004", "step-00000005", "last", "best"}
    assert not load_checkpoint(tmp_path / "last", with_optimizer=True).optimizer["first.weight:exp_avg"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_copy_is_made_before_what_the_gpu_does_next(tmp_path: Path) -> None:
    state = {str(number): torch.full((1 << 22,), float(number), device="cuda") for number in range(8)}
    saver = Saver(tmp_path, ALONE, keep=1, timeout=9, say=print)
    for turn in range(3):
        expected = {name: value.clone() for name, value in state.items()}
        torch.cuda._sleep(20_000_000)  # the host is far ahead
        saver.save({MODEL: state}, Progress(step=turn), META)
        for value in state.values():
            value.mul_(-3).add_(1)
        saver.wait()
        loaded = load_checkpoint((tmp_path / "last").resolve(), with_optimizer=False).model
        assert all(torch.equal(loaded[name], value.cpu()) for name, value in expected.items())


def test_an_error_of_the_thread_is_raised_where_the_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, ALONE, keep=2, timeout=9, say=print)
    parts = parts_of(*trained_model())
    with monkeypatch.context() as patch:
        patch.setattr(saving_module, "write_meta", full)
        saver.save(parts, Progress(step=1), {})
        saver.end()
    assert saver.failed
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save(parts, Progress(step=2), {})
    assert not saver.failed
    saver.save(parts, Progress(step=2), {})
    saver.wait()
    assert names(tmp_path) == {"step-00000002", "last"}


def test_what_a_person_may_name(trained: Path, tmp_path: Path) -> None:
    best = (trained / "checkpoints" / "best").resolve()
    for path in (trained, best, trained / "checkpoints" / "best", best / FILES[0], best / "model", best / "meta.json"):
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
        r"weights_only\s*=\s*False|\b(pickle|cPickle|dill|joblib)\b\s*\.|\bimport pickle"
        r"|(?<!lambda file: )torch\.save\("  # an export writes one, nothing reads it
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
