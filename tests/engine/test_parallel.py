"""Several real processes against one: the same run, its stops, its faults, and two launchers for two machines."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from samdetr.data.loader import EvalLoader, Shard, TrainLoader
from samdetr.data.splits import build_dataset, load_splits
from samdetr.engine.coco import CocoDetections
from samdetr.engine.distributed import world as processes
from samdetr.engine.distributed.launch import processes_wanted
from samdetr.engine.distributed.parallel import wrap
from samdetr.engine.distributed.world import ALONE, World, init_world, micro_batches_of
from samdetr.engine.evaluate import gather_detections
from samdetr.engine.failures.errors import _lost_process
from samdetr.engine.run.metrics import AsyncMetrics, Step
from samdetr.engine.run.reports import StepReports
from samdetr.errors import RecipeError, SamdetrError
from samdetr.models import build_model
from samdetr.recipe import ParallelSection
from tests.engine.runs import ROOT, MakeRecipe, Result, assert_same_weights, end, losses, metrics, weights

ROUNDING = 1e-5  # relative; sums of float32 gradients in another order, through twelve steps
PUBLISHED = ("--set", "model.backbone.norm=frozen", "--set", "train.micro_batch=1")
PUBLISHED += ("--set", "optim.lr=1e-4", "--set", "optim.backbone_lr=1e-4")  # at 1e-3 differences of rounding grow


def start(command: list[str], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command, *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_in(processes: int, recipe: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    options = (*PUBLISHED, "--set", f"run.folder={folder}", "--nproc", str(processes), *options)
    return start(["samdetr", "train", str(recipe)], *options)


def finished(process: subprocess.Popen[str], timeout: float = 300.0) -> Result:
    result = end(process, timeout)
    assert result.code == 0, result.err
    return result


def wait_for_steps(run: Path, count: int) -> None:
    deadline = time.monotonic() + 180
    while not (run / "metrics.jsonl").exists() or len(metrics(run, "train")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def alone(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps with dropout and augmentation, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    finished(train_in(1, recipe_file, folder))
    return folder / "tiny" / "1"


@pytest.mark.parametrize(
    ("processes", "strategy"), [pytest.param(2, "ddp", marks=pytest.mark.long), (2, "fsdp"), (4, "ddp")]
)
def test_the_run_does_not_depend_on_the_processes(
    recipe_file: Path, tmp_path: Path, alone: Path, processes: int, strategy: str
) -> None:
    result = finished(train_in(processes, recipe_file, tmp_path, "--set", f"parallel.strategy={strategy}"))
    assert result.out.count("epoch 1/2  step 1/12") == 1
    assert f"{processes} processes ({strategy})" in result.out
    run = tmp_path / "tiny" / "1"
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 13))
    assert np.allclose(losses(run), losses(alone), rtol=ROUNDING, atol=0)
    for found, expected in zip(metrics(run, "eval"), metrics(alone, "eval"), strict=True):
        assert found["AP50"] == pytest.approx(expected["AP50"], abs=1e-4)
    one, other = weights(run), weights(alone)
    assert one.keys() == other.keys()
    for key in (key.removeprefix("model/") for key in one if key.startswith("model/")):
        squares = other.get(f"optimizer/{key}:exp_avg_sq", torch.ones(()))
        with_gradient = squares > 1e-12  # AdamW makes a step of mere rounding as large as any other
        error = ((one[f"model/{key}"] - other[f"model/{key}"]).abs() * with_gradient).max()
        assert error < 1e-4, key


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_and_in_other_numbers(recipe_file: Path, tmp_path: Path) -> None:
    four = ("--set", "train.epochs=4")
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    process = train_in(2, recipe_file, stopped, *four)
    run = stopped / "tiny" / "1"
    wait_for_steps(run, 3)
    process.send_signal(signal.SIGTERM)
    result = end(process)
    assert result.code == 143, result.err
    said = re.findall(r"stopped after step (\d+); continue with", result.out)
    assert len(said) == 1 and int(said[0]) < 24
    finished(train_in(2, recipe_file, stopped, *four, "--resume", str(run)))
    finished(train_in(2, recipe_file, straight, *four))
    assert losses(run) == losses(straight / "tiny" / "1")
    assert_same_weights(run, straight / "tiny" / "1")
    finished(train_in(1, recipe_file, straight, "--set", "train.epochs=5", "--resume", str(straight / "tiny" / "1")))
    assert [line["step"] for line in metrics(straight / "tiny" / "1", "train")] == list(range(1, 31))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_processes_train_as_one_eagerly(recipe_file: Path, tmp_path: Path, strategy: str) -> None:
    buckets = ("--set", "data.batching=buckets", "--set", "data.buckets=2", "--set", "model.dropout=0.0")
    buckets += ("--set", "optim.lr=1e-5", "--set", "optim.backbone_lr=1e-5")
    together, alone = tmp_path / "together", tmp_path / "alone"
    compiled = ("--set", "compute.compile=on", "--set", f"parallel.strategy={strategy}")
    result = finished(train_in(2, recipe_file, together, *buckets, *compiled), timeout=900)
    assert "compiled for 2 shapes" in result.out
    finished(train_in(1, recipe_file, alone, *buckets))
    assert np.allclose(losses(together / "tiny" / "1"), losses(alone / "tiny" / "1"), rtol=10 * ROUNDING, atol=0)


def process_of_rank(launcher: int, rank: int) -> int:
    """The launcher's child of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "limit"),
    [(signal.SIGKILL, 30.0), pytest.param(signal.SIGSTOP, 60.0, marks=pytest.mark.long)],
    ids=["killed", "hanging"],
)
def test_a_lost_process_ends_the_others_and_is_named(
    recipe_file: Path, tmp_path: Path, number: signal.Signals, limit: float
) -> None:
    process = train_in(2, recipe_file, tmp_path, "--set", "train.epochs=500", "--set", "parallel.timeout=8")
    run = tmp_path / "tiny" / "1"
    wait_for_steps(run, 8)
    os.kill(process_of_rank(process.pid, 1), number)
    begin = time.monotonic()
    result = end(process)
    assert time.monotonic() - begin < limit
    assert result.code == 1
    found = re.search(r"error: rank 1 stopped responding after step (\d+), in \w+: .*gloo", result.err)
    assert found, result.err
    assert int(found[1]) >= 8
    assert f"samdetr-train --resume {run}" in result.err


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([], "contact was lost for a while after step 7, in all_reduce_max: gloo: timed out; all processes respond"),
        ([2], "rank 2 stopped responding after step 7, in all_reduce_max: gloo: timed out; it hangs or has ended"),
        (
            [1, 2],
            "ranks 1, 2 stopped responding after step 7, in all_reduce_max: gloo: timed out; it hangs or has ended",
        ),
    ],
)
def test_what_is_said_of_lost_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ranks: list[int], message: str
) -> None:
    monkeypatch.setattr(World, "unresponsive_ranks", lambda self: ranks)

    def time_out(*_: object, **__: object) -> None:
        raise RuntimeError("gloo: timed out\nmore")

    monkeypatch.setattr(dist, "all_reduce", time_out)
    with pytest.raises(RuntimeError) as caught:
        World(0, 3).all_reduce_max(0)
    said = _lost_process(caught.value, World(0, 3), 7, tmp_path)
    assert said.startswith(message) and said.endswith(f"Continue with samdetr-train --resume {tmp_path}.")


