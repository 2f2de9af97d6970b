"""All measurements on a GPU, in two commands for a machine that is there for fifteen minutes.

Call 1: tests, commands and the training steps of R50 and R50-DC5 side by side, then what bounds our kernels. Call 2:
the other benches. Nothing is timed while tests or commands run, nor while another part times something; a part that is
compared, compiled or warmed up meanwhile still takes some steps on the GPU (compare p20 and p80).

Each part is a process group of its own, which is stopped at its time limit or at the deadline of the whole. README.md,
results.json and files.tar.gz (logs, profiles) of the record are rewritten whenever a part ends, so that a part that
fails or hangs, or a killed check, costs only what it had not finished. ``--device cpu`` tries the machinery;
``--dry-run`` goes through all parts at small sizes without comparing numbers, for a null GPU.

    python perf/gpu_check.py --call 1 --change first-run --prediction "the aligner takes a tenth of the published time"
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from perf.gpu_lock import LOCK_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 12
ENVIRONMENT_SECONDS = 40  # torch's first import on a slow machine
POLL_SECONDS = 0.1
GPU_LOCK, RESULTS = ".gpu.lock", "results.json"
INTERRUPTION_SECONDS = 6
TERMINATION_SECONDS = 2  # between asking a part to end and killing it
STOPPING_SECONDS = INTERRUPTION_SECONDS + 2 * TERMINATION_SECONDS
COMMIT_VARIABLE = "PERF_COMMIT"
NO_GPU = 3  # exit code of the process that describes the machine


class Part(NamedTuple):
    """One process. ``command`` follows the Python interpreter; {device} and {out} (a folder) are filled in."""

    name: str
    command: tuple[str, ...]
    seconds: float
    gpu_only: bool = False
    holds_gpu: bool = False  # from its start to its end; what it times for itself is locked there
    dry_run: tuple[str, ...] = ()  # options that make it small and compare no numbers


def slug(text: str) -> str:
    """Keep letters, digits and hyphens, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "none"


Stage = tuple[Part, ...]  # run side by side
SMALL_BENCH = ("--shapes", "small", "--repeats", "2", "--no-compile", "--no-gate")


def _bench(op: str, seconds: float, *options: str) -> Part:
    command = (f"perf/bench_{op}.py", "--device", "{device}", "--out", "{out}", "--seconds", f"{0.75 * seconds:.0f}")
    return Part(f"bench {op}", (*command, *options), seconds, dry_run=SMALL_BENCH)


def _pytest(name: str, seconds: float, processes: int, *chosen: str) -> Part:
    options = "--import-mode=importlib --strict-markers --strict-config"
    command = ("-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-o", f"addopts={options}")
    command += ("-n", str(processes), "--dist=worksteal", *chosen)
    return Part(name, command, seconds, gpu_only=True, holds_gpu=True, dry_run=("-n", "0", "--collect-only"))


def _steps(recipe: str, batches: tuple[int, int], seconds: float) -> Part:
    command = ("perf/train_step.py", f"recipes/{recipe}.toml", "--height", "640", "--width", "864")  # the mean, about
    command += ("--batch", *map(str, batches), "--ways", "eager", "compiled", "graph", "--steps", "10", "--group", "2")
    command += ("--device", "{device}", "--profile", "{out}/profiles", "--json", f"{{out}}/step_{recipe}.json")
    small = ("--height", "128", "--width", "160", "--batch", "1", "--steps", "1", "--group", "1")
    small += ("--no-gate", "--no-baseline", "--set", "model.encoder_layers=1", "--set", "model.decoder_layers=2")
    return Part(f"steps {recipe}", command, seconds, gpu_only=True, dry_run=small)


def _commands(name: str, seconds: float, *options: str) -> Part:
    command = ("perf/try_commands.py", "recipes/quickstart.toml", *options, "--json", f"{{out}}/{slug(name)}.json")
    small = ("--set", "train.epochs=1", "--set", "data.shapes.train_images=320", "--set", "data.shapes.val_images=20")
    return Part(name, command, seconds, gpu_only=True, holds_gpu=True, dry_run=small)


