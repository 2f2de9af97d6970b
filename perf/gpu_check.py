"""Everything a GPU can tell, in one command inside nine minutes: GPU tests, training steps, a profile, the benches.

Each part runs in a process group of its own, which is killed at its time limit or at the deadline of the whole; its
output goes to a log, and README.md and results.json of the record are rewritten whenever a part ends, so that a part
that fails or hangs, or a killed check, costs only what it had not finished. ``--device cpu`` tries the machinery.

    python perf/gpu_check.py --change first-run --prediction "the aligner takes a tenth of the published time"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 12
ENVIRONMENT_SECONDS = 15
TERMINATION_SECONDS = 2  # between asking a part to end and killing it
COMMIT_VARIABLE = "PERF_COMMIT"
NO_GPU = 3  # exit code of the process that describes the machine


class Part(NamedTuple):
    """One process. ``command`` follows the Python interpreter; {device} and {out} (a folder) are filled in."""

    name: str
    command: tuple[str, ...]
    seconds: float
    gpu_only: bool = False


def _bench(op: str, seconds: float) -> Part:
    command = (f"perf/bench_{op}.py", "--device", "{device}", "--out", "{out}", "--seconds", f"{0.75 * seconds:.0f}")
    return Part(f"bench {op}", command, seconds)


MEAN_SIZE = ("--height", "640", "--width", "864", "--device", "{device}")  # of the images of training, about


def _train_step(recipe: str, batch: int, seconds: float, how: str, *options: str) -> Part:
    command = ("perf/train_step.py", f"recipes/{recipe}.toml", *MEAN_SIZE, "--batch", str(batch), *options)
    return Part(
        f"train step {recipe} batch {batch} {how}",
        (*command, "--json", f"{{out}}/train_step_{recipe}_b{batch}_{how}.json"),
        seconds,
        gpu_only=True,
    )


def _kernel_tests() -> tuple[str, ...]:
    """One small case of each op in fp32 and bf16; the gpu tests have fp16, and the CPU all cases."""
    aligner, case = "tests/kernels/test_aligner_kernels.py::test", "7x5-C24-N7-bins7-padded"
    deformable = "tests/kernels/test_deformable_attention.py::test_kernels"
    attention = "tests/kernels/test_salient_cross_attention.py::test_kernels_lose_no_more_than_eager"
    chosen = ["tests/kernels/test_linear_assignment.py::test_kernel_equals_scipy_at_the_size_of_training"]
    for dtype in ("torch.float32", "torch.bfloat16"):
        chosen += [f"{aligner}_{op}_kernels[{case}-{dtype}]" for op in ("roi_align", "salient_points")]
        chosen += [f"{aligner}_roi_pool_kernels[{case}-{dtype}-max]", f"{deformable}[7x5-{dtype}]"]
    return (*chosen, f"{attention}_float32[case0]", f"{attention}_half[case0-dtype0]")


# one process, so that no two tests share the GPU, and no need of pytest-xdist
ONE_PROCESS = ("-o", "addopts=--import-mode=importlib --strict-markers --strict-config")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *ONE_PROCESS)
NO_COMPILE = ("--set", "compute.compile=off")  # beside the baseline: compiling takes about a minute
OURS_ALONE = ("--no-baseline", "--group", "1")
PARTS = (
    Part("gpu tests", (*PYTEST, "-m", "gpu", "tests"), 56, gpu_only=True),
    _train_step("r50_12ep", 4, 45, "eager", "--group", "2", "--steps", "10", *NO_COMPILE),
    _train_step("r50_dc5_12ep", 4, 55, "eager", "--group", "1", "--steps", "10", *NO_COMPILE),
    _train_step("r50_12ep", 16, 75, "compiled", *OURS_ALONE),
    _train_step("r50_dc5_12ep", 16, 75, "compiled", *OURS_ALONE),
    # from here on the cache of compiled code is warm
    _train_step("r50_12ep", 16, 40, "graph", *OURS_ALONE, "--set", "compute.cuda_graph=on"),
    Part(
        "profile r50_12ep",
        ("perf/profile_step.py", "recipes/r50_12ep.toml", *MEAN_SIZE, "--batch", "16", "--out", "{out}/profile"),
        30,
        gpu_only=True,
    ),
    _bench("aligner", 30),
    _bench("salient_cross_attention", 30),
    _bench("linear_assignment", 15),
    _bench("roi_align", 10),
    _bench("salient_points", 15),
    _bench("deformable_attention", 20),
    Part("kernel tests on the GPU", (*PYTEST, "--maxfail=20", *_kernel_tests()), 24, gpu_only=True),
)


@dataclass
class Outcome:
    """How one part ended."""

    name: str
    state: str = "not run"  # ok, failed, timed out, nothing ran (every test was skipped), not run
    exit_code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    tail: str = ""


class Record:
    """The folder that a check leaves behind, complete after every part."""

    def __init__(self, folder: Path, flat: bool, facts: Mapping[str, Any], change: str, prediction: str) -> None:
        self.folder, self.flat, self.facts = folder, flat, facts
        self.change, self.prediction = change, prediction
        self.benches: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if not flat:
            (folder / "logs").mkdir(exist_ok=True)

    def log_path(self, part: Part) -> Path:
        """Where the part's output is appended."""
        return self.folder / "log.txt" if self.flat else self.folder / "logs" / f"{slug(part.name)}.txt"

    def collect(self, results: Path) -> None:
        """Take over the JSON files that parts have written so far."""
        for path in sorted(results.glob("*.json")):
            self.benches[path.stem] = json.loads(path.read_text())

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """results.json and README.md as of now."""
        content: dict[str, Any] = {"change": self.change, "prediction": self.prediction, "environment": self.facts}
        content |= {"parts": [asdict(outcome) for outcome in outcomes], "benches": self.benches}
        (self.folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        (self.folder / "README.md").write_text(
            f"# {self.change}\n\n## Prediction\n\n{self.prediction}\n\n## Outcome\n\nTo be written.\n\n"
            f"## Table\n\n```\n{self.table(outcomes)}\n```\n\n## Machine\n\n{facts}\n"
        )

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Parts, then the cases of each bench."""
        lines = [f"{part.name:<34}{part.state:<10}{part.seconds:7.1f} s of {part.limit:.0f}" for part in outcomes]
        for bench in self.benches.values():
            lines += ["", *_summary(bench)]
        return "\n".join(lines)


def _summary(bench: Mapping[str, Any]) -> list[str]:
    """For each case: the first variant's name and time; of ours the time, how many times faster, share of the bound."""
    state = "" if bench["complete"] else ", unfinished"
    lines = [f"{bench['op']}{state}{', RED or failed' if bench['failed'] else ''}"]
    first: Mapping[str, Any] = {}
    for row in bench["rows"]:
        case = f"{row['case']} {row['dtype']} {row['direction']}"
        if not first or row["variant"] == first["variant"]:
            first = row  # of the next case; a step's baseline has a dtype of its own
        if row["problem"] is not None:
            lines.append(f"  {case}: {row['variant']}: {row['problem'][:90]}")
        elif row["variant"].startswith("ours"):
            named = first["variant"] if "(" in first["variant"] else f"{first['variant']} ({first['dtype']})"
            before = named if first["ms"] is None else f"{named} {first['ms']:.4g} ms"
            faster = "" if row["times_faster"] is None else f", {row['times_faster']:.2f}x"
            share = "" if row["share"] is None else f", {row['share']:.0%}"
            lines.append(f"  {case}: {before} -> {row['variant']} {row['ms']:.4g} ms{faster}{share}{_counts(row)}")
    return lines + [f"  {note}" for note in bench["notes"]]


def _counts(row: Mapping[str, Any]) -> str:
    """Of a training step: what else was found out."""
    if "images_per_s" not in row:
        return ""
    return (
        f", {row['images_per_s']:.0f} images/s, {row['launches']} launches, {row['syncs']} syncs, "
        f"{(row['state_mb'] + row['peak_mb']) / 1e3:.1f} GB"
    )


def slug(text: str) -> str:
    """Letters, digits and hyphens, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "none"


def child_environment() -> dict[str, str]:
    """The environment in which parts import the checkout without an installation."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths + before), "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group, first by asking."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(TERMINATION_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_part(part: Part, limit: float, log: Path, device: str, results: Path) -> Outcome:
    """Run one part to its end or its limit in seconds, its output appended to ``log``."""
    filled = [word.replace("{device}", device).replace("{out}", str(results)) for word in part.command]
    command = [sys.executable, *filled]
    begin = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(limit)
            state = "ok" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            stop(process)
    with log.open("rb") as written:
        written.seek(start)
        tail = written.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
    if state == "ok" and "pytest" in command and not re.search(r"\b[1-9]\d* passed", "\n".join(tail)):
        state = "nothing ran"
    seconds = time.monotonic() - begin
    return Outcome(part.name, state, process.returncode, round(seconds, 1), round(limit, 1), "\n".join(tail))


def describe_machine(device: str) -> dict[str, Any]:
    """`perf.report.environment` from a process of its own, so that this one holds no GPU memory.

    Ends the program where the device is "cuda" and torch has none.
    """
    code = (
        "import json, sys, torch; from perf.report import environment\n"
        f"if {device!r} == 'cuda' and not torch.cuda.is_available(): sys.exit({NO_GPU})\n"
        f"print(json.dumps(environment({device!r})))"
    )
    command = [sys.executable, "-c", code]
    try:
        told = subprocess.check_output(command, cwd=ROOT, env=child_environment(), timeout=ENVIRONMENT_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        if isinstance(error, subprocess.CalledProcessError) and error.returncode == NO_GPU:
            sys.exit("error: torch finds no CUDA GPU here (nvidia-smi tells why); --device cpu tries the machinery")
        return {"device": device, "name": "unknown", "problem": repr(error)[-500:]}
    facts: dict[str, Any] = json.loads(told.splitlines()[-1])
    return facts | {"command": " ".join(sys.argv)}


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts in order; returns 1 if one did not end well."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description="GPU tests and benches, each part in its own process.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="deadline of the whole")
    parser.add_argument("--change", default="check", help="what is measured, for the name of the record")
    parser.add_argument("--prediction", default="None was written down.", help="text, or a file with it")
    parser.add_argument("--commit", help="the commit, where the checkout came without .git")
    parser.add_argument("--out", type=Path, help="folder of the record (perf/records/DATE_GPU_CHANGE)")
    parser.add_argument("--flat", action="store_true", help="three files only, for a machine that returns few files")
    parser.add_argument("--only", default="", help="run only parts whose name contains this")
    options = parser.parse_args(argv)
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    prediction = options.prediction
    if len(prediction) < 256 and Path(prediction).is_file():
        prediction = Path(prediction).read_text().strip()
    facts = describe_machine(options.device)
    name = f"{datetime.now(UTC):%Y-%m-%d}_{slug(facts['name'])}_{slug(options.change)}"
    folder = options.out or ROOT / "perf" / "records" / name
    record = Record(folder, options.flat, facts, options.change, prediction)
    chosen = [part for part in parts if options.only in part.name and (options.device == "cuda" or not part.gpu_only)]
    outcomes = [Outcome(part.name, limit=part.seconds) for part in chosen]
    deadline = begin + 60 * options.minutes - 2 * TERMINATION_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for at, part in enumerate(chosen):
                record.write(outcomes)
                limit = min(part.seconds, deadline - time.monotonic())
                if limit <= 0:
                    break
                print(f"== {part.name}, at most {limit:.0f} s", flush=True)
                done = outcomes[at] = run_part(part, limit, record.log_path(part), options.device, Path(scratch))
                record.collect(Path(scratch))
                print(f"{done.tail}\n== {done.state}, {done.seconds} s\n", flush=True)
        finally:
            record.collect(Path(scratch))
            record.write(outcomes)
    print(record.table(outcomes))
    print(f"record: {folder}")
    return int(any(outcome.state != "ok" for outcome in outcomes))


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(main())
