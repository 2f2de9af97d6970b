"""Report of a measurement: machine and versions, result rows, the table and the JSON file."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from perf import null_library

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "torchvision", "numpy", "scipy", "pycocotools", "hotcoco")
NULL_GPU = ", null GPU: times and numbers mean nothing"
COMMIT_VARIABLE = "PERF_COMMIT"  # the commit, where the checkout came without its .git


@dataclass
class Row:
    """One variant of one case in one direction: its times, or why it has none."""

    op: str
    case: str
    dtype: str
    direction: str
    variant: str
    ms: float | None = None  # median; on a GPU of the time between two events, with the queue filled beforehand
    p20: float | None = None
    p80: float | None = None
    # median of the time in which the host had started everything; GPU only, no use where the variant waits for the GPU
    host_ms: float | None = None
    repeats: int = 0
    gb_per_s: float | None = None  # fewest bytes of the op over ms
    floor_ms: float | None = None
    share: float | None = None  # floor over ms
    times_faster: float | None = None  # than the first variant of the case
    peak_mb: float | None = None  # above what was allocated before the call; GPU only
    problem: str | None = None


@dataclass
class Report:
    """Results of one bench; `write` is called after every case."""

    op: str
    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    complete: bool = False

    def write(self, folder: Path | None) -> None:
        """Replace ``folder``/<op>.json in one step, so that a reader never sees half a file."""
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{self.op}.json.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(folder / f"{self.op}.json")

    def note(self, text: str) -> None:
        """Print a line and keep it in the JSON."""
        self.notes.append(text)
        print(text, flush=True)


def run_text(command: list[str]) -> str:
    """Return the standard output of a short command, empty if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """Return the checked-out commit, with "-dirty" if tracked or new files differ from it."""
    if known := os.environ.get(COMMIT_VARIABLE):
        return known
    head = run_text(["git", "rev-parse", "HEAD"])
    return f"{head}-dirty" if head and run_text(["git", "status", "--porcelain"]) else head or "unknown"


def environment(device: str) -> dict[str, Any]:
    """Collect device, driver, versions, commit and date, for the head of a record."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "name": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "commit": commit(),
        "command": " ".join(sys.argv),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_threads": torch.get_num_threads(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": f"{properties.name}{NULL_GPU if null_library.is_loaded() else ''}",
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "driver": nvidia_smi("driver_version"),
            "clocks_and_power": nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"),
        }
    return facts


def nvidia_smi(query: str) -> str:
    """Ask nvidia-smi about the first GPU; "unknown" where there is no such tool."""
    if not shutil.which("nvidia-smi"):
        return "unknown"
    answer = run_text(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
    return answer or "unknown"


def number(value: float | None, places: int = 3) -> str:
    """Format a number for a table; None, not measured, is a dash."""
    return "-" if value is None else f"{value:.{places}f}"


def table(rows: list[Row]) -> str:
    """Write rows of one case and direction as text."""
    first = rows[0]
    floor = f"floor {number(first.floor_ms, 4)} ms" if first.floor_ms is not None else ""
    lines = [f"{first.op}  {first.case}  {first.dtype}  {first.direction}  {floor}"]
    width = max(len(row.variant) for row in rows)
    names = ("ms", "p20", "p80", "host ms", "GB/s", "share", "faster", "peak MB")
    lines.append("  " + " " * width + "".join(f"{name:>10}" for name in names))
    for row in rows:
        if row.problem is not None:
            lines.append(f"  {row.variant:{width}}  {row.problem}")
            continue
        share = "-" if row.share is None else f"{row.share:.1%}"
        cells = [number(value, 4) for value in (row.ms, row.p20, row.p80, row.host_ms)]
        cells += [number(row.gb_per_s, 1), share, number(row.times_faster, 2), number(row.peak_mb, 1)]
        lines.append(f"  {row.variant:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