def limit_of(group: dist.ProcessGroup | None) -> float:
    """Seconds that a call on CPU tensors waits in a group."""
    assert group is not None
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


@pytest.fixture
def limits(one_of_one: None, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`joined` finds the launcher of two processes, and this group where it makes one; limits that it asks for."""
    asked: list[float] = []
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda _, *, timeout, **__: asked.append(timeout.total_seconds()))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    return asked


@pytest.mark.parametrize(("device", "longer"), [("cuda", 21), ("cpu", 7)])
def test_the_host_notices_a_lost_process_before_nccl_does(limits: list[float], device: str, longer: float) -> None:
    with init_world(torch.device(device), ParallelSection(timeout=7)) as world:
        assert world.all_reduce_max(3) == 3
        assert limits == [longer] and limit_of(world.group) == 7


def test_whoever_leaves_by_an_error_waits_for_no_call(limits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Destroying a group of NCCL would wait for its calls under way, which a lost process never joins."""
    left: list[str] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("destroyed"))
    monkeypatch.setattr(processes, "_abort_process_group", lambda: left.append("aborted"))
    with init_world(torch.device("cuda"), ParallelSection()):
        pass
    with pytest.raises(SamdetrError), init_world(torch.device("cuda"), ParallelSection()):
        raise SamdetrError("rank 1 stopped responding")
    assert left == ["destroyed", "aborted"]


