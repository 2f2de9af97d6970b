"""perf/launch_kernels.py: every kernel's op is called, and the table that is made of Nsight Compute's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import launch_kernels
from perf.launch_kernels import COLUMNS, OPS, main, profiled, table

METRICS = list(COLUMNS.values())
KERNEL = "_roi_align_forward_kernel"


def row(number: str, kernel: str, grid: str, *values: str) -> str:
    return ",".join(f'"{value}"' for value in (number, kernel, grid, *values))


def test_every_op_is_called_at_each_size_but_the_largest_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--shapes", "small", "--times", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split(":")[0] for line in lines)) == list(OPS)


def test_the_table_has_the_medians_of_each_kernel_and_case(tmp_path: Path) -> None:
    rest = [f"{value}" for value in range(2, len(METRICS))]
    one_case, another = ("1,000", "9,000"), ("50", "70")  # with the same grid
    lines = [
        "==PROF== Connected to process 1",
        row("ID", "Kernel Name", "Grid Size", *METRICS),
        row("", "", "", "ns", *["%"] * (len(METRICS) - 1)),
        *(row("1", f"{KERNEL}(float *)", "(4, 1, 1)", ns, "50.5", *rest) for ns in one_case),
        *(row("1", KERNEL, "(4, 1, 1)", ns, "", *rest) for ns in another),
    ]
    file = tmp_path / "kernels.csv"
    file.write_text("\n".join(lines))
    head, first, second = table(file, 2).splitlines()
    assert head.split()[0] == next(iter(COLUMNS))
    assert first.split()[:6] == ["roi_align_forward_kernel", "(4,", "1,", "1)", "5.0", "50.5"]  # microseconds
    assert second.split()[4:6] == ["0.1", "-"]


def test_without_nsight_compute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_kernels, "PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profiled(tmp_path / "none.csv", 1, []) == 3
    assert "no ncu" in capsys.readouterr().out
