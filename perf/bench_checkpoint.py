"""What a step waits for when a checkpoint is saved, and what the checkpoint weighs; after a comparison of every tensor.

The state is that of a recipe's model after a step of AdamW, with the average of its weights. "torch.save" writes one
file where it stands, without fsync, as the published code does. While a checkpoint is written beside the steps, the
longest pause of a thread that asks for Python every half millisecond is noted too.

    python perf/bench_checkpoint.py recipes/r50_12ep.toml --out perf/records/DATE_cpu_checkpoint
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from perf.report import Report, Row, environment, table
from samdetr.engine.checkpoint.format import AVERAGE, MODEL, OPTIMIZER, Progress, load_checkpoint, model_tensors
from samdetr.engine.checkpoint.format import optimizer_tensors as tensors_of
from samdetr.engine.checkpoint.saving import Parts, Saver
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.ema import EMA
from samdetr.engine.optim import build_optimizer
from samdetr.models import build_model
from samdetr.recipe import load_recipe

PUBLISHED, WAITED, BESIDE = "torch.save in place", "ours, waited for", "ours, beside the steps"


def state_of(recipe: Path, device: torch.device) -> Parts:
    """The three parts of a checkpoint on the device."""
    read = load_recipe(recipe, ["model.backbone.weights=none"])
    model = build_model(read.model).to(device)
    optimizer = build_optimizer(model, read.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    average = EMA(model, 0.999).averages
    return {MODEL: model_tensors(model), OPTIMIZER: tensors_of(model, optimizer), AVERAGE: average}


def unequal(parts: Parts, checkpoint: Path) -> list[str]:
    """The tensors that a checkpoint has not kept to the last bit."""
    loaded = load_checkpoint(checkpoint, with_optimizer=True)
    found = {MODEL: loaded.model, OPTIMIZER: loaded.optimizer, AVERAGE: loaded.average}

    def same(part: str, name: str, value: Tensor) -> bool:
        return name in found[part] and torch.equal(found[part][name], value.cpu())

    return [name for part, tensors in parts.items() for name, value in tensors.items() if not same(part, name, value)]


def longest_pauses(saver: Saver, parts: Parts, progress: Progress) -> tuple[float, float]:
    """Milliseconds for which this thread did not get Python: while another wrote a checkpoint, and as long after it."""
    saver.save(parts, progress, {})
    thread, begin = saver._thread, time.perf_counter()
    assert thread is not None
    writing = _pause_while(thread.is_alive)
    saver.wait()
    end = 2 * time.perf_counter() - begin
    return writing, _pause_while(lambda: time.perf_counter() < end)


def _pause_while(lasts: Callable[[], bool]) -> float:
    last, longest = time.perf_counter(), 0.0
    while lasts():
        time.sleep(0.0005)
        now = time.perf_counter()
        last, longest = now, max(longest, now - last)
    return longest * 1e3


def timed(
    call: Callable[[int], object], device: torch.device, repeats: int, after: Callable[[], object]
) -> list[float]:
    """Milliseconds of each call, the device's part included; ``after`` is not timed."""
    found = []
    for turn in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(turn)
        if device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        found.append((time.perf_counter() - start) * 1e3)
        after()
    return found


def row(report: Report, case: str, stage: str, variant: str, times: list[float], size: int) -> Row:
    """Median and spread of the times, and the speed with which ``size`` bytes went through."""
    found = Row(report.op, case, "float32", stage, variant, median(times), repeats=len(times))
    if len(times) > 2:
        found.p20, _, _, found.p80 = quantiles(times, n=5)
    found.gb_per_s = size / found.ms / 1e6 if found.ms else None
    report.rows.append(found)
    return found


def run(parts: Parts, case: str, device: torch.device, folder: Path, repeats: int, report: Report) -> None:
    """All figures of one state."""
    size = sum(value.numel() * value.element_size() for tensors in parts.values() for value in tensors.values())
    saver = Saver(folder, ALONE, keep=1, timeout=600, say=print)
    progress = Progress()

    def save(turn: int) -> None:
        progress.step += 1
        saver.save(parts, progress, {})

    def save_and_wait(turn: int) -> None:
        save(turn)
        saver.wait()

    first = timed(save, device, 1, saver.wait)
    wrong = unequal(parts, folder / "last")
    report.gates.append({"case": case, "tensors": sum(map(len, parts.values())), "unequal": wrong})
    if wrong:
        report.failed = True
        report.note(f"RED {case}: not kept to the last bit: {', '.join(wrong[:5])}; no speed")
        return
    published = folder / "published.pth"

    def published_save(turn: int) -> None:
        torch.save({name: dict(tensors) for name, tensors in parts.items()}, published)

    stage = "what the step waits for"
    rows = [
        row(report, case, stage, PUBLISHED, timed(published_save, device, repeats, published.unlink), size),
        row(report, case, stage, WAITED, timed(save_and_wait, device, repeats, saver.wait), size),
        row(report, case, stage, BESIDE, timed(save, device, repeats, saver.wait), size),
    ]
    for one in rows[1:]:
        one.times_faster = rows[0].ms / one.ms if rows[0].ms and one.ms else None
    print(table(rows) + "\n", flush=True)
    last = (folder / "last").resolve()
    loads = timed(lambda turn: load_checkpoint(last, with_optimizer=True), device, repeats, lambda: None)
    print(table([row(report, case, "read", "verified and whole, on the CPU", loads, size)]) + "\n", flush=True)
    writing, idle = longest_pauses(saver, parts, replace(progress, step=progress.step + 1))
    on_disk = {part: sum(file.stat().st_size for file in (folder / "last" / part).iterdir()) for part in parts}
    files = sum(len(list((folder / "last" / part).iterdir())) for part in parts)
    sizes = ", ".join(f"{part} {count / 1e6:.1f} MB" for part, count in on_disk.items())
    report.note(f"{case}: {sum(on_disk.values()) / 1e6:.1f} MB in {files} files: {sizes}")
    report.note(f"{case}: the first save of a run, which takes its memory: {first[0]:.0f} ms")
    report.note(
        f"{case}: longest pause of Python while a checkpoint was written {writing:.1f} ms, without {idle:.1f} ms"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns its exit code: 1 if a tensor was not kept."""
    parser = argparse.ArgumentParser(description="Stall and size of a checkpoint.")
    parser.add_argument("recipe", type=Path, help="whose model is saved")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; by default a temporary folder")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for checkpoint.json")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    report = Report("checkpoint", environment(given.device))
    print(" ".join(f"{key}={value}" for key, value in report.environment.items()) + "\n")
    parts = state_of(given.recipe, device)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run(parts, given.recipe.stem, device, Path(folder), given.repeats, report)
    report.complete = True
    report.write(given.out)
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
