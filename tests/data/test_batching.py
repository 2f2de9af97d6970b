"""Padding, and the order of an epoch."""

from __future__ import annotations

import pytest
import torch

from samdetr.data.batching import EpochSampler, Sample, collate, cut_step, epoch_order
from samdetr.errors import DataError


def sample(height: int, width: int, objects: int, image_id: int) -> Sample:
    boxes = torch.arange(1, objects * 4 + 1).reshape(-1, 4) / 100
    return Sample(
        torch.full((3, height, width), float(image_id)), boxes, torch.arange(1, objects + 1), image_id, (8, 9)
    )


def test_padding_is_zero_and_at_the_bottom_and_right() -> None:
    batch = collate([sample(4, 6, 2, 7), sample(5, 3, 0, 9)], max_objects=3)
    assert batch.images.shape == (2, 3, 5, 6)
    assert (batch.images[0, :, :4] == 7).all() and (batch.images[0, :, 4:] == 0).all()
    assert (batch.images[1, :, :, :3] == 9).all() and (batch.images[1, :, :, 3:] == 0).all()
    assert batch.image_sizes.tolist() == [[4, 6], [5, 3]]
    assert batch.targets.labels.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert batch.targets.boxes.shape == (2, 3, 4)
    assert batch.targets.boxes[0, 1].tolist() == pytest.approx([0.05, 0.06, 0.07, 0.08])
    assert batch.targets.boxes[0, 2].tolist() == batch.targets.boxes[1, 0].tolist() == [0, 0, 0, 0]
    assert (batch.targets.counts.tolist(), batch.image_ids.tolist()) == ([2, 0], [7, 9])
    assert batch.original_sizes.tolist() == [[8, 9], [8, 9]]
    assert batch.images.dtype == batch.targets.boxes.dtype == torch.float32
    integers = (batch.image_sizes, *batch.targets[::2], batch.image_ids, batch.original_sizes)
    assert {tensor.dtype for tensor in integers} == {torch.int64}


def test_padding_to_a_shape() -> None:
    batch = collate([sample(4, 6, 2, 7), sample(5, 3, 0, 9)], max_objects=3, shape=(8, 6))
    assert batch.images.shape == (2, 3, 8, 6) and batch.image_sizes.tolist() == [[4, 6], [5, 3]]
    assert (batch.images[0, :, :4] == 7).all() and (batch.images[0, :, 4:] == 0).all()
    with pytest.raises(DataError, match=r"image ids .*5 x 6 pixels were planned to fit 4 x 6.*data\.batching"):
        collate([sample(4, 6, 2, 7), sample(5, 3, 0, 9)], max_objects=3, shape=(4, 6))


def test_bytes_stay_bytes() -> None:
    samples = [one._replace(image=one.image.byte()) for one in (sample(4, 6, 2, 7), sample(5, 3, 0, 9))]
    images = collate(samples, max_objects=3, shape=(8, 8)).images
    assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (2, 3, 8, 8) and (images[1, :, :5, :3] == 9).all() and images[1].sum() == 9 * 45


def test_order_is_a_permutation_of_seed_and_epoch() -> None:
    assert epoch_order(8, seed=42, epoch=0).tolist() == epoch_order(8, seed=42, epoch=0).tolist()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_order_never_changes_between_versions() -> None:
    assert epoch_order(8, seed=42, epoch=3).tolist() == [3, 4, 5, 0, 1, 6, 2, 7]


def test_training_drops_the_incomplete_batch_and_resumes_anywhere() -> None:
    sampler = EpochSampler(10, 4, 1, shuffle=True)
    sampler.set_epoch(2)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 2
    assert all(len(keys) == 4 and {epoch for epoch, _ in keys} == {2} for keys in whole)
    assert len({row for keys in whole for _, row in keys}) == 8
    assert [row for keys in whole for _, row in keys] == epoch_order(10, 1, 2)[:8].tolist()
    sampler.set_epoch(2, 1)
    assert list(sampler) == whole[1:]
    sampler.set_epoch(2, 2)
    assert list(sampler) == []


def test_evaluation_keeps_all_in_order() -> None:
    sampler = EpochSampler(5, 2, 0, shuffle=False)
    assert list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    assert len(sampler) == 3


def test_too_few_images_is_an_error() -> None:
    with pytest.raises(DataError, match=r"has 3 images.*batch of 4.*train\.total_batch to 3"):
        EpochSampler(3, 4, 0, shuffle=True)
    assert len(EpochSampler(4, 4, 0, shuffle=True)) == 1


def test_a_step_is_cut_into_micro_batches() -> None:
    keys = [(0, row) for row in range(5)]
    assert cut_step(keys, 2) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