def test_the_groups_of_hsdp_have_the_recipes_limit(one_of_one: None, make_recipe: MakeRecipe) -> None:
    section = ParallelSection(strategy="hsdp", timeout=7)
    model = wrap(build_model(make_recipe().model), section, ALONE, torch.device("cpu"))
    mesh = next(iter(model.parameters())).device_mesh
    assert mesh.mesh_dim_names == ("machine", "process")
    assert [limit_of(group) for group in mesh.get_all_groups()] == [7, 7]


def test_the_hosts_meet_before_one_waits_for_its_device() -> None:
    class Lost(World):
        def all_reduce_max(self, value: int) -> int:
            raise RuntimeError("gloo: connection closed by peer")

    class Waiting(AsyncMetrics):
        def drain(self) -> Iterator[tuple[Step, list[float]]]:
            raise AssertionError("the device waits for the lost process")

    nothing: Any = None
    reports = StepReports(nothing, nothing, 1, nothing, metrics=Waiting())
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        reports.finish(Lost(0, 2))


@pytest.mark.slow
def test_a_bad_image_in_one_process_stops_all_with_everything_saved(recipe_file: Path, tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    options = ("--set", f"data.shapes.folder={shapes}", "--set", "data.workers=1")
    finished(train_in(1, recipe_file, tmp_path / "first", *options, "--set", "train.epochs=1"))
    victim = sorted(shapes.rglob("train*/*.png"))[13]
    victim.write_bytes(victim.read_bytes()[:200])
    result = end(train_in(2, recipe_file, tmp_path / "runs", *options))
    assert result.code == 1
    assert len(result.err.splitlines()) == result.err.count(victim.name) == 1, result.err
    run = tmp_path / "runs" / "tiny" / "1"
    steps = len(metrics(run, "train")) if (run / "metrics.jsonl").exists() else 0  # the bad image's place is by chance
    assert (run / "checkpoints" / "last").resolve().name == f"step-{steps:08d}"


@pytest.mark.slow
def test_two_launchers_share_a_run(recipe_file: Path, tmp_path: Path, alone: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7"]
    launcher += [f"--rdzv-endpoint=127.0.0.1:{port}", "-m", "samdetr", "train", str(recipe_file)]
    options = (*PUBLISHED, "--set", f"run.folder={tmp_path}", "--set", "parallel.strategy=hsdp")
    machines = [start(launcher, *options) for _ in range(2)]
    results = [finished(machine) for machine in machines]
    assert sum(result.out.count("2 processes (hsdp)") for result in results) == 1
    assert np.allclose(losses(tmp_path / "tiny" / "1"), losses(alone), rtol=ROUNDING, atol=0)


DIES_ONCE = """
import os, samdetr.engine.train as engine
from samdetr.cli.main import main
step, calls = engine.train_step, 0
def dying(*arguments, **options):
    global calls
    calls += 1
    if calls == 9 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os._exit(9)
    return step(*arguments, **options)
engine.train_step = dying
main()
"""


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_go_on_with_their_run(
    recipe_file: Path, tmp_path: Path, alone: Path
) -> None:
    """One dies in the ninth step; what was saved is not lost, and no second run begins."""
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script)]
    options = (*PUBLISHED, "--set", f"run.folder={tmp_path}", "--set", "checkpoint.every=3")
    result = finished(start(launcher, "train", str(recipe_file), *options))
    assert re.findall(r"continuing after step (\d+)", result.out) in (["6"], ["3"])
    assert [folder.name for folder in (tmp_path / "tiny").iterdir()] == ["1"]
    assert np.allclose(losses(tmp_path / "tiny" / "1"), losses(alone), rtol=ROUNDING, atol=0)


