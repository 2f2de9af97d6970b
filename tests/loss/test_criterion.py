"""Matching and losses: exactness, padding, empty images, numbers of boxes, bad numbers."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from samdetr.loss import SetCriterion, matcher
from samdetr.loss.matcher import candidates, match
from samdetr.structures import Outputs, Proposals, Targets


def example(
    counts: list[int], *, queries: int = 9, padded: int = 5, classes: int = 4, layers: int = 3, seed: int = 0
) -> tuple[Outputs, Targets]:
    """Random predictions (float64, with gradients) and targets; rows beyond the counts are zero."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(counts)
    logits = torch.randn(layers, batch, queries, classes, generator=generator, dtype=torch.float64)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    labels = torch.randint(0, classes - 1, (batch, padded), generator=generator)  # the last may be no object
    wanted = torch.rand(batch, padded, 4, generator=generator) * 0.4 + 0.2
    exists = torch.arange(padded) < torch.tensor(counts)[:, None]
    targets = Targets(labels * exists, wanted * exists[..., None], torch.tensor(counts))
    return Outputs(logits.requires_grad_(), boxes.requires_grad_()), targets


def part(outputs: Outputs, targets: Targets, image: int, padded: int) -> tuple[Outputs, Targets]:
    """One image alone, with another padding of its targets."""
    alone = Outputs(*(value[:, image : image + 1] for value in outputs[:2]))
    return alone, Targets(
        targets.labels[image : image + 1, :padded],
        targets.boxes[image : image + 1, :padded],
        targets.counts[image : image + 1],
    )


def test_match_is_the_cheapest_of_all_assignments() -> None:
    generator = torch.Generator().manual_seed(3)
    cost = torch.randn(2, 3, 5, 4, generator=generator)
    counts = torch.tensor([3, 0, 2])
    indices, bad = match(cost, counts)
    assert bad.tolist() == [[False] * 3] * 2
    for layer in range(2):
        for image, count in enumerate(counts.tolist()):
            chosen = indices[layer, image]
            assert (chosen[count:] == -1).all()
            problem = cost[layer, image].numpy()
            best = min(sum(problem[q, t] for t, q in enumerate(order)) for order in permutations(range(5), count))
            total = sum(problem[chosen[t], t] for t in range(count))
            assert total == pytest.approx(best)
            assert len(set(chosen[:count].tolist())) == count


def test_more_targets_than_queries_leaves_the_dearest_unmatched() -> None:
    cost = torch.tensor([[[[1.0, 5.0, 2.0], [4.0, 1.0, 9.0]]]])
    assert match(cost, torch.tensor([3]))[0].tolist() == [[[0, 1, -1]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cost_that_is_not_finite_is_told_only_where_it_counts(bad: float) -> None:
    cost = torch.zeros(1, 1, 3, 2)
    cost[..., 1] = bad
    assert [part.tolist() for part in match(cost, torch.tensor([1]))] == [[[[0, -1]]], [[False]]]
    assert [part.tolist() for part in match(cost, torch.tensor([2]))] == [[[[-1, -1]]], [[True]]]


def test_boxes_that_are_not_finite_make_the_total_nan() -> None:
    outputs, targets = example([2, 1])
    assert SetCriterion()(outputs, targets).total.isfinite()
    with torch.no_grad():
        outputs.boxes[0, 0, 1, 2] = torch.nan
    assert SetCriterion()(outputs, targets).total.isnan()


def test_loss_by_hand() -> None:
    logits = torch.tensor([[[[0.0], [-2.0]]]], dtype=torch.float64)
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]], dtype=torch.float64)
    targets = Targets(torch.tensor([[0]]), torch.tensor([[[0.5, 0.6, 0.2, 0.2]]]), torch.tensor([1]))
    losses = SetCriterion()(Outputs(logits, boxes), targets)
    wrong = 1 / (1 + np.exp(2))  # probability of the unmatched query
    focal = 0.25 * 0.5**2 * np.log(2) + 0.75 * wrong**2 * -np.log(1 - wrong)
    assert losses.terms["loss_ce"].item() == pytest.approx(focal)
    assert losses.terms["loss_bbox"].item() == pytest.approx(0.1)
    assert losses.terms["loss_giou"].item() == pytest.approx(1 - 1 / 3)
    assert losses.terms["class_error"].item() == 0
    assert losses.total.item() == pytest.approx(2 * focal + 5 * 0.1 + 2 * (2 / 3))


def test_softmax_loss_by_hand() -> None:
    """Two classes and no object; the first query is matched, the second has no object."""
    logits = torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]]]], dtype=torch.float64)
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]], dtype=torch.float64)
    targets = Targets(torch.tensor([[0, 0]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.0] * 4]]), torch.tensor([1]))
    losses = SetCriterion(classification="softmax", no_object_weight=0.1)(Outputs(logits, boxes), targets)
    matched, empty = -np.log(np.e / (np.e + 2)), -np.log(np.exp(2) / (np.exp(2) + 2))
    assert losses.terms["loss_ce"].item() == pytest.approx((matched + 0.1 * empty) / 1.1)


