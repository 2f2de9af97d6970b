"""Imports point one way, as [tool.importlinter] in pyproject.toml says; kernels stand alone, commands need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def test_imports_point_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


def test_one_kernel_can_be_taken_alone() -> None:
    graph = grimp.build_graph("samdetr_kernels", include_external_packages=True, cache_dir=None)
    packages = {module.partition(".")[0] for module in graph.modules}
    assert packages <= {"samdetr_kernels", "torch", "triton", "scipy", *sys.stdlib_module_names}


def test_only_builders_name_sections_of_a_recipe() -> None:
    rooms = ("models", "loss", "data")
    files = [file for room in rooms for file in (ROOT / "samdetr" / room).glob("*.py") if file.name != "splits.py"]
    for file in files:  # data/splits.py reads the whole section [data]
        nodes = list(ast.walk(ast.parse(file.read_text())))
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        imports = [node for node in imports if (node.module or "").startswith("samdetr.recipe")]
        sections = {alias.asname or alias.name for node in imports for alias in node.names}
        for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
            names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
            assert function.name.startswith("build_") or not names & sections, (file, function.name)


def test_parsing_a_command_and_a_recipe_needs_no_torch() -> None:
    program = "import sys, samdetr.cli.main, samdetr.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
