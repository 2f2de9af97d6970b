"""From the model's outputs to the tables: detections, and the commands that print numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import samdetr.engine.evaluate
from samdetr.data.device import to_device
from samdetr.data.loader import EvalLoader
from samdetr.data.splits import build_dataset, load_splits
from samdetr.engine.coco import STAT_NAMES, coco_evaluate
from samdetr.engine.evaluate import best_detections, detect, device_batches, evaluate_checkpoint
from samdetr.errors import RecipeError
from samdetr.models import build_model
from samdetr.models.official import to_official
from samdetr.recipe import dump_recipe
from samdetr.structures import Batch, Categories, Outputs, Targets
from tests.engine.runs import Command, MakeRecipe, metrics

CPU = torch.device("cpu")


def test_best_detections_by_hand() -> None:
    logits = torch.tensor([[[0.0, 2.0], [1.0, -3.0], [4.0, 2.0]]])  # one image, three queries, two classes
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0], [0.9, 0.1, 0.2, 0.2]]])
    first_layer = (torch.full_like(logits, 9.0), torch.zeros_like(boxes))
    outputs = Outputs(torch.stack((first_layer[0], logits)), torch.stack((first_layer[1], boxes)))
    found = best_detections(outputs, torch.tensor([[100, 200]]), top_k=4)
    assert found.labels.tolist() == [[0, 1, 1, 0]]
    torch.testing.assert_close(found.scores, torch.tensor([[4.0, 2.0, 2.0, 1.0]]).sigmoid())
    corners = {0: [80, 30, 120, 70], 1: [0, 0, 100, 100], 2: [160, 0, 200, 20]}
    tied = [found.boxes_xyxy[0, 1].tolist(), found.boxes_xyxy[0, 2].tolist()]
    assert found.boxes_xyxy[0, 0].tolist() == pytest.approx(corners[2], abs=1e-4)
    assert sorted(tied) == [pytest.approx(corners[0], abs=1e-4), pytest.approx(corners[2], abs=1e-4)]
    assert found.boxes_xyxy[0, 3].tolist() == pytest.approx(corners[1], abs=1e-4)


def test_top_k_beyond_all_scores() -> None:
    outputs = Outputs(torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4, 4))
    found = best_detections(outputs, torch.tensor([[10, 10]] * 3), top_k=100)
    assert found.scores.shape == (3, 20)
    assert sorted(found.labels[1].tolist()) == sorted([0, 1, 2, 3, 4] * 4)


def test_boxes_of_each_image_have_its_own_size() -> None:
    outputs = Outputs(torch.zeros(1, 2, 1, 1), torch.tensor([0.5, 0.5, 1.0, 1.0]).expand(1, 2, 1, 4))
    found = best_detections(outputs, torch.tensor([[30, 40], [50, 20]]), top_k=1)
    assert found.boxes_xyxy.tolist() == [[[0, 0, 40, 30]], [[0, 0, 20, 50]]]


class Replay(nn.Module):
    """Answers each call with the next of the prepared outputs."""

    def __init__(self, outputs: Sequence[Outputs]) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        assert not self.training
        return self.outputs.pop(0)


def answers(batch: Batch, classes: int) -> Outputs:
    """The ground truth of a batch as a model's outputs."""
    labels, boxes, counts = batch.targets
    logits = torch.full((*labels.shape, classes), -20.0).scatter(2, labels[..., None], 20.0)
    padding = torch.arange(labels.shape[1]) >= counts[:, None]
    logits[padding] = -20.0
    return Outputs(logits[None], boxes[None])


