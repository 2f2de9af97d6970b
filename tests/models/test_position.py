"""Position codes: the formula, valid cells, and the two rules for counting them."""

from __future__ import annotations

import math

import pytest
import torch

from samdetr.models.position import covered_cells, sine_map, sine_points, valid_cells


@pytest.mark.parametrize("offset", [0.5, 0.0], ids=["SAM-DETR", "DETR"])
def test_sine_map_by_the_formula(offset: float) -> None:
    code = sine_map(torch.tensor([[3, 5]]), 4, 6, 16, offset=offset)
    for row, column in ((0, 0), (2, 4)):
        for half, (index, last) in enumerate(((row, 3), (column, 5))):
            coordinate = (index + 1 - offset) / (last - offset + 1e-6 + offset) * 2 * math.pi
            for channel in range(8):
                wave = math.sin if channel % 2 == 0 else math.cos
                expected = wave(coordinate / 10000 ** (2 * (channel // 2) / 8))
                assert code[0, row, column, half * 8 + channel].item() == pytest.approx(expected, abs=1e-6)


def test_sine_points_is_y_then_x() -> None:
    point = torch.tensor([[0.25, 0.5]])
    code = sine_points(point, 8)
    assert code[0, 0].item() == pytest.approx(math.sin(math.pi), abs=1e-6)  # y
    assert code[0, 4].item() == pytest.approx(math.sin(math.pi / 2), abs=1e-6)  # x


@pytest.mark.parametrize(("padded", "size"), [((224, 288), (180, 250)), ((97, 130), (97, 130)), ((250, 333), (33, 64))])
def test_valid_cells_equals_downsampling_the_mask(padded: tuple[int, int], size: tuple[int, int]) -> None:
    cells = tuple(-(-side // 32) for side in padded)
    mask = torch.ones(1, 1, *padded)
    mask[..., : size[0], : size[1]] = 0
    small = torch.nn.functional.interpolate(mask, size=cells)[0, 0] == 0
    expected = [int(small[:, 0].sum()), int(small[0].sum())]
    assert valid_cells(torch.tensor([size]), padded, cells).tolist() == [expected]


def test_covered_cells_rounds_up() -> None:
    assert covered_cells(torch.tensor([[64, 65], [1, 31]]), 32).tolist() == [[2, 3], [1, 1]]
