"""Use the commands as a person does: train, stop by a signal, continue, evaluate, predict, export; check exit codes.

    python perf/try_commands.py recipes/quickstart.toml --device cuda [--set train.epochs=1 ...] [--json FILE]

The run is stopped by SIGTERM once it has logged its first steps. Prints the seconds of every command and the AP.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

START = "import sys; from samdetr.cli.main import main; main(sys.argv[1:])"
TERMINATED = 143
COMMANDS = 5
LIMIT, PATIENCE = 400.0, 20.0  # seconds of one command, and for its end


class Samdetr(NamedTuple):
    """Command line and environment of ``samdetr``."""

    words: tuple[str, ...] = (sys.executable, "-c", START)  # before its arguments
    environment: Mapping[str, str] | None = None  # None: that of this process


SAMDETR = Samdetr()


class Ended(NamedTuple):
    """One command that has ended."""

    name: str
    seconds: float
    exit_code: int
    wanted: int
    output: str


def start(arguments: Sequence[str], log: Path, samdetr: Samdetr) -> subprocess.Popen[bytes]:
    """Begin ``samdetr ARGUMENTS``, its output in ``log``."""
    with log.open("wb") as output:
        return subprocess.Popen([*samdetr.words, *arguments], stdout=output, stderr=output, env=samdetr.environment)


def finish(name: str, process: subprocess.Popen[bytes], begin: float, log: Path, wanted: int = 0) -> Ended:
    """Wait for the end, or kill it at the limit; print one line, and the output if the exit code is not ``wanted``."""
    try:
        code = process.wait(max(1.0, LIMIT - (time.monotonic() - begin)))
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its loaders
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    ended = Ended(name, round(time.monotonic() - begin, 1), code, wanted, log.read_text(errors="replace"))
    print(f"{name}: exit code {code} after {ended.seconds} s", flush=True)
    if code != wanted or "Traceback" in ended.output:
        print(ended.output[-6000:], flush=True)
    return ended


def run(name: str, arguments: Sequence[str], log: Path, samdetr: Samdetr, wanted: int = 0) -> Ended:
    """Run one command from its start to its end."""
    begin = time.monotonic()
    return finish(name, start(arguments, log, samdetr), begin, log, wanted)


def stopped(train: Sequence[str], folder: Path, log: Path, samdetr: Samdetr) -> Ended:
    """Train until the first line of metrics.jsonl is there, then send SIGTERM."""
    begin = time.monotonic()
    process = start(train, log, samdetr)
    while process.poll() is None and time.monotonic() - begin < LIMIT:
        if any(path.stat().st_size for path in folder.glob("runs/*/*/metrics.jsonl")):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    return finish("train, stopped by SIGTERM", process, begin, log, wanted=TERMINATED)


def try_all(
    recipe: str,
    device: str,
    settings: Sequence[str],
    folder: Path,
    samdetr: Samdetr = SAMDETR,
    after: Callable[[list[Ended]], None] = lambda ended: None,
) -> tuple[list[Ended], dict[str, object]]:
    """Run all commands in order, until one ends otherwise than it should; returns the evaluations in metrics.jsonl.

    ``after`` hears of the commands so far whenever one has ended.
    """
    log = folder / "log.txt"
    change = [f"run.device={device}", f"run.folder={folder / 'runs'}", "train.log_every=10", *settings]
    options = [word for setting in change for word in ("--set", setting)]
    ended = [stopped(["train", recipe, *options], folder, log, samdetr)]
    after(ended)
    found = sorted(folder.glob("runs/*/1"))
    if ended[0].exit_code != TERMINATED or not found:
        return ended, {}
    place = str(found[0])
    pictures = folder / "pictures"
    pictures.mkdir()
    commands: list[tuple[str, list[str]]] = [
        ("resume", ["train", "--resume", place]),
        ("eval", ["eval", place, "--set", f"run.device={device}"]),
        ("predict", ["predict", place, str(pictures), "--output", str(folder / "predictions")]),
        ("export", ["export", place, "--weights", str(folder / "weights.safetensors")]),
    ]
    for name, arguments in commands:
        if name == "predict":
            draw_pictures(pictures)
        ended.append(run(name, arguments, log, samdetr))
        after(ended)
        if ended[-1].exit_code != 0:
            break
    lines = [json.loads(line) for line in (found[0] / "metrics.jsonl").read_text().splitlines()]
    evaluations = [{key: line[key] for key in line if key in ("epoch", "AP", "AP50")} for line in lines if "AP" in line]
    return ended, {"evaluations": evaluations, "last": lines[-1]}


def draw_pictures(folder: Path) -> None:
    """Write two pictures of noise to predict on."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for number, size in enumerate(((128, 160, 3), (96, 64, 3))):
        Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number}.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Try; returns 1 if a command ended otherwise than it should, or with a traceback."""
    parser = argparse.ArgumentParser(description="Train, stop, continue, evaluate, predict, export.")
    parser.add_argument("recipe")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of the recipe")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)

    def write(ended: Sequence[Ended], told: Mapping[str, object] | None = None, good: bool = False) -> None:
        if not options.json:
            return
        parts = [{**one._asdict(), "output": one.output[-3000:]} for one in ended]
        content = {"recipe": options.recipe, "set": options.set, "device": options.device, "good": good}
        temporary = options.json.with_name(f".{options.json.name}.tmp")
        temporary.write_text(json.dumps({**content, "commands": parts, **(told or {})}, indent=1) + "\n")
        temporary.replace(options.json)

    with tempfile.TemporaryDirectory() as scratch:
        ended, told = try_all(options.recipe, options.device, options.set, Path(scratch), after=write)
    good = len(ended) == COMMANDS
    good &= all(one.exit_code == one.wanted and "Traceback" not in one.output for one in ended)
    print(json.dumps(told))
    write(ended, told, good)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