@pytest.mark.parametrize(("class_index", "classes"), [("contiguous", 8), ("category_id", 12)])
def test_a_perfect_model_has_ap_1(make_recipe: MakeRecipe, class_index: str, classes: int) -> None:
    """Resizing, padding, normalised boxes, original sizes and category ids cancel out."""
    recipe = make_recipe(
        f'data.class_index="{class_index}"', f"model.num_classes={classes}", "augment.eval_size=50", "eval.batch=4"
    )
    splits = load_splits(recipe.data, num_queries=12, num_classes=classes)
    dataset = build_dataset(splits.val, splits.categories, recipe.data, recipe.augment, seed=0, training=False)
    loader = EvalLoader(dataset, batch=4, workers=0, pin_memory=False)
    model = Replay([answers(batch, classes) for batch in loader]).train()
    results = detect(model, device_batches(loader, CPU), splits.categories, top_k=20)
    assert model.training
    assert set(results.category_ids.tolist()) <= set(range(1, 9))
    assert coco_evaluate(splits.val, results, evaluator="hotcoco").stats["AP"] > 0.999


def test_best_detections_of_a_softmax() -> None:
    """Each query has one detection, of its best class; the last logit is no object and no class."""
    logits = torch.tensor([[[[2.0, 1.0, 9.0], [0.0, 5.0, 4.0], [3.0, 3.5, 0.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]]]])
    found = best_detections(Outputs(logits, boxes), torch.tensor([[100, 200]]), 2, "softmax")
    probability = logits[0, 0].softmax(-1)
    assert found.labels.tolist() == [[1, 1]]
    assert found.scores[0].tolist() == pytest.approx([probability[1, 1].item(), probability[2, 1].item()])
    assert found.boxes_xyxy.tolist() == [[[0, 0, 200, 100], [0, 0, 100, 100]]]
    everything = best_detections(Outputs(logits, boxes), torch.tensor([[100, 200]]), 100, "softmax")
    assert everything.labels.tolist() == [[1, 1, 0]]


def test_logits_without_a_category_are_left_out(tmp_path: Path) -> None:
    categories = Categories(ids=(2, 7), names=("two", "seven"), indices=(2, 7))
    logits = torch.arange(9.0).expand(1, 1, 1, 9)  # class 8, which no category has, is best
    batch = Batch(
        images=torch.zeros(1, 3, 8, 8),
        image_sizes=torch.tensor([[8, 8]]),
        targets=Targets(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 4), torch.tensor([0])),
        image_ids=torch.tensor([31]),
        original_sizes=torch.tensor([[10, 20]]),
    )
    model = Replay([Outputs(logits, torch.full((1, 1, 1, 4), 0.5))])
    results = detect(model, [batch], categories, top_k=9)
    assert (results.image_ids.tolist(), results.category_ids.tolist()) == ([31, 31], [7, 2])
    assert results.boxes[0] == pytest.approx((5, 2.5, 10, 5))


def batch_of(image_ids: list[int]) -> Batch:
    count = len(image_ids)
    return Batch(
        images=torch.zeros(count, 3, 8, 8),
        image_sizes=torch.tensor([[8, 8]] * count),
        targets=Targets(
            torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1, 4), torch.zeros(count, dtype=torch.int64)
        ),
        image_ids=torch.tensor(image_ids),
        original_sizes=torch.tensor([[10, 20 + number] for number in image_ids]),
    )


def test_batches_keep_the_order_of_the_images() -> None:
    categories = Categories(ids=(4, 9), names=("four", "nine"), indices=(0, 1))
    outputs = Outputs(torch.randn(1, 5, 3, 2), torch.rand(1, 5, 3, 4))
    image_ids = [12, 3, 7, 40, 5]

    def found(*sizes: int) -> list[dict[str, object]]:
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        parts = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        model = Replay([Outputs(outputs.logits[:, part], outputs.boxes[:, part]) for part in parts])
        loader = [batch_of(image_ids[part]) for part in parts]
        return detect(model, loader, categories, top_k=4).lines()

    lines = found(2, 2, 1)
    assert lines == found(1, 1, 1, 1, 1) == found(5)
    assert [one["image_id"] for one in lines] == [number for number in image_ids for _ in range(4)]
    scores = [one["score"] for one in lines]
    assert all(scores[at] >= scores[at + 1] for at in range(20) if at % 4 != 3)


