"""The embedded data set: honest labels, the same pictures everywhere, and a cache that is whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samdetr.data import shapes
from samdetr.data.shapes import (
    CLASS_NAMES,
    MIN_VISIBLE,
    Scene,
    ShapesPaths,
    ensure_shapes,
    scene_at,
    tight_box,
)
from samdetr.errors import DataError


def build(folder: Path, train_images: int = 6, val_images: int = 3, seed: int = 0) -> ShapesPaths:
    return ensure_shapes(
        folder=str(folder),
        train_images=train_images,
        val_images=val_images,
        image_size=64,
        max_objects=5,
        seed=seed,
    )


def scenes(count: int, image_size: int = 96, max_objects: int = 12) -> list[Scene]:
    return [
        scene_at(seed=0, split="train", index=k, image_size=image_size, max_objects=max_objects) for k in range(count)
    ]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def pixels_hash(path: Path) -> str:
    with Image.open(path) as picture:
        return hashlib.sha256(np.asarray(picture).tobytes()).hexdigest()


def test_two_builds_are_equal_and_another_seed_is_not(tmp_path: Path) -> None:
    first, second, other = build(tmp_path / "a"), build(tmp_path / "b"), build(tmp_path / "c", seed=1)
    assert first.train_annotations.read_bytes() == second.train_annotations.read_bytes()
    assert first.val_annotations.read_bytes() == second.val_annotations.read_bytes()
    assert first.train_annotations.read_bytes() != other.train_annotations.read_bytes()
    name = "000002.png"
    assert pixels_hash(first.train_images / name) == pixels_hash(second.train_images / name)
    assert pixels_hash(first.train_images / name) != pixels_hash(other.train_images / name)
    assert pixels_hash(first.train_images / name) != pixels_hash(first.val_images / name)


def test_pictures_are_frozen() -> None:
    """A change of the drawing needs a new GENERATOR_VERSION, or old caches would be taken for new."""
    digest = hashlib.sha256()
    for scene in scenes(8):
        digest.update(scene.image.tobytes())
        digest.update(repr([tight_box(mask) for mask in scene.masks]).encode())
    assert (shapes.GENERATOR_VERSION, digest.hexdigest()[:16]) == (1, "efba4a6d0251a003")


def test_a_smaller_data_set_is_a_prefix(tmp_path: Path) -> None:
    small, large = (
        build(tmp_path, train_images=3, val_images=1),
        build(tmp_path, train_images=6, val_images=3),
    )
    few, many = read(small.train_annotations), read(large.train_annotations)
    assert many["images"][:3] == few["images"]
    assert many["annotations"][: len(few["annotations"])] == few["annotations"]
    for photo in few["images"]:
        name = photo["file_name"]
        assert pixels_hash(small.train_images / name) == pixels_hash(large.train_images / name)


def test_it_is_an_ordinary_coco_folder(tmp_path: Path) -> None:
    paths = build(tmp_path)
    for folder, file, count in (
        (paths.train_images, paths.train_annotations, 6),
        (paths.val_images, paths.val_annotations, 3),
    ):
        content = read(file)
        assert [c["name"] for c in content["categories"]] == list(CLASS_NAMES)
        assert [c["id"] for c in content["categories"]] == list(range(1, len(CLASS_NAMES) + 1))
        assert sorted(p.name for p in folder.iterdir()) == [i["file_name"] for i in content["images"]]
        assert len(content["images"]) == count
        assert [a["id"] for a in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
        sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        for photo in content["images"]:
            with Image.open(folder / photo["file_name"]) as picture:
                assert picture.size == sizes[photo["id"]]
                assert picture.mode == "RGB"
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            width, height = sizes[annotation["image_id"]]
            assert x >= 0
            assert y >= 0
            assert w > 0
            assert h > 0
            assert x + w <= width
            assert y + h <= height
            assert 0 < annotation["area"] <= w * h
            assert annotation["iscrowd"] == 0


def test_tight_box_on_a_known_mask() -> None:
    mask = np.zeros((7, 9), dtype=np.bool_)
    mask[2, 3:6] = mask[4, 8] = True
    assert tight_box(mask) == (3, 2, 6, 3)


def test_written_boxes_and_areas_are_those_of_the_masks(tmp_path: Path) -> None:
    content = read(build(tmp_path).train_annotations)
    rows = iter(content["annotations"])
    for index in range(6):
        scene = scene_at(seed=0, split="train", index=index, image_size=64, max_objects=5)
        for label, mask, seen in zip(scene.labels, scene.masks, scene.visible, strict=True):
            row = next(rows)
            x, y, w, h = row["bbox"]
            inside = mask[y : y + h, x : x + w]
            assert inside.sum() == mask.sum()
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert (row["image_id"], row["category_id"]) == (index + 1, label + 1)
            assert row["area"] == int(seen.sum())
    assert next(rows, None) is None


def test_visible_parts_tile_the_union_of_the_masks() -> None:
    for scene in scenes(20):
        seen = np.sum(scene.visible, axis=0)
        assert seen.max() == 1
        assert np.array_equal(seen > 0, np.any(scene.masks, axis=0))


def test_the_mask_is_where_the_object_is_painted() -> None:
    """A step of colour lies on the mask's outline: across it, not beside it."""
    across, beside = [], []
    for scene in scenes(60, max_objects=1):
        picture, mask = scene.image.astype(np.float64), scene.masks[0]
        steps = np.abs(np.diff(picture, axis=1)).sum(axis=2)
        outline = mask[:, 1:] != mask[:, :-1]
        across.append(steps[outline].mean())
        beside.append(steps[np.roll(outline, 3, axis=1) & ~outline].mean())
    assert np.median(np.array(across) / np.array(beside)) > 2.0


