"""The measuring itself: counting, gate, failures, limits of time; and every bench once on the CPU."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perf import bench_roi_align, bench_salient_points, gate, gpu_check
from perf.gate import Args, Case, Variant, Work
from perf.gpu_check import Part, slug
from perf.gpu_check import main as check
from perf.gpu_lock import LOCK_VARIABLE, gpu_alone
from perf.harness import BOTH, FORWARD, floor_ms, main, measure, read_options
from perf.inputs import Shape, between_kinks, boxes_in_cells, cast, generator
from perf.report import Report, Row
from samdetr_kernels import linear_assignment

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--repeats", "3", "--dtypes", "bfloat16"]
BENCHES = (
    "aligner",
    "deformable_attention",
    "linear_assignment",
    "roi_align",
    "salient_cross_attention",
    "salient_points",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine threads that wait for each other take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return (x.to(weight.dtype if weight.dtype == torch.float64 else torch.float32) * weight).to(x.dtype)


def one_percent_more(x: Tensor, weight: Tensor) -> Tensor:
    return scaled(x, weight) * 1.01 if x.dtype == torch.float32 else scaled(x, weight) * 1.05


def wrong_gradient(x: Tensor, weight: Tensor) -> Tensor:
    return scaled(x, weight) + (scaled(x, weight) - scaled(x, weight).detach()) * 0.05


def wrong_in_the_last_image(x: Tensor, weight: Tensor) -> Tensor:
    out = scaled(x, weight)
    return torch.cat((out[:-1], out[-1:] * 1.1))


def unwritten(x: Tensor, weight: Tensor) -> Tensor:
    return scaled(x, weight) + torch.empty_like(x) * 0


def raises(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("no such kernel\nfor this card")


def bench(*variants: Variant, dtype: torch.dtype = torch.bfloat16) -> Callable:
    def make(seed: int) -> Args:
        random = generator(seed, CPU)
        x = torch.randn(3, 40, generator=random).to(dtype)
        return x, torch.randn(40, generator=random).to(dtype)

    case = Case(
        name="toy",
        dtype=dtype,
        make=make,
        variants=(Variant("published", scaled), *variants),
        reference=scaled,
        eager=scaled,
        work={FORWARD: Work(1e6, 0.0), BOTH: Work(2e6, 0.0)},
        wanted=(0, 1),
        shared=(1,),
        images=(0, 2),
    )
    return lambda options: [case]


def written(folder: Path) -> dict:
    return json.loads((folder / "toy.json").read_text())


def test_work_becomes_a_floor_and_shares_of_it(tmp_path, capsys):
    ceilings = {"copy_gb_per_s": 2000.0, "bfloat16_tflops": 500.0, "float32_tflops": 50.0, "tf32_tflops": 250.0}
    assert floor_ms(Work(4e9, 1.0), torch.bfloat16, ceilings) == pytest.approx(2.0)
    assert floor_ms(Work(1.0, 5e12), torch.bfloat16, ceilings) == pytest.approx(10.0)
    assert floor_ms(Work(1.0, 5e12), torch.float32, ceilings) == pytest.approx(100.0)
    assert floor_ms(Work(1.0, 5e12, vector=True), torch.bfloat16, ceilings) == pytest.approx(100.0)
    assert main("toy", bench(), [*QUICK, "--out", str(tmp_path)]) == 0
    report = written(tmp_path)
    forward, both = report["rows"]
    for row, size in ((forward, 1e6), (both, 2e6)):
        assert row["floor_ms"] == pytest.approx(size / report["ceilings"]["copy_gb_per_s"] / 1e6)
        assert row["share"] == pytest.approx(row["floor_ms"] / row["ms"])
        assert row["gb_per_s"] == pytest.approx(size / row["ms"] / 1e6)
        assert row["p20"] <= row["ms"] <= row["p80"] and row["repeats"] == 3 and row["times_faster"] == 1
    assert report["complete"] and report["environment"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "share" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [one_percent_more, wrong_gradient, wrong_in_the_last_image, unwritten])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_wrong_variant_is_caught_and_no_speed_is_printed(wrong, dtype, tmp_path, capsys):
    variants = (Variant("right", scaled, ours=True), Variant("wrong", wrong, ours=True))
    assert main("toy", bench(*variants, dtype=dtype), [*QUICK, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "RED toy  toy" in out and "wrong errs by" in out and "share" not in out
    report = written(tmp_path)
    ratios = report["gates"][0]["error_over_budget"]
    assert ratios["wrong"] > 1 and max(ratios["right"], ratios["published"]) <= 1
    assert all(row["ms"] is None and row["problem"] for row in report["rows"])


@pytest.mark.parametrize("ours", [False, True])
def test_a_failing_variant_is_named_and_the_others_are_timed(ours, tmp_path, capsys):
    variants = (Variant("breaks", raises, ours=ours), Variant("right", scaled, ours=True))
    assert main("toy", bench(*variants), [*QUICK, "--out", str(tmp_path)]) == int(ours)
    rows = {(row["variant"], row["direction"]): row for row in written(tmp_path)["rows"]}
    assert rows["breaks", FORWARD]["problem"] == "failed: RuntimeError: no such kernel for this card"
    assert rows["right", BOTH]["ms"] > 0 and rows["published", FORWARD]["ms"] > 0
    assert "breaks     failed: RuntimeError" in capsys.readouterr().out


def test_a_baseline_may_have_a_tolerance_of_its_own():
    loose = Variant("loose", one_percent_more, tolerance=0.1)
    assert main("toy", bench(loose), QUICK) == 0
    assert main("toy", bench(loose._replace(tolerance=0.01)), QUICK) == 1


def test_measure_interleaves_and_times():
    order = []

    def slow(turn: int) -> None:
        order.append(("slow", turn))
        time.sleep(0.01)

    def late(turn: int) -> None:
        order.append(("late", turn))
        if turn == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    timings = measure({"slow": slow, "late": late, "fast": lambda turn: order.append(("fast", turn))}, CPU, 4)
    assert timings["late"] == "out of memory"
    assert timings["slow"].ms >= 10 and timings["fast"].ms < timings["slow"].ms and timings["slow"].repeats == 4
    assert order[:6] == [(name, turn) for turn in (0, 1) for name in ("slow", "late", "fast")]
    assert [turn for name, turn in order if name == "fast"] == [0, 1, 2, 3, 4]


def test_compiled_variants_come_last(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    (case,) = bench(Variant("compiled", scaled, compile=True))(None)
    cases = [case._replace(compiled=True), case._replace(name="second")]
    assert main("toy", lambda options: cases, [*QUICK, "--compile", "--out", str(tmp_path)]) == 0
    rows = [(row["case"], row["variant"]) for row in written(tmp_path)["rows"] if row["direction"] == FORWARD]
    last = "toy, compiled too"
    assert rows == [("toy", "published"), ("second", "published"), (last, "published"), (last, "compiled")]


def test_no_seconds_are_no_default():
    assert read_options("toy", ["--shapes", "gpu", "--seconds", "0"]).seconds == 0
    assert read_options("toy", ["--shapes", "gpu"]).seconds == 45


def test_time_is_up(tmp_path):
    assert main("toy", bench(), [*QUICK, "--seconds", "1e-9", "--out", str(tmp_path)]) == 0
    report = written(tmp_path)
    assert report["rows"] == [] and report["notes"][0].startswith("not run")


def test_inputs():
    boxes = boxes_in_cells(generator(0, CPU), Shape(25, 38, 2, 500))
    assert ((boxes[..., 2:] - boxes[..., :2]) > 0).all()
    position = between_kinks(torch.linspace(-2, 3, 1001))
    assert ((position - position.round()).abs() >= 0.049).all()
    number, tensor = cast((3, torch.ones(2, dtype=torch.bfloat16)), torch.float64)
    assert number == 3 and tensor.dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("op", BENCHES)
def test_bench_runs_and_writes_its_json(op, tmp_path):
    cases = importlib.import_module(f"perf.bench_{op}").cases
    assert main(op, cases, [*QUICK[:4], "--shapes", "small", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{op}.json").read_text())
    assert report["complete"] and not report["failed"] and report["rows"] and not report["notes"]
    assert all(row["problem"] is None and row["ms"] > 0 for row in report["rows"])
    assert {"published", "ours"} <= {row["variant"].split()[0] for row in report["rows"]}
    for judged in report["gates"]:
        assert all(ratio <= 1 for ratio in judged["error_over_budget"].values())


def floors(bench: str, dtype: torch.dtype) -> tuple[Case, Work, Work]:
    """Return the first case of a bench at the training shapes of a CPU, and its work in both directions."""
    options = read_options(bench, ["--device", "cpu", "--shapes", "cpu", "--dtypes", str(dtype).removeprefix("torch.")])
    case = next(iter(importlib.import_module(f"perf.bench_{bench}").cases(options)))
    return case, case.work[FORWARD], case.work[BOTH]


def test_the_floor_counts_each_tensor_as_often_as_it_must_move():
    # batch 2, map 25 x 38, 300 boxes: bytes in bf16 of map, bins, content, and of 64-channel map and bins
    cells, boxes = 2 * 25 * 38, 2 * 300
    whole, content, bins = 512 * cells, 512 * boxes * 8, 128 * boxes * 49
    small = 16 * boxes + 8 * boxes * 8  # boxes and points in fp32
    _, forward, both = floors("roi_align", torch.bfloat16)
    assert forward.bytes == 128 * cells + bins + 16 * boxes and both.bytes == 2 * forward.bytes
    assert both.operations == 2 * forward.operations
    _, points, points_both = floors("salient_points", torch.bfloat16)
    assert points.bytes == whole + content + small
    assert points_both.bytes == 3 * whole + 2 * content + 2 * small + 8 * boxes * 8
    assert points_both.operations == 3 * points.operations
    case, forward, both = floors("aligner", torch.bfloat16)
    sizes = Shape(25, 38, 2), case.make(0)[1]
    align = bench_roi_align.forward_work(*sizes, 64, torch.bfloat16)
    points = bench_salient_points.forward_work(*sizes, 8, 256, torch.bfloat16)
    assert forward.bytes == whole + content + bins + small
    assert both.bytes == 3 * whole + 2 * content + 3 * bins + 2 * small + 8 * boxes * 8
    projection = 2 * cells * 256 * 64
    assert forward.operations == align.operations + points.operations + projection
    assert both.operations == 2 * align.operations + 3 * points.operations + 3 * projection


def test_the_floor_of_the_attentions():
    case, forward, both = floors("deformable_attention", torch.bfloat16)
    value, _, locations, weights = case.make(0)
    inputs, result = 2 * value.numel() + 4 * locations.numel() + 4 * weights.numel(), 2 * 2 * 300 * 256
    assert (forward.bytes, both.bytes) == (inputs + result, 3 * inputs + 2 * result)
    assert both.operations == 4 * forward.operations == 32 * weights.numel() * 32
    case, forward, both = floors("salient_cross_attention", torch.bfloat16)
    query, key, value, sizes = case.make(0)[:4]
    inputs, result = 2 * (query.numel() + key.numel() + value.numel()), 2 * 2 * 300 * 256
    assert (forward.bytes, both.bytes) == (inputs + result, 3 * inputs + 2 * result)
    pairs = 2 * 300 * 8 * sizes.prod(1).sum().item()
    assert (forward.operations, both.operations) == (pairs * (256 + 32), pairs * (4 * 256 + 3 * 32))


def test_an_assignment_that_is_a_little_dearer_is_red(monkeypatch):
    bench = importlib.import_module("perf.bench_linear_assignment")
    costs = bench.realistic_costs

    def with_twin(random: torch.Generator, *sizes: object) -> tuple[Tensor, Tensor]:
        cost, counts = costs(random, *sizes)
        cost[:, 1] = cost[:, 0] + 2e-4
        cost[:, :2] -= 500  # the pair holds the cheapest queries of all targets, one of them left over
        return cost, counts.clamp(max=1)

    def dearer(cost: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        indices, bad = linear_assignment(cost, counts)
        return torch.where(indices == 0, 1, indices), bad

    monkeypatch.setattr(bench, "realistic_costs", with_twin)
    options = read_options("linear_assignment", ["--device", "cpu", "--shapes", "small"])
    case = next(iter(bench.cases(options)))
    variants = (Variant("ours", linear_assignment, ours=True), Variant("dearer", dearer, ours=True))
    found = gate.check(case._replace(variants=variants), case.make(0))
    assert found["ours"] <= 1 < found["dearer"]


HANG = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""
WRITE = """
import pathlib, sys
from perf.report import Report
Report("written", {}).write(pathlib.Path(sys.argv[1]))
print("so far so good")
"""
FAIL = "import sys; print('before the end'); sys.exit(3)"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def packed(record: Path) -> dict[str, str]:
    with tarfile.open(record / "files.tar.gz") as files:
        found = {entry.name: files.extractfile(entry) for entry in files.getmembers() if entry.isfile()}
        return {name: file.read().decode() for name, file in found.items() if file}


def test_a_part_that_hangs_or_fails_costs_only_itself(tmp_path, capsys):
    stages = (
        (Part("hangs", ("-c", HANG), 1.5), Part("fails", ("-c", FAIL), 20)),
        (Part("on a gpu", ("-c", ""), 20, gpu_only=True),),
        (Part("ends well", ("-c", WRITE, "{out}"), 30),),
    )
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--change", "try", "--prediction", "it is fast"]
    assert check(arguments, {1: stages}) == 1
    content = json.loads((tmp_path / "results.json").read_text())
    states = {part["name"]: part["state"] for part in content["parts"]}
    assert states == {"hangs": "timed out", "fails": "failed", "ends well": "ok"}
    assert content["parts"][1]["exit_code"] == 3 and content["benches"]["written"]["op"] == "written"
    hanging = re.search(r"^child (\d+)$", content["parts"][0]["tail"], re.MULTILINE)
    assert hanging and not alive(int(hanging[1]))
    assert "KeyboardInterrupt" in content["parts"][0]["tail"]  # where it hung
    readme = (tmp_path / "README.md").read_text()
    assert "it is fast" in readme and "timed out" in readme and torch.__version__.split("+")[0] in readme
    logs = packed(tmp_path)
    assert logs.keys() == {"logs/hangs.txt", "logs/fails.txt", "logs/ends-well.txt"}
    assert "before the end" in logs["logs/fails.txt"] and "before the end" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "files.tar.gz", "results.json"]


def test_the_parts_of_a_stage_run_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    meet = "import pathlib, sys, time; here, other = map(pathlib.Path, sys.argv[1:]); here.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)"
    names = (str(tmp_path / "one"), str(tmp_path / "two"))
    stage = (Part("one", ("-c", meet, *names), 20), Part("two", ("-c", meet, *reversed(names)), 20))
    assert check(["--device", "cpu", "--out", str(tmp_path / "record")], {1: (stage,)}) == 0


def test_tests_that_are_all_skipped_are_not_ok(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    file = tmp_path / "test_it.py"
    skipped = "@pytest.mark.skipif(True, reason='no GPU')\ndef test_one(): pass"
    file.write_text(f"import pytest\n{skipped}\ndef test_two(): pass\n")
    names = ("test_one", "test_two")
    parts = (gpu_check._pytest(f"tests {name}", 60, 0, f"{file}::{name}")._replace(gpu_only=False) for name in names)
    assert check(["--device", "cpu", "--out", str(tmp_path / "record")], {1: [(part,) for part in parts]}) == 1
    content = json.loads((tmp_path / "record" / "results.json").read_text())
    assert [part["state"] for part in content["parts"]] == ["nothing ran", "ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
def test_without_a_gpu_nothing_begins(tmp_path):
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        check(["--out", str(tmp_path / "record")])
    assert not (tmp_path / "record").exists()


def test_the_deadline_of_the_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    stages = ((Part("long", ("-c", "import time; time.sleep(60)"), 50),), (Part("after it", ("-c", ""), 50),))
    begin = time.monotonic()
    assert check(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0.2"], {1: stages}) == 1
    assert time.monotonic() - begin < 12
    content = json.loads((tmp_path / "results.json").read_text())
    assert [part["state"] for part in content["parts"]] == ["timed out", "not run"]
    assert "not run" in (tmp_path / "README.md").read_text() and "not run" in capsys.readouterr().out


def test_the_summary_names_the_baseline_and_its_dtype():
    report = Report("toy", {}, complete=True)
    for dtype in ("bfloat16", "float32"):
        report.rows += [
            Row("toy", "case", dtype, FORWARD, "published (fp32)", ms=8.0, times_faster=1.0),
            Row("toy", "case", dtype, FORWARD, "ours", ms=2.0, times_faster=4.0),
        ]
    assert gpu_check._summary(asdict(report)) == [
        "toy",
        "  case bfloat16 forward: published (fp32) 8 ms -> ours 2 ms, 4.00x",
        "  case float32 forward: published (fp32) 8 ms -> ours 2 ms, 4.00x",
    ]
    step = [
        Row("toy", "step", "float32", "step", "baseline", ms=9.0),
        Row("toy", "step", "bfloat16", "step", "ours", ms=3.0, times_faster=3.0),
        Row("toy", "larger step", "bfloat16", "step", "ours eager", ms=8.0),
        Row("toy", "larger step", "bfloat16", "step", "ours graph", ms=4.0),
    ]
    summary = gpu_check._summary(asdict(Report("toy", {}, rows=step, complete=True)))
    assert summary[1:] == [
        "  step bfloat16 step: baseline (float32) 9 ms -> ours 3 ms, 3.00x",
        "  larger step bfloat16 step: ours eager 8 ms",
        "  larger step bfloat16 step: ours graph 4 ms",
    ]


def test_a_record_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    assert check(arguments, {1: ((Part("good", ("-c", ""), 30),),)}) == 0
    with pytest.raises(SystemExit, match="holds a record already"):
        check(arguments, {1: ()})


def test_a_part_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    with pytest.raises(SystemExit, match=r"no part of call 2 on cpu has 'nosuch' in its name: .*bench roi_align"):
        check(["--device", "cpu", "--call", "2", "--only", "nosuch", "--out", str(tmp_path / "record")])
    assert not (tmp_path / "record").exists()


def test_a_machine_that_cannot_be_described_is_an_error(monkeypatch):
    monkeypatch.setattr(gpu_check, "ENVIRONMENT_SECONDS", 0.01)
    with pytest.raises(SystemExit, match="could not be described: TimeoutExpired"):
        gpu_check.describe_machine("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA GPU")
@pytest.mark.parametrize("tool", ["bench", "launch_kernels", "train_step"])
def test_without_a_gpu_the_tools_say_so(tool, capsys):
    run = partial(main, "toy", bench()) if tool == "bench" else importlib.import_module(f"perf.{tool}").main
    recipe = ["recipes/r50_12ep.toml"] if tool == "train_step" else []
    with pytest.raises(SystemExit) as left:
        run([*recipe, "--device", "cuda"])
    assert left.value.code == 2 and "torch finds no CUDA GPU here" in capsys.readouterr().err


def test_the_lock_may_be_nested_and_ends_with_its_context(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCK_VARIABLE, str(tmp_path / "lock"))
    with gpu_alone(), gpu_alone():
        child = os.fork()  # has the file too
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with (tmp_path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another holds it
            with pytest.raises(BlockingIOError), (tmp_path / "lock").open("w") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_holds_the_gpu_is_shared_and_what_is_timed_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "describe_machine", lambda device: {"name": "test"})
    said = "import pathlib, sys, time; time.sleep(1.5); pathlib.Path(sys.argv[1]).write_text(str(time.monotonic()))"
    timed = "import pathlib, sys, time; from perf.gpu_lock import gpu_alone\n"
    timed += "with gpu_alone(): pathlib.Path(sys.argv[1]).write_text(str(time.monotonic()))"
    ends = [tmp_path / name for name in ("one", "two", "timed")]
    holding = [Part(path.name, ("-c", said, str(path)), 30, holds_gpu=True) for path in ends[:2]]
    stage = (*holding, Part("timed", ("-c", timed, str(ends[2])), 30))
    assert check(["--device", "cpu", "--out", str(tmp_path / "record")], {1: (stage,)}) == 0
    one, two, after = (float(path.read_text()) for path in ends)
    assert abs(one - two) < 1.4 and after >= max(one, two)


@pytest.mark.parametrize("call", gpu_check.CALLS)
def test_all_parts_fit_the_deadline(call):
    stages = gpu_check.CALLS[call]
    limits = sum(max(part.seconds for part in stage) for stage in stages) + gpu_check.ENVIRONMENT_SECONDS
    assert limits < 60 * gpu_check.MINUTES[call]
    names = [slug(part.name) for stage in stages for part in stage]
    assert len(set(names)) == len(names)


def test_the_files_of_the_check_exist():
    words = [word for stages in gpu_check.CALLS.values() for stage in stages for part in stage for word in part.command]
    files = [word for word in words if word.endswith((".py", ".toml"))]
    assert len(files) > 15 and all((gpu_check.ROOT / file).is_file() for file in files)


def test_a_bench_runs_from_a_checkout_as_a_part(tmp_path):
    assert check(["--device", "cpu", "--out", str(tmp_path), "--call", "2", "--only", "bench linear_assignment"]) == 0
    bench = json.loads((tmp_path / "results.json").read_text())["benches"]["linear_assignment"]
    assert bench["complete"] and bench["environment"]["device"] == "cpu"
