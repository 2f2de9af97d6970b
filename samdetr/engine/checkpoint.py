"""Checkpoints: a folder of safetensors files and a JSON, complete or absent, with a checksum of every file.

    checkpoints/epoch-0003/{model.safetensors, optimizer.safetensors, [average.safetensors], meta.json}
    checkpoints/last -> epoch-0003      checkpoints/best -> epoch-0002

A checkpoint is written beside its place and renamed; the links move after it is on disk, and only then are
folders that no link names removed. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from samdetr.engine.parallel import share_like, whole
from samdetr.errors import CheckpointError
from samdetr.models.state import CLASS_HEADS, differences, first_of

MODEL_FILE, OPTIMIZER_FILE, META_FILE = "model.safetensors", "optimizer.safetensors", "meta.json"
AVERAGE_FILE = "average.safetensors"  # where the run averages its weights
LAST, BEST = "last", "best"
_OWN_CHECKSUM = "sha256_of_the_rest"  # of meta.json, in itself
_OTHER = "use another checkpoint, or train again."
_DAMAGED = f"its content does not match its checksum; {_OTHER}"


@dataclass
class Progress:
    """Where a run stands. ``epoch`` and ``step_in_epoch`` name the next step to take, both from 0."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    evaluation_due: bool = False  # the epoch's steps are done, its evaluation is not
    best_ap: float = -1.0
    best_epoch: int = -1
    epoch_sums: dict[str, float] | None = None  # of the unfinished epoch's step values: a stored Meter
    interval_sums: dict[str, float] | None = None  # of the steps since the last line of metrics.jsonl
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns; tensors are on the CPU."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]  # of the parameters; empty where the run has none
    meta: dict[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """What to evaluate and to use: the averaged parameters where there are any."""
        return {**self.model, **self.average}

    @property
    def progress(self) -> Progress:
        """The run's progress when this was written."""
        return Progress(**self.meta["progress"])


def save_checkpoint(
    folder: Path,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    average: Mapping[str, Tensor] | None = None,
    progress: Progress,
    meta: Mapping[str, object],
) -> Path:
    """Write ``folder/epoch-<n>`` [-step-<m>] and point ``folder/last`` at it. Returns its path.

    model, optimizer: what `model_tensors` and `optimizer_tensors` return. average: of the parameters, on the CPU.

    Raises CheckpointError when the disk refuses; what was there before stays whole.
    """
    name = f"epoch-{progress.epoch:04d}"
    if not progress.evaluation_due:
        name += f"-step-{progress.step_in_epoch:06d}"
    temporary = folder / f".{name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        parts = {MODEL_FILE: model, OPTIMIZER_FILE: optimizer, **({AVERAGE_FILE: average} if average else {})}
        for file, tensors in parts.items():
            save_file(dict(tensors), temporary / file)
        files = {file: _checksum(temporary / file) for file in parts}
        _write_meta(temporary / META_FILE, {**meta, "progress": asdict(progress), "sha256": files})
        for place in temporary.iterdir():
            # safetensors writes for the owner alone; colleagues may read what the umask lets them
            place.chmod((temporary / META_FILE).stat().st_mode)
            _sync(place)
        _sync(temporary)
        target = _free_place(folder / name)
        temporary.rename(target)
        _link(folder, LAST, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot save the checkpoint {folder / name} ({_reason(error)}); the previous checkpoint is intact. "
            "Free some space or choose another run.folder, then continue with --resume."
        ) from error
    _remove_unlinked(folder)
    return target


def update_progress(folder: Path, progress: Progress, *, best: bool) -> None:
    """Store the progress after an evaluation in ``folder/last``; with ``best`` point ``folder/best`` at it first.

    The link moves first: what dies in between is evaluated again, and moves it again. Raises CheckpointError when
    the disk refuses.
    """
    checkpoint = (folder / LAST).resolve()
    meta = read_meta(checkpoint / META_FILE)
    try:
        if best:
            _link(folder, BEST, checkpoint)
        _write_meta(checkpoint / META_FILE, {**meta, "progress": asdict(progress)})
    except OSError as error:
        raise CheckpointError(
            f"cannot update the checkpoint {checkpoint} ({_reason(error)}); it is as before. "
            "Free some space, then continue with --resume."
        ) from error
    _remove_unlinked(folder)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a person means by a run folder, a checkpoint folder or a file in one.

    For a run folder: its best checkpoint, or the last where no evaluation has been. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pth":
        raise CheckpointError(f"{path} looks like a published checkpoint: use samdetr eval --official {path} RECIPE.")
    places = (path, path / "checkpoints" / BEST, path / "checkpoints" / LAST, path.parent)
    for place in places:
        if (place / META_FILE).is_file():
            return place.resolve()
    raise CheckpointError(
        f"{path} is neither a run folder nor a checkpoint: expected {META_FILE} in it, or in its checkpoints/{LAST}."
    )


def load_checkpoint(path: Path, *, with_optimizer: bool) -> Checkpoint:
    """Read a checkpoint folder and verify its checksums. Raises CheckpointError naming the file that is bad."""
    meta = read_meta(path / META_FILE)
    wanted = [MODEL_FILE, AVERAGE_FILE, *([OPTIMIZER_FILE] if with_optimizer else [])]
    tensors = {file: _read_tensors(path / file, meta["sha256"][file]) for file in wanted if file in meta["sha256"]}
    return Checkpoint(path, tensors[MODEL_FILE], tensors.get(OPTIMIZER_FILE, {}), tensors.get(AVERAGE_FILE, {}), meta)


def _read_tensors(file: Path, checksum: str) -> dict[str, Tensor]:
    try:
        if _checksum(file) != checksum:
            raise CheckpointError(f"{file} is damaged: {_DAMAGED}")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file} ({_reason(error)}): {_OTHER}") from error


