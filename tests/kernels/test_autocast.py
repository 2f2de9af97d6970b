"""Autocast reaches into custom ops: it must not change what one computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from samdetr_kernels import (
    deformable_attention,
    linear_assignment,
    roi_align,
    salient_cross_attention,
    salient_points,
)

VALID = torch.tensor([[7, 9], [5, 8]])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def boxes() -> Tensor:
    centre, side = random(2, 6, 2).sigmoid() * 7, random(2, 6, 2).exp()
    return torch.cat((centre - side, centre + side), dim=-1)


def attention(query: Tensor, key: Tensor, value: Tensor, device: str = "cpu") -> Tensor:
    points, scales = (random(2, 6, 8, 2) * 4).to(device), random(2, 6, 8, 2).to(device)
    return salient_cross_attention(query, key, value, VALID.to(device), 9, points=points, scales=scales)


def deformable(value: Tensor) -> Tensor:
    locations, weights = random(2, 6, 4, 2, 3, 2).sigmoid(), random(2, 6, 4, 2, 3).softmax(-1)
    return deformable_attention(value, torch.tensor([[7, 9], [3, 4]]), locations, weights)


CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "roi_align": (lambda x: roi_align(x, boxes(), valid_sizes=VALID), [random(2, 7, 9, 16)]),
    "salient_points": (
        lambda x, points: salient_points(x, boxes(), points, valid_sizes=VALID),
        [random(2, 7, 9, 16), random(2, 6, 8, 2).tanh()],
    ),
    # scores of some hundreds, as a trained model has them: rounded in one direction only, gradients explode
    "salient_cross_attention": (attention, [random(2, 6, 8, 64) * 30, random(2, 63, 64) * 30, random(2, 63, 8, 8)]),
    "deformable_attention": (deformable, [random(2, 75, 4, 16)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_ops_compute_the_same_under_autocast(name, dtype):
    op, tensors = CASES[name]
    results = []
    for enabled in (False, True):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        # attention's own inputs are cast, as torch's attention casts its own
        parts = [part.bfloat16() for part in leaves] if op is attention and not enabled else leaves
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = op(*parts)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for plain, under in zip(*results, strict=True):
        assert torch.equal(plain, under) and plain.dtype == under.dtype and plain.isfinite().all()


def test_attention_takes_what_norms_and_linear_layers_give_under_autocast():
    query, key, value = CASES["salient_cross_attention"][1]
    expected = attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    plain = torch.compile(salient_cross_attention, backend="aot_eager", fullgraph=True)

    def compiled(*tensors: Tensor) -> Tensor:
        return plain(*tensors, VALID, 9, points=random(2, 6, 8, 2) * 4, scales=random(2, 6, 8, 2))

    with torch.autocast("cpu", torch.bfloat16):
        for op in (attention, compiled):
            out = op(query, key.bfloat16(), value)
            assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
        assert attention(query.double(), key.double(), value.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"key must be a torch\.float32"):
        attention(query, key.bfloat16(), value)
    assert attention(query.to("meta"), key.to("meta"), value.to("meta"), "meta").device.type == "meta"


def test_assignment_is_the_same_under_autocast():
    cost, counts = random(3, 20, 7), torch.tensor([7, 0, 4])
    expected = linear_assignment(cost, counts)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_assignment(cost, counts)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
