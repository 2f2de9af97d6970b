"""Fetch, for a GPU machine without a network, the wheels that its Python may lack; nothing is built there.

python perf/fetch_wheels.py --python 3.12            # here, into .wheels/
python3 -m pip install --no-index --no-deps --target SITE .wheels/*.whl    # there; then SITE into PYTHONPATH
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# what samdetr needs beyond torch, torchvision, triton, numpy, scipy, matplotlib, typer, rich and safetensors
WITH_DEPENDENCIES = ("pydantic", "pytest", "pytest-xdist")
ALONE = ("msgspec", "hotcoco", "simplejpeg", "pycocotools")  # which need numpy only
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> int:
    """Download; returns pip's exit code."""
    parser = argparse.ArgumentParser(description="Wheels for a GPU machine without a network.")
    parser.add_argument("--python", default="3.12", help="the version of its Python")
    parser.add_argument("--out", type=Path, default=Path(".wheels"), help="folder, replaced wheel by wheel")
    options = parser.parse_args()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", options.python, "--dest", str(options.out)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    calls = ([*command, *WITH_DEPENDENCIES], [*command, "--no-deps", *ALONE])
    return max(subprocess.run(call).returncode for call in calls)


if __name__ == "__main__":
    sys.exit(main())