OPS = ("aligner_kernels", "aligner_ops", "deformable_attention", "linear_assignment", "salient_cross_attention")
KERNEL_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in OPS)
LAYER_TESTS = "tests/models/test_layers.py"
GPU_TESTS = ("tests/engine/test_compile.py", "tests/engine/test_optim.py", "tests/engine/test_checkpoint.py")
UNDER_NCU = ("perf/launch_kernels.py", "--times", "1", "--ncu", "{out}/kernels.csv")
FEWER_PICTURES = ("--set", "data.shapes.train_images=800", "--set", "data.shapes.val_images=40")
BF16 = ("--dtypes", "bfloat16")
CALLS: dict[int, tuple[Stage, ...]] = {
    1: (
        (
            _pytest("kernel tests", 110, 8, "-m", "not long", *KERNEL_TESTS, LAYER_TESTS),
            _steps("r50_12ep", (4, 16), 250),
            _steps("r50_dc5_12ep", (1, 8), 250),
            _commands("commands on a part of quickstart", 130, "--set", "train.epochs=1", *FEWER_PICTURES),
        ),
        (Part("kernels under ncu", UNDER_NCU, 60, True, dry_run=("--shapes", "small", "--ncu", "")),),
        (_bench("attention", 55, *BF16),),
        (_bench("aligner", 55, *BF16),),
    ),
    2: (
        (
            _pytest("slow kernel tests", 70, 8, "-m", "slow", *KERNEL_TESTS),
            _pytest("gpu tests", 70, 3, "-m", "gpu", *GPU_TESTS, "tests/data/test_device.py"),
        ),
        (_bench("salient_cross_attention", 50, *BF16),),
        (_bench("roi_align", 25, *BF16), _bench("salient_points", 35, *BF16)),
        (_bench("linear_assignment", 25), _bench("deformable_attention", 40, *BF16)),
    ),
}
MINUTES = {1: 8.0, 2: 4.0}


@dataclass
class Outcome:
    """End of one part: exit code and seconds."""

    name: str
    state: str = "not run"  # ok, failed, timed out, nothing ran (every test was skipped), not run
    exit_code: int | None = None
    seconds: float = 0.0
    limit: float = 0.0
    tail: str = ""


class Record:
    """The folder that a check leaves behind, complete after every part."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], change: str, prediction: str) -> None:
        self.folder, self.facts, self.change, self.prediction = folder, facts, change, prediction
        self.benches: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def collect(self, results: Path) -> None:
        """Take over what parts have written so far: JSON files into results.json, logs and others into files.tar.gz."""
        for path in sorted(results.glob("*.json")):
            self.benches[path.stem] = json.loads(path.read_text())
        with tarfile.open(self.folder / "files.tar.gz", "w:gz") as packed:
            for path in sorted(results.rglob("*")):
                if path.is_file() and path.suffix != ".json" and not path.name.startswith("."):
                    with suppress(OSError):  # another part is writing it
                        packed.addfile(*_as_it_is(path, results))

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Write results.json and README.md as of now."""
        content: dict[str, Any] = {"change": self.change, "prediction": self.prediction, "environment": self.facts}
        content |= {"parts": [asdict(outcome) for outcome in outcomes], "benches": self.benches}
        (self.folder / RESULTS).write_text(json.dumps(content, indent=1) + "\n")
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        (self.folder / "README.md").write_text(
            f"# {self.change}\n\n## Prediction\n\n{self.prediction}\n\n## Outcome\n\nTo be written.\n\n"
            f"## Table\n\n```\n{self.table(outcomes)}\n```\n\n## Machine\n\n{facts}\n"
        )

    def table(self, outcomes: Sequence[Outcome]) -> str:
        """Write parts, then the cases of each bench, and how the commands ended."""
        lines = [f"{part.name:<34}{part.state:<10}{part.seconds:7.1f} s of {part.limit:.0f}" for part in outcomes]
        for content in self.benches.values():
            lines += ["", *(_summary(content) if "rows" in content else _endings(content))]
        return "\n".join(lines)


def _as_it_is(path: Path, root: Path) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """Read a file that may grow meanwhile, for a tar file."""
    content = path.read_bytes()
    entry = tarfile.TarInfo(str(path.relative_to(root)))
    entry.size, entry.mtime = len(content), int(time.time())
    return entry, io.BytesIO(content)


