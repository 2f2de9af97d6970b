"""The ahead-of-time report: kernels are compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

import samdetr_kernels
from samdetr_kernels import aot
from samdetr_kernels.aot import Compilation, Limits, Report, _fault, _occupancy, read_list

ROOT = Path(__file__).parents[2]
OPS = {name for name in samdetr_kernels.__all__ if hasattr(samdetr_kernels, f"{name}_reference")}
# tiles are chosen for the newest Triton; the assembler of older ones spills a few bytes of some
TOLERATED_SPILL = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 64
PRECISIONS = ("ieee", "tf32")
FIRST_OF_EACH = """
import json, sys
from samdetr_kernels.aot import compile_for, read_list
first = {entry.op: entry for entry in reversed(read_list())}
print(json.dumps([compile_for(entry, int(sys.argv[1]))._asdict() for entry in first.values()]))
"""
SPILLING = """
from samdetr_kernels.aot import compile_for, read_list
entry = next(entry for entry in read_list() if entry.kernel == "_salient_points_features_kernel")
blocks = {"BLOCK_H": 4, "BLOCK_W": 16, "BLOCK_C": 128}
print(compile_for(entry._replace(constants={**entry.constants, **blocks}, warps=2), 90).fault)
print(compile_for(entry._replace(constants={**entry.constants, "BLOCK_C": 3}), 90).fault)
"""
# gives launchers meta tensors and prints whether the compilation that Triton would make is in the list
LISTED = """
import importlib, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature
from samdetr_kernels.aot import Compilation, read_list

sizes, listed, backend = json.loads(sys.argv[1]), read_list(), CUDABackend(GPUTarget("cuda", 90, 32))
modules = {name: importlib.import_module(f"samdetr_kernels.{name}") for name in {entry.module for entry in listed}}
names = ("roi_align", "linear_assignment", "salient_points_kernels", "deformable_attention_kernels")
roi_align, assignment, salient_points, deformable = (modules[name] for name in names)
attention, attention_backward = (modules[f"salient_cross_attention{part}_kernels"] for part in ("", "_backward"))

def launch(kernel, grid, tile, arguments, **constants):
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, kinds, _ = bind(*arguments, **constants, **tile.blocks)
    kinds = dict(zip(values, kinds, strict=True))
    run_time = {name: kind for name, (kind, _) in kinds.items() if kind != "constexpr"}
    aligned = [name for name in run_time if kinds[name][1] == "D"]
    constants = {name: value for name, value in values.items() if name not in run_time}
    module = kernel.__module__.removeprefix("samdetr_kernels.")
    found = Compilation(module, kernel.__name__, run_time, aligned, constants, tile.warps, tile.stages)
    print(kernel.__name__, dtype, found in listed)

for module in modules.values():
    module.launch = launch
