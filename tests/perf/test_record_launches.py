"""perf/record_launches.py: the committed list is what the steps compile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perf import null_library
from perf.null_library import FOLDER_VARIABLE, NullGpuError
from perf.record_launches import LIST, ROOT, main, read_recipes
from samdetr_kernels import aot
from tests.perf.null_gpu import from_checkout

REWRITE = "python perf/record_launches.py writes it anew"


def record(to: Path, *recipes: str) -> set[str]:
    """Run the command; returns the lines of its list."""
    command = [sys.executable, "perf/record_launches.py", *recipes, "--to", str(to)]
    done = subprocess.run(command, cwd=ROOT, env=from_checkout(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return lines(to)


def lines(path: Path) -> set[str]:
    """Read the compilations of a list, each as JSON with its keys sorted."""
    return {json.dumps(entry, sort_keys=True) for entry in json.loads(path.read_text())}


def test_one_recipe_a_model() -> None:
    names = ("detr_r50_500ep", "smca_detr_r50_12ep", "smca_detr_r50_50ep", "faster_rcnn_r50_c4_12ep")
    found = read_recipes([ROOT / "recipes" / f"{name}.toml" for name in names])
    assert [recipe.run.name for recipe in found] == ["detr_r50_500ep", "smca_detr_r50_12ep"]
    assert LIST == aot.LIST


def test_where_there_is_no_null_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    with pytest.raises(NullGpuError, match=f"^set {FOLDER_VARIABLE} to the folder"):
        main([])
    assert not null_library.is_loaded()


@pytest.mark.usefixtures("null_gpu_there")
def test_what_a_recipe_compiles_is_listed(tmp_path: Path) -> None:
    found = record(tmp_path / "launches.json", "recipes/r50_12ep.toml")
    assert len(found) > 20 and found <= lines(LIST), f"{LIST.name} lacks compilations of r50_12ep: {REWRITE}"


@pytest.mark.long
@pytest.mark.usefixtures("null_gpu_there")
def test_the_list_is_what_all_recipes_compile(tmp_path: Path) -> None:
    found, listed = record(tmp_path / "launches.json"), lines(LIST)
    missing, unused = len(found - listed), len(listed - found)
    assert found == listed, f"{LIST.name} lacks {missing} compilations and has {unused} that no step makes: {REWRITE}"
