"""A CUDA library without a device: built, put before everything else of this process, and asked what it counted.

The library answers for the CUDA runtime and driver, cuBLAS and cuDNN: torch and Triton see an H100, compile and launch
as they do on one, and nothing is computed. It does not belong to the project: `FOLDER_VARIABLE` names the folder of its
source. Nothing here imports torch, which has to find the library when it is loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

from samdetr.errors import SamdetrError

FOLDER_VARIABLE = "SAMDETR_NULL_GPU"
SOURCE, EXPORTS = Path("nullcuda/nullcuda.cpp"), Path("nullcuda/exports.map")
LIBRARY = "libcuda.so.1"
# what the host starts: kernels of torch, kernels of Triton, calls of libraries, CUDA graphs; copies and fills are apart
KINDS = ("kernel", "triton", "cublas", "cudnn", "graph")
CAPTURED, NODES = "captured ", "nodes of launched graphs"


class NullGpuError(SamdetrError):
    """The null GPU cannot be had: its source, a compiler or a CUDA build of torch is missing."""

    exit_code = 2


class Counts(NamedTuple):
    """Requests to the library since a reset, without those that only a capture recorded."""

    launches: dict[str, int]  # by one of `KINDS`; a CUDA graph is one
    nodes: int  # of the CUDA graphs that were launched: kernels, copies and fills
    copies: dict[str, int]  # by direction, with "pageable" where the host's memory is
    fills: int
    waits: dict[str, int]  # of the host for the device, by the call that waits
    captured: dict[str, int]  # recorded into CUDA graphs, by one of `KINDS`, "copy" or "fill"

    @classmethod
    def parse(cls, text: str) -> Counts:
        """Read lines ``number<tab>name``, as the library gives them; names of no interest are passed over."""
        by_kind: dict[str, Counter[str]] = {group: Counter() for group in ("launch", "copy", "wait", "captured")}
        nodes = fills = 0
        for line in text.splitlines():
            number, _, name = line.partition("\t")
            kind, _, rest = name.partition(" ")
            if name == NODES:
                nodes = int(number)
            elif name.startswith(CAPTURED):
                by_kind["captured"][rest.split()[0]] += int(number)
            elif kind in KINDS:
                by_kind["launch"][kind] += int(number)
            elif kind == "fill":
                fills += int(number)
            elif kind in ("copy", "wait"):
                by_kind[kind][rest] += int(number)
        launches, copies, waits, captured = (dict(found) for found in by_kind.values())
        return cls(launches, nodes, copies, fills, waits, captured)


def reset() -> None:
    """Begin to count anew."""
    _loaded().nullcuda_reset()


def counts() -> Counts:
    """Read what was counted since the last `reset`."""
    return Counts.parse(_text("nullcuda_counts"))


def refused() -> list[str]:
    """List the calls since the last `reset` that a real driver would have refused, in sentences of the library."""
    return _text("nullcuda_problems").splitlines()


def is_loaded() -> bool:
    """Tell whether this process runs on the null GPU."""
    return hasattr(ctypes.CDLL(None), "nullcuda_counts")


def start(command: Sequence[str]) -> NoReturn:
    """Replace this process by ``command`` on the null GPU, whose library is built first if it is not there.

    Raises NullGpuError where that cannot be had.
    """
    library = build(source_folder())
    if str(library) in os.environ.get("LD_PRELOAD", "").split(":"):
        raise NullGpuError(f"{library} was named in LD_PRELOAD, but the dynamic linker did not load it.")
    sys.stdout.flush()
    os.execve(command[0], list(command), environment_on(library, os.environ))


def source_folder() -> Path:
    """Return the folder that the environment names. Raises NullGpuError where the library's source is not in it."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise NullGpuError(f"set {FOLDER_VARIABLE} to the folder of the null GPU, which holds {SOURCE}.")
    folder = Path(named).expanduser().resolve()
    if not (folder / SOURCE).is_file():
        raise NullGpuError(f"{FOLDER_VARIABLE} names {folder}, which holds no {SOURCE}.")
    return folder


def cache_folder() -> Path:
    """Return the folder for the library and for what is compiled on it, which need not exist."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "samdetr" / "null_gpu"


def build(folder: Path) -> Path:
    """Compile the library with the headers of torch's wheels, unless these sources have been; returns its file.

    folder: of the source, only read. Raises NullGpuError without a compiler, headers, or where they do not agree.
    """
    torch_version, sources = version("torch"), (folder / SOURCE, folder / EXPORTS)
    contents = hashlib.sha256(b"\0".join([torch_version.encode(), *(file.read_bytes() for file in sources)]))
    library = cache_folder() / contents.hexdigest()[:16] / LIBRARY
    if library.is_file():
        return library
    if not shutil.which("g++"):
        raise NullGpuError("the null GPU is built by g++, which is not installed.")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_name(f"{LIBRARY}.{os.getpid()}")
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-w"]
    command += [f"-I{path}" for path in headers(torch_version)]
    command += [f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script={sources[1]}"]
    command += ["-o", str(unfinished), str(sources[0]), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise NullGpuError(f"g++ could not build the null GPU: {reason}")
    unfinished.replace(library)  # at once: another process may be building it too
    return library


def headers(torch_version: str) -> list[Path]:
    """List the folders of CUDA's headers, the first one first. Raises NullGpuError where torch came without CUDA."""
    found = find_spec("torch")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parents[1]
    # Triton's come last: they are of another CUDA than torch's, but hold some that torch's wheels lack
    folders = [*sorted(site.glob("nvidia/cu1*/include")), site / "nvidia/cudnn/include"]
    folders.append(site / "triton/backends/nvidia/include")
    if len(folders) < 3 or not all(folder.is_dir() for folder in folders):
        raise NullGpuError(
            f"torch {torch_version} came without CUDA's headers: the null GPU needs a CUDA build of torch."
        )
    return folders


def environment_on(library: Path, before: Mapping[str, str]) -> dict[str, str]:
    """Make the environment of a process on the null GPU from that of another."""
    after = dict(before)
    for gone in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):  # kernels are compiled, for the one GPU there is
        after.pop(gone, None)
    for name, value in (("LD_PRELOAD", library), ("LD_LIBRARY_PATH", library.parent)):
        after[name] = f"{value}:{before[name]}" if before.get(name) else str(value)
    after["TRITON_LIBCUDA_PATH"] = str(library.parent)
    # apart from the caches of a real GPU: what is chosen by time is chosen at random here
    after.setdefault("TRITON_CACHE_DIR", str(cache_folder() / "triton"))
    after.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    return after


def _loaded() -> ctypes.CDLL:
    if not is_loaded():
        raise RuntimeError("this process does not run on the null GPU")
    return ctypes.CDLL(None)


def _text(name: str) -> str:
    function = getattr(_loaded(), name)
    function.restype = ctypes.c_char_p
    return str(function().decode())
