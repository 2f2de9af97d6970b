"""8-bit batches become the published ones, and what is given out when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from samdetr.data.batching import Sample, collate
from samdetr.data.device import one_ahead, prefetch, to_device
from samdetr.data.transforms import TrainTransform
from samdetr.errors import DataError
from samdetr.structures import Batch, Targets
from tests.data.test_transforms import TRAIN, augmented, boxes_of, image_of

CPU = torch.device("cpu")


def batch_of(*, raw: bool, seed: int = 0) -> Batch:
    transform = TrainTransform(**{**vars(TRAIN), "raw": raw})
    samples = []
    for number in range(6):
        image = image_of(50 + number, 70, number).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoded
        boxes, labels = boxes_of((3, 4, 40, 30), (20, 2, 60, 44)), torch.tensor([1, 2])
        parts = augmented(transform, image, boxes, labels, 100 * seed + number)
        samples.append(Sample(*parts, number, (50 + number, 70)))
    return collate(samples, 3, (112, 128))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.images, batch.image_sizes, *batch.targets, batch.image_ids, batch.original_sizes]


def test_bytes_that_are_normalised_are_the_published_batch_to_the_last_bit() -> None:
    for seed in range(5):
        published, fast = batch_of(raw=False, seed=seed), batch_of(raw=True, seed=seed)
        assert fast.images.dtype == torch.uint8 and fast.images.shape == (6, 3, 112, 128)
        assert fast.images.is_contiguous(memory_format=torch.channels_last)
        moved = to_device(fast, CPU)
        assert moved.images.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(tensors(moved), tensors(published), strict=True))
        for image, (height, width) in zip(moved.images, moved.image_sizes.tolist(), strict=True):
            assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
            assert (image[:, :height, :width] != 0).any(dim=0).float().mean() > 0.99


def test_a_float_batch_is_normalised_already() -> None:
    batch = batch_of(raw=False)
    assert to_device(batch, CPU).images is batch.images


def test_all_that_the_step_reads_moves_in_one_copy_each() -> None:
    """Each tensor begins where compiled code need not copy it."""
    batch = batch_of(raw=True)
    copied: list[torch.Tensor] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
                copied.append(args[0])
            return func(*args, **(kwargs or {}))

    with Counting():
        moved = batch.to(torch.device("meta"))
    read = (batch.images, batch.image_sizes, *batch.targets)
    assert [tensor.data_ptr() for tensor in copied] == [tensor.data_ptr() for tensor in read]
    assert moved.image_sizes.is_meta and all(part.is_meta for part in moved.targets) and not moved.image_ids.is_meta
    for tensor in read:
        assert tensor.is_contiguous() or tensor is batch.images
        assert tensor.data_ptr() % 16 == 0


def test_a_loader_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of the targets, a tuple within the batch."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: pinned.append(tensor) or tensor.clone())
    batch = batch_of(raw=True)
    got = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in tensors(batch)]
    assert type(got) is Batch and type(got.targets) is Targets
    assert all(torch.equal(a, b) and a is not b for a, b in zip(tensors(got), tensors(batch), strict=True))


def test_prefetching_keeps_steps_and_order() -> None:
    steps = [[batch_of(raw=True, seed=step), batch_of(raw=False, seed=step + 10)] for step in range(3)]
    got = list(prefetch(steps, CPU))
    want = [[to_device(batch, CPU) for batch in step] for step in steps]
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_one_ahead_makes_the_next_before_giving_out() -> None:
    made: list[int] = []

    def source(count: int) -> Iterator[int]:
        for number in range(count):
            made.append(number)
            yield number

    seen = [(item, len(made)) for item in one_ahead(source(4))]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(one_ahead(source(1))) == [0] and list(one_ahead(source(0))) == []


@pytest.mark.parametrize("sound", [0, 1, 3])
def test_an_error_waits_for_its_turn(sound: int) -> None:
    def source() -> Iterator[int]:
        yield from range(sound)
        raise DataError("the fourth photo is damaged")

    items = one_ahead(source())
    assert [next(items) for _ in range(sound)] == list(range(sound))
    with pytest.raises(DataError, match="fourth photo"):
        next(items)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_prefetching_to_a_gpu_gives_the_same_numbers() -> None:
    device = torch.device("cuda", 0)
    steps = [[batch_of(raw=True, seed=step), batch_of(raw=True, seed=step + 10)] for step in range(8)]
    pinned = [[batch.pin_memory() for batch in step] for step in steps]
    for got, step in zip(prefetch(pinned, device), steps, strict=True):
        torch.cuda._sleep(1_000_000)  # the step computes while the next one is copied
        for moved, batch in zip(got, step, strict=True):
            want = to_device(batch, CPU)
            assert moved.images.is_contiguous(memory_format=torch.channels_last)
            assert (moved.images.cpu() - want.images).abs().max() < 1e-6
            assert torch.equal(moved.targets.boxes.cpu(), want.targets.boxes)
