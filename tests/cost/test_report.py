"""Every recipe's report, and docs/models.md, which is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from samdetr.cost.meta import Size
from samdetr.cost.published import PUBLISHED
from samdetr.cost.report import Report, evaluation_sizes, make_reports
from samdetr.cost.report_text import as_json, markdown, print_tables, report_recipes
from samdetr.recipe import load_recipe

ROOT = Path(__file__).parents[2]
COUNTED_AT = (Size(800, 1066), Size(800, 1201))


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    paths = sorted((ROOT / "recipes").glob("*.toml"))
    return {report.path.stem: report for report in make_reports({path: load_recipe(path) for path in paths})}


@pytest.mark.slow
def test_parameters_are_the_published_ones_to_the_unit(reports: dict[str, Report]) -> None:
    differing = {name: report.parameters_over for name, report in reports.items() if report.parameters_over}
    released = {name for name, row in PUBLISHED.items() if row.parameters is not None}
    assert differing == dict.fromkeys(released, (0, 0))


@pytest.mark.slow
def test_published_form_is_the_published_code_s_count(reports: dict[str, Report]) -> None:
    """Within 1 % at both sizes; and what is published, a mean over other images, lies between them."""
    counted = {name: row for name, row in PUBLISHED.items() if row.counted is not None}
    assert len(counted) >= 22
    for name, row in counted.items():
        flops = reports[name].figures.flops
        assert tuple(flops) == COUNTED_AT
        ours = [count.published / 1e9 for count in flops.values()]
        assert ours == pytest.approx(row.counted, rel=0.01), name
        assert row.gflops is None or ours[0] < row.gflops < ours[1], name


@pytest.mark.slow
def test_nothing_runs_more_than_the_published_code(reports: dict[str, Report]) -> None:
    for name, report in reports.items():
        assert all(count.run <= count.published for count in report.figures.flops.values()), name
    aligned = {name for name, report in reports.items() if report.gflops.run < report.gflops.published_form}
    assert {"r50_12ep", "r50_dc5_smca_50ep", "quickstart"} <= aligned
    assert {"detr_r50_500ep", "conditional_detr_r50_12ep", "smca_detr_r50_12ep"}.isdisjoint(aligned)


def test_evaluation_sizes() -> None:
    assert evaluation_sizes(load_recipe(ROOT / "recipes/r50_12ep.toml")) == COUNTED_AT
    assert evaluation_sizes(load_recipe(ROOT / "recipes/quickstart.toml")) == ((96, 128), (85, 127))


@pytest.mark.slow
def test_json(reports: dict[str, Report]) -> None:
    row, own = json.loads(as_json([reports["r50_12ep"], reports["quickstart"]]))
    assert row["parameters"] == 58_296_458
    assert row["parameters_over_published"] == [0, 0]
    assert [count["size"] for count in row["gflops"]] == ["800x1066", "800x1201"]
    mean = sum(count["published_form"] for count in row["gflops"]) / 2
    assert row["gflops_mean"]["published_form"] == pytest.approx(mean)
    assert row["gflops_mean"]["over_published"] == pytest.approx(mean - 100)
    assert row["published"]["ap"] == 33.1
    memory = row["training_memory"]
    assert memory["total"] == sum(memory[part] for part in ("parameters", "gradients", "optimizer", "activations"))
    assert own["published"] is own["parameters_over_published"] is own["gflops_mean"]["over_published"] is None


@pytest.mark.slow
def test_table(reports: dict[str, Report], capsys: pytest.CaptureFixture[str]) -> None:
    print_tables([reports["r50_12ep"], reports["quickstart"]])
    printed = capsys.readouterr().out
    for text in (
        "GFLOPs at 800x1066 / 800x1201",
        "GFLOPs at 96x128 / 85x127",
        "58,296,458",
        "96.0/106.9",
        "94.4/105.4",
        "+1.4",
    ):
        assert text in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.slow
def test_the_document_of_models_is_the_report(reports: dict[str, Report]) -> None:
    """CONTRIBUTING.md says how to write it anew."""
    assert markdown(list(reports.values())) == (ROOT / "docs/models.md").read_text()


@pytest.mark.parametrize(("form", "start"), [("table", "GFLOPs at 64x96"), ("json", "[\n"), ("markdown", "# Models\n")])
def test_forms_and_sizes(
    form: Literal["table", "json", "markdown"], start: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "recipes/quickstart.toml"
    report_recipes({path: load_recipe(path)}, [(64, 96)], form)
    printed = capsys.readouterr().out
    assert printed.startswith(start)
    assert "64x96" in printed
    assert "1140416" in printed.replace(",", "")
