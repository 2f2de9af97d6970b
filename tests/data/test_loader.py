"""Loaders: the same batches whatever the workers, errors, signals and the end of the process."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdetr.data.batching import Shape, epoch_order
from samdetr.data.buckets import choose_buckets
from samdetr.data.datasets import CocoData, DetectionDataset, make_categories
from samdetr.data.decode import Pixels
from samdetr.data.device import prefetch
from samdetr.data.loader import EvalLoader, TrainLoader
from samdetr.data.transforms import EvalTransform, TrainTransform
from samdetr.errors import DataError
from samdetr.structures import Batch

TRAIN = TrainTransform(
    flip=0.5, sizes=(16, 20, 24), max_size=40, crop=0.5, crop_resize_sizes=(20, 30), crop_min=10, crop_max=20
)
IMAGES = [(100 + i, f"{i}.png", 20 + i, 30 - i) for i in range(11)]
BOXES = [(i, 100 + i % 9, 1 + i % 2, (i % 5, i % 7, 6, 8)) for i in range(25)]


@pytest.fixture
def data(make_coco) -> CocoData:
    return make_coco(IMAGES, BOXES)


def dataset_of(
    data: CocoData,
    training: bool = True,
    pixels: Pixels = "published",
) -> DetectionDataset:
    raw = pixels == "fast"
    transform = dataclasses.replace(TRAIN, raw=raw) if training else EvalTransform(size=20, max_size=40, raw=raw)
    categories = make_categories(data, "category_id", 3)
    return DetectionDataset(data, categories, transform, seed=3, max_pixels=10_000, pixels=pixels)


@contextmanager
def train_loader(
    data: CocoData,
    workers: int,
    total: int = 4,
    micro: int = 2,
    bucket_shapes: Sequence[Shape] | None = None,
    pixels: Pixels = "published",
) -> Iterator[TrainLoader]:
    loader = TrainLoader(
        dataset_of(data, pixels=pixels),
        total_batch=total,
        micro_batch=micro,
        workers=workers,
        seed=1,
        pin_memory=False,
        bucket_shapes=bucket_shapes,
    )
    try:
        yield loader
    finally:
        loader.close()


def test_more_workers_than_cores_are_no_warning(data: CocoData, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would warn when the loader is built, and again when its workers start."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with train_loader(data, workers=2) as loader:
            assert next(loader.epoch(0))
    assert [str(one.message) for one in caught] == []


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.image_sizes, *batch.targets, batch.image_ids, batch.original_sizes]


def same(first: list[list[Batch]], second: list[list[Batch]]) -> bool:
    assert [len(step) for step in first] == [len(step) for step in second]
    pairs = zip((b for step in first for b in step), (b for step in second for b in step), strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in zip(tensors(a), tensors(b), strict=True))


def test_batches_are_bit_equal_for_any_workers_and_start(data: CocoData) -> None:
    with train_loader(data, 0) as plain, train_loader(data, 2) as parallel:
        epochs = [list(plain.epoch(epoch)) for epoch in range(3)]
        assert plain.steps_per_epoch == parallel.steps_per_epoch == 2
        assert [[len(step) for step in steps] for steps in epochs] == [[2, 2]] * 3
        assert not same(epochs[0], epochs[1])
        assert same(list(parallel.epoch(2)), epochs[2])
        next(parallel.epoch(1))  # abandoned under way
        assert same(list(parallel.epoch(0)), epochs[0])
        assert same(list(parallel.epoch(1, start_step=1)), epochs[1][1:])
        assert same(list(plain.epoch(1, start_step=1)), epochs[1][1:])
        assert list(plain.epoch(1, start_step=2)) == []


def test_step_holds_the_same_images_for_any_micro_batch(data: CocoData) -> None:
    with train_loader(data, 0, 6, 6) as whole, train_loader(data, 0, 6, 4) as cut:
        (one,) = list(whole.epoch(0))
        (two,) = list(cut.epoch(0))
        assert ([len(b.image_ids) for b in one], [len(b.image_ids) for b in two]) == ([6], [4, 2])
        assert torch.equal(one[0].image_ids, torch.cat([batch.image_ids for batch in two]))
        assert torch.equal(one[0].targets.boxes, torch.cat([batch.targets.boxes for batch in two]))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_callers_random_numbers_alone(data: CocoData, workers: int) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with train_loader(data, workers) as loader:
        assert len(list(loader.epoch(0)) + list(loader.epoch(1))) == 4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pixels", ["published", "fast"])
def test_buckets_give_the_same_batches_whatever_the_workers(data: CocoData, pixels: Pixels) -> None:
    shapes = choose_buckets(TRAIN, data.heights, data.widths, count=4, grid=8)
    with (
        train_loader(data, 0, bucket_shapes=shapes, pixels=pixels) as plain,
        train_loader(data, 2, bucket_shapes=shapes, pixels=pixels) as parallel,
    ):
        assert plain.bucket_shapes == shapes and plain.steps_per_epoch == 2
        for epoch in (0, 1):
            steps = list(plain.epoch(epoch))
            assert [[len(micro.image_ids) for micro in step] for step in steps] == [[2, 2], [2, 2]]
            assert same(list(parallel.epoch(epoch)), steps)
            assert same(list(parallel.epoch(epoch, start_step=1)), steps[1:])
            ids = torch.cat([micro.image_ids for step in steps for micro in step])
            assert sorted((ids - 100).tolist()) == sorted(epoch_order(11, 1, epoch)[:8].tolist())
            for micro in (micro for step in steps for micro in step):
                assert tuple(micro.images.shape[2:]) in shapes
                assert (micro.image_sizes <= torch.tensor(micro.images.shape[2:])).all()


def test_fast_pixels_are_finished_to_the_published_batches(data: CocoData) -> None:
    with train_loader(data, 0) as published, train_loader(data, 2, pixels="fast") as fast:
        assert published.bucket_shapes is None
        steps = list(fast.epoch(0))
        assert {micro.images.dtype for step in steps for micro in step} == {torch.uint8}
        assert same(list(prefetch(steps, torch.device("cpu"))), list(published.epoch(0)))
    loaders = [
        EvalLoader(dataset_of(data, False, pixels), batch=4, workers=0, pin_memory=False)
        for pixels in ("published", "fast")
    ]
    assert same([list(loaders[0])], list(prefetch([list(loaders[1])], torch.device("cpu"))))


def test_batches_are_described_before_they_are_loaded(data: CocoData) -> None:
    shapes = choose_buckets(TRAIN, data.heights, data.widths, count=4, grid=8)
    with train_loader(data, 0, bucket_shapes=shapes) as buckets, train_loader(data, 0, total=2) as random:
        found, shares = [], []
        for loader in (buckets, random):
            batches = [micro for step in loader.epoch(0) for micro in step]
            valid = sum(int(micro.image_sizes.prod(dim=1).sum()) for micro in batches)
            shares.append(valid / sum(micro.images[:, 0].numel() for micro in batches))
            found.append(loader.describe())
    advice = ': data.batching = "random" pads less here' if shares[1] > shares[0] else ""
    assert found == [
        f"batches: 4 shapes, {shares[0]:.0%} useful pixels (random batches: {shares[1]:.0%}{advice})",
        f"batches: random, each padded to its largest image, {shares[1]:.0%} useful pixels",
    ]


def test_shapes_need_a_transform_that_can_be_planned(data: CocoData) -> None:
    with pytest.raises(TypeError, match="EvalTransform gives cannot be planned"):
        dataset_of(data, training=False).train_transform()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_all_images_in_order(data: CocoData, workers: int) -> None:
    loader = EvalLoader(dataset_of(data, False), batch=4, workers=workers, pin_memory=False)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert torch.cat([batch.image_ids for batch in batches]).tolist() == [100 + i for i in range(11)]
    assert torch.cat([batch.targets.counts for batch in batches]).tolist() == [3] * 7 + [2, 2, 0, 0]
    assert torch.cat([batch.original_sizes for batch in batches]).tolist() == [[30 - i, 20 + i] for i in range(11)]
    assert same([list(loader)], [batches])
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_is_the_same_sentence(data: CocoData, workers: int) -> None:
    path = data.image_root / "5.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError) as direct:
        dataset_of(data)[0, 5]
    with train_loader(data, workers, 11, 11) as loader, pytest.raises(DataError) as caught:
        list(loader.epoch(0))
    assert str(caught.value) == str(direct.value)
    assert str(caught.value).startswith(f"{path}: the image is damaged")


def test_fewer_images_than_a_batch(data: CocoData) -> None:
    with pytest.raises(DataError, match=r"has 11 images"), train_loader(data, 0, 12):
        pass


def test_workers_survive_the_signals_of_the_group(data: CocoData) -> None:
    with train_loader(data, 0) as plain, train_loader(data, 2) as parallel:
        want = list(plain.epoch(0))
        steps = parallel.epoch(0)
        got = [next(steps)]
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        assert same(got + list(steps), want)
        assert same(list(parallel.epoch(0)), want)
    assert multiprocessing.active_children() == []


def test_workers_survive_a_signal_while_they_start(data: CocoData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has just set its own handler, which ends the worker."""
    torch_handlers = torch.utils.data._utils.signal_handling._set_worker_signal_handlers

    def set_and_signal() -> None:
        torch_handlers()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_set_worker_signal_handlers", set_and_signal)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with train_loader(data, 0) as plain, train_loader(data, 2) as parallel:
        assert same(list(parallel.epoch(0)), list(plain.epoch(0)))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


