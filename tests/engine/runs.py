"""A recipe so small that a whole training run takes a second or two, and what tests ask of its runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from samdetr.engine.checkpoint.format import load_checkpoint
from samdetr.engine.train import train
from samdetr.recipe import Recipe

ROOT = Path(__file__).parents[2]
TINY = """
[run]
name = "tiny"
seed = 5
device = "cpu"

[compute]
precision = "fp32"

[data]
format = "shapes"
class_index = "contiguous"
workers = 0

[data.shapes]
train_images = 24
val_images = 6
image_size = 64
max_objects = 5

[augment]
train_sizes = [48, 56, 64]
max_size = 96
crop = 0.5
crop_resize_sizes = [64, 72]
crop_min = 40
crop_max = 64
eval_size = 64
eval_max_size = 96

[model]
num_classes = 8
num_queries = 12
smca = true
width = 32
heads = 4
encoder_layers = 1
decoder_layers = 2
ffn = 64
dropout = 0.1
padding = "masked"

[model.backbone]
name = "resnet18"
weights = "none"
norm = "batch"
frozen_stages = 0
stages = 2
width = 16

[optim]
lr = 1e-3
backbone_lr = 1e-3
clip_norm = 1.0
warmup_steps = 3
drop_epochs = [1]

[train]
epochs = 2
total_batch = 4
micro_batch = 4
log_every = 1

[eval]
batch = 4
top_k = 20
"""

META = {"recipe": {"model": {"system": "sam_detr"}}}  # what every checkpoint says at least

MakeRecipe = Callable[..., Recipe]
Lines = list[dict[str, Any]]


class Result(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Result]


def captured(command: Callable[[list[str]], object], arguments: list[str], capfd: Any) -> Result:
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught, patch("samdetr.cli.main._leave", sys.exit):  # not this process
        command(arguments)
    assert isinstance(caught.value.code, int)
    return Result(caught.value.code, *capfd.readouterr())


def signal_at(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, call: int, number: int) -> None:
    """Send this process a signal before the call of a function, counted from 1."""
    original, calls = getattr(module, function), 0

    def signalling(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, signalling)


def train_and_die(recipe: Recipe, module: str, function: str, call: int) -> None:
    """Train in a child process that is killed before the call of a function of ``samdetr.engine.<module>``."""
    torch.set_num_threads(1)
    signal_at(pytest.MonkeyPatch(), import_module(f"samdetr.engine.{module}"), function, call, signal.SIGKILL)
    train(recipe)


def start_train(recipe_file: Path, *options: str, before: str = "") -> subprocess.Popen[str]:
    """``samdetr-train`` in a process of its own. before: Python that it runs first."""
    return _start("-c", _program(before), "train", str(recipe_file), *options)


def start_in(processes: int, recipe_file: Path, *options: str, before: str = "") -> subprocess.Popen[str]:
    """``samdetr-train`` in several processes, by torchrun. before: Python that each of them runs first."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as script:
        script.write(_program(before))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), script.name)
    return _start(*launcher, "train", str(recipe_file), *options)


def _program(before: str) -> str:
    return f"import torch; torch.set_num_threads(1)\n{before}\nfrom samdetr.cli.main import main; main()"


def _start(*arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 300.0) -> Result:
    """Wait for the process; its output."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


def sentence(result: Result, code: int = 1) -> str:
    """The one sentence on stderr of a command that failed with ``code``."""
    assert result.code == code, result
    assert "Traceback" not in result.err + result.out
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    return lines[0]


def metrics(run: Path, kind: str | None = None) -> Lines:
    """The lines of metrics.jsonl, of one kind if given."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["kind"] == kind]


def losses(run: Path, keys: Sequence[str] = ("step", "epoch", "loss", "loss_ce", "grad_norm", "lr")) -> list[Any]:
    """Return the values of every logged step that are the same in two equal runs."""
    return [tuple(line[key] for key in keys) for line in metrics(run, "train")]


def weights(run: Path, link: str = "last") -> dict[str, torch.Tensor]:
    """Weights, buffers, averages and optimizer moments of a checkpoint, by part and key."""
    checkpoint = load_checkpoint((run / "checkpoints" / link).resolve(), with_optimizer=True)
    parts = {"model": checkpoint.model, "optimizer": checkpoint.optimizer, "average": checkpoint.average}
    return {f"{part}/{key}": value for part, tensors in parts.items() for key, value in tensors.items()}


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
