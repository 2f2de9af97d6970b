"""The commands on the null GPU: exit codes as on a CPU, nothing refused, no wait between steps but the meant ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from perf.try_commands import TERMINATED, Ended, Samdetr, run, stopped, try_all
from tests.engine.runs import TINY, metrics
from tests.perf import null_command
from tests.perf.null_gpu import on_null_gpu

pytestmark = pytest.mark.usefixtures("null_gpu_there")

STEPS = 24  # of an epoch
EPOCHS = 2
SETTINGS = (f"train.epochs={EPOCHS}", f"data.shapes.train_images={4 * STEPS}", "eval.every=2", "train.log_every=1")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Write a small recipe for a GPU; returns its file."""
    file = tmp_path / "tiny.toml"
    folder = f"folder = {json.dumps(str(tmp_path / 'shapes'))}\n"
    file.write_text(
        TINY.replace('device = "cpu"', 'device = "cuda"').replace("[data.shapes]\n", f"[data.shapes]\n{folder}")
    )
    return str(file)


def samdetr(**environment: str) -> Samdetr:
    """Return the command that says what it asked of the null GPU.

    Memory is as the device gives it, zeros: torch would give what was copied to freed memory, which may be no number.
    """
    zeros = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    return Samdetr((sys.executable, null_command.__file__), on_null_gpu() | zeros | environment)


def counted(ended: Ended) -> list[dict[str, Any]]:
    """Return the report of each process of a command."""
    parts = ended.output.split(null_command.COUNTED)[1:]
    return [json.JSONDecoder().raw_decode(part)[0] for part in parts]


def check(ended: Iterable[Ended], processes: int = 1) -> None:
    """Assert that every command ended as it should, and that no call of its processes was refused."""
    for one in ended:
        assert one.exit_code == one.wanted and "Traceback" not in one.output, one.name
        assert [process["refused"] for process in counted(one)] == [[]] * processes, one.name


def check_waits(epochs: list[dict[str, int]], *, at_first: int = 0) -> None:
    """Assert that steps, logged one by one, wait for the step two before them alone: `RunAheadLimit`.

    The other waits of this kind are for values whose copy is known to be done: one a step. at_first: copies from the
    host in the first epoch, of what is then kept.
    """
    assert [waits.pop("cudaStreamSynchronize", 0) for waits in epochs] == [at_first, 0]
    assert all(set(waits) == {"cudaEventSynchronize"} for waits in epochs)
    assert epochs[-1]["cudaEventSynchronize"] == STEPS + STEPS - 2


@pytest.mark.slow
def test_all_commands(recipe: str, tmp_path: Path) -> None:
    """With a loader process; the files are there."""
    ended, told = try_all(recipe, "cuda", [*SETTINGS, "data.workers=1"], tmp_path, samdetr())
    assert [one.name for one in ended] == ["train, stopped by SIGTERM", "resume", "eval", "predict", "export"]
    check(ended)
    check_waits(counted(ended[1])[0]["epochs"])
    assert told["evaluations"] == [{"epoch": EPOCHS - 1, "AP": 0.0, "AP50": 0.0}]
    assert all((tmp_path / name).is_file() for name in ("predictions/predictions.json", "weights.safetensors"))
    (folder,) = tmp_path.glob("runs/tiny/1")
    assert [line["step"] for line in metrics(folder, "train")] == list(range(1, EPOCHS * STEPS + 1))


@pytest.mark.long
def test_all_commands_compiled_in_bf16(recipe: str, tmp_path: Path) -> None:
    buckets = ("data.batching=buckets", "data.buckets=2", "data.pixels=fast")
    compute = ("compute.precision=bf16", "compute.compile=on", "optim.ema_decay=0.99")
    ended, _ = try_all(recipe, "cuda", [*SETTINGS, *buckets, *compute], tmp_path, samdetr())
    check(ended)
    assert "compiled for 2 shapes" in ended[1].output
    check_waits(counted(ended[1])[0]["epochs"], at_first=2)  # mean and deviation of pixels


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes(recipe: str, tmp_path: Path, strategy: str) -> None:
    """On one device, with gloo in the place of NCCL: they stop together, and go on."""
    shared = ("train.micro_batch=2", "model.backbone.norm=frozen", f"parallel.strategy={strategy}")
    settings = [f"run.folder={tmp_path / 'runs'}", *SETTINGS, *shared]
    options = [word for setting in settings for word in ("--set", setting)]
    log, two = tmp_path / "log.txt", samdetr()
    begun = stopped(["train", recipe, *options, "--nproc", "2"], tmp_path, log, two)
    check([begun], processes=3)  # with the launcher
    assert begun.exit_code == TERMINATED and f"2 processes ({strategy})" in begun.output
    folder = tmp_path / "runs" / "tiny" / "1"
    resumed = run("resume", ["train", "--resume", str(folder), "--nproc", "2"], log, two)
    check([resumed], processes=3)
    assert "continuing after step " in resumed.output
    assert [line["step"] for line in metrics(folder, "train")] == list(range(1, EPOCHS * STEPS + 1))


@pytest.mark.long
def test_a_gpu_that_is_full(recipe: str, tmp_path: Path) -> None:
    """From the start, and once the weights are there: a sentence each."""
    options = ("--set", f"run.folder={tmp_path / 'runs'}")
    for mib, place in ((600, "the start-up"), (640, "step 1, at 4 images of ")):
        full = samdetr(NULLCUDA_MIB=str(mib), PYTORCH_NO_CUDA_MEMORY_CACHING="0")
        failed = run("train", ["train", recipe, *options], tmp_path / "log.txt", full, wanted=1)
        check([failed])
        assert failed.output.count(f"error: cuda is out of memory in {place}") == 1
