"""Box arithmetic against hand-computed numbers and torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou

from samdetr.loss.boxes import cxcywh_to_xyxy, generalized_iou


def test_corners_of_a_known_box() -> None:
    box = torch.tensor([0.5, 0.4, 0.2, 0.6])
    assert cxcywh_to_xyxy(box).tolist() == pytest.approx([0.4, 0.1, 0.6, 0.7])


def test_generalized_iou_by_hand() -> None:
    first = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    second = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 1.0, 1.0], [2.0, 0.0, 3.0, 1.0]])
    # overlap 1 of union 7 in a hull of 9; identical; disjoint: union 2 in a hull of 3
    assert generalized_iou(first, second).tolist() == pytest.approx([1 / 7 - 2 / 9, 1.0, -1 / 3])


def test_generalized_iou_equals_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = cxcywh_to_xyxy(torch.rand(2, 40, 4, generator=generator, dtype=torch.float64) + 0.01)
    ours = generalized_iou(boxes[0][:, None], boxes[1][None])
    torch.testing.assert_close(ours, generalized_box_iou(boxes[0], boxes[1]), rtol=0, atol=1e-12)
