"""The Python that the READMEs show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = [path.relative_to(ROOT) for path in ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("file", ["README.md", "kernels/README.md"])
def test_python_blocks(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {}
    exec(compile(blocks[0], file, "exec"), names)
    trained = names.get("model")
    tensors = list(trained.parameters()) if isinstance(trained, torch.nn.Module) else [names["features"]]
    assert any(isinstance(t, torch.Tensor) and t.grad is not None and t.grad.abs().sum() > 0 for t in tensors)


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "kernels/README.md", "perf/README.md", *sorted(map(str, DOCS))]
)
def test_links_point_to_files(file: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert local or file in ("CONTRIBUTING.md", "perf/README.md")
    missing = [target for target in local if not (ROOT / file).parent.joinpath(target).exists()]
    assert missing == []
