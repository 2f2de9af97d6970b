"""A checkpoint: a folder of safetensors files and a JSON that names all of them with size and checksum.

    step-00001200/{meta.json, model/*.safetensors, optimizer/*.safetensors, [average/*.safetensors]}

Every process wrote its share of the tensors, by torch.distributed.checkpoint; the files say where in a tensor their
part belongs, so any number of processes can read them. Nothing is pickled, and nothing is read before its checksum is
right. What `samdetr export` wrote is a checkpoint too: NAME.safetensors with NAME.json beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from samdetr.engine.distributed.parallel import shard_like
from samdetr.errors import CheckpointError
from samdetr.models.older_names import current_names
from samdetr.models.state import differences, first_of

if TYPE_CHECKING:
    from samdetr.models import Detector

META_FILE = "meta.json"
MODEL, OPTIMIZER, AVERAGE = "model", "optimizer", "average"  # the parts; no average where the run has none
LAST, BEST = "last", "best"  # links beside the checkpoints of a run
EXPORTED = ".safetensors"
_OWN_CHECKSUM = "sha256_of_the_rest"  # of meta.json, in itself
_OTHER = "use another checkpoint, or train again."
_DAMAGED = f"its content does not match its checksum; {_OTHER}"
# torch says so of every process that reads or writes alone, which ours do on purpose
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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
    skips: int = 0  # steps that were skipped, as they were not finite
    skips_in_row: int = 0  # those just before the next step


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint; tensors are whole, on the CPU."""

    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor]  # of the parameters; empty where the run has none
    meta: dict[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and to use: the averaged parameters where there are any."""
        return {**self.model, **self.average}

    @property
    def progress(self) -> Progress:
        """The run's progress when this was written."""
        return Progress(**self.meta["progress"])


def find_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint of a run folder, a checkpoint folder or a file in one, or an exported file.

    For a run folder: its best checkpoint, or the last where no evaluation has been. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".pth":
        raise CheckpointError(f"{path} looks like a published checkpoint: use samdetr eval --official {path} RECIPE.")
    if path.suffix == EXPORTED and path.with_suffix(".json").is_file():
        return path.resolve()
    places = (path, path / "checkpoints" / BEST, path / "checkpoints" / LAST, path.parent, path.parent.parent)
    for place in places:
        if (place / META_FILE).is_file():
            return place.resolve()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder.")
    raise CheckpointError(
        f"{path} is neither a run folder nor a checkpoint: expected {META_FILE} in it, or in its checkpoints/{LAST}."
    )


def meta_file(path: Path) -> Path:
    """Return the JSON of a checkpoint, which names all its files."""
    return path.with_suffix(".json") if path.suffix == EXPORTED else path / META_FILE


def load_checkpoint(path: Path, *, with_optimizer: bool) -> Checkpoint:
    """Read a checkpoint and verify its checksums. Raises CheckpointError naming the file that is bad."""
    meta = read_meta(meta_file(path))
    if "files" not in meta:
        raise CheckpointError(f"{meta_file(path)} is of an earlier version of samdetr, or no checkpoint: {_OTHER}")
    if not meta.get("recipe", {}).get("model", {}).get("system"):
        raise CheckpointError(f"{meta_file(path)} names no model.system in its recipe: {_OTHER}")
    if path.suffix == EXPORTED:
        if path.name not in meta["files"]:
            raise CheckpointError(f"{meta_file(path)} is of {', '.join(meta['files'])}: keep the names of an export.")
        _verify(path.parent, {path.name: meta["files"][path.name]})
        return Checkpoint(path, current_names(load_file(path), meta), {}, {}, meta)
    model, average = (current_names(_read_part(path, part, meta), meta) for part in (MODEL, AVERAGE))
    optimizer = current_names(_read_part(path, OPTIMIZER, meta), meta) if with_optimizer else {}
    return Checkpoint(path, model, optimizer, average, meta)


def _read_part(folder: Path, part: str, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a part of a checkpoint, whole: the shards of all processes, which the files name."""
    files = {name: facts for name, facts in meta["files"].items() if name.startswith(f"{part}/")}
    _verify(folder, files)
    place = folder / part
    if not files:
        return {}
    surplus = sorted({entry.name for entry in place.iterdir()} - {Path(name).name for name in files})
    if surplus:
        raise CheckpointError(f"{place / surplus[0]} is not one of the checkpoint's files, all of which it names.")
    try:
        tensors: dict[str, Tensor] = {}
        for name, facts in HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata)
            if sum(chunk.sizes.numel() for chunk in facts.chunks) != facts.size.numel():
                raise CheckpointError(f"{place} lacks a part of {name}; {_OTHER}")
            tensors[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(place)), no_dist=True)
    except (OSError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(f"cannot read {place} ({reason_of(error)}): {_OTHER}") from error
    return tensors


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, facts in files.items():
        try:
            if facts_of(folder / name) != facts:
                raise CheckpointError(f"{folder / name} is damaged: {_DAMAGED}")
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / name} ({reason_of(error)}): {_OTHER}") from error


def facts_of(file: Path) -> dict[str, object]:
    """Compute size and checksum, as a meta.json holds them for every file."""
    with file.open("rb") as stream:
        checksum = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"size": stream.tell(), "sha256": checksum}


def read_meta(file: Path) -> dict[str, Any]:
    """Read a meta.json; its own checksum is verified and left out."""
    try:
        meta: dict[str, Any] = json.loads(file.read_bytes())
        intact = meta.pop(_OWN_CHECKSUM) == _json_checksum(meta)
    except OSError as error:
        raise CheckpointError(f"cannot read {file} ({reason_of(error)}): {_OTHER}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {_DAMAGED}") from error
    if not intact:
        raise CheckpointError(f"{file} is damaged: {_DAMAGED}")
    return meta


def write_meta(file: Path, meta: Mapping[str, object]) -> None:
    """Write or replace a meta.json, with a checksum of itself, so that a crash leaves the one or the other."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps({**meta, _OWN_CHECKSUM: _json_checksum(meta)}, indent=1))
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)


def _json_checksum(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Return once a file or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason_of(error: BaseException) -> str:
    """Return the reason of an error of the system or of a library, in short."""
    if isinstance(error, CheckpointException):
        failures = {rank: reason_of(failure[0]) for rank, failure in error.failures.items()}
        return "; ".join(f"process {rank}: {why}" if rank else why for rank, why in sorted(failures.items()))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


def load_model_state(
    model: Detector, checkpoint: Checkpoint, *, averaged: bool = True, remake_class_heads: bool = False
) -> int:
    """Load the weights strictly: `Checkpoint.weights`, or without ``averaged`` those that training goes on from.

    remake_class_heads: leave the class heads as they are where the checkpoint has another number of classes.
    Returns that number, 0 where nothing was left out. Raises CheckpointError naming the first key that does not fit.
    """
    own, state, remade = model.state_dict(), checkpoint.weights if averaged else dict(checkpoint.model), 0
    if remake_class_heads:
        for key in [key for key in state if key.startswith(model.system.class_heads) and key in own]:
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
                state[field] = value.to(parameter.device)
            elif value.shape == parameter.shape:
                # fused AdamW walks memory in order: the moments need the parameter's own strides
                state[field] = torch.empty_like(parameter, dtype=value.dtype).copy_(shard_like(value, parameter))
            else:
                raise CheckpointError(f"the optimizer state of {name} in {checkpoint.path} has another shape.")


def _named_optimizer_parameters(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, nn.Parameter]]:
    managed = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in managed]


def model_tensors(model: nn.Module, *, with_buffers: bool = True) -> dict[str, Tensor]:
    """Return the model's state, as this process has it. Without buffers: its parameters alone."""
    without = set() if with_buffers else {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name not in without}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by ``<parameter>:<field>``, as this process has it."""
    return {
        f"{name}:{key}": value
        for name, parameter in _named_optimizer_parameters(model, optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }
