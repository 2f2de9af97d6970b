"""The ahead-of-time report: compiles for GPUs that are not there, so a CPU machine sees what a GPU would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from samdetr_kernels import salient_points
from samdetr_kernels.aot import OPS, Limits, _occupancy, example_launches
from samdetr_kernels.launch import float32_precision

ROOT = Path(__file__).parents[2]
# tiles are chosen for the newest Triton; the assembler of older ones spills a few bytes of some
TOLERATED_SPILL = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64
FIRST_OF_EACH = """
import json, sys
from samdetr_kernels.aot import compile_launch, example_launches
target, *ops = sys.argv[1:]
rows = [compile_launch(op, example_launches(op)[0], int(target))._asdict() for op in ops]
print(json.dumps(rows))
"""
SPILLING = """
import importlib
from samdetr_kernels.aot import compile_launch, example_launches
launch = next(x for x in example_launches("salient_points") if "features" in x.kernel.__name__)
blocks = {**launch.tile.blocks, "BLOCK_H": 4, "BLOCK_W": 16, "BLOCK_C": 128}
tile = launch.tile._replace(blocks=blocks, warps=2)
launch = launch._replace(tile=tile, constants={**launch.constants, **blocks})
print(compile_launch("salient_points", launch, 90).spilled_bytes)
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


@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_a_kernel_of_each_op_compiles_without_spilling(target):
    rows = json.loads(compile_in_process(FIRST_OF_EACH, target, *OPS))
    assert [row["op"] for row in rows] == list(OPS)
    for row in rows:
        assert row["spilled_bytes"] <= TOLERATED_SPILL, row
        assert 16 <= row["registers"] <= 255 and 0 < row["occupancy"] <= 1, row
        assert row["shared_bytes"] <= 164 * 1024, row


def test_a_spilling_tile_is_seen():
    assert int(compile_in_process(SPILLING)) > 0


def test_examples_cover_the_dtypes_and_both_precisions():
    launches = example_launches("salient_points")
    assert {x.arguments[0].dtype for x in launches} == {torch.bfloat16, torch.float16, torch.float32}
    exact = [x.constants["PRECISION"] for x in launches if x.arguments[0].dtype == torch.float32]
    assert set(exact) == {"ieee", "tf32"}
    assert {x.constants["PRECISION"] for x in launches if x.arguments[0].dtype == torch.bfloat16} == {"ieee"}
    assert torch.get_float32_matmul_precision() == "highest" and float32_precision(torch.float32) == "ieee"


def test_occupancy_by_each_limit():
    limits = Limits(warps=64, shared_bytes=228 << 10)
    assert _occupancy(32, 0, 4, limits) == 1.0
    assert _occupancy(255, 0, 8, limits) == 8 / 64  # 256 registers x 32 threads x 8 warps is the whole file
    assert _occupancy(32, 100 << 10, 4, limits) == 2 * 4 / 64
    assert _occupancy(16, 0, 1, limits) == 32 / 64


def test_recording_runs_nothing():
    example_launches("roi_align")
    features = torch.ones(1, 2, 2, 3)
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    assert torch.allclose(salient_points(features, boxes, torch.zeros(1, 1, 1, 2)), torch.ones(1, 1, 1, 3))
