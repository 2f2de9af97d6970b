"""Saves checkpoints while the run continues: the steps wait for a copy of the state, a thread does the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from samdetr.engine.checkpoint.folder import name_of, publish, remove_old, unfinished, update_progress
from samdetr.engine.checkpoint.format import META_FILE, Progress, facts_of, reason_of, sync, write_meta
from samdetr.engine.distributed.parallel import local_shard
from samdetr.engine.distributed.world import ALONE, World
from samdetr.errors import CheckpointError

FILE_BYTES = 2**25  # of a file, about: Python waits while one is put together
AT_ONCE = 1.0  # seconds that a save under way gets when the run is to end at once

Parts = Mapping[str, Mapping[str, Tensor]]


def save_checkpoint(
    folder: Path, parts: Parts, *, progress: Progress, meta: Mapping[str, object], world: World = ALONE
) -> Path:
    """Write ``folder/step-<n>``, point ``folder/last`` at it, and return its path.

    parts: by format.MODEL, ...: tensors by name, contiguous and on the CPU. Every process calls this with its own. A
    tensor that all have is written by one of them; of a DTensor each writes its shard. Last the main process writes
    meta.json, with ``meta``, ``progress`` and the size and checksum of every file.

    Raises CheckpointError in the main process when the disk of any process refuses, SystemExit in the others; the
    checkpoint before stays whole.
    """
    target = folder / name_of(progress.step)
    temporary = unfinished(folder, target.name)
    try:
        world.broadcast_from_main(lambda: _empty_folder(temporary))
        for part, tensors in parts.items():
            if tensors:
                writer = HuggingFaceStorageWriter(str(temporary / part), _file_numbers(tensors), save_distributed=True)
                writer.per_thread_copy_ahead = 0  # all is on the CPU: wait for no GPU stream
                dcp.save(dict(tensors), storage_writer=writer, process_group=world.group, no_dist=world.size == 1)
        return world.broadcast_from_main(lambda: _complete(temporary, target, {**meta, "progress": asdict(progress)}))
    except (OSError, CheckpointException) as error:
        if not world.is_main:
            raise SystemExit(1) from error  # the main process prints why
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot save the checkpoint {target} ({reason_of(error)}); the previous checkpoint is intact. "
            "Free some space or choose another run.folder, then continue with --resume."
        ) from error


def save_weights(file: Path, tensors: Mapping[str, Tensor], content: Mapping[str, object]) -> None:
    """Write NAME.safetensors and NAME.json, which `load_checkpoint` reads.

    tensors: on the CPU, contiguous. content: of the JSON, besides the size and checksum of the file. Raises
    CheckpointError where one cannot be written.
    """
    write_whole(file, lambda place: place.write_bytes(to_safetensors(dict(tensors), metadata={"format": "pt"})))
    whole = {**content, "files": {file.name: facts_of(file)}}
    write_whole(file.with_suffix(".json"), lambda place: write_meta(place, whole))


def write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it is there whole or not at all. write: fills the path it gets. Raises CheckpointError."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch's own errors of writing are RuntimeErrors
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"cannot write {file} ({reason_of(error)}): choose another place.") from error


class Saver:
    """Saves a run's checkpoints. All processes must call it at the same places."""

    def __init__(self, folder: Path, world: World, *, keep: int, timeout: float, say: Callable[[str], None]) -> None:
        """Join the processes in a group for the thread. All must do so.

        folder: the run's ``checkpoints``. keep: how many stay, besides the best. timeout: seconds that a process waits
        for another. say: prints warnings, also from the thread.
        """
        self.folder, self.keep, self.say = folder, keep, say
        self.world = world.with_own_group(timeout)
        self._staging = Staging()
        self._saved: Progress | None = None
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a save is known to have failed in this process; `wait` then raises."""
        return self._failure is not None

    def save(self, parts: Parts, progress: Progress, meta: Mapping[str, object]) -> None:
        """Wait for the save before, copy the state, and start to write it. The same progress is saved once.

        Raises as `wait` does.
        """
        self.wait()
        if progress == self._saved:
            return
        self._saved = replace(progress)
        copies, copied = self._staging.copy(parts)
        self._thread = Thread(target=self._write, args=(copies, copied, self._saved, meta), daemon=True)
        self._thread.start()

    def update(self, progress: Progress, *, best: bool) -> None:
        """Store the progress after an evaluation in the last checkpoint; with ``best`` make that the best one.

        Raises CheckpointError in the main process when this or the save before failed, SystemExit in the others.
        """
        self.wait()
        self.world.broadcast_from_main(lambda: update_progress(self.folder, progress, best=best))
        self._remove_old()

    def wait(self) -> None:
        """Return once the save under way, if any, is on the disk.

        Raises CheckpointError in the main process when it failed, SystemExit in the others.
        """
        self.end()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def end(self, *, at_once: bool = False) -> None:
        """Wait for the save under way, if any, and raise nothing; ``at_once``: wait for `AT_ONCE` seconds at most."""
        if self._thread is not None:
            self._thread.join(AT_ONCE if at_once else None)
            self._thread = None

    def _write(
        self, parts: Parts, copied: torch.cuda.Event | None, progress: Progress, meta: Mapping[str, object]
    ) -> None:
        try:
            if copied is not None:
                torch.cuda.set_device(copied.device)  # a new thread would use the first GPU
                copied.synchronize()
            save_checkpoint(self.folder, parts, progress=progress, meta=meta, world=self.world)
            self._remove_old()
        except BaseException as error:  # raised where the run waits for this thread
            self._failure = error

    def _remove_old(self) -> None:
        if self.world.is_main:
            for problem in remove_old(self.folder, keep=self.keep):
                self.say(problem)


class Staging:
    """Copies of tensors on the CPU, in memory that stays: pinned where the tensors are on a GPU."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._meshes: dict[DeviceMesh, DeviceMesh] = {}

    def copy(self, parts: Parts) -> tuple[dict[str, dict[str, Tensor]], torch.cuda.Event | None]:
        """Copy the parts, contiguous, over the copies of the last call, and return them.

        With tensors on a GPU an event is returned too: until it the copies are under way. What the device does later,
        such as the next step's update, waits for them; the host does not.
        """
        copies = {
            part: {name: self._copy((part, name), value.detach()) for name, value in tensors.items()}
            for part, tensors in parts.items()
        }
        if not any(copy.is_pinned() for copy in self._copies.values()):
            return copies, None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return copies, event

    def _copy(self, key: tuple[str, str], value: Tensor) -> Tensor:
        local = local_shard(value)
        copy = self._copies.get(key)
        if copy is None:
            copy = self._copies[key] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        copy.copy_(local, non_blocking=True)
        if not isinstance(value, DTensor):
            return copy
        mesh = value.device_mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = mesh if mesh.device_type == "cpu" else DeviceMesh("cpu", mesh.mesh)
        whole = torch.empty(value.shape, device="meta")
        return DTensor.from_local(
            copy, self._meshes[mesh], value.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of each tensor's file, from 1."""
    total, numbers = 0, {}
    for name, value in tensors.items():
        numbers[name] = 1 + total // FILE_BYTES
        total += value.numel() * value.element_size()
    return numbers


def _empty_folder(folder: Path) -> Path:
    """Make a folder, or empty it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _complete(temporary: Path, target: Path, meta: Mapping[str, object]) -> Path:
    """Write meta.json, which names all other files with size and checksum; then publish the checkpoint."""
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    for part in {file.parent for file in files}:
        sync(part)
    facts = {str(file.relative_to(temporary)): facts_of(file) for file in files}
    write_meta(temporary / META_FILE, {**meta, "files": facts})
    return publish(temporary, target)
