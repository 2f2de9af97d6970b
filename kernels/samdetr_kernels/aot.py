"""Compile what training steps launch for GPUs that this machine does not have, and tabulate the result.

    python -m samdetr_kernels.aot [--targets 80 90 100] [--only OP] [--json FILE]

`launches.json` lists the compilations; `perf/record_launches.py` writes it from steps. Columns: registers a thread,
spilled bytes, shared memory a program, the share of an SM's warps that can be resident (limited by these and by nothing
else), and what is wrong. Exit code 1 if a kernel spills, does not compile or asks for more memory than a program may.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from samdetr_kernels.launch import OPTIONS

LIST = Path(__file__).with_name("launches.json")
TENSOR_MEMORY = 512  # columns that a program may ask for, where there are any


class Limits(NamedTuple):
    """Resources of one SM and one program (CUDA C++ programming guide, table of compute capabilities)."""

    warps: int
    shared_bytes: int
    programs: int
    program_bytes: int  # of shared memory
    registers: int = 65536


SM_LIMITS = {
    80: Limits(64, 164 << 10, 32, 163 << 10),
    86: Limits(48, 100 << 10, 16, 99 << 10),
    89: Limits(48, 100 << 10, 24, 99 << 10),
    90: Limits(64, 228 << 10, 32, 227 << 10),
    100: Limits(64, 228 << 10, 32, 227 << 10),
    120: Limits(48, 100 << 10, 24, 99 << 10),
}


class Compilation(NamedTuple):
    """One kernel as Triton specialises it for a launch."""

    module: str  # of this package
    kernel: str
    types: dict[str, str]  # of the run-time arguments, as Triton writes them
    aligned: list[str]  # run-time arguments that are multiples of 16
    constants: dict[str, bool | int | str | None]
    warps: int
    stages: int

    @property
    def op(self) -> str:
        """Name of the op that launches it."""
        return self.module.removesuffix("_kernels").removesuffix("_backward")

    def function(self) -> Any:
        """Import the kernel. Raises AttributeError where there is none of this name."""
        return getattr(importlib.import_module(f"samdetr_kernels.{self.module}"), self.kernel)

    def describe(self) -> str:
        """Write what tells it from other compilations of its kernel: pointers' types, constants, warps, stages."""
        pointers = sorted({kind[1:] for kind in self.types.values() if kind.startswith(("*fp", "*bf"))})
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        return " ".join(["/".join(pointers), *constants, f"warps={self.warps}", f"stages={self.stages}"])


class Report(NamedTuple):
    """Row of the table: one kernel on one target; all numbers are 0 where it does not compile."""

    op: str
    kernel: str
    target: int
    tile: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float
    fault: str  # empty if there is none


def read_list(path: Path = LIST) -> list[Compilation]:
    """Read the compilations of training steps."""
    return [Compilation(**entry) for entry in json.loads(path.read_text())]


def compile_for(compilation: Compilation, target: int) -> Report:
    """Compile for compute capability ``target`` / 10; what Triton raises is the report's fault."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = compilation.function()
    signature = {name: compilation.types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in compilation.aligned}
    source = ASTSource(kernel, signature, compilation.constants, attributes)
    options = {"num_warps": compilation.warps, "num_stages": compilation.stages, **OPTIONS}
    named = (compilation.op, compilation.kernel.strip("_"), target, compilation.describe())
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    except Exception as error:
        return Report(*named, 0, 0, 0, 0.0, f"does not compile: {str(error).strip().splitlines()[0]}")
    registers, spilled = _resources(compiled.asm["cubin"])
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    limits = SM_LIMITS[target]
    fault = _fault(spilled, shared, getattr(compiled.metadata, "tmem_size", None) or 0, limits)
    return Report(*named, registers, spilled, shared, _occupancy(registers, shared, warps, limits), fault)


def _fault(spilled: int, shared: int, tensor_memory: int, limits: Limits) -> str:
    faults = []
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if shared > limits.program_bytes:
        faults.append(f"a program may have {limits.program_bytes} bytes of shared memory")
    if tensor_memory > TENSOR_MEMORY:
        faults.append(f"needs {tensor_memory} columns of tensor memory, a program may have {TENSOR_MEMORY}")
    return ", ".join(faults)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Read registers and bytes of local memory a thread; without arrays a kernel has such memory only if it spills."""
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    compilations, targets = read_list(), list(SM_LIMITS)
    ops = sorted({compilation.op for compilation in compilations})
    parser = argparse.ArgumentParser(prog="python -m samdetr_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=targets, choices=targets)
    parser.add_argument("--only", nargs="+", default=ops, choices=ops, help="ops to compile")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: unset it, the interpreter cannot compile")
    print(f"| {' | '.join(Report._fields)} |\n{'|---' * len(Report._fields)}|".replace("_", " "))
    table = []
    for compilation in compilations:
        for target in options.targets if compilation.op in options.only else []:
            row = compile_for(compilation, target)
            print("| " + " | ".join(map(str, row[:7])) + f" | {row.occupancy:.0%} | {row.fault} |", flush=True)
            table.append(row)
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in table], indent=1) + "\n")
    return int(any(row.fault for row in table))


if __name__ == "__main__":
    sys.exit(main())
