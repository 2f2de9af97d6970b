"""perf/null_gpu.py: reading of counters, messages where it cannot count, and the counts of every system."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf import gpu_check, null_gpu, null_library
from perf.null_counts import Part, StepCounts
from perf.null_gpu import NOT_COUNTED, ROOT, SYSTEMS, Counted, main
from perf.null_library import FOLDER_VARIABLE, Counts, NullGpuError
from samdetr.cost.published import PUBLISHED
from tests.perf.null_gpu import from_checkout, on_null_gpu

# launches of an eager step, 2 images of 320 x 320: the larger of torch 2.11's and 2.14's counts, up to the next ten
BOUNDS = {
    "r50_12ep": 3950,
    "r50_smca_12ep": 4040,
    "r50_dc5_smca_12ep": 4040,
    "r50_ms_12ep": 4150,
    "r50_ms_smca_12ep": 4240,
    "detr_r50_500ep": 2790,
    "detr_focal_r50_12ep": 2820,
    "conditional_detr_r50_12ep": 2980,
    "dab_detr_r50_50ep": 3640,
    "smca_detr_r50_12ep": 3160,
    "smca_detr_r50_ms_50ep": 5330,
    "smca_detr_r50_ms_attention_50ep": 5010,
    "deformable_detr_r50_12ep": 3090,
    "deformable_detr_r50_ms_50ep": 3420,
}
COUNTED = """\
2\tkernel _ZN2at6native29vectorized_elementwise_kernelILi4EEEviT0_T1_
3\tkernel _ZN2at6native13reduce_kernelEv
4\ttriton triton_poi_fused_add_0
5\tcublas cublasLtMatmul
6\tcudnn
7\tcudnn BatchNorm
2\tgraph launch
900\tnodes of launched graphs
8\tcaptured kernel _ZN2at6native13reduce_kernelEv
1\tcaptured copy D2D
2\tcaptured fill
1\tcopy H2D
2\tcopy D2H pageable
9\tfill
2\twait copy D2H pageable
1\twait cudaStreamSynchronize
30\tmalloc
31\tevent record
"""


def test_counters_by_kind() -> None:
    found = Counts.parse(COUNTED)
    assert found.launches == {"kernel": 5, "triton": 4, "cublas": 5, "cudnn": 13, "graph": 2}
    assert (found.nodes, found.fills) == (900, 9)
    assert found.copies == {"H2D": 1, "D2H pageable": 2}
    assert found.waits == {"copy D2H pageable": 2, "cudaStreamSynchronize": 1}
    assert found.captured == {"kernel": 8, "copy": 1, "fill": 2}
    assert Counts.parse("") == Counts({}, 0, {}, 0, {}, {})


def step(**changes: Any) -> StepCounts:
    """Make the counts of an eager step that waits for nothing, changed."""
    counted = {"launches": 5, "kinds": {"kernel": 3, "cublas": 2}, "copies": {"H2D": 2}, "fills": 1, "waits": {}}
    counted |= {"refused": [], "nodes": 0, "host_ms": 1.25}
    row = {"recipe": "r50_12ep", "way": "eager", "precision": "bfloat16", "node_kinds": {}, "state_gib": 0.5}
    return StepCounts(**{**counted, **row, "peak_gib": 1.5, "start_up_seconds": 2.0, "phases": {}, **changes})


def test_a_step_that_waits_or_is_refused_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counted_as(row: StepCounts, **others: Any) -> int:
        monkeypatch.setattr(null_gpu, "count_all", lambda options: Counted({}, 2, "320x320", [row], **others))
        return main(["recipe.toml"])

    monkeypatch.setattr(null_library, "is_loaded", lambda: True)
    assert counted_as(step()) == 0
    assert capsys.readouterr().out == ""
    assert counted_as(step(waits={"copy D2H pageable": 3})) == 1
    assert capsys.readouterr().out == "r50_12ep waits: copy D2H pageable (3)\n"
    assert counted_as(step(refused=["refused (shared memory): a_kernel"])) == 1
    assert capsys.readouterr().out == "r50_12ep: refused (shared memory): a_kernel\n"
    assert counted_as(step(), failed={"r50_dc5_12ep": "RuntimeError: out of memory"}) == 1


def test_the_tables() -> None:
    part = Part(launches=7, kinds={}, copies={}, fills=0, waits={}, refused=[], nodes=0, host_ms=0.5)
    row = step(phases={"forward": part, "backward": part})
    assert " ".join(null_gpu.line(row).split()) == "r50_12ep eager 5 3 0 2 0 0 0 2 1 0 0 1.50 1.2 2 s"
    assert " ".join(null_gpu.phases_table([row]).split()) == "launches of forward backward r50_12ep eager 7 7"
    named = {"name": "H100", "torch": "2.14.1", "triton": "3.8.0", "cuda": "13.0", "commit": "abc"}
    head, names = null_gpu.head(Counted(named, 2, "320x320")).splitlines()
    assert head == "320x320, batch 2, as if on H100: torch 2.14.1, triton 3.8.0, cuda 13.0, commit abc"
    assert len(names) == len(null_gpu.line(row))


def test_every_system_of_the_table_is_named() -> None:
    assert {PUBLISHED[name].system for name in SYSTEMS} == {row.system for row in PUBLISHED.values()}
    assert set(BOUNDS) == {name for name in SYSTEMS if not name.startswith("faster_rcnn")}
    assert all((ROOT / "recipes" / f"{name}.toml").is_file() for name in SYSTEMS)


def test_where_there_is_no_null_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(NullGpuError, match=f"^set {FOLDER_VARIABLE} to the folder"):
        main(["recipes/r50_12ep.toml"])
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(NullGpuError, match=rf"names {tmp_path}, which holds no nullcuda/nullcuda.cpp\.$"):
        main(["recipes/r50_12ep.toml"])
    command = [sys.executable, str(ROOT / "perf" / "null_gpu.py"), "recipes/r50_12ep.toml"]
    done = subprocess.run(command, env=from_checkout(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: SAMDETR_NULL_GPU names ") and done.stderr.count("\n") == 1


def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("800", "800x", "800x1216x3"):
        with pytest.raises(SystemExit):
            main(["--size", size])
        assert f"argument --size: invalid height_and_width value: '{size}'" in capsys.readouterr().err


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a source that is soon compiled, and a cache of its own."""
    folder = tmp_path / "source"
    (folder / "nullcuda").mkdir(parents=True)
    (folder / null_library.SOURCE).write_text('extern "C" int nullcuda_reset() { return 0; }\n')
    (folder / null_library.EXPORTS).write_text("{ global: nullcuda_*; local: *; };\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(null_library, "headers", lambda torch_version: [])
    return folder


def test_the_library_is_built_once_for_its_source(sources: Path, tmp_path: Path) -> None:
    first = null_library.build(sources)
    assert first.is_relative_to(tmp_path / "cache" / "samdetr" / "null_gpu") and first.name == "libcuda.so.1"
    built = first.stat().st_mtime_ns
    assert null_library.build(sources) == first and first.stat().st_mtime_ns == built
    (sources / null_library.SOURCE).write_text('extern "C" int nullcuda_reset() { return 1; }\n')
    assert null_library.build(sources) != first
    (sources / null_library.SOURCE).write_text("no program\n")
    with pytest.raises(NullGpuError, match=r"g\+\+ could not build the null GPU: .*error"):
        null_library.build(sources)


def test_what_a_machine_may_lack(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NullGpuError, match=r"^the null GPU is built by g\+\+, which is not installed\.$"):
        null_library.build(sources)
    monkeypatch.undo()
    origin = SimpleNamespace(origin=str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(null_library, "find_spec", lambda name: origin)
    with pytest.raises(NullGpuError, match=r"^torch 2\.14\.1 came without CUDA's headers"):
        null_library.headers("2.14.1")


def test_the_environment_on_the_null_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": "/opt/lib", "HOME": "/root"}
    after = null_library.environment_on(Path("/cache/libcuda.so.1"), before)
    assert after == {
        "HOME": "/root",
        "LD_PRELOAD": "/cache/libcuda.so.1",
        "LD_LIBRARY_PATH": "/cache:/opt/lib",
        "TRITON_LIBCUDA_PATH": "/cache",
        "TRITON_CACHE_DIR": str(tmp_path / "samdetr" / "null_gpu" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "samdetr" / "null_gpu" / "inductor"),
    }
    assert null_library.environment_on(Path("/cache/libcuda.so.1"), after)["TRITON_CACHE_DIR"].endswith("triton")


def test_a_process_is_started_anew_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path("/cache/libcuda.so.1")
    monkeypatch.setattr(null_library, "source_folder", lambda: Path("/source"))
    monkeypatch.setattr(null_library, "build", lambda folder: library)
    monkeypatch.setenv("LD_PRELOAD", f"/opt/other.so:{library}")
    with pytest.raises(NullGpuError, match="did not load it"):
        null_library.start([sys.executable])


# ---- on the null GPU ----


def count(path: Path, *arguments: str, code: int = 0) -> Namespace:
    """Run the command at a small size; returns its JSON and its output."""
    command = [sys.executable, "perf/null_gpu.py", *arguments, "--batch", "2", "--size", "320x320", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=from_checkout(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return Namespace(**json.loads(path.read_text()), out=done.stdout)


def check_step(row: dict[str, Any], way: str) -> None:
    """Assert what holds for every step, however it is run."""
    assert (row["way"], row["precision"]) == (way, "bfloat16")
    assert row["waits"] == {} and row["refused"] == [], row["recipe"]
    assert row["launches"] == sum(row["kinds"].values()) and row["nodes"] == sum(row["node_kinds"].values())
    assert row["copies"]["H2D"] == 5 and not any("pageable" in name for name in row["copies"])
    assert 0.3 < row["state_gib"] < row["peak_gib"] < 3 and row["host_ms"] > 0 and row["start_up_seconds"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("null_gpu_there")
def test_every_system_waits_for_nothing_and_launches_no_more_than_before(tmp_path: Path) -> None:
    found = count(tmp_path / "eager.json")
    assert found.complete and found.failed == {} and (found.batch, found.size) == (2, "320x320")
    assert found.left_out == {name: NOT_COUNTED for name in SYSTEMS if name.startswith("faster_rcnn")}
    assert [row["recipe"] for row in found.rows] == list(BOUNDS)
    for row in found.rows:
        check_step(row, "eager")
        assert row["launches"] <= BOUNDS[row["recipe"]], row["recipe"]
        phases = row["phases"]
        assert list(phases) == ["data", "forward", "criterion", "backward", "update"]
        assert not any(part["waits"] or part["refused"] for part in phases.values())
        # the log's values are put together between the phases
        assert 0 <= row["launches"] - sum(part["launches"] for part in phases.values()) <= 10
    for name in BOUNDS:
        assert name in found.out


@pytest.mark.usefixtures("null_gpu_there")
def test_cuda_graphs_take_the_place_of_launches(tmp_path: Path) -> None:
    found = count(tmp_path / "graph.json", "recipes/r50_12ep.toml", "--graph")
    (row,) = found.rows
    check_step(row, "graph")
    assert row["kinds"]["graph"] == 2 and row["launches"] <= 20 and row["phases"] == {}
    assert 3500 < row["nodes"] <= 4520


@pytest.mark.usefixtures("null_gpu_there")
def test_waits_and_refusals_are_noticed() -> None:
    program = """
import json, torch
from perf import null_library
ones = torch.ones(4, device="cuda")
null_library.reset()
ones.sum().item()
waits = null_library.counts().waits
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        ones.sum().item()
except Exception as error:
    print(json.dumps([waits, null_library.refused(), str(error).splitlines()[0]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=on_null_gpu(), capture_output=True, text=True, check=True
    )
    waits, refused, error = json.loads(done.stdout)
    assert waits and set(waits) <= {"copy D2H", "copy D2H pageable", "cudaStreamSynchronize"}
    assert any("during a capture" in call for call in refused) and "captur" in error


@pytest.mark.long
@pytest.mark.usefixtures("null_gpu_there")
def test_a_compiled_step_and_its_graph(tmp_path: Path) -> None:
    compiled = count(tmp_path / "compiled.json", "recipes/r50_12ep.toml", "--compile")
    (row,) = compiled.rows
    check_step(row, "compiled")
    assert row["kinds"]["triton"] > 1000 and row["launches"] <= 2350 and row["phases"]["criterion"]["launches"] <= 30
    recorded = count(tmp_path / "graph.json", "recipes/r50_12ep.toml", "--compile", "--graph")
    (row,) = recorded.rows
    check_step(row, "compiled graph")
    assert row["launches"] <= 20 and row["nodes"] <= 2850


@pytest.mark.long
@pytest.mark.usefixtures("null_gpu_there")
@pytest.mark.parametrize("call", gpu_check.CALLS)
def test_the_check_of_a_gpu_goes_through_all_its_parts(call: int, tmp_path: Path) -> None:
    command = [sys.executable, "perf/gpu_check.py", "--call", str(call), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=on_null_gpu(), capture_output=True, text=True, timeout=600)
    content = json.loads((tmp_path / "results.json").read_text())
    parts = [part.name for stage in gpu_check.CALLS[call] for part in stage]
    assert {part["name"]: part["state"] for part in content["parts"]} == dict.fromkeys(parts, "ok"), done.stdout[-3000:]
    assert done.returncode == 0 and "null GPU" in content["environment"]["name"]
    steps = [
        row for bench in content["benches"].values() for row in bench.get("rows", ()) if row["direction"] == "step"
    ]
    ways = ["ours eager", "ours compiled", "ours graph"]
    assert [row["variant"] for row in steps] == (2 * ways if call == 1 else [])
    assert all(row["ms"] > 0 and row["syncs"] == 0 and row["problem"] is None for row in steps)