def _summary(bench: Mapping[str, Any]) -> list[str]:
    """List for each case the first variant's name and time; of ours time, times faster, share of the bound."""
    state = "" if bench["complete"] else ", unfinished"
    lines = [f"{bench['op']}{state}{', RED or failed' if bench['failed'] else ''}"]
    firsts: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for row in bench["rows"]:
        # a step's baseline has a dtype of its own
        dtype = "" if row["direction"] == "step" else row["dtype"]
        first = firsts.setdefault((row["case"], dtype, row["direction"]), row)
        case = f"{row['case']} {row['dtype']} {row['direction']}"
        if row["problem"] is not None:
            lines.append(f"  {case}: {row['variant']}: {row['problem'][:90]}")
        elif row["variant"].startswith("ours"):
            before = ""
            if first["ms"] is not None and not first["variant"].startswith("ours"):
                named = first["variant"] if "(" in first["variant"] else f"{first['variant']} ({first['dtype']})"
                before = f"{named} {first['ms']:.4g} ms -> "
            faster = "" if row["times_faster"] is None or not before else f", {row['times_faster']:.2f}x"
            share = "" if row["share"] is None else f", {row['share']:.0%}"
            lines.append(f"  {case}: {before}{row['variant']} {row['ms']:.4g} ms{faster}{share}{_counts(row)}")
    return lines + [f"  {note}" for note in bench["notes"]]


def _endings(content: Mapping[str, Any]) -> list[str]:
    """Write of each command its exit code and seconds; the last AP."""
    found = [f"{one['name']}: exit code {one['exit_code']}, {one['seconds']} s" for one in content["commands"]]
    reached = content.get("evaluations") or [{}]
    return [f"commands of {content['recipe']}: {'good' if content['good'] else 'NOT GOOD'}", *found, f"{reached[-1]}"]


def _counts(row: Mapping[str, Any]) -> str:
    """Write what else was found out about a training step."""
    if row.get("images_per_s") is None:
        return ""
    text = f", {row['images_per_s']:.0f} images/s"
    if row["peak_mb"] is None:  # a step is counted after all are timed
        return text
    memory = (row["state_mb"] + row["peak_mb"]) / 1e3
    return f"{text}, {row['launches']} launches, {row['syncs']} syncs, {memory:.1f} GB"


def child_environment() -> dict[str, str]:
    """Return the environment in which parts import the checkout without an installation."""
    paths = [str(ROOT), str(ROOT / "kernels")]
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths + before), "PYTHONUNBUFFERED": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: first interrupt the part itself, which then says how far it came."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(INTERRUPTION_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATION_SECONDS)
    process.wait()


def begin_part(part: Part, log: Path, device: str, results: Path) -> subprocess.Popen[bytes]:
    """Start one part, its output appended to ``log``."""
    filled = [word.replace("{device}", device).replace("{out}", str(results)) for word in part.command]
    command = [sys.executable, *filled]
    lock = results / GPU_LOCK
    with log.open("ab") as output, lock.open("w") as held:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        if part.holds_gpu:  # shared with others that do; the lock goes with the process, which inherits the file
            fcntl.flock(held, fcntl.LOCK_SH)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment() | {LOCK_VARIABLE: str(lock)},
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(held.fileno(),) if part.holds_gpu else (),
        )


def run_stage(
    stage: Stage, limits: Sequence[float], logs: Sequence[Path], device: str, results: Path
) -> Iterator[tuple[int, Outcome]]:
    """Run parts side by side, each to its end or its limit in seconds; yields a part's place and outcome as it ends."""
    begin = time.monotonic()
    running: dict[int, subprocess.Popen[bytes]] = {}
    try:
        # first those that hold the GPU: nobody else has it yet
        for place, part in sorted(enumerate(stage), key=lambda item: not item[1].holds_gpu):
            running[place] = begin_part(part, logs[place], device, results)
        while running:
            for place, process in list(running.items()):
                seconds = time.monotonic() - begin
                if process.poll() is None and seconds < limits[place]:
                    continue
                state = "timed out" if process.poll() is None else "ok" if process.returncode == 0 else "failed"
                stop(running.pop(place))
                yield place, outcome_of(stage[place], state, process, seconds, limits[place], logs[place])
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            stop(process)


