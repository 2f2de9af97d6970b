"""Compile every kernel with every shipped tile for GPUs that this machine does not have, and tabulate the result.

    python -m samdetr_kernels.aot [--targets 80 90 100] [--only NAME] [--json FILE]

Each op module has a function ``example_launches()`` that calls its launchers with meta tensors of the shapes that
training uses; `launch.record_launches` turns these into compilations. Columns: registers a thread, spilled bytes,
shared memory a program, and the share of an SM's warps that can be resident (limited by these and by nothing else).
Exit code 1 if any kernel spills or does not compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from samdetr_kernels.launch import OPTIONS, Launch, record_launches

OPS = ("roi_align", "salient_points", "salient_cross_attention", "linear_assignment", "deformable_attention")
TARGETS = (80, 90, 100)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Limits(NamedTuple):
    """What one SM offers (CUDA C++ programming guide, table of compute capabilities)."""

    warps: int
    shared_bytes: int
    registers: int = 65536
    programs: int = 32


SM_LIMITS = {80: Limits(64, 164 << 10), 90: Limits(64, 228 << 10), 100: Limits(64, 228 << 10)}


class Report(NamedTuple):
    """What the assembler says of one kernel on one target."""

    op: str
    kernel: str
    target: int
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float


def example_launches(op: str) -> list[Launch]:
    """What the op launches at the shapes of training, without running it, with exact and with TF32 products."""
    module = importlib.import_module(f"samdetr_kernels.{op}")
    precision = torch.get_float32_matmul_precision()
    try:
        with record_launches() as launches:
            for wanted in ("highest", "high"):
                torch.set_float32_matmul_precision(wanted)
                module.example_launches()
    finally:
        torch.set_float32_matmul_precision(precision)
    return launches


def compile_launch(op: str, launch: Launch, target: int) -> Report:
    """Compile one recorded launch for compute capability ``target`` / 10. Raises what Triton raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    shared = int(compiled.metadata.shared)
    warps = int(compiled.metadata.num_warps)
    return Report(
        op=op,
        kernel=launch.kernel.__name__.strip("_"),
        target=target,
        tile=_describe(launch),
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        occupancy=_occupancy(registers, shared, warps, SM_LIMITS[target]),
    )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes as Triton's own specialisation of these arguments gives them."""
    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    fixed = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and name not in fixed):
            constants[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    return {name: signature[name] for name in names}, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread: a kernel without arrays has none unless it spills."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    numbers = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _occupancy(registers: int, shared: int, warps: int, limits: Limits) -> float:
    # registers are given to warps in units of 256; a program costs 1 KiB of shared memory beyond its own
    registers_of_program = -(-registers * 32 // 256) * 256 * warps
    programs = min(
        limits.programs,
        limits.warps // warps,
        limits.registers // max(registers_of_program, 1),
        limits.shared_bytes // (shared + 1024),
    )
    return programs * warps / limits.warps


def _describe(launch: Launch) -> str:
    types = sorted({TYPES[a.dtype] for a in launch.arguments if isinstance(a, torch.Tensor) and a.is_floating_point()})
    blocks = [f"{name}={value}" for name, value in launch.tile.blocks.items()]
    modes = [f"{name}={value}" for name, value in launch.constants.items() if name not in launch.tile.blocks]
    arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    modes += [f"{name}=None" for name, value in arguments if value is None]
    return " ".join(["/".join(types), *modes, *blocks, f"warps={launch.tile.warps}", f"stages={launch.tile.stages}"])


def reports(ops: Iterable[str], targets: Sequence[int]) -> list[Report]:
    """One report for each distinct kernel, tile and target."""
    found: dict[tuple[Any, ...], Report] = {}
    for op in ops:
        for launch in example_launches(op):
            for target in targets:
                signature, constants, attributes = _specialise(launch)
                key = (op, launch.kernel, str(signature), str(constants), str(attributes), launch.tile.warps, target)
                if key not in found:
                    found[key] = compile_launch(op, launch, target)
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m samdetr_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", nargs="+", default=list(OPS), choices=OPS, help="ops to compile")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter cannot compile")
    table = reports(options.only, options.targets)
    print("| op | kernel | sm | tile | registers | spilled bytes | shared bytes | occupancy |")
    print("|---|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row.op} | {row.kernel} | {row.target} | {row.tile} | {row.registers} | {row.spilled_bytes} "
            f"| {row.shared_bytes} | {row.occupancy:.0%} |"
        )
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in table], indent=1))
    return 1 if any(row.spilled_bytes for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
