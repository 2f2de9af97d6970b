"""Launch our kernels at the shapes of training, forward and backward, a few times; or run that under Nsight Compute.

    python perf/launch_kernels.py --ncu kernels.csv

The file has a row a launch with what `SECTIONS` hold; what bounds each kernel is printed as a table. Compilation and
inputs lie outside the profiled range. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import glob
import importlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from perf.gate import differentiate, leaves, results
from perf.harness import read_options

OPS = ("roi_align", "salient_points", "salient_cross_attention", "linear_assignment", "deformable_attention")
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "MemoryWorkloadAnalysis", "SchedulerStats", "WarpStateStats")
COLUMNS = {  # of the printed table: metric of Nsight Compute
    "us": "gpu__time_duration.sum",
    "SM %": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 %": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "sm__inst_executed.avg.pct_of_peak_sustained_elapsed",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "regs": "launch__registers_per_thread",
}
PLACES = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")


def launch_all(shapes: str, device: str, times: int) -> None:
    """Launch each op at the bf16 cases of its bench but those of batch 16."""
    for op in OPS:
        options = read_options(op, ["--shapes", shapes, "--device", device, "--dtypes", "bfloat16"])
        for case in importlib.import_module(f"perf.bench_{op}").cases(options):
            if "batch 16" in case.name:
                continue
            run = next(variant.run for variant in case.variants if variant.ours)
            args = leaves(case.make(0), case.wanted)
            with torch.no_grad():
                upstream = [torch.randn_like(out) for out in results(run(*args))] if case.wanted else []
            for turn in range(1 + times):
                if turn == 1 and device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                if case.wanted:
                    differentiate(run, args, case.wanted, upstream)
                else:
                    run(*args)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            print(f"{op}: {case.name}", flush=True)


def profiled(file: Path, times: int, arguments: Sequence[str]) -> int:
    """Run this file under Nsight Compute, its rows in ``file``; returns the exit code, 3 where there is none."""
    found = [shutil.which("ncu"), *(path for pattern in PLACES for path in sorted(glob.glob(pattern)))]
    program = next(filter(None, found), None)
    if program is None:
        print("no ncu (Nsight Compute) is on the PATH")
        return 3
    command = [program, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--kernel-name", "regex:roi_align|salient|assignment|deformable", "--log-file", str(file)]
    command += [word for section in SECTIONS for word in ("--section", section)]
    code = subprocess.run([*command, sys.executable, __file__, *arguments]).returncode
    print(table(file, times))
    return code


def table(file: Path, times: int) -> str:
    """Write the medians of every kernel and case, in order; a case launches each of its kernels ``times`` times."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.startswith('"')]
    rows = [row for row in csv.DictReader(lines) if row["ID"]]  # the row after the names holds units: ns, %
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["Kernel Name"].split("(")[0], []).append(row)
    text = [f"{'':58}" + "".join(f"{name:>9}" for name in COLUMNS)]
    for kernel, every in found.items():
        for launches in (every[first : first + times] for first in range(0, len(every), times)):
            cells = []
            for name, metric in COLUMNS.items():
                values = [float(row[metric].replace(",", "")) for row in launches if row.get(metric)]
                scale = 1e-3 if name == "us" else 1.0
                cells.append(f"{scale * median(values):9.1f}" if values else f"{'-':>9}")
            text.append(f"{kernel.strip('_')[:40]:42}{launches[0].get('Grid Size', ''):16}" + "".join(cells))
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Launch, or profile the launches."""
    parser = argparse.ArgumentParser(description="Launch our kernels at the shapes of training.")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", default="gpu", choices=("gpu", "small"))
    parser.add_argument("--ncu", metavar="FILE", help="run under Nsight Compute, whose CSV this is")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here; --device cpu --shapes small tries the machinery")
    if given.ncu:
        again = ["--times", str(given.times), "--device", given.device, "--shapes", given.shapes]
        return profiled(Path(given.ncu), given.times, again)
    launch_all(given.shapes, given.device, given.times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