def outcome_of(
    part: Part, state: str, process: subprocess.Popen[bytes], seconds: float, limit: float, log: Path
) -> Outcome:
    """Describe a part that has ended."""
    tail = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    is_tests = "pytest" in part.command and "--collect-only" not in part.command
    if state == "ok" and is_tests and not re.search(r"\b[1-9]\d* passed", "\n".join(tail)):
        state = "nothing ran"
    return Outcome(part.name, state, process.returncode, round(seconds, 1), round(limit, 1), "\n".join(tail))


def describe_machine(device: str) -> dict[str, Any]:
    """Return `perf.report.environment` from a process of its own, so that this one holds no GPU memory.

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
        sys.exit(f"error: the machine could not be described: {repr(error)[-300:]}")
    facts: dict[str, Any] = json.loads(told.splitlines()[-1])
    return facts | {"command": " ".join(sys.argv)}


def main(argv: Sequence[str] | None = None, calls: Mapping[int, Sequence[Stage]] = CALLS) -> int:
    """Run the stages of a call in order; returns 1 if a part did not end well."""
    begin = time.monotonic()
    options = read_options(argv, calls)
    if options.commit:
        os.environ[COMMIT_VARIABLE] = options.commit
    prediction = options.prediction
    if len(prediction) < 256 and Path(prediction).is_file():
        prediction = Path(prediction).read_text().strip()
    facts = describe_machine(options.device)
    name = f"{datetime.now(UTC):%Y-%m-%d}_{slug(facts['name'])}_{slug(options.change)}_call-{options.call}"
    folder = options.out or ROOT / "perf" / "records" / name
    if (folder / RESULTS).exists():
        sys.exit(f"error: {folder} holds a record already: take another --change or --out.")
    stages = [
        [
            part._replace(command=part.command + part.dry_run) if options.dry_run else part
            for part in stage
            if options.only in part.name and (options.device == "cuda" or not part.gpu_only)
        ]
        for stage in calls[options.call]
    ]
    if not any(stages):
        known = ", ".join(part.name for stage in calls[options.call] for part in stage)
        sys.exit(
            f"error: no part of call {options.call} on {options.device} has {options.only!r} in its name: {known}."
        )
    record = Record(folder, facts, options.change, prediction)
    outcomes = {part.name: Outcome(part.name, limit=part.seconds) for stage in stages for part in stage}
    deadline = begin + 60 * (options.minutes or MINUTES[options.call]) - STOPPING_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        logs_at = Path(scratch) / "logs"
        logs_at.mkdir()
        for stage in filter(None, stages):
            record.write(list(outcomes.values()))
            left = deadline - time.monotonic()
            if left <= 0:
                break
            limits = [min(part.seconds, left) for part in stage]
            print(f"== {', '.join(part.name for part in stage)}: at most {max(limits):.0f} s", flush=True)
            logs = [logs_at / f"{slug(part.name)}.txt" for part in stage]
            for place, done in run_stage(tuple(stage), limits, logs, options.device, Path(scratch)):
                outcomes[stage[place].name] = done
                record.collect(Path(scratch))
                record.write(list(outcomes.values()))
                print(f"{done.tail}\n== {done.name}: {done.state}, {done.seconds} s\n", flush=True)
    print(record.table(list(outcomes.values())))
    print(f"record: {folder}")
    return int(any(outcome.state != "ok" for outcome in outcomes.values()))


def read_options(argv: Sequence[str] | None, calls: Mapping[int, Sequence[Stage]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="GPU tests, training steps and benches, each in its own process.")
    parser.add_argument("--call", type=int, choices=tuple(calls), default=1, help="which of the two")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, help="deadline of the whole (8 and 4)")
    parser.add_argument("--change", default="check", help="what is measured, for the name of the record")
    parser.add_argument("--prediction", default="None was written down.", help="text, or a file with it")
    parser.add_argument("--commit", help="the commit, where the checkout came without .git")
    parser.add_argument("--out", type=Path, help="folder of the record (perf/records/DATE_GPU_CHANGE_CALL)")
    parser.add_argument("--dry-run", action="store_true", help="all parts at small sizes, no numbers compared")
    parser.add_argument("--only", default="", help="run only parts whose name contains this")
    return parser.parse_args(argv)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _exit)
    sys.exit(main())
