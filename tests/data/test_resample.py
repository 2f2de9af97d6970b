"""Augmentation by matrix products against the resizes of the loader."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from samdetr.data.batching import Sample, collate
from samdetr.data.prefetch import finish
from samdetr.data.resample import collect, geometry_of, resample
from samdetr.data.transforms import IMAGENET_STD, Plan, TrainTransform
from samdetr.structures import Batch
from tests.data.test_transforms import boxes_of

TRAIN = TrainTransform(
    flip=0.5, sizes=(48, 56, 96), max_size=120, crop=0.5, crop_resize_sizes=(40, 70), crop_min=30, crop_max=64, raw=True
)


def photo(height: int, width: int, seed: int) -> Tensor:
    """Smooth patches with a little noise, uint8 [3, height, width]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator) * 255
    noise = torch.randn(3, height, width, generator=generator) * 6
    return (interpolate(coarse, (height, width), mode="bicubic")[0] + noise).clamp(0, 255).to(torch.uint8)


def batches(seed: int, shape: tuple[int, int] | None) -> tuple[Batch, Batch]:
    """The same six images, augmented by the loader, and as photos with what is to be done."""
    done, todo = [], []
    for number, (height, width) in enumerate([(60, 80), (80, 60), (53, 80), (200, 64), (40, 40), (75, 100)]):
        image, boxes, labels = photo(height, width, number), boxes_of((3, 4, 40, 30)), torch.tensor([1])
        torch.manual_seed(1000 * seed + number)
        plan = TRAIN.plan(height, width)
        augmented, boxes, labels = TRAIN.apply(plan, image, boxes, labels)
        done.append(Sample(augmented, boxes, labels, number, (height, width)))
        todo.append(done[-1]._replace(image=image, geometry=geometry_of(plan, height, width)))
    return collate(done, 2, shape), collate(todo, 2, shape)


@pytest.mark.parametrize("shape", [None, (128, 128)])
@pytest.mark.parametrize("seed", range(4))
def test_pixels_are_those_of_the_loader_within_rounding(seed: int, shape: tuple[int, int] | None) -> None:
    done, todo = batches(seed, shape)
    assert todo.images.dtype == torch.uint8 and todo.images.shape[2:] == (200, 100)
    want, got = finish(done, torch.device("cpu")), finish(todo, torch.device("cpu"))
    assert got.resample is None and got.images.shape == want.images.shape
    assert torch.equal(got.image_sizes, want.image_sizes)
    levels = (got.images - want.images).abs() * 255 * torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    for difference, (height, width) in zip(levels, got.image_sizes.tolist(), strict=True):
        assert difference[:, :height, :width].max() < 2.01 and difference[:, :height, :width].mean() < 0.5
        assert (difference[:, height:] == 0).all() and (difference[:, :, width:] == 0).all()


def test_half_precision_costs_less_than_a_level() -> None:
    """On a GPU the products take float16."""
    _, todo = batches(0, None)
    given = (todo.images, todo.geometry, todo.resample)
    exact, half = (resample(*given, dtype) for dtype in (torch.float32, torch.float16))
    assert (exact - half).abs().max() <= 1 and (exact - half).abs().mean() < 0.1


def test_nothing_to_do_changes_nothing() -> None:
    image = photo(30, 50, 0)
    still = geometry_of(Plan(False, 0, (0, 0, 30, 50), 30, (30, 50)), 30, 50)
    mirrored = geometry_of(Plan(True, 0, (0, 0, 30, 50), 30, (30, 50)), 30, 50)
    both = [still, mirrored]
    out = resample(image.repeat(2, 1, 1, 1), torch.tensor(both), collect(both, (32, 64)), torch.float32)
    assert torch.equal(out[0, :, :30, :50], image.float()) and torch.equal(out[1, :, :30, :50], image.flip(-1).float())
    assert (out[:, :, 30:] == 0).all() and (out[:, :, :, 50:] == 0).all()