def test_nothing_is_read_back_before_the_last_batch() -> None:
    """Reading a value back from the meta device is impossible, and is first tried after the last batch."""
    categories = Categories(ids=(4, 9), names=("four", "nine"), indices=(0, 1))
    shape = torch.zeros(1, 2, 3, 2, device="meta")
    model = Replay([Outputs(shape, shape.expand(1, 2, 3, 2).repeat(1, 1, 1, 2)) for _ in range(3)])
    seen: list[int] = []

    def batches() -> Iterator[Batch]:
        for done, image_ids in enumerate(([1, 2], [3, 4], [5, 6]), start=1):
            yield to_device(batch_of(image_ids), torch.device("meta"))
            seen.append(done)

    with pytest.raises(NotImplementedError, match="meta"):
        detect(model, batches(), categories, top_k=4)
    assert seen == [1, 2, 3] and model.outputs == []


def shown(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> dict[str, float]:
    """The numbers that evaluating a run or checkpoint prints."""
    tables: list[dict[str, float]] = []
    with monkeypatch.context() as patch:
        patch.setattr(samdetr.engine.evaluate, "print_evaluation", lambda console, stats, title: tables.append(stats))
        evaluate_checkpoint(str(path), overrides=list(overrides))
    return tables[0]


def test_a_run_is_evaluated_as_in_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_recipe: MakeRecipe
) -> None:
    lines = metrics(trained, "eval")
    best = max(lines, key=lambda line: line["AP"])
    assert lines[0]["AP"] != lines[1]["AP"]
    assert {line["evaluator"] for line in lines} == {"hotcoco"}
    for path in (trained, trained / "checkpoints" / "best"):
        for override in ((), ('eval.evaluator="pycocotools"',)):
            assert shown(monkeypatch, path, *override) == {name: best[name] for name in STAT_NAMES}
    moved = tmp_path / "somewhere else"
    shutil.copytree(trained / "checkpoints" / "last", moved)
    assert shown(monkeypatch, moved) == {name: lines[-1][name] for name in STAT_NAMES}
    # another batch size changes the padding, which padding = "masked" keeps out of the numbers
    other = shown(monkeypatch, moved, "eval.batch=1", "data.workers=1")
    assert other == pytest.approx({name: lines[-1][name] for name in STAT_NAMES}, abs=1e-4)
    with pytest.raises(RecipeError, match="is as it was trained and cannot be changed"):
        shown(monkeypatch, moved, "model.dropout=0.3")


def test_the_command_prints_tables(trained: Path, samdetr_command: Command) -> None:
    result = samdetr_command("eval", str(trained))
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == f"{(trained / 'checkpoints' / 'best').resolve()}  evaluated by hotcoco"
    assert lines[1].split() == list(STAT_NAMES)
    best = max(metrics(trained, "eval"), key=lambda line: line["AP"])
    assert lines[2].split() == ["-" if best[name] < 0 else f"{best[name]:.3f}" for name in STAT_NAMES]
    assert all(re.search(rf"\b{name}\b", result.out) for name in best["per_class"])
    other = samdetr_command("eval", str(trained), "--set", 'eval.evaluator="pycocotools"')
    assert other.out == result.out.replace("by hotcoco", "by pycocotools")


def test_a_published_checkpoint_needs_no_training_split(
    make_recipe: MakeRecipe, tmp_path: Path, samdetr_command: Command
) -> None:
    recipe = make_recipe('model.backbone.norm="frozen"')
    torch.save({"model": to_official(build_model(recipe.model))}, tmp_path / "published.pth")
    splits = load_splits(recipe.data, num_queries=12, num_classes=8)
    coco = (
        'data.format="coco"',
        f'data.val_images="{splits.val.image_root}"',
        f'data.val_annotations="{splits.val.annotation_file}"',
    )
    (tmp_path / "val_only.toml").write_text(dump_recipe(make_recipe('model.backbone.norm="frozen"', *coco)))
    result = samdetr_command("eval", "--official", str(tmp_path / "published.pth"), str(tmp_path / "val_only.toml"))
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1].split() == list(STAT_NAMES)