@pytest.mark.slow
def test_a_step_that_cannot_be_shared_is_refused_once(recipe_file: Path, tmp_path: Path) -> None:
    result = end(train_in(3, recipe_file, tmp_path, "--set", "train.total_batch=12", "--set", "train.micro_batch=3"))
    assert result.code == 2
    assert result.err.splitlines() == [
        "train.total_batch = 12 makes 4 micro-batches of 3 images, which 3 processes cannot share equally: "
        "set train.micro_batch to 2."
    ]
    assert micro_batches_of(World(0, 4), total_batch=12, micro_batch=3) == 1
    with pytest.raises(RecipeError, match="use another number of processes"):
        micro_batches_of(World(0, 5), total_batch=12, micro_batch=3)


@pytest.mark.parametrize(
    ("gpus", "micro", "expected"), [(0, 1, 1), (1, 4, 1), (3, 1, 2), (4, 1, 4), (8, 4, 1), (8, 1, 4)]
)
def test_as_many_processes_as_can_share_a_step(
    make_recipe: MakeRecipe, capfd: pytest.CaptureFixture[str], gpus: int, micro: int, expected: int
) -> None:
    recipe = make_recipe(f"train.micro_batch={micro}")  # of a total of 4
    assert processes_wanted(None, recipe, gpus) == expected
    said = capfd.readouterr().out
    assert said.startswith(f"using {expected} of {gpus} GPUs: ") if expected < gpus else said == ""
    assert processes_wanted(2, recipe, 0) == 2
    with pytest.raises(SamdetrError, match="--nproc 9, but there are 8 GPUs"):
        processes_wanted(9, recipe, 8)


@pytest.mark.parametrize("batching", ["random", "buckets"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_are_the_whole(make_recipe: MakeRecipe, batching: str, ranks: int) -> None:
    recipe = make_recipe("train.micro_batch=1", f"data.batching={batching}")
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    train, val = (
        build_dataset(data, splits.categories, recipe.data, recipe.augment, seed=7, training=training)
        for data, training in ((splits.train, True), (splits.val, False))
    )
    shapes = [(96, 96)] if batching == "buckets" else None

    def train_loader(share: Shard):  # type: ignore[no-untyped-def]
        return TrainLoader(
            train, total_batch=4, micro_batch=1, workers=0, seed=7, pin_memory=False, bucket_shapes=shapes, shard=share
        )

    whole = list(train_loader(Shard()).epoch(1, start_step=2))
    parts = [list(train_loader(Shard(rank, ranks)).epoch(1, start_step=2)) for rank in range(ranks)]
    for step, batches in enumerate(whole):
        shared = [parts[place % ranks][step][place // ranks] for place in range(4)]
        for one, other in zip(batches, shared, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.image_ids, other.image_ids)
        ids = [int(batch.image_ids) for batch in batches]
        assert train_loader(Shard(1, ranks)).image_ids(1, 2 + step) == ids

    loaders = [EvalLoader(val, batch=2, workers=0, pin_memory=False, shard=Shard(rank, ranks)) for rank in range(ranks)]
    counts = {len(list(loader)) for loader in loaders}
    assert counts == {-(-3 // ranks)} == {len(loader) for loader in loaders}
    seen = [int(number) for loader in loaders for batch in loader for number in batch.image_ids]
    assert set(seen) == set(splits.val.image_ids.tolist())


def test_gathered_detections_are_in_order_and_counted_once() -> None:
    class Gathering(World):
        """Its own detections, and another process's, which ran image 5 again and image 9."""

        def gather(self, rows: torch.Tensor) -> torch.Tensor:
            theirs = {1: [9, 9, 5], 2: [3, 4, 1], 3: [0.5, 0.25, 0.75], 4: [1, 1, 1]}
            self_call.append(1)
            place = len(self_call)
            if rows.dim() == 2:
                return torch.cat((rows, torch.arange(12.0, dtype=rows.dtype).view(3, 4)))
            return torch.cat((rows, torch.tensor(theirs[place if place < 3 else place - 1], dtype=rows.dtype)))

    self_call: list[int] = []
    found = CocoDetections(np.array([5, 7]), np.array([1, 2]), np.ones((2, 4)), np.array([0.75, 0.125]))
    whole = gather_detections(found, Gathering(0, 2), np.array([9, 7, 5]))
    assert whole is not None
    assert whole.image_ids.tolist() == [9, 9, 7, 5]
    assert whole.category_ids.tolist() == [3, 4, 2, 1]
    assert whole.scores.tolist() == [0.5, 0.25, 0.125, 0.75]
    assert whole.boxes[:2].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
