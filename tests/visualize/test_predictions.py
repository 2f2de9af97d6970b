"""Boxes, labels and ground truth land where they belong, and a picture file is whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from samdetr.errors import SamdetrError
from samdetr.visualize.predictions import (
    CAPTION,
    GAP,
    TILE,
    GridItem,
    class_colours,
    draw_detections,
    prediction_grid,
    save_png,
)

RED = (255, 0, 0)
NO_BOXES = torch.zeros(0, 4)


def grey(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def item(image: Tensor, score: float = 0.9, target: Tensor = NO_BOXES) -> GridItem:
    return GridItem(image, boxes((2, 2, 30, 30)), ["cat"], [score], target, ["cat"] * len(target))


def test_the_box_is_drawn_on_its_first_and_last_pixels() -> None:
    image = grey(400, 500)
    drawn = draw_detections(image, boxes((100, 50, 200, 150)), ["cat"], scale=1.0, colours={"cat": RED})
    red = (drawn == torch.tensor(RED)[:, None, None]).all(dim=0)
    below_text = red[52:]
    columns, rows = below_text.any(dim=0).nonzero().flatten(), red.any(dim=1).nonzero().flatten()
    assert (int(columns[0]), int(columns[-1]), int(rows[-1])) == (100, 199, 149)
    assert red[50, 100:200].all()
    assert not red[60:140, 110:190].any()
    assert torch.equal(image, grey(400, 500))


def test_small_photos_are_enlarged_and_large_ones_are_not() -> None:
    shape = draw_detections(grey(96, 128), NO_BOXES, []).shape
    assert min(shape[-2:]) == 320
    assert tuple(shape) == (3, 320, 427)
    assert tuple(draw_detections(grey(400, 500), NO_BOXES, []).shape) == (3, 400, 500)
    assert max(draw_detections(grey(2, 1000), NO_BOXES, []).shape) == 1600
    assert tuple(draw_detections(grey(96, 128), NO_BOXES, [], scale=0.5).shape) == (3, 48, 64)


def test_boxes_are_enlarged_with_the_photo() -> None:
    drawn = draw_detections(grey(160, 160), boxes((20, 40, 100, 120)), ["cat"], colours={"cat": RED})
    red = (drawn == torch.tensor(RED)[:, None, None]).all(dim=0)
    rows = red[82:].any(dim=1).nonzero().flatten() + 82
    assert int(rows[-1]) == 239
    assert red[200, 40:42].all()
    assert red[200, 198:200].all()
    assert not red[200, 42:198].any()


def test_the_best_score_lies_on_top() -> None:
    both = boxes((50, 50, 150, 150), (50, 50, 150, 150))
    colours = {"cat": RED, "dog": (0, 0, 255)}
    for labels, scores in ((["cat", "dog"], [0.9, 0.2]), (["dog", "cat"], [0.2, 0.9])):
        drawn = draw_detections(grey(400, 400), both, labels, scores, scale=1.0, colours=colours)
        assert drawn[:, 149, 100].tolist() == list(RED)


def test_scores_are_written() -> None:
    place = boxes((50, 50, 150, 150))
    draws = [draw_detections(grey(400, 400), place, ["cat"], scores, scale=1.0) for scores in (None, [0.25], [0.75])]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert torch.equal(draws[1][:, 60:], draws[2][:, 60:])


def test_the_text_stays_inside_at_the_border() -> None:
    drawn = draw_detections(grey(320, 320), boxes((310, 0, 320, 10)), ["a long name"], colours={"a long name": RED})
    red = (drawn == torch.tensor(RED)[:, None, None]).all(dim=0)
    assert int(red.any(dim=0).nonzero()[0]) < 270
    assert red[0, 319]


@pytest.mark.parametrize(
    "bad",
    [
        (float("nan"), 0.0, 10.0, 10.0),
        (0.0, 0.0, float("inf"), float("nan")),
        (10.0, 10.0, 10.0, 20.0),
        (20.0, 20.0, 10.0, 10.0),
        (-30.0, -30.0, -10.0, -10.0),
        (500.0, 0.0, 600.0, 10.0),
    ],
)
def test_boxes_that_cannot_be_drawn_are_left_out(bad: tuple[float, float, float, float]) -> None:
    good = (50.0, 50.0, 150.0, 150.0)
    mixed = draw_detections(grey(400, 400), boxes(bad, good), ["dog", "cat"], [0.5, 0.9], colours={"cat": RED})
    alone = draw_detections(grey(400, 400), boxes(good), ["cat"], [0.9], colours={"cat": RED})
    assert torch.equal(mixed, alone)


def test_a_name_with_a_line_break_is_written_on_one_line() -> None:
    place, colours = boxes((50, 50, 150, 150)), {"a b": RED, "a\nb": RED}
    broken = draw_detections(grey(400, 400), place, ["a\nb"], colours=colours)
    assert torch.equal(broken, draw_detections(grey(400, 400), place, ["a b"], colours=colours))


def test_colours_are_distinct_and_follow_the_names() -> None:
    names = [f"class {k}" for k in range(20)]
    colours = class_colours([*names, "class 3"])
    assert list(colours) == names
    assert len(set(colours.values())) == 20
    assert class_colours([]) == {}


@pytest.mark.parametrize(
    ("image", "place", "labels", "scores", "message"),
    [
        (torch.zeros(3, 8, 8), NO_BOXES, [], None, "uint8"),
        (grey(8, 8)[:1], NO_BOXES, [], None, r"\[1, 8, 8\]"),
        (grey(8, 8), boxes((0, 0, 4, 4)), [], None, "1 boxes, 0 labels"),
        (grey(8, 8), boxes((0, 0, 4, 4)), ["cat"], [], "0 scores"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    image: Tensor, place: Tensor, labels: list[str], scores: list[float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_detections(image, place, labels, scores)


def test_the_grid_has_a_tile_for_each_of_the_first_twelve_photos(tmp_path: Path) -> None:
    step = TILE + GAP
    for count, (rows, columns) in {1: (1, 1), 3: (1, 3), 5: (2, 4), 14: (3, 4)}.items():
        prediction_grid(tmp_path / "grid.png", [item(grey(48, 64))] * count)
        grid = read(tmp_path / "grid.png")
        assert tuple(grid.shape) == (3, rows * step + GAP + CAPTION, columns * step + GAP)
    last = grid[:, 2 * step + GAP :, 3 * step + GAP :]
    assert last[:, 200, 340].tolist() == [128, 128, 128]
    assert last[:, 300, 340].tolist() == [255, 255, 255]


def test_the_grid_shows_ground_truth_as_dashes_and_hides_low_scores(tmp_path: Path) -> None:
    target = boxes((16, 16, 48, 40))
    prediction_grid(tmp_path / "hidden.png", [item(grey(60, 60), score=0.1, target=target)])
    tile = read(tmp_path / "hidden.png")[:, GAP : GAP + TILE, GAP : GAP + TILE]
    top = tile[:, 96, 96:288]
    assert set(top.flatten().tolist()) == {0, 255}
    assert 0.3 < top.float().mean() / 255 < 0.7
    changed = (tile != 128).any(dim=0)
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    assert [int(v) for v in (rows[0], rows[-1], columns[0], columns[-1])] == [96, 239, 96, 287]
    prediction_grid(tmp_path / "shown.png", [item(grey(60, 60), score=0.9, target=target)])
    shown = read(tmp_path / "shown.png")[:, GAP : GAP + TILE, GAP : GAP + TILE]
    assert (shown[:, 100, 12] != 128).any()


def test_the_caption_tells_the_threshold_and_how_many_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, write = [], ImageDraw.ImageDraw.text

    def noting(self: ImageDraw.ImageDraw, place: tuple[int, int], text: str, **options: Any) -> None:
        texts.append(text)
        write(self, place, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", noting)
    prediction_grid(tmp_path / "none.png", [item(grey(60, 60), score=0.2)] * 2)
    assert texts == ["detections with score ≥ 0.3: 0; dashed: ground truth"]
    caption = read(tmp_path / "none.png")[:, GAP + TILE :] < 128
    rows, columns = (caption.any(dim=(0, axis)).nonzero().flatten() for axis in (2, 1))
    assert 0 < int(rows[0]) < int(rows[-1]) < CAPTION + GAP - 1  # whole, and below the tiles
    assert int(columns[0]) >= GAP and int(columns[-1]) < TILE + GAP
    prediction_grid(tmp_path / "some.png", [item(grey(60, 60), score=s) for s in (0.6, 0.4)], min_score=0.5)
    assert texts[-1] == "detections with score ≥ 0.5: 1; dashed: ground truth"


def test_an_empty_grid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        prediction_grid(tmp_path / "grid.png", [])


def test_save_png_keeps_every_pixel(tmp_path: Path) -> None:
    image = torch.arange(3 * 5 * 7, dtype=torch.uint8).reshape(3, 5, 7)
    save_png(tmp_path / "a.png", image)
    assert torch.equal(read(tmp_path / "a.png"), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(path, grey(4, 4))

    def full(_: object, target: Path, **__: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SamdetrError, match=r"a\.png.*No space left"):
        save_png(path, torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert torch.equal(read(path), grey(4, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SamdetrError, match=r"nowhere/a\.png"):
        save_png(tmp_path / "nowhere" / "a.png", grey(4, 4))