def test_every_object_stays_in_sight_and_some_are_covered() -> None:
    shares = [
        seen.sum() / mask.sum() for scene in scenes(150) for mask, seen in zip(scene.masks, scene.visible, strict=True)
    ]
    assert min(shares) >= MIN_VISIBLE
    assert 0.15 < np.mean(np.array(shares) < 0.98) < 0.7


def test_counts_sizes_and_classes_are_spread() -> None:
    pictures = scenes(400)
    counts = Counter(len(scene.labels) for scene in pictures)
    assert set(counts) == set(range(1, 13))
    assert max(counts.values()) < 0.2 * len(pictures)
    labels = Counter(label for scene in pictures for label in scene.labels)
    expected = sum(labels.values()) / len(CLASS_NAMES)
    assert len(CLASS_NAMES) >= 8
    assert len(labels) == len(CLASS_NAMES)
    assert all(0.8 * expected < count < 1.2 * expected for count in labels.values())
    sides = [max(tight_box(mask)[2:]) / 96 for scene in pictures for mask in scene.masks]
    assert min(sides) < 0.12
    assert 0.5 < max(sides) <= 0.63
    shorter = [min(scene.image.shape[:2]) for scene in pictures]
    assert all(max(scene.image.shape[:2]) == 96 for scene in pictures)
    assert 72 <= min(shorter) < 76
    assert 92 < max(shorter) <= 96
    assert {scene.image.shape[0] == 96 for scene in pictures} == {True, False}


def test_max_objects_one_gives_exactly_one() -> None:
    assert {len(scene.labels) for scene in scenes(40, image_size=48, max_objects=1)} == {1}


def test_colour_does_not_tell_the_class() -> None:
    """The mean colour of a class is that of all objects, within the noise of the sample."""
    means: list[list[Any]] = [[] for _ in CLASS_NAMES]
    for scene in scenes(400):
        for label, seen in zip(scene.labels, scene.visible, strict=True):
            means[label].append(scene.image[seen].mean(axis=0))
    overall = np.concatenate([np.array(rows) for rows in means])
    for rows in means:
        error = overall.std(axis=0) / np.sqrt(len(rows))
        assert np.all(np.abs(np.mean(rows, axis=0) - overall.mean(axis=0)) < 4.0 * error)


def test_a_second_call_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the cache was written again")

    monkeypatch.setattr(shapes, "_write_split", refuse)
    assert build(tmp_path) == paths
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_an_interrupted_build_leaves_nothing_and_the_next_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_split = shapes._write_split

    def interrupted(root: Path, *, split: str, images: int, image_size: int, max_objects: int, seed: int) -> None:
        if split == "val":
            raise KeyboardInterrupt
        write_split(root, split=split, images=images, image_size=image_size, max_objects=max_objects, seed=seed)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_write_split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list(build(tmp_path).val_images.iterdir())) == 3


def test_a_leftover_of_a_killed_build_is_not_taken(tmp_path: Path) -> None:
    name = build(tmp_path / "elsewhere").train_images.parents[1].name
    leftover = tmp_path / "cache" / f".{name}.0123"
    (leftover / "annotations").mkdir(parents=True)
    (leftover / "annotations" / "instances_train.json").write_text("{", encoding="utf-8")
    paths = build(tmp_path / "cache")
    assert len(read(paths.train_annotations)["images"]) == 6
    assert leftover.is_dir()


def test_when_another_process_is_first_its_folder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split = shapes._write_split
    inode: list[int] = []

    def overtaken(root: Path, *, split: str, images: int, image_size: int, max_objects: int, seed: int) -> None:
        write_split(root, split=split, images=images, image_size=image_size, max_objects=max_objects, seed=seed)
        if split == "val":
            monkeypatch.setattr(shapes, "_write_split", write_split)
            inode.append(build(tmp_path).train_annotations.stat().st_ino)

    monkeypatch.setattr(shapes, "_write_split", overtaken)
    paths = build(tmp_path)
    assert inode == [paths.train_annotations.stat().st_ino]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"file.*cannot be written.*data\.shapes\.folder"):
        build(blocker)


def test_a_damaged_cache_folder_is_named(tmp_path: Path) -> None:
    paths = build(tmp_path)
    paths.val_annotations.unlink()
    with pytest.raises(DataError, match=r"-train6-val3-.*delete a damaged folder"):
        build(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
