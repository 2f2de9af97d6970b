"""``samdetr predict``: pictures and a COCO file from photos without annotations."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from samdetr.engine.checkpoint.weights import load_trained
from samdetr.recipe import load_recipe
from tests.engine.runs import Command, Result, sentence


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size, mode in (("a.png", (90, 60), "RGB"), ("b.JPG", (50, 70), "L"), ("c.webp", (64, 64), "RGB")):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
    (folder / "notes.txt").write_text("no photo")
    return folder


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "predictions.json").read_text())
    return content


def test_a_folder(trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command) -> None:
    out = tmp_path / "out" / "deep"
    result = samdetr_command("predict", str(trained), str(photos), "--output", str(out), "--threshold", "0")
    assert (result.code, result.err) == (0, "")
    assert {file.name for file in out.iterdir()} == {"a.png.png", "b.JPG.png", "c.webp.png", "predictions.json"}
    content = read(out)
    assert [(one["file_name"], one["width"], one["height"]) for one in content["images"]] == [
        ("a.png", 90, 60),
        ("b.JPG", 50, 70),
        ("c.webp", 64, 64),
    ]
    categories = load_trained(str(trained)).categories
    assert [(one["id"], one["name"]) for one in content["categories"]] == list(
        zip(categories.ids, categories.names, strict=True)
    )
    sides = {one["id"]: (one["width"], one["height"]) for one in content["images"]}
    assert len(content["annotations"]) == 3 * 20  # eval.top_k
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        image_width, image_height = sides[one["image_id"]]
        assert 0 <= x + width / 2 <= image_width and 0 < width <= image_width
        assert 0 <= y + height / 2 <= image_height and 0 < height <= image_height
        assert 0 < one["score"] < 1
    with contextlib.redirect_stdout(io.StringIO()):
        loaded = COCO(out / "predictions.json")
        again = loaded.loadRes(content["annotations"])
    assert len(loaded.anns) == len(again.anns) == 60
    assert loaded.anns[1]["bbox"] == content["annotations"][0]["bbox"]


def test_one_photo_is_as_in_its_folder(trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command) -> None:
    for source, name in ((photos, "all"), (photos / "b.JPG", "one")):
        assert samdetr_command(
            "predict", str(trained), str(source), "--output", str(tmp_path / name), "--threshold", "0"
        ).code == 0  # fmt: skip
    alone = read(tmp_path / "one")
    among = [one for one in read(tmp_path / "all")["annotations"] if one["image_id"] == 2]
    assert [one["bbox"] for one in alone["annotations"]] == [one["bbox"] for one in among]
    picture = Image.open(tmp_path / "one" / "b.JPG.png")
    assert picture.size[0] / picture.size[1] == pytest.approx(50 / 70, rel=0.01)
    colours = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.ptp(colours, axis=2) > 60).any()  # boxes have colours, the grey photo has none


def test_threshold(trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command) -> None:
    def run(threshold: float) -> list[float]:
        out = tmp_path / str(threshold)
        arguments = ("predict", str(trained), str(photos), "--output", str(out), "--threshold", str(threshold))
        assert samdetr_command(*arguments).code == 0
        assert len(list(out.glob("*.png"))) == 3
        return [one["score"] for one in read(out)["annotations"]]

    every = run(0.0)
    middle = sorted(every)[30]
    assert sorted(run(middle)) == sorted(score for score in every if score >= middle)
    assert run(0.99) == []


def test_a_checkpoint_from_a_gpu_machine(
    trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.device = "cuda" belongs to the training machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    original = load_trained(str(trained))
    recipe = load_recipe(trained / "recipe.toml", ['run.device="cuda"'])
    monkeypatch.setattr("samdetr.engine.predict.load_trained", lambda path: original._replace(recipe=recipe))
    assert samdetr_command("predict", str(trained), str(photos), "--output", str(tmp_path / "out")).code == 0


def test_mistakes(trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command) -> None:
    def predict(source: Path, output: Path = tmp_path / "out") -> str:
        return sentence(samdetr_command("predict", str(trained), str(source), "--output", str(output)))

    assert f"there is no photo or folder {tmp_path / 'nowhere'}" in predict(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no photos (.jpg" in predict(tmp_path / "empty")
    file = tmp_path / "file"
    file.touch()
    assert f"cannot write to {file / 'out'} (Not a directory): choose another --output." in predict(
        photos, file / "out"
    )
    shutil.copy(photos / "a.png", photos / "d.png")
    (photos / "d.png").write_bytes((photos / "a.png").read_bytes()[:2000])
    assert f"{photos / 'd.png'}: the image is damaged or cut off" in predict(photos)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]  # of the others
    assert (
        predict(photos)
        == f"error: {tmp_path / 'out'} holds an earlier prediction: choose another --output, or delete it."
    )


def test_a_failed_prediction_is_not_in_the_way(
    trained: Path, photos: Path, tmp_path: Path, samdetr_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def predict(source: Path) -> Result:
        return samdetr_command("predict", str(trained), str(source), "--output", str(out))

    assert "1 of 1 photos could not be read: " in sentence(predict(photos / "notes.txt"))
    assert not out.exists()
    with monkeypatch.context() as patch:
        replace = os.replace

        def full(source: Path, target: Path) -> None:
            if target.name == "predictions.json":
                raise OSError(28, "No space left on device")
            replace(source, target)

        patch.setattr(os, "replace", full)
        assert f"cannot write {out / 'predictions.json'} (No space left on device)" in sentence(predict(photos))
    assert {file.name for file in out.iterdir()} == {"a.png.png", "b.JPG.png", "c.webp.png"}
    assert predict(photos).code == 0
    # what is wrong with the photos is said before what is wrong with the folder
    assert "there is no photo or folder" in sentence(predict(tmp_path / "nowhere"))
