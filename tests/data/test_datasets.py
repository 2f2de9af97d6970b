"""Reading COCO files, the class mapping, and the samples of the data set."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from samdetr.data.datasets import DetectionDataset, make_categories, positions, read_coco
from samdetr.data.transforms import EvalTransform, TrainTransform
from samdetr.errors import DataError

EVAL = EvalTransform(size=20, max_size=100)
TRAIN = TrainTransform(
    flip=0.5, sizes=(16, 20, 24), max_size=40, crop=0.5, crop_resize_sizes=(20, 30), crop_min=10, crop_max=20
)
GOOD = {
    "images": [{"id": 5, "file_name": "a.png", "width": 40, "height": 20}],
    "annotations": [{"id": 7, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3.5, 4]}],
    "categories": [{"id": 3, "name": "cell"}],
}


def write(folder: Path, text: str | bytes) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    file = folder / "a.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_reads_every_column(tmp_path: Path) -> None:
    content = {
        "info": {"year": 2026},
        "images": [
            {"id": 9, "file_name": "b.png", "width": 30, "height": 10, "license": 1},
            {"id": 5, "file_name": "a.png", "width": 40, "height": 20},
        ],
        "annotations": [
            {"id": 7, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3.5, 4], "segmentation": [[1, 2, 3]]},
            {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1, "area": 12.5},
            {"id": 3, "image_id": 6, "category_id": 1, "bbox": [0, 0, 5, 5], "area": None},
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 1, "name": "dust", "supercategory": "x"}],
    }
    data = read_coco(tmp_path, write(tmp_path, json.dumps(content)), "val")
    assert data.split == "val"
    assert (data.category_ids, data.category_names) == ((1, 3), ("dust", "cell"))
    assert (data.image_ids.tolist(), data.file_names) == ([9, 5], ["b.png", "a.png"])
    assert (data.widths.tolist(), data.heights.tolist()) == ([30, 40], [10, 20])
    assert (data.ann_ids.tolist(), data.ann_image.tolist()) == ([7, 2, 3], [1, 0, -1])
    assert (data.ann_image_id.tolist(), data.ann_category.tolist()) == ([5, 9, 6], [3, 1, 1])
    assert data.ann_boxes.tolist() == [[1, 2, 3.5, 4], [0, 0, 5, 5], [0, 0, 5, 5]]
    assert data.ann_crowd.tolist() == [False, True, False]
    assert data.ann_area.tolist() == [14, 12.5, 25]


def test_large_file_is_read_exactly_and_quickly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, count = 12_000, 100_000
    boxes = rng.uniform(0, 500, (count, 4))
    owner = rng.permutation(count) % images
    polygon = [[round(float(value), 2) for value in rng.uniform(0, 500, 40)]]
    content = {
        "images": [{"id": 3 * i + 1, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {
                "id": 10 * i,
                "image_id": 3 * int(owner[i]) + 1,
                "category_id": i % 80,
                "bbox": boxes[i].tolist(),
                "segmentation": polygon,
                "iscrowd": int(i % 100 == 0),
            }
            for i in range(count)
        ],
        "categories": [{"id": i, "name": str(i)} for i in range(80)],
    }
    file = write(tmp_path, json.dumps(content))
    start = time.perf_counter()
    data = read_coco(tmp_path, file, "train")
    assert time.perf_counter() - start < 10
    assert np.array_equal(data.ann_boxes, boxes)
    assert np.array_equal(data.ann_image, owner)
    assert np.array_equal(data.ann_area, boxes[:, 2] * boxes[:, 3])
    assert np.array_equal(data.ann_ids, 10 * np.arange(count))
    assert data.ann_crowd.sum() == 1000
    assert data.file_names[-1] == "11999.jpg"


def with_box(text: str) -> str:
    return json.dumps(GOOD).replace("3.5", text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (with_box("NaN"), ["broken JSON", "line 1", "NaN or infinity in the entry of id 7"]),
        (with_box("-Infinity"), ["broken JSON", "NaN or infinity"]),
        (with_box("1e999"), ["out of range", "$.annotations[0].bbox[2]", "annotation id 7"]),
        (with_box("null"), ["null", "$.annotations[0].bbox[2]", "annotation id 7"]),
        (with_box('"4"'), ["str", "annotation id 7"]),
        (json.dumps(GOOD).replace("[1, 2, 3.5, 4]", "[1, 2]"), ["length 4", "annotation id 7"]),
        (json.dumps(GOOD).replace('"id": 7', '"id": "7"'), ["$.annotations[0].id"]),
        (json.dumps(GOOD).replace('"id": 7', '"id": 99999999999999999999'), ["$.annotations[0].id"]),
        (json.dumps(GOOD).replace('"width": 40, ', ""), ["width", "$.images[0]", "image id 5"]),
        (json.dumps(GOOD)[:-20], ["truncated"]),
        ("{\n\n  x}", ["line 3"]),
        ("", ["broken JSON"]),
        ("[]", ["object"]),
        ('{"images": [], "categories": []}', ["annotations"]),
        (b'{"images": [{"file_name": "\xff"}]}', ["broken JSON"]),
        ('{"x": ' + "[" * 100_000, ["broken JSON"]),
        (json.dumps({**GOOD, "images": []}), ["no images"]),
    ],
)
def test_broken_files_are_one_typed_error(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    file = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_coco(tmp_path, file, "train")
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    text, rng = json.dumps(GOOD).encode(), np.random.default_rng(0)
    outcomes = {"read": 0, "error": 0}
    for _ in range(400):
        mutated = bytearray(text)
        mutated[rng.integers(len(text))] = rng.choice(list(b'0123456789[]{}",:-eNn.\\ '))
        try:
            read_coco(tmp_path, write(tmp_path, bytes(mutated)), "train")
            outcomes["read"] += 1
        except DataError:
            outcomes["error"] += 1
    assert outcomes["read"] > 30 and outcomes["error"] > 100


def test_missing_file_and_folder_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.json.*data\.val_annotations"):
        read_coco(tmp_path, tmp_path / "nothing.json", "val")
    file = write(tmp_path, json.dumps(GOOD))
    with pytest.raises(DataError, match=r"absent.*data\.train_images"):
        read_coco(tmp_path / "absent", file, "train")
    with pytest.raises(DataError, match=r"cannot be read.*data\.train_annotations"):
        read_coco(tmp_path, tmp_path / "images", "train")


def test_positions_finds_the_first() -> None:
    assert positions([4, 2, 4], np.array([4, 3, 2, 9])).tolist() == [0, -1, 1, -1]
    assert positions([], np.array([1])).tolist() == [-1]


def test_categories(make_coco) -> None:
    data = make_coco([(1, "a.png", 4, 4)], categories=(90, 3, 17))
    published = make_categories(data, "category_id", 91)
    assert (published.ids, published.indices) == ((3, 17, 90), (3, 17, 90))
    ranked = make_categories(data, "contiguous", 3)
    assert (ranked.ids, ranked.indices) == ((3, 17, 90), (0, 1, 2))
    assert ranked.names == ("class 3", "class 17", "class 90")
    with pytest.raises(DataError, match=r"model\.num_classes = 91, or data\.class_index"):
        make_categories(data, "category_id", 90)
    with pytest.raises(DataError, match=r"set model\.num_classes = 3$"):
        make_categories(data, "contiguous", 4)
    with pytest.raises(DataError, match=r"set model\.num_classes = 3$"):
        make_categories(data, "contiguous", 2)
    negative = make_coco([(1, "a.png", 4, 4)], categories=(-1, 3))
    with pytest.raises(DataError, match="contiguous"):
        make_categories(negative, "category_id", 91)
    with pytest.raises(DataError, match="no categories"):
        make_categories(make_coco([(1, "a.png", 4, 4)], categories=()), "category_id", 91)


def test_sample_has_clamped_boxes_without_crowds(make_coco) -> None:
    data = make_coco(
        [(11, "a.png", 40, 20), (12, "b.png", 20, 40), (13, "c.png", 20, 20)],
        [
            (1, 12, 9, (-0.5, 10, 10.5, 40.5 - 10)),
            (2, 11, 5, (10, 5, 20, 10)),
            (3, 12, 5, (0, 0, 20, 40)),
            (4, 12, 5, (3, 3, 0, 4)),
            (5, 11, 9, (30, 10, 10, 10)),
        ],
        categories=(5, 9),
        crowds=(5,),
    )
    categories = make_categories(data, "contiguous", 2)
    dataset = DetectionDataset(data, categories, EVAL, seed=0, max_pixels=1000)
    assert (len(dataset), dataset.max_objects) == (3, 2)
    first, second, third = (dataset[0, row] for row in range(3))
    assert (first.image_id, first.original_size, first.image.shape) == (11, (20, 40), (3, 20, 40))
    assert (first.boxes.tolist(), first.labels.tolist()) == ([[0.5, 0.5, 0.5, 0.5]], [0])
    assert (second.original_size, second.labels.tolist()) == ((40, 20), [1, 0])
    assert second.boxes.tolist() == [[0.25, 0.625, 0.5, 0.75], [0.5, 0.5, 1, 1]]
    assert (third.boxes.shape, third.boxes.dtype, third.labels.dtype) == ((0, 4), torch.float32, torch.int64)


def test_without_any_object_one_target_row_remains(make_coco) -> None:
    data = make_coco([(1, "a.png", 8, 8)])
    categories = make_categories(data, "category_id", 3)
    assert DetectionDataset(data, categories, EVAL, seed=0, max_pixels=100).max_objects == 1


def test_sample_depends_on_seed_epoch_and_row_alone(make_coco) -> None:
    data = make_coco([(i, f"{i}.png", 40, 30) for i in range(3)], [(1, 0, 1, (2, 3, 20, 20))])
    categories = make_categories(data, "category_id", 3)
    make = {s: DetectionDataset(data, categories, TRAIN, seed=s, max_pixels=10_000) for s in (0, 1)}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = make[0][4, 2].image
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    _ = make[0][0, 0], make[0][4, 1]
    assert torch.equal(make[0][4, 2].image, first)
    others = [make[0][epoch, 2].image for epoch in range(8)] + [make[1][epoch, 2].image for epoch in range(8)]
    different = [image for image in others if image.shape != first.shape or not torch.equal(image, first)]
    assert 10 <= len(different) <= 15


def test_images_of_two_epochs_are_not_loaded_together(make_coco) -> None:
    data = make_coco([(1, "a.png", 8, 8)])
    dataset = DetectionDataset(data, make_categories(data, "category_id", 3), TRAIN, seed=0, max_pixels=100)
    with pytest.raises(ValueError, match=r"must be of one epoch \(got those of \[0, 1\]\)"):
        dataset.load([(0, 0), (1, 0)])


def test_bad_input_is_refused_when_built(make_coco) -> None:
    data = make_coco([(1, "a.png", 40, 30)], [(8, 1, 7, (0, 0, 5, 5))])
    categories = make_categories(data, "category_id", 3)
    with pytest.raises(DataError, match=r"annotation 8 .*category id 7"):
        DetectionDataset(data, categories, EVAL, seed=0, max_pixels=10_000)
    with pytest.raises(DataError, match=r"a\.png.*data\.max_pixels = 1199"):
        DetectionDataset(data, categories, EVAL, seed=0, max_pixels=1199)