def read_meta(file: Path) -> dict[str, Any]:
    """The content of a meta.json, its own checksum verified and left out."""
    try:
        meta: dict[str, Any] = json.loads(file.read_bytes())
        intact = meta.pop(_OWN_CHECKSUM) == _json_checksum(meta)
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({_reason(error)}): {_OTHER}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {_DAMAGED}") from error
    if not intact:
        raise CheckpointError(f"{file} is damaged: {_DAMAGED}")
    return meta


def load_model_state(
    model: nn.Module, checkpoint: Checkpoint, *, averaged: bool = True, remake_class_heads: bool = False
) -> int:
    """Load the weights strictly: `Checkpoint.weights`, or without ``averaged`` those that training goes on from.

    remake_class_heads: leave the class heads as they are where the checkpoint has another number of classes.
    Returns that number, 0 where nothing was left out. Raises CheckpointError naming the first key that does not fit.
    """
    own, state, remade = model.state_dict(), checkpoint.weights if averaged else dict(checkpoint.model), 0
    if remake_class_heads:
        for key in [key for key in state if key.startswith(CLASS_HEADS) and key in own]:
            if state[key].shape[0] != own[key].shape[0]:
                classes = state[key].shape[0]
                remade = min(remade or classes, classes)  # a head of boxes has four rows a class
                state[key] = own[key]
    problems = differences(own, state)
    if problems:
        raise CheckpointError(
            f"the checkpoint {checkpoint.path} is of another architecture: {first_of(problems)}. "
            "Use the recipe it was trained with."
        )
    model.load_state_dict(state)
    return remade


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Restore the moments of every parameter. Raises CheckpointError when one has another shape."""
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.optimizer.items():
        name, _, field = key.rpartition(":")
        saved.setdefault(name, {})[field] = value
    for name, parameter in _named_optimizer_parameters(model, optimizer):
        if name not in saved:
            continue  # a parameter that has had no gradient yet
        state = optimizer.state[parameter]
        for field, value in saved[name].items():
            if value.dim() == 0:
                # a copy: a view into the mapped file would keep its disk space after its removal
                state[field] = value.to(parameter.device, copy=True)
            elif value.shape == parameter.shape:
                # fused AdamW walks memory in order: the moments need the parameter's own strides
                state[field] = torch.empty_like(parameter, dtype=value.dtype).copy_(share_like(value, parameter))
            else:
                raise CheckpointError(f"the optimizer state of {name} in {checkpoint.path} has another shape.")


def _named_optimizer_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    managed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in managed]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, whole and on the CPU. Where it is shared among processes all of them must ask."""
    return whole_tensors(model.state_dict())


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``<parameter>:<field>``, as `model_tensors`."""
    return whole_tensors(
        {
            f"{name}:{key}": value
            for name, parameter in _named_optimizer_parameters(model, optimizer)
            for key, value in optimizer.state.get(parameter, {}).items()
        }
    )


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU. Where they are shared among processes all of them must ask."""
    return {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}


def _free_place(target: Path) -> Path:
    """The path itself, or with a number behind it: what a link names is never removed to make room."""
    place, number = target, 2
    while place.exists():
        place, number = target.with_name(f"{target.name}-{number}"), number + 1
    return place


def _write_meta(file: Path, meta: Mapping[str, object]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps({**meta, _OWN_CHECKSUM: _json_checksum(meta)}, indent=1))
    _sync(temporary)
    os.replace(temporary, file)


def _json_checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(folder: Path, name: str, target: Path) -> None:
    temporary = folder / f".{name}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, folder / name)
    _sync(folder)


def restore_links(folder: Path) -> None:
    """Make links of ``last`` and ``best`` again where copying a run has made folders of them."""
    for name in (LAST, BEST):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            copy = _free_place(folder / f"epoch-{name}")
            (folder / name).rename(copy)
            _link(folder, name, copy)


def _remove_unlinked(folder: Path) -> None:
    keep = {(folder / link).resolve() for link in (LAST, BEST)}
    for entry in folder.iterdir():
        if entry.is_symlink():
            if entry.name.startswith("."):
                entry.unlink(missing_ok=True)
        elif entry.name.startswith((".epoch-", "epoch-")) and entry.resolve() not in keep:
            shutil.rmtree(entry, ignore_errors=True)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
