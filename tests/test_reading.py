"""Facts that a reader may rely on: a file a system, a forward on a page, nothing that stands twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from samdetr.models import SYSTEMS, EncoderDecoder, build_model
from samdetr.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGE = 60  # lines
BLOCK = 6  # lines that must not stand twice
PACKAGE = sorted((ROOT / "samdetr").rglob("*.py"))
SOURCES = [*PACKAGE, *sorted((ROOT / "kernels").rglob("*.py"))]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def test_every_system_has_a_file_of_its_own() -> None:
    """It is named by the recipe key that chooses the system. A decoder is that of the file, or of a simpler form."""
    homes: dict[str, set[str]] = defaultdict(set)
    for path in RECIPES:
        section = load_recipe(path).model
        with torch.device("meta"):
            model = build_model(section)
        part = model.decoder if isinstance(model, EncoderDecoder) else model
        homes[section.system].add(type(part).__module__.removeprefix("samdetr.models."))
        assert model.system.name == section.system
    assert homes.keys() == SYSTEMS.keys()
    for system, modules in homes.items():
        assert SYSTEMS[system].build.__module__ == f"samdetr.models.{system}"
        assert all(module == system or system.startswith(f"{module}_") for module in modules), (system, modules)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_functions_fit_on_a_page(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kernels = {node.name for node in functions if any("triton.jit" in ast.unparse(one) for one in node.decorator_list)}
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in functions
        if node.end_lineno and node.end_lineno - node.lineno >= (2 * PAGE if node.name in kernels else PAGE)
    }
    assert not too_long


def test_no_block_stands_twice() -> None:
    """Six lines of statements in a row, whatever their indentation."""
    places: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in PACKAGE:
        lines = code_lines(path)
        for first in range(len(lines) - BLOCK + 1):
            window = lines[first : first + BLOCK]
            places[tuple(text for _, text in window)].append(f"{path.relative_to(ROOT)}:{window[0][0]}")
    assert not {" | ".join(block): found for block, found in places.items() if len(found) > 1}


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines without blanks, comments, docstrings, imports, signatures, and lines of brackets alone."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            left_out |= set(range(node.lineno, node.body[0].lineno))
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if docstring or isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    numbered = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    return [
        (number, line)
        for number, line in numbered
        if number not in left_out and not line.startswith("#") and any(letter.isalnum() for letter in line)
    ]