SCRIPT = """
import multiprocessing, os, signal, sys, torch
from pathlib import Path
from samdetr.data.datasets import DetectionDataset, make_categories, read_coco
from samdetr.data.loader import TrainLoader
from samdetr.data.transforms import TrainTransform

if __name__ == "__main__":
    method, end, root, file = sys.argv[1:]
    multiprocessing.set_start_method(method)
    data = read_coco(root, file, "train")
    transform = TrainTransform(
        flip=0.5, sizes=(16, 20), max_size=40, crop=0.5, crop_resize_sizes=(20,), crop_min=10, crop_max=20
    )
    categories = make_categories(data, "category_id", 3)
    dataset = DetectionDataset(data, categories, transform, seed=3, max_pixels=10_000)
    plain, parallel, other = (
        TrainLoader(dataset, total_batch=4, micro_batch=2, workers=n, seed=1, pin_memory=False)
        for n in (0, 1, 1)
    )
    next(other.epoch(0))
    first, second = next(parallel.epoch(1)), next(plain.epoch(1))
    del other
    print(all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True)), flush=True)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "end"), [("fork", "done"), ("forkserver", "done"), ("forkserver", "killed")])
def test_workers_end_with_the_process(data: CocoData, tmp_path: Path, method: str, end: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), method, end, str(data.image_root), str(data.annotation_file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Workers hold the pipes open: this returns when the last of them has ended.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("True", 0 if end == "done" else -signal.SIGKILL)
    assert end == "killed" or done.stderr == ""


class _DiesAtOnce(EvalTransform):
    """A transform whose process is killed, as the kernel does when memory runs out."""

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        os.kill(os.getpid(), signal.SIGKILL)
        return image, boxes, labels


def test_a_killed_worker_is_a_sentence(data: CocoData) -> None:
    categories = make_categories(data, "category_id", 3)
    dataset = DetectionDataset(data, categories, _DiesAtOnce(size=20, max_size=40), seed=3, max_pixels=10_000)
    loader = TrainLoader(dataset, total_batch=4, micro_batch=2, workers=1, seed=1, pin_memory=False)
    with pytest.raises(DataError, match=r"a loader process was killed.*lower data\.workers"):
        next(loader.epoch(0))
    loader.close()
