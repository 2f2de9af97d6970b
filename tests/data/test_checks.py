"""Every kind of finding with its exact count."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samdetr.data.checks import BOX_LEVEL, MEANINGS, CheckReport, check_data, is_unsafe_name, raise_for_errors
from samdetr.data.datasets import CocoData, read_coco
from samdetr.errors import DataError

IMAGES = [(1, "a.png", 40, 30), (2, "b.png", 40, 30)]


def check(data: CocoData, on_bad: str = "error", num_queries: int = 10, against=None) -> CheckReport:
    """The report without what a split lacking objects says of itself, which has its own tests."""
    report = check_data(data, num_queries=num_queries, on_bad=on_bad, against=against)[1]
    return replace(report, findings=tuple(f for f in report.findings if f.kind != "no_objects"))


def counts(report: CheckReport) -> dict[str, int]:
    return {finding.kind: finding.count for finding in report.findings}


def names_of(data: CocoData, *ids: int) -> dict[int, str]:
    """The names that the data has for these categories."""
    return {number: name for number, name in zip(data.category_ids, data.category_names, strict=True) if number in ids}


def test_sound_data_has_no_findings(make_coco) -> None:
    boxes = [(1, 1, 1, (0, 0, 40, 30)), (2, 1, 2, (0.1, 0.2, 39.9, 29.8)), (0, 2, 2, (39, 29, 1, 1))]
    data = make_coco(IMAGES, boxes, crowds=(2,))
    same, report = check_data(data, num_queries=2, on_bad="drop", against=names_of(data, 1, 2))
    assert (report.findings, report.errors(), report.rows()) == ((), 0, [])
    assert same.ann_ids.tolist() == [1, 2, 0]
    raise_for_errors([report])


BAD_BOXES = [
    (1, (5, 5, 0, 4), "box_degenerate"),
    (2, (5, 5, 4, 0), "box_degenerate"),
    (3, (5, 5, -3, 4), "box_degenerate"),
    (4, (40, 5, 0.5, 4), "box_degenerate"),  # inside the tolerance, and gone after clamping
    (5, (-0.5, 5, 0.5, 4), "box_degenerate"),
    (6, (-1.5, 5, 9, 4), "box_negative"),
    (7, (5, -9, 4, 20), "box_negative"),
    (8, (-3, 5, 90, 4), "box_negative"),
    (9, (35, 5, 6.5, 4), "box_outside"),
    (10, (5, 25, 4, 6.5), "box_outside"),
    (11, (50, 40, 4, 6), "box_outside"),
    (12, (-1, 5, 9, 4), "box_clamped"),
    (13, (35, 5, 6, 4), "box_clamped"),
    (14, (5, 29.5, 4, 1.5), "box_clamped"),
    (15, (5, 5, 4, 4), None),
    (16, (30.1, 5, 9.900000001, 4), None),
]


@pytest.mark.parametrize(("number", "box", "kind"), BAD_BOXES)
def test_kind_of_a_box(make_coco, number: int, box: tuple[float, ...], kind: str | None) -> None:
    report = check(make_coco(IMAGES, [(number, 2, 1, box)]))
    assert counts(report) == ({} if kind is None else {kind: 1})
    assert report.errors() == (0 if kind in (None, "box_clamped") else 1)
    for finding in report.findings:
        assert f"annotation {number} of 'b.png' (40 x 30)" in finding.examples[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(make_coco, value: float) -> None:
    data = make_coco(IMAGES, [(i, 1, 1, (1, 1, 5, 5)) for i in range(5)])
    boxes = data.ann_boxes.copy()
    boxes[[0, 1, 2, 3], [0, 1, 2, 3]] = value
    data = replace(data, ann_boxes=boxes)
    assert counts(check(data)) == {"box_not_finite": 4}
    kept, _ = check_data(data, num_queries=10, on_bad="drop", against=None)
    assert kept.ann_ids.tolist() == [4]


def test_sum_that_overflows_is_not_finite(make_coco) -> None:
    assert counts(check(make_coco(IMAGES, [(1, 1, 1, (1.7e308, 1, 1.7e308, 5))]))) == {"box_not_finite": 1}


def test_all_box_findings_together_and_dropped(make_coco) -> None:
    data = make_coco(IMAGES, [(number, 1, 1, box) for number, box, _ in BAD_BOXES])
    want = {"box_degenerate": 5, "box_negative": 3, "box_outside": 3, "box_clamped": 3}
    report = check(data, num_queries=100)
    assert (counts(report), report.errors()) == (want, 11)
    kept, report = check_data(data, num_queries=100, on_bad="drop", against=None)
    assert (counts(report), report.errors()) == (want, 0)
    assert {f.kind: f.severity for f in report.findings} == {
        kind: "note" if kind == "box_clamped" else "dropped" for kind in want
    }
    assert kept.ann_ids.tolist() == [12, 13, 14, 15, 16]
    assert len(kept.ann_boxes) == len(kept.ann_area) == len(kept.ann_crowd) == len(kept.ann_image_id) == 5
    assert len(data.ann_ids) == 16
    raise_for_errors([report])


def test_references(make_coco) -> None:
    box = (1, 1, 5, 5)
    data = make_coco(
        IMAGES,
        [(5, 1, 1, box), (5, 2, 1, box), (5, 2, 2, box), (6, 3, 1, box), (7, 1, 8, box), (8, 1, 2, box)],
        categories=(1, 2, 2),
    )
    want = {
        "category_duplicate_id": 1,
        "annotation_duplicate_id": 2,
        "image_unknown": 1,
        "category_unknown": 1,
    }
    assert counts(check(data)) == want
    assert counts(check(data, against=names_of(data, 2))) == {**want, "category_not_in_train": 3}
    report = check(data, "drop", against=names_of(data, 2))
    assert report.errors() == 8  # wrong references are no bad boxes: nothing is dropped for them
    by_kind = {finding.kind: finding for finding in report.findings}
    assert "annotation 6 of image id 3 (unknown)" in by_kind["image_unknown"].examples[0]
    assert "category id 8" in by_kind["category_unknown"].examples[0]


def test_images(make_coco) -> None:
    data = make_coco([(1, "a.png", 40, 30), (1, "b.png", 40, 30), (3, "c.png", 40, 30), (1, "d.png", 40, 30)])
    report = check(data)
    assert counts(report) == {"image_duplicate_id": 2}
    assert report.findings[0].examples == (
        "image id 1: 'b.png' and 'a.png'",
        "image id 1: 'd.png' and 'a.png'",
    )
    sizes = replace(data, image_ids=np.arange(4), widths=np.array([0, 40, -1, 40]), heights=np.array([1, 0, 5, 30]))
    assert counts(check(sizes)) == {"image_size": 3}


def test_image_without_a_size_does_not_blame_its_boxes(make_coco) -> None:
    data = make_coco(IMAGES, [(1, 1, 1, (5, 5, 10, 10)), (2, 1, 1, (5, 5, 0, 10))])
    report = check(replace(data, widths=np.array([0, 40])))
    assert counts(report) == {"image_size": 1, "box_degenerate": 1}


def test_missing_files(make_coco) -> None:
    images = [(i, f"{'sub/' if i % 2 else ''}{i}.png", 4, 4) for i in range(30)]
    data = make_coco(images, write=["0.png", "sub/1.png", "2.png"])
    (data.image_root / "4.png").mkdir()
    report = check(data, "drop")
    assert (counts(report), report.errors()) == ({"file_missing": 27}, 27)
    assert len(report.findings[0].examples) == 10
    assert report.findings[0].examples[0] == str(data.image_root / "sub/3.png")
    with pytest.raises(DataError, match=r"3\.png[\s\S]*\.\.\. and 17 more\nCorrect the files or the recipe\.$"):
        raise_for_errors([report])


EVIL = [
    "/etc/passwd",
    "../a.png",
    "sub/../../a.png",
    "..",
    "~/a.png",
    "~root/a.png",
    "sub\\a.png",
    "..\\a.png",
    "a\0.png",
    "a\n.png",
    "http://host/a.png",
    "file:///etc/passwd",
    "\uff0e\uff0e/a.png",  # full-width dots
    "\u2025/a.png",  # two dot leader
    "sub\uff0fa.png",  # full-width slash
    "sub\uff3ca.png",  # full-width backslash
    "a\u202egnp.exe",  # right-to-left override
    "a\udc80.png",  # half a surrogate pair
    "",
]
GOOD = [
    "a.png",
    "sub/a.png",
    "a..png",
    "..a.png",
    "a~1.png",
    "größe 日本.png",
    "a b (1).png",
    "./a.png",
    "a:b.png",
]


@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_evil_names(make_coco, name: str) -> None:
    assert is_unsafe_name(name)
    report = check(replace(make_coco(IMAGES), file_names=["a.png", name]), "drop")
    assert (counts(report), report.errors()) == ({"file_name_unsafe": 1}, 1)
    assert "image id 2" in report.findings[0].examples[0]


@pytest.mark.parametrize("name", GOOD)
def test_ordinary_names(make_coco, name: str) -> None:
    assert counts(check(make_coco([(1, name, 4, 4)]))) == {}


def test_links_may_not_leave_the_folder(make_coco, tmp_path: Path) -> None:
    data = make_coco([(1, "a.png", 40, 30)])
    outside = tmp_path / "outside"
    outside.mkdir()
    (data.image_root / "a.png").rename(outside / "a.png")
    (data.image_root / "a.png").symlink_to(outside / "a.png")
    assert counts(check(data)) == {"file_name_unsafe": 1}
    (data.image_root / "folder").symlink_to(outside)
    assert counts(check(replace(data, file_names=["folder/a.png"]))) == {"file_name_unsafe": 1}
    (data.image_root / "a.png").unlink()
    (outside / "a.png").rename(data.image_root / "real.png")
    (data.image_root / "a.png").symlink_to("real.png")
    assert counts(check(data)) == {}
    (tmp_path / "link").symlink_to(data.image_root)
    assert counts(check(replace(data, image_root=tmp_path / "link"))) == {}


def test_more_objects_than_queries(make_coco) -> None:
    boxes = [(i, 1, 1, (1, 1, 5, 5)) for i in range(5)] + [(5 + i, 2, 1, (1, 1, 5, 5)) for i in range(7)]
    data = make_coco(IMAGES, boxes, crowds=(0, 5, 6))
    assert counts(check(data, num_queries=5)) == {}
    report = check(data, "drop", num_queries=3)
    assert (counts(report), report.errors()) == ({"too_many_objects": 2}, 2)
    assert report.findings[0].examples == (
        "'b.png': 5 objects, model.num_queries = 3",
        "'a.png': 4 objects, model.num_queries = 3",
    )
    with pytest.raises(DataError, match=r"raise model\.num_queries"):
        raise_for_errors([report])
    assert counts(check(replace(data, split="val"), num_queries=3)) == {}


def test_dropped_boxes_do_not_count_as_objects(make_coco) -> None:
    data = make_coco(IMAGES, [(1, 1, 1, (1, 1, 5, 5)), (2, 1, 1, (1, 1, 0, 5))])
    assert counts(check(data, "error", num_queries=1)) == {"box_degenerate": 1, "too_many_objects": 1}
    assert counts(check(data, "drop", num_queries=1)) == {"box_degenerate": 1}


def test_one_error_covers_both_splits(make_coco) -> None:
    train = check(make_coco(IMAGES, [(31, 1, 1, (1, 1, 0, 5))]))
    val = check(make_coco(IMAGES, [(32, 1, 1, (1, 1, 5, -2)), (32, 2, 1, (1, 1, 5, 5))], split="val"))
    with pytest.raises(DataError) as caught:
        raise_for_errors([train, val])
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 3 problems:"
    assert lines[1].split() == ["train", "1", *MEANINGS["box_degenerate"].split()]
    assert "annotation 31 of 'a.png'" in lines[2]
    assert [line.split()[:2] for line in lines[3:7:2]] == [["val", "1"], ["val", "1"]]
    assert lines[-1] == 'Correct the files or the recipe; data.on_bad = "drop" helps for 2 of 3 only.'
    with pytest.raises(DataError, match=r'set data\.on_bad = "drop" to leave out these boxes\.$'):
        raise_for_errors([train])


def test_rows_of_the_table(make_coco) -> None:
    data = make_coco(IMAGES, [(i, 1, 1, (1, 1, 0, 5)) for i in range(12)])
    (row,) = check(data, num_queries=12).rows()
    assert row[:4] == ("train", "error", "12", MEANINGS["box_degenerate"])
    assert row[4].count("annotation") == 10 and row[4].endswith("; ... 2 more")


def test_every_kind_has_a_meaning() -> None:
    assert set(MEANINGS) > BOX_LEVEL


def test_without_annotations(make_coco) -> None:
    data = make_coco(IMAGES)
    _, report = check_data(data, num_queries=10, on_bad="drop", against=names_of(data, 1))
    assert [(f.kind, f.severity, f.count) for f in report.findings] == [("no_objects", "error", 1)]


def test_nothing_left_after_dropping_is_an_error(make_coco) -> None:
    _, report = check_data(make_coco(IMAGES, [(1, 1, 1, (5, 5, 0, 0))]), num_queries=10, on_bad="drop", against=None)
    assert [(f.kind, f.severity) for f in report.findings] == [("box_degenerate", "dropped"), ("no_objects", "error")]


def test_categories_with_another_name_than_in_train(make_coco) -> None:
    data = make_coco(IMAGES, [(1, 1, 1, (5, 5, 4, 4))])
    against = {**names_of(data, 1, 2), 2: "something else"}
    report = check(data, against=against)
    assert counts(report) == {"category_renamed": 1}
    assert "'something else'" in report.findings[0].examples[0]


def test_large_split_is_checked_quickly(tmp_path: Path) -> None:
    images, boxes = 20_000, 150_000
    content = {
        "images": [{"id": i, "file_name": f"{i:06}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {"id": i, "image_id": i % images, "category_id": 1, "bbox": [1, 2, 30, 40]} for i in range(boxes)
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    for i in range(0, images, 2):
        (tmp_path / f"{i:06}.jpg").touch()
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    data = read_coco(tmp_path, file, "train")
    start = time.perf_counter()
    report = check(data)
    assert time.perf_counter() - start < 5
    assert counts(report) == {"file_missing": images // 2}