def test_softmax_loss_is_torchs_weighted_cross_entropy() -> None:
    outputs, targets = example([3, 0, 5])
    criterion = SetCriterion(classification="softmax")
    indices, _ = criterion.match(outputs, targets)
    losses = criterion(outputs, targets)
    weight = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    for layer, name in enumerate(("loss_ce_0", "loss_ce_1", "loss_ce")):
        wanted = torch.full(outputs.logits.shape[1:3], 3)
        for image, count in enumerate(targets.counts.tolist()):
            wanted[image, indices[layer, image, :count]] = targets.labels[image, :count]
        expected = torch.nn.functional.cross_entropy(outputs.logits[layer].flatten(0, 1), wanted.flatten(), weight)
        assert losses.terms[name].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_padding_of_targets_and_other_images_change_nothing(classification: str) -> None:
    outputs, targets = example([3, 0, 5])
    criterion = SetCriterion(classification=classification, step_images=3)
    whole = criterion(outputs, targets, torch.tensor(8))
    pieces = [
        criterion(*part(outputs, targets, image, padded), torch.tensor(8)) for image, padded in enumerate((3, 1, 5))
    ]
    assert whole.total.item() == pytest.approx(sum(piece.total.item() for piece in pieces), rel=1e-12)
    gradient = torch.autograd.grad(whole.total, outputs[:2])
    again = torch.autograd.grad(sum(piece.total for piece in pieces), outputs[:2])
    for one, other in zip(gradient, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_images_without_objects_give_finite_losses_and_gradients(classification: str) -> None:
    outputs, targets = example([0, 0])
    losses = SetCriterion(classification=classification)(outputs, targets)
    assert losses.terms["loss_bbox"].item() == 0
    assert losses.terms["loss_giou"].item() == 0
    assert losses.terms["loss_ce"].item() > 0
    for gradient in torch.autograd.grad(losses.total, outputs[:2]):
        assert torch.isfinite(gradient).all()


def test_terms_are_named_as_published() -> None:
    outputs, targets = example([2], layers=3)
    kinds = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    expected = {f"{kind}{layer}" for kind in kinds for layer in ("", "_0", "_1")} | {"class_error"}
    assert set(SetCriterion()(outputs, targets).terms) == expected


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_gradients_match_finite_differences(classification: str) -> None:
    outputs, targets = example([2, 1], queries=4, layers=1)

    def total(logits: Tensor, boxes: Tensor) -> Tensor:
        return SetCriterion(classification=classification)(Outputs(logits, boxes), targets).total

    assert torch.autograd.gradcheck(total, outputs[:2])


def test_weights_scale_their_terms() -> None:
    outputs, targets = example([3, 2])
    plain = SetCriterion()(outputs, targets)
    only_l1 = SetCriterion(class_weight=0, giou_weight=0, l1_weight=3.0)(outputs, targets)
    l1 = sum(plain.terms[name].item() for name in plain.terms if name.startswith("loss_bbox"))
    assert only_l1.total.item() == pytest.approx(3 * l1)


def test_candidates_hold_the_cheapest_assignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the whole lists, the assignment among them is that among all, even where all want the same."""
    generator = torch.Generator().manual_seed(2)
    wanted = torch.rand(1, 2, 60, 1, generator=generator)
    cost = wanted + 0.01 * torch.rand(1, 2, 60, 6, generator=generator)
    counts = torch.tensor([6, 4])
    expected, _ = match(cost, counts)
    monkeypatch.setattr(matcher, "MAX_QUERIES", 36)
    found, bad = match(cost, counts)
    assert torch.equal(found, expected)
    assert not bad.any()
    among, _ = candidates(cost[0], counts)
    assert among.shape == (2, 36)
    for image, count in enumerate(counts.tolist()):
        lists = cost[0, image, :, :count].topk(count, dim=0, largest=False).indices
        assert set(lists.flatten().tolist()) <= set(among[image].tolist())
        assert among[image].tolist() == sorted(set(among[image].tolist()))


def test_candidates_see_every_bad_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "MAX_QUERIES", 4)
    cost = torch.arange(24.0).view(1, 2, 6, 2)
    cost[0, 0, 5, 0] = torch.nan  # the dearest query, and no candidate
    cost[0, 1, 5, 1] = torch.inf  # of a target that is padding
    assert match(cost, torch.tensor([2, 1]))[1].tolist() == [[True, False]]


def test_proposals_are_one_more_layer_of_a_single_class() -> None:
    outputs, targets = example([3, 2])
    proposals, _ = example([3, 2], queries=20, layers=1, seed=5)
    losses = SetCriterion()(outputs._replace(proposals=Proposals(proposals.logits[0], proposals.boxes[0])), targets)
    decoder = SetCriterion()(outputs, targets)
    alone = SetCriterion()(proposals, targets._replace(labels=torch.zeros_like(targets.labels)))
    assert losses.total.item() == pytest.approx((decoder.total + alone.total).item())
    extra = {"loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}
    assert set(losses.terms) == set(decoder.terms) | {f"{name}_enc" for name in extra}
    for name in extra:
        assert losses.terms[f"{name}_enc"].item() == alone.terms[name].item()
