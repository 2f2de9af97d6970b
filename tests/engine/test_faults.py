"""Mistakes of a person and refusals of a machine: one clear sentence, the right exit code, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samdetr.data.batching import epoch_order
from samdetr.data.datasets import make_categories, read_coco
from samdetr.engine.checkpoint.folder import newest_first
from samdetr.engine.checkpoint.format import MODEL, Progress, load_checkpoint, model_tensors
from samdetr.engine.checkpoint.saving import Staging, save_checkpoint
from samdetr.engine.train import train
from samdetr.models import build_model
from samdetr.models.official import to_official
from samdetr.recipe import dump_recipe
from tests.engine.runs import (
    META,
    TINY,
    Command,
    MakeRecipe,
    assert_same_weights,
    end,
    losses,
    metrics,
    sentence,
    start_train,
    weights,
)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO folder with JPEG photos: 6 to train on, 2 for evaluation, two categories."""
    rng = np.random.default_rng(0)
    root = tmp_path / "coco"
    for split, count in (("train", 6), ("val", 2)):
        (root / split).mkdir(parents=True)
        annotations = []
        for number in range(1, count + 1):
            pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{number}.jpg", quality=90)
            for _ in range(3):
                box = [int(value) for value in rng.integers(1, 30, 4)]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": int(rng.choice([4, 9])),
                        "bbox": box,
                    }
                )
        images = [{"id": n, "file_name": f"{n}.jpg", "width": 80, "height": 60} for n in range(1, count + 1)]
        categories = [{"id": 4, "name": "four"}, {"id": 9, "name": "nine"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def coco_options(coco: Path) -> list[str]:
    options = [
        "data.format=coco",
        "model.num_classes=2",
        "train.total_batch=2",
        "train.micro_batch=2",
        "train.epochs=1",
    ]
    for split in ("train", "val"):
        options += [f"data.{split}_images={coco / split}", f"data.{split}_annotations={coco / f'{split}.json'}"]
    return [part for option in options for part in ("--set", option)]


def edit(file: Path, change: Callable[[dict[str, list[dict[str, object]]]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_folder_itself_is_sound(coco: Path, train_command: Command) -> None:
    result = train_command(*coco_options(coco))
    assert (result.code, result.err) == (0, "")


def test_missing_data(coco: Path, train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All paths at once, from the root, and what relative ones are relative to."""
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(coco / "val")
    options = [*coco_options(coco), "--set", "data.train_annotations=nowhere/a.json", "--set", "data.train_images="]
    result = train_command(*options)
    assert result.code == 1
    assert result.err.splitlines() == [
        "error: the data is not there:",
        "  data.train_images is empty",
        f"  data.val_images: there is no folder {coco / 'val'}",
        f"  data.train_annotations: there is no file {tmp_path / 'nowhere/a.json'}",
        "Set these keys (a relative path begins at the current folder), or for a COCO recipe link it at data/coco.",
    ]
    assert not (tmp_path / "runs").exists()


def test_a_missing_published_checkpoint_is_named_before_missing_data(
    samdetr_command: Command, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    recipe = make_recipe('data.format="coco"', 'model.backbone.norm="frozen"')
    (tmp_path / "r.toml").write_text(dump_recipe(recipe))
    published = tmp_path / "published.pth"
    command = ("eval", "--official", str(published), str(tmp_path / "r.toml"))
    assert sentence(samdetr_command(*command)) == f"error: there is no published checkpoint {published}."
    torch.save({"model": to_official(build_model(recipe.model))}, published)
    assert samdetr_command(*command).err.splitlines()[1:3] == [
        "  data.val_images is empty",
        "  data.val_annotations is empty",
    ]


def test_a_missing_photo(coco: Path, train_command: Command) -> None:
    (coco / "train" / "3.jpg").unlink()
    result = train_command(*coco_options(coco))
    assert result.code == 1
    assert result.err.splitlines() == [
        "error: the data has 1 problem:",
        "  train        1  the image file does not exist",
        f"                  {coco / 'train' / '3.jpg'}",
        "Correct the files or the recipe.",
    ]


def test_broken_json(coco: Path, train_command: Command) -> None:
    file = coco / "train.json"
    file.write_text(file.read_text()[:-40])
    assert sentence(train_command(*coco_options(coco))).startswith(f"error: {file}: broken JSON: ")


@pytest.mark.parametrize("pixels", ["published", "fast"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_photo(coco: Path, train_command: Command, tmp_path: Path, workers: int, pixels: str) -> None:
    photo = coco / "train" / f"{epoch_order(6, 5, 0)[-1] + 1}.jpg"  # in the last of three steps
    photo.write_bytes(photo.read_bytes()[:1500])
    result = train_command(*coco_options(coco), "--set", f"data.workers={workers}", "--set", f"data.pixels={pixels}")
    assert sentence(result).startswith(f"error: {photo}: the image is damaged or cut off (")
    run = tmp_path / "runs/tiny/1"  # the steps before it are not lost
    saved = load_checkpoint((run / "checkpoints/last").resolve(), with_optimizer=True)
    assert saved.progress.step == len(metrics(run, "train")) == 2


def test_a_truncated_photo_in_evaluation(coco: Path, train_command: Command, tmp_path: Path) -> None:
    photo = coco / "val" / "2.jpg"
    photo.write_bytes(photo.read_bytes()[:1500])
    assert f"{photo}: the image is damaged" in sentence(train_command(*coco_options(coco)))
    saved = load_checkpoint((tmp_path / "runs/tiny/1/checkpoints/last").resolve(), with_optimizer=True)
    assert saved.progress.evaluation_due  # the epoch is not lost


def test_bad_boxes_are_dropped_when_asked(coco: Path, train_command: Command) -> None:
    edit(coco / "train.json", lambda content: content["annotations"][3].update(bbox=[5, 5, 0, 9]))
    result = train_command(*coco_options(coco))
    assert result.code == 1 and "annotation 4 of '2.jpg'" in result.err and "Traceback" not in result.err
    result = train_command(*coco_options(coco), "--set", "data.on_bad=drop")
    assert (result.code, result.err) == (0, "")
    assert "dropped" in result.out and "the box has no area" in result.out


def test_categories_that_only_the_training_split_has(coco: Path, train_command: Command) -> None:
    """The model may find a category that the val file does not list."""

    def remove(content: dict[str, list[dict[str, object]]]) -> None:
        content["categories"] = content["categories"][:1]
        for annotation in content["annotations"]:
            annotation["category_id"] = 4

    edit(coco / "val.json", remove)
    result = train_command(*coco_options(coco))
    assert (result.code, result.err) == (0, "")


def test_recipe_typo(tmp_path: Path, train_command: Command) -> None:
    file = tmp_path / "typo.toml"
    file.write_text(TINY.replace("backbone_lr = 1e-3", "bakbone_lr = 1e-3"))
    line = file.read_text().splitlines().index("bakbone_lr = 1e-3") + 1
    assert sentence(train_command(recipe=file), 2) == (
        f"{file}:{line}: optim.bakbone_lr: unknown key. Did you mean optim.backbone_lr?"
    )
    assert (
        sentence(train_command(recipe=tmp_path / "no.toml"), 2)
        == f"{tmp_path / 'no.toml'}: there is no such recipe file"
    )


def test_more_objects_than_queries(train_command: Command) -> None:
    result = train_command("--set", "model.num_queries=2")
    assert result.code == 1
    first, title, *examples, advice = result.err.splitlines()
    assert first.startswith("error: the data has ") and "more objects than queries: raise model.num_queries" in title
    assert "'000001.png': 5 objects, model.num_queries = 2" in [example.strip() for example in examples]
    assert advice == "Correct the files or the recipe."
    assert "Traceback" not in result.err


def test_fewer_images_than_a_batch(train_command: Command) -> None:
    assert (
        "the training split has 24 images, fewer than one batch of 32: set train.total_batch to 24 or less"
        in sentence(train_command("--set", "train.total_batch=32"))
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(train_command: Command) -> None:
    assert "torch finds no GPU" in sentence(train_command("--set", "run.device=cuda"))


def test_no_write_permission(train_command: Command, tmp_path: Path) -> None:
    """Below a regular file nothing can be written, by root neither."""
    file = tmp_path / "file"
    file.touch()
    assert f"cannot write the run folder {file / 'tiny'} (Not a directory): choose another run.folder." in sentence(
        train_command("--set", f"run.folder={file}")
    )
    assert f"{file}/" in sentence(train_command("--set", f"data.shapes.folder={file}", "--set", "data.shapes.seed=1"))


def test_another_architecture(
    train_command: Command, samdetr_command: Command, trained: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    result = train_command("--set", f"init.checkpoint={trained}", "--set", "model.width=64")
    named = (
        r"is of another architecture: [a-z]\S+ is \[32.*\], the model needs \[64.*\] \(and 126 more differences\)\. Use"
    )
    assert re.search(named, sentence(result))
    assert not (tmp_path / "runs").exists()
    other = build_model(make_recipe("model.decoder_layers=1").model)
    meta = load_checkpoint((trained / "checkpoints/last").resolve(), with_optimizer=False).meta
    mixed = save_checkpoint(
        tmp_path,
        Staging().copy({MODEL: model_tensors(other)})[0],
        progress=Progress(),
        meta={key: meta[key] for key in ("recipe", "categories", "environment")},
    )
    for command in (("eval", str(mixed)), ("predict", str(mixed), str(trained / "curves.png"))):
        assert f"the checkpoint {mixed} is of another architecture: decoder.layers.1." in sentence(
            samdetr_command(*command)
        )
    published = tmp_path / "published.pth"
    frozen = 'model.backbone.norm="frozen"'
    torch.save({"model": to_official(build_model(make_recipe(frozen, "model.decoder_layers=1").model))}, published)
    recipe = tmp_path / "frozen.toml"
    recipe.write_text(dump_recipe(make_recipe(frozen)))
    message = sentence(samdetr_command("eval", "--official", str(published), str(recipe)))
    assert "the published checkpoint does not fit the recipe's model: transformer.decoder.layers.1." in message


def test_a_missing_checkpoint(train_command: Command, samdetr_command: Command, trained: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for result in (
        train_command("--set", f"init.checkpoint={nowhere}"),
        samdetr_command("eval", str(nowhere)),
        samdetr_command("predict", str(nowhere), str(trained / "curves.png")),
    ):
        assert f"{nowhere}: there is no such file or folder" in sentence(result)
    assert f"there is no published checkpoint {nowhere}" in sentence(train_command("--set", f"init.official={nowhere}"))


def test_a_damaged_checkpoint(
    train_command: Command, samdetr_command: Command, trained: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained, run, symlinks=True)
    newest, before = newest_first(run / "checkpoints")
    for folder in (newest, before):
        file = next((folder / "optimizer").iterdir())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        if folder == newest:
            assert samdetr_command("eval", str(run / "checkpoints/last")).code == 0  # which needs no optimizer
            result = train_command("--resume", str(run), "--set", "train.epochs=2")
            assert (result.code, result.err) == (0, "")
            assert f"{file} is damaged: its content does not match its checksum" in result.out
            assert "continuing after step 6" in result.out
            assert_same_weights(run, trained)
            assert losses(run) == losses(trained)
            shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert f"can be used: {file} is damaged: " in sentence(train_command("--resume", str(run)))


def test_not_a_number(train_command: Command, trained: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe()
    model = build_model(recipe.model)
    with torch.no_grad():
        model.decoder.class_heads[0].weight[3, 5] = torch.nan
    parts, _ = Staging().copy({MODEL: model_tensors(model)})
    broken = save_checkpoint(tmp_path / "broken", parts, progress=Progress(), meta=META)
    message = sentence(train_command("--set", f"init.checkpoint={broken}"))
    assert "the loss or its gradient is not finite at step 1 (epoch 1, image ids " in message
    ids = message.split("image ids ")[1].split(")")[0]
    assert len({int(number) for number in ids.split(", ")}) == 4
    assert "no parameter was changed by this step" in message


def test_not_a_number_later(
    make_recipe: MakeRecipe, train_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss of step 9 becomes infinite: the weights of the first epoch are still in the checkpoint."""
    from samdetr.loss import SetCriterion

    forward, calls = SetCriterion.forward, 0

    def explode(self: SetCriterion, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        found = forward(self, *arguments)  # type: ignore[arg-type]
        return found._replace(total=found.total * torch.inf) if calls == 9 else found

    monkeypatch.setattr(SetCriterion, "forward", explode)
    message = sentence(train_command())
    assert "the loss or its gradient is not finite at step 9 (epoch 2, image ids " in message
    monkeypatch.undo()
    run = tmp_path / "runs/tiny/1"
    assert str(run) in message
    train(make_recipe(), resume=str(run))


def test_no_network(train_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    message = sentence(train_command("--set", "model.backbone.weights=imagenet", "--set", "model.backbone.width=64"))
    assert "cannot download the ImageNet weights of resnet18 (" in message
    assert str(tmp_path / "torch/hub/checkpoints/resnet18-f37072fd.pth") in message
    assert 'set model.backbone.weights to its path or to "none"' in message
    assert not (tmp_path / "runs").exists()


def test_a_file_size_limit_while_saving(
    recipe_file: Path, make_recipe: MakeRecipe, trained: Path, tmp_path: Path
) -> None:
    """The kernel refuses to let a file grow: the previous checkpoint stays, and the run goes on from it later."""
    run = train(make_recipe("train.epochs=1"))
    before = weights(run)
    process = start_train(
        recipe_file,
        *("--set", f"run.folder={tmp_path / 'runs'}", "--resume", str(run)),
        before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))",
    )
    message = sentence(end(process))
    assert f"cannot save the checkpoint {run / 'checkpoints/step-00000012'} (" in message
    assert "File too large" in message and "the previous checkpoint is intact" in message
    after = weights(run)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert {entry.name for entry in (run / "checkpoints").iterdir()} == {"step-00000006", "last", "best"}
    train(make_recipe(), resume=str(run))
    assert_same_weights(run, trained)
    assert losses(run) == losses(trained)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that can be made smaller."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, free: int) -> None:
    usage = os.statvfs(disk)
    used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
    subprocess.run(["mount", "-o", f"remount,size={used + free}", str(disk)], check=True)


def test_a_full_disk_while_saving(
    small_disk: Path, make_recipe: MakeRecipe, train_command: Command, trained: Path
) -> None:
    folder = f'run.folder="{small_disk}"'
    run = train(make_recipe("train.epochs=1", folder))
    before = weights(run)
    resize(small_disk, 600_000)
    message = sentence(train_command("--set", folder, "--resume", str(run)))
    assert "cannot save the checkpoint" in message and "No space left on device" in message
    after = weights(run)
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    resize(small_disk, 0)
    assert "No space left on device" in sentence(train_command("--set", folder, "--resume", str(run)))
    resize(small_disk, 20_000_000)
    train(make_recipe(folder), resume=str(run))
    assert_same_weights(run, trained)
    assert losses(run) == losses(trained)


def test_a_read_only_disk(small_disk: Path, train_command: Command) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "(Read-only file system): choose another run.folder." in sentence(
        train_command("--set", f"run.folder={small_disk}")
    )


def test_the_mapping_of_classes_is_in_the_checkpoint(coco: Path, train_command: Command, tmp_path: Path) -> None:
    assert train_command(*coco_options(coco)).code == 0
    meta = load_checkpoint((tmp_path / "runs/tiny/1/checkpoints/last").resolve(), with_optimizer=False).meta
    data = read_coco(coco / "train", coco / "train.json", "train")
    assert meta["categories"] == make_categories(data, "contiguous", 2).to_json()
    assert meta["categories"] == [{"id": 4, "name": "four", "index": 0}, {"id": 9, "name": "nine", "index": 1}]
