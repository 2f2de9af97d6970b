"""Imports point one way: this walks all of them, without importing anything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"samdetr.structures", "samdetr.errors"}
# What each part may import of the project; a package stands for everything in it.
ALLOWED = {
    "samdetr_kernels": {"samdetr_kernels"},
    "samdetr": {"samdetr.recipe", "samdetr.models", "samdetr.loss"},
    "samdetr.structures": set(),
    "samdetr.errors": set(),
    "samdetr.published": set(),
    "samdetr.toml_text": set(),
    "samdetr.recipe_messages": set(),
    "samdetr.recipe_sections": set(),
    "samdetr.recipe_model": {"samdetr.recipe_sections"},
    "samdetr.recipe": {
        "samdetr.recipe_messages",
        "samdetr.recipe_model",
        "samdetr.recipe_sections",
        "samdetr.toml_text",
    },
    "samdetr.models": {"samdetr.models", "samdetr_kernels"},
    "samdetr.loss": {"samdetr.loss", "samdetr_kernels"},
    "samdetr.data": {"samdetr.data"},
    "samdetr.visualize": {"samdetr.visualize"},
    "samdetr.engine": {
        "samdetr",
        "samdetr.published",
        "samdetr.recipe",
        "samdetr.data",
        "samdetr.models",
        "samdetr.loss",
        "samdetr.visualize",
        "samdetr.engine",
        "samdetr_kernels",  # for the recipe key that forces the references
    },
    "samdetr.cli": {"samdetr", "samdetr.recipe", "samdetr.engine", "samdetr.cli"},
    "samdetr.__main__": {"samdetr.cli"},
}
BUILDERS = {
    "samdetr.models",
    "samdetr.loss",
    "samdetr.data",
}  # these may name a recipe section in a signature
KERNEL_LIBRARIES = {"torch", "triton", "scipy"}
WITHOUT_TORCH = {
    "samdetr",
    "samdetr.errors",
    "samdetr.published",
    "samdetr.recipe",
    "samdetr.recipe_messages",
    "samdetr.recipe_model",
    "samdetr.recipe_sections",
    "samdetr.toml_text",
}


@dataclass(frozen=True)
class Import:
    module: str  # the imported module, absolute
    line: int
    for_types: bool  # inside ``if TYPE_CHECKING:``


def modules() -> dict[str, Path]:
    found = {}
    for base, package in ((ROOT, "samdetr"), (ROOT / "kernels", "samdetr_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def part_of(module: str) -> str:
    """The longest entry of ALLOWED that holds the module."""
    holders = [part for part in ALLOWED if module == part or module.startswith(f"{part}.")]
    return max(holders, key=len)


def imports_of(tree: ast.AST, module: str, is_package: bool, for_types: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _from_import(node, module, is_package, for_types)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            body = ast.Module(body=node.body, type_ignores=[])
            yield from imports_of(body, module, is_package, for_types=True)
            yield from imports_of(ast.Module(node.orelse, type_ignores=[]), module, is_package, for_types)
        else:
            yield from imports_of(node, module, is_package, for_types)


def _from_import(node: ast.ImportFrom, module: str, is_package: bool, for_types: bool) -> Iterator[Import]:
    source = node.module or ""
    if node.level:
        package = module.split(".")[: len(module.split(".")) - node.level + is_package]
        source = ".".join([*package, source]).rstrip(".")
    for alias in node.names:
        inner = f"{source}.{alias.name}"
        yield Import(inner if inner in MODULES else source, node.lineno, for_types)


MODULES = modules()
IMPORTS = {
    name: list(imports_of(ast.parse(path.read_text()), name, path.name == "__init__.py"))
    for name, path in MODULES.items()
}


def is_own(module: str) -> bool:
    return module.split(".")[0] in ("samdetr", "samdetr_kernels")


def allowed(importer: str, found: Import) -> bool:
    part = part_of(importer)
    target = part_of(found.module)
    if part == "samdetr" and not found.for_types:
        return False
    if found.for_types and part in BUILDERS and target == "samdetr.recipe":
        return True
    return target in ALLOWED[part] or (target in SHARED and part != "samdetr_kernels")


@pytest.mark.parametrize("name", MODULES)
def test_direction_of_imports(name: str) -> None:
    wrong = [
        f"{MODULES[name].relative_to(ROOT)}:{found.line}: {part_of(name)} must not import {found.module}"
        for found in IMPORTS[name]
        if is_own(found.module) and not allowed(name, found)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "samdetr_kernels"])
def test_kernels_need_torch_and_triton_only(name: str) -> None:
    roots = {found.module.split(".")[0] for found in IMPORTS[name]}
    assert roots <= KERNEL_LIBRARIES | {"samdetr_kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) in WITHOUT_TORCH | {"samdetr.cli"}])
def test_parsing_needs_no_torch(name: str) -> None:
    roots = {found.module.split(".")[0] for found in IMPORTS[name] if not found.for_types}
    light = {"pydantic", "typer", "rich", "samdetr"}
    assert roots <= light | sys.stdlib_module_names
    assert "samdetr.structures" not in {found.module for found in IMPORTS[name]}


@pytest.mark.parametrize("name", [name for name in MODULES if part_of(name) == "samdetr.models"])
def test_only_builders_of_models_name_recipe_sections(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    sections = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "samdetr.recipe"
        for alias in node.names
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    wrong = {
        function.name
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and node.id in sections and not function.name.startswith("build_")
    }
    assert not wrong


def test_every_module_is_assigned_to_a_part() -> None:
    for name in MODULES:
        assert part_of(name) != "samdetr" or name == "samdetr", f"give {name} its own line in ALLOWED"


@pytest.mark.parametrize(
    ("importer", "source", "good"),
    [
        ("samdetr.models.x", "from samdetr.engine.train import train", False),
        ("samdetr.models.x", "from samdetr.recipe import ModelSection", False),
        ("samdetr.models.x", "def f():\n    import samdetr.data.loader", False),
        ("samdetr.models.x", "from ..data import loader", False),
        ("samdetr.models.x", "if TYPE_CHECKING:\n    from samdetr.recipe import ModelSection", True),
        ("samdetr.models.x", "from samdetr.structures import Outputs\nimport samdetr_kernels", True),
        ("samdetr.models.x", "from .y import z", True),
        ("samdetr_kernels.x", "from samdetr.structures import Outputs", False),
        ("samdetr.cli.x", "from samdetr.models import build_model", False),
        ("samdetr.engine.x", "from samdetr.cli.train import train", False),
        ("samdetr", "from samdetr.models import build_model", False),
        ("samdetr.recipe", "from samdetr.engine import train", False),
    ],
)
def test_the_walk_itself(importer: str, source: str, good: bool) -> None:
    found = list(imports_of(ast.parse(source), importer, is_package=False))
    assert found
    assert all(allowed(importer, one) for one in found if is_own(one.module)) is good
