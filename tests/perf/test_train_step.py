"""Measurements of perf/train_step.py: counts of known calls, phases that are the step, the gate before any speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perf import sides
from perf.counting import OpCounter, count_compiled_kernels, peak_bytes
from perf.gpu_check import _summary
from perf.inputs import object_classes, training_batch
from perf.profile_step import main as profile_step
from perf.sides import build_baseline, build_model_on, build_ours
from perf.train_step import NOISE, main
from samdetr.errors import RecipeError
from samdetr.recipe import load_recipe
from samdetr_kernels import linear_assignment

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "recipes" / "r50_smca_12ep.toml"
SMALL = ("model.encoder_layers=1", "model.decoder_layers=2", "model.num_queries=20", "model.ffn=64")
SMALL += ('model.backbone.name="resnet10"', 'model.backbone.weights="none"')
ADAMW = (*SMALL, "model.dropout=0.0", "optim.lr=1e-3")
FASTER_RCNN = RECIPE.with_stem("faster_rcnn_r50_fpn_108ep")
REGIONS = (*SMALL[4:], 'model.backbone.norm="batch"', "model.regions.candidates_train=50", "model.regions.hidden=32")
SIZE = ["--batch", "2", "--height", "64", "--width", "96", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(*overrides: str) -> list[str]:
    return [word for change in (*SMALL, *overrides) for word in ("--set", change)]


def attention(x: Tensor, weight: Tensor) -> Tensor:
    """Launches addmm or mm, relu, softmax, bmm twice, sum; views and an empty tensor besides."""
    hidden = torch.nn.functional.linear(x, weight).relu()
    torch.empty(3)
    scores = torch.bmm(hidden[None], hidden[None].transpose(1, 2)).softmax(-1)
    return torch.bmm(scores, hidden[None]).sum()


def test_eager_ops_are_counted_without_views() -> None:
    x, weight = torch.randn(8, 4), torch.randn(4, 4)
    found = count_compiled_kernels(lambda: attention(x, weight))
    with OpCounter() as counter:
        attention(x, weight)
    assert dict(found.ops) == dict(counter.launches)
    assert found.ops == {"aten::mm": 1, "aten::relu": 1, "aten::_softmax": 1, "aten::bmm": 2, "aten::sum": 1}
    assert found.total() == 6 and not found.fused and not found.reads


def test_reads_and_custom_ops() -> None:
    cost, counts = torch.rand(3, 6, 4), torch.tensor([4, 2, 0])

    def call() -> None:
        indices, _ = linear_assignment(cost, counts)
        if indices.max() > 0:
            (indices > 1).nonzero()

    found = count_compiled_kernels(call)
    assert found.ops["samdetr::linear_assignment"] == 1
    assert found.total() == 5  # the op, max, two comparisons, nonzero
    assert found.reads == {"aten::_local_scalar_dense": 1, "aten::nonzero": 1}


def test_an_optimizers_own_numbers_are_no_reads() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter], foreach=False, fused=False)
    assert not count_compiled_kernels(optimizer.step).reads


@torch.no_grad()
def chain(x: Tensor, weight: Tensor) -> Tensor:
    """Four operations in a row, a product, three in a row."""
    return ((x.sin() * 2 + 1).exp() @ weight).tanh().mul(3).sum()


def test_kernels_of_a_compiled_call() -> None:
    x, weight = torch.randn(8, 4), torch.randn(4, 4)
    compiled: Callable[..., Tensor] = torch.compile(chain, fullgraph=True)
    compiled(x, weight)
    eager = count_compiled_kernels(lambda: chain(x, weight))
    assert eager.total() == 8 and not eager.fused
    for _ in range(2):  # the second count finds everything as it was
        found = count_compiled_kernels(lambda: (compiled(x, weight), compiled(x, weight), x.neg()))
        assert found.ops == {"aten::mm": 2, "aten::neg": 1}
        assert list(found.fused.values()) == [2, 2] and found.total() == 7


def test_peak_memory_is_what_lives_at_once() -> None:
    x = torch.ones(250_000)  # 1 MB

    def call() -> Tensor:
        first = x * 2
        second = first + 1
        del first
        return (second * 3).sum()

    assert peak_bytes(call, CPU) == pytest.approx(2e6, abs=1e4)


@pytest.mark.parametrize(
    ("build", "file", "changes", "moments"),
    [
        (build_ours, RECIPE, ADAMW, 2),
        (build_baseline, RECIPE, ADAMW, 2),
        (build_ours, FASTER_RCNN, REGIONS, 1),
    ],
    ids=["ours", "baseline", "faster-rcnn"],
)
def test_the_phases_are_the_step(
    build: Callable[..., sides.Side], file: Path, changes: tuple[str, ...], moments: int
) -> None:
    recipe = load_recipe(file, changes)
    classes = object_classes(recipe)
    batches = [training_batch(2, 64, 96, classes=classes, seed=seed) for seed in range(2)]
    one, other = (build(recipe, build_model_on(recipe, CPU), batches, CPU) for _ in range(2))
    marked: list[str] = []
    for turn in range(3):
        torch.manual_seed(turn)  # of what Faster R-CNN draws
        one.step(turn)
        torch.manual_seed(turn)
        other.phases(turn, marked.append)
    names = ["data", "forward", "criterion", "backward", "update", "log"][: 6 if one.name == "baseline" else 5]
    assert marked == 3 * names
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    trained = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
    held = sum(t.numel() for t in one.model.state_dict(keep_vars=True).values()) + moments * trained
    assert one.state_bytes() == pytest.approx(4 * held, rel=0.01)


def test_labels_are_of_objects() -> None:
    """With softmax, "no object" has a logit, but no box."""
    for file, logits, objects in ((RECIPE, 91, 91), (FASTER_RCNN, 81, 80)):
        recipe = load_recipe(file)
        assert (recipe.model.num_classes, object_classes(recipe)) == (logits, objects)


def test_faster_rcnn_is_measured_without_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, changes = tmp_path / "step.json", [word for change in REGIONS for word in ("--set", change)]
    arguments = [str(FASTER_RCNN), *SIZE, "--steps", "1", "--no-baseline", *changes, "--json", str(path)]
    assert main(arguments) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["problem"] is None and row["phases_ms"].keys() == {"data", "forward", "criterion", "backward", "update"}
    assert "no gate: " in capsys.readouterr().out


@pytest.mark.slow
def test_both_sides_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    assert main([str(RECIPE), *SIZE, "--steps", "2", *small(), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    differences = report["gates"][0]["relative_difference"]
    assert differences.keys() == NOISE.keys() and all(differences[name] <= NOISE[name] for name in NOISE)
    baseline, ours = report["rows"]
    assert (baseline["variant"], ours["variant"]) == ("baseline", "ours")
    for row in (baseline, ours):
        assert row["p20"] <= row["ms"] <= row["p80"] and row["repeats"] == 2
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["cpu_ms"] > 0 and row["phases_ms"]["backward"] > row["phases_ms"]["data"]
        assert row["share"] is None and row["problem"] is None and row["host_ms"] is None
        assert row["state_mb"] > 60 and row["peak_mb"] > 20  # gradients alone have 24 MB
    assert baseline["times_faster"] == 1 and ours["times_faster"] > 0
    # two layers: 8 asserts, the number of boxes, the loss, and 1 + 6 + 9 values of the log
    assert baseline["syncs"] == 8 + 1 + 1 + 1 + 6 + 9
    assert ours["syncs"] == 0 and ours["launches"] < 0.5 * baseline["launches"]
    assert report["complete"] and not report["failed"] and "useful pixels" in report["notes"][0]
    out = capsys.readouterr().out
    assert "faster" in out and "criterion" in out and "limit" in out
    assert f"{ours['images_per_s']:.0f} images/s" in _summary(report)[1]


def test_a_red_gate_prints_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = sides.train_step

    def wrong(*arguments: object, **options: object) -> Tensor:
        return right(*arguments, **options) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(sides, "train_step", wrong)
    path = tmp_path / "step.json"
    assert main([str(RECIPE), *SIZE, *small(), "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "RED loss in float32 differs by 0.001" in out and "images/s" not in out
    report = json.loads(path.read_text())
    assert report["failed"] and report["rows"] == []


def test_without_a_published_counterpart(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(RECIPE), *SIZE, "--steps", "1", *small('model.padding="masked"')]
    with pytest.raises(RecipeError, match="padding"):
        main(arguments)
    assert main([*arguments, "--no-baseline"]) == 0
    out = capsys.readouterr().out
    assert "no gate: model.padding" in out and "images/s" in out and "baseline  " not in out
    with pytest.raises(RecipeError, match=r"system is 'detr'.*there is no baseline"):
        main([str(RECIPE.with_stem("detr_r50_500ep")), *SIZE, "--steps", "1"])


@pytest.mark.slow
def test_what_is_timed_in_bf16_passes_a_gate_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(RECIPE), *SIZE, "--steps", "1", *small("compute.precision=bf16")]
    path = tmp_path / "step.json"
    assert main([*arguments, "--json", str(path)]) == 0
    exact, half = json.loads(path.read_text())["gates"]
    assert (exact["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert 1e-6 < half["relative_difference"]["loss"] <= 0.01
    assert "baseline      float32" in capsys.readouterr().out
    right = sides.train_step

    def wrong(*arguments: object, **options: object) -> Tensor:
        factor = 1.05 if options["precision"] == torch.bfloat16 else 1
        return right(*arguments, **options) * factor  # type: ignore[arg-type]

    monkeypatch.setattr(sides, "train_step", wrong)
    assert main([*arguments, "--json", str(path)]) == 1
    out = capsys.readouterr().out
    assert "RED loss in bfloat16 differs by 0.0" in out and "images/s" not in out


def test_profile_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_step([str(RECIPE), *SIZE, "--steps", "1", *small(), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 steps; " in out and "aten::convolution_backward" in out
    assert (tmp_path / "trace.json.gz").stat().st_size > 10_000


@pytest.mark.slow
def test_ways_and_sizes_each_have_a_row_and_a_profile(tmp_path: Path) -> None:
    size = ["--batch", "1", "2", "--height", "64", "--width", "96", "--device", "cpu", "--steps", "1", "--no-baseline"]
    ways = ["--ways", "eager", "graph", "--profile", str(tmp_path / "profiles"), "--json", str(tmp_path / "step.json")]
    assert main([str(RECIPE), *size, *ways, *small()]) == 1  # there is no graph without a GPU
    report = json.loads((tmp_path / "step.json").read_text())
    found = [(row["case"][-1], row["variant"], row["ms"] is not None) for row in report["rows"]]
    assert found == [
        *(("1", "ours eager", True), ("2", "ours eager", True)),
        *(("1", "ours graph", False), ("2", "ours graph", False)),
    ]
    assert "needs a GPU" in report["rows"][2]["problem"] and report["failed"] and report["complete"]
    assert len(list((tmp_path / "profiles").glob("*/profile.txt"))) == 2  # of the last way that there is