torch.set_default_device("meta")
for batch, boxes, height, width in sizes:
    for dtype in (torch.bfloat16, torch.float32):
        cells, halves = height * width, {"dtype": dtype}
        features, places = torch.empty(batch, height, width, 64, **halves), torch.empty(batch, boxes, 4)
        out = roi_align.roi_align_forward_triton(features, places)
        roi_align.roi_align_backward_triton(out, places, height, width)
        features, points = torch.empty(batch, height, width, 256, **halves), torch.empty(batch, boxes, 8, 2)
        out = salient_points.salient_points_forward_triton(features, places, points)
        salient_points.salient_points_backward_triton(out, features, places, points)
        seed, valid = torch.empty(1, dtype=torch.int64), torch.empty(batch, 2, dtype=torch.int64)
        query, key = torch.empty(batch, boxes, 8, 256, **halves), torch.empty(batch, cells, 256, **halves)
        value = torch.empty(batch, cells, 8, 32, **halves)
        inputs = query, key, value, valid, width, None, None, 1 / 16, 0.1, seed
        results = attention.salient_cross_attention_forward_triton(*inputs)
        attention_backward.salient_cross_attention_backward_triton(torch.empty_like(results[0]), *inputs, *results)
        locations, weights = torch.empty(batch, boxes, 8, 1, 4, 2), torch.empty(batch, boxes, 8, 1, 4)
        out = deformable.deformable_attention_forward_triton(value, [(height, width)], locations, weights)
        deformable.deformable_attention_backward_triton(out, value, [(height, width)], locations, weights)
    counts = torch.empty(6 * batch, dtype=torch.int64)
    assignment.linear_assignment_triton(torch.empty(6 * batch, 300, boxes // 4), counts)
"""


def compile_in_process(script: str, *arguments: str) -> str:
    """Run a script where kernels are compiled, not interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT / 'kernels'}"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("target", ["90", "120"])
def test_a_kernel_of_each_op_compiles_without_spilling(target: str) -> None:
    rows = [Report(**row) for row in json.loads(compile_in_process(FIRST_OF_EACH, target))]
    assert {row.op for row in rows} == OPS
    for row in rows:
        assert row.spilled_bytes <= TOLERATED_SPILL, row
        assert 16 <= row.registers <= 255 and 0 < row.occupancy <= 1, row
        assert row.shared_bytes <= aot.SM_LIMITS[int(target)].program_bytes, row


def test_a_spilling_and_a_wrong_tile_are_seen() -> None:
    spills, wrong = compile_in_process(SPILLING).splitlines()
    assert re.fullmatch(r"spills \d+ bytes", spills)
    assert wrong.startswith("does not compile: ")


def test_faults() -> None:
    limits = Limits(warps=64, shared_bytes=228 << 10, programs=32, program_bytes=99 << 10)
    assert _fault(0, 99 << 10, 512, limits) == ""
    assert _fault(8, 100 << 10, 0, limits) == "spills 8 bytes, a program may have 101376 bytes of shared memory"
    assert _fault(0, 0, 513, limits) == "needs 513 columns of tensor memory, a program may have 512"


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("spills 8 bytes", 1)])
def test_the_command(
    fault: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    seen: list[tuple[str, int]] = []

    def compiled(entry: Compilation, target: int) -> Report:
        seen.append((entry.op, target))
        return Report(entry.op, "kernel", target, "tile", 64, 0, 1024, 0.5, fault)

    monkeypatch.setattr(aot, "compile_for", compiled)
    file = tmp_path / "report.json"
    assert aot.main(["--targets", "86", "90", "--only", "linear_assignment", "--json", str(file)]) == code
    number = sum(entry.op == "linear_assignment" for entry in read_list())
    assert seen == [("linear_assignment", 86), ("linear_assignment", 90)] * number
    assert f"| linear_assignment | kernel | 86 | tile | 64 | 0 | 1024 | 50% | {fault} |\n" in capsys.readouterr().out
    assert [row["fault"] for row in json.loads(file.read_text())] == [fault] * 2 * number


def test_occupancy_by_each_limit() -> None:
    limits = Limits(warps=64, shared_bytes=228 << 10, programs=32, program_bytes=227 << 10)
    assert _occupancy(32, 0, 4, limits) == 1.0
    assert _occupancy(255, 0, 8, limits) == 8 / 64  # 256 registers x 32 threads x 8 warps is the whole file
    assert _occupancy(32, 100 << 10, 4, limits) == 2 * 4 / 64
    assert _occupancy(16, 0, 1, limits) == 32 / 64


def test_the_list_is_of_kernels_that_there_are() -> None:
    entries = read_list()
    assert {entry.op for entry in entries} == OPS
    for entry in entries:
        names = entry.function().arg_names
        # every argument is of one kind, in the kernel's order
        assert [name for name in names if name in entry.types] == list(entry.types)
        assert [name for name in names if name in entry.constants] == list(entry.constants)
        assert len(entry.types) + len(entry.constants) == len(names), entry
        assert set(entry.aligned) <= set(entry.types)
    exact = {(entry.op, entry.constants["PRECISION"]) for entry in entries if "PRECISION" in entry.constants}
    assert exact == {
        (op, way) for op in ("roi_align", "salient_points", "salient_cross_attention") for way in PRECISIONS
    }


def test_launches_at_any_size_are_in_the_list() -> None:
    sizes = [(16, 300, 25, 38), (1, 300, 25, 38), (4, 256, 32, 48), (2, 301, 7, 1)]
    lines = compile_in_process(LISTED, json.dumps(sizes)).splitlines()
    assert len(lines) == len(sizes) * (2 * 10 + 1)
    assert not [line for line in lines if not line.endswith(" True")]
