"""The two aligner ops against torchvision and grid_sample in float64, and their registration."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align as torchvision_roi_align

from samdetr_kernels import (
    roi_align,
    roi_align_reference,
    salient_points,
    salient_points_reference,
)
from samdetr_kernels.salient_points import salient_points_backward_reference
from samdetr_kernels.salient_points_kernels import salient_points_backward_triton

MODULE = sys.modules["samdetr_kernels.salient_points"]
MAPS = [(1, 1), (7, 5), (25, 38)]


def random_boxes(batch: int, count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draw boxes within, across and outside the map, some of zero or negative size, one of the whole map."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float64)
    centre = (torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * size
    side = torch.rand(batch, count, 2, generator=generator, dtype=torch.float64) ** 2 * 1.7 * size
    boxes = torch.cat((centre - side / 2, centre + side / 2), dim=-1)
    if count >= 6:
        boxes[:, 0] = torch.tensor([0.0, 0.0, width, height])
        boxes[:, 1, 2:] = boxes[:, 1, :2]
        boxes[:, 2, 2:] = boxes[:, 2, :2] - 1.0
        boxes[:, 3] += 3 * max(height, width)
        boxes[:, 4] = torch.tensor([0.2, 0.3, 0.21, 0.32])
    return boxes


def published_roi_align(features: Tensor, boxes: Tensor, size: int = 7) -> Tensor:
    """Run torchvision's op on [B, H, W, C]; boxes without positive side give zero (there they are left to chance)."""
    out = torchvision_roi_align(
        features.permute(0, 3, 1, 2).contiguous(), list(boxes), size, aligned=True, sampling_ratio=-1
    )
    out = out.view(boxes.shape[0], boxes.shape[1], -1, size, size).permute(0, 1, 3, 4, 2)
    positive = ((boxes[..., 2:] - boxes[..., :2]) > 0).all(-1)
    return torch.where(positive[..., None, None, None], out, torch.zeros((), dtype=out.dtype))


def published_points(features: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """Run RoIAlign then grid_sample, as the paper composes them."""
    rois = published_roi_align(features, boxes).flatten(0, 1).permute(0, 3, 1, 2)
    grid = points.flatten(0, 1)[:, :, None]
    out = grid_sample(rois, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return out.squeeze(-1).transpose(1, 2).reshape(*points.shape[:3], features.shape[-1])


def inputs(height: int, width: int, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 100 + width)
    features = torch.randn(2, height, width, channels, generator=generator, dtype=torch.float64)
    boxes = random_boxes(2, 60, height, width)
    points = torch.rand(2, 60, 8, 2, generator=generator, dtype=torch.float64) * 2.4 - 1.2
    return features, boxes, points


@pytest.mark.parametrize("size", MAPS)
def test_roi_align_equals_torchvision_with_gradient(size):
    features, boxes, _ = inputs(*size)
    features.requires_grad_()
    expected = published_roi_align(features, boxes)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected_grad,) = torch.autograd.grad(expected, features, upstream)
    out = roi_align(features, boxes)
    (grad,) = torch.autograd.grad(out, features, upstream)
    assert (out - expected).abs().max() < 1e-12
    assert (grad - expected_grad).abs().max() < 1e-12
    assert (roi_align_reference(features, boxes) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("size", MAPS)
def test_salient_points_equal_roi_align_then_grid_sample_with_gradients(size):
    features, boxes, points = inputs(*size)
    features.requires_grad_()
    points.requires_grad_()
    expected = published_points(features, boxes, points)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, (features, points), upstream)
    out = salient_points(features, boxes, points)
    grads = torch.autograd.grad(out, (features, points), upstream)
    assert (out - expected).abs().max() < 1e-12
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).abs().max() < 1e-11
    reference = salient_points_reference(features, boxes, points)
    reference_grads = torch.autograd.grad(reference, (features, points), upstream)
    for grad, reference_grad in zip(grads, reference_grads, strict=True):
        assert (grad - reference_grad).abs().max() < 1e-11


class _DividesAsCuda(TorchDispatchMode):
    """Mode that divides by a number of the host as CUDA does: multiplies with its rounded inverse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], Tensor):
            return args[0] * (1 / torch.tensor(float(args[1]), dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_the_number_of_samples_is_that_of_an_exact_division():
    # 21 / 7 rounds to 3 samples a bin, 21 * (1 / 7) to 4
    features = torch.rand(1, 30, 30, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[2.0, 3.0, 23.0, 24.0]]])
    expected = published_roi_align(features.double(), boxes.double())
    with _DividesAsCuda():
        out = roi_align_reference(features, boxes)
        assert (torch.tensor(21.0) / 7).ceil() == 4
    assert (out - expected).abs().max() < 1e-5


def test_points_of_the_whole_image():
    """The ablation's search range "within the image": the box is the image, whatever the reference box."""
    features, _, points = inputs(25, 38)
    sizes = torch.tensor([[25, 38], [20, 31]])
    boxes = torch.cat((torch.zeros(2, 2), sizes.flip(-1)), dim=1).double()[:, None].expand(-1, 60, -1)
    out = salient_points(features, boxes, points, 7, sizes)
    for image, (height, width) in enumerate(sizes.tolist()):
        alone = features[image : image + 1, :height, :width]
        expected = published_points(alone, boxes[image : image + 1], points[image : image + 1])
        assert (out[image] - expected[0]).abs().max() < 1e-12


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_other_batches_and_maps(dynamic):
    def both(features: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
        return roi_align(features, boxes).sum() + salient_points(features, boxes, points).square().sum()

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch, height, width in ((2, 7, 5), (3, 9, 6), (1, 25, 38)):
        generator = torch.Generator().manual_seed(batch)
        features = torch.randn(batch, height, width, 4, generator=generator)
        boxes = random_boxes(batch, 6, height, width).float()
        points = torch.rand(batch, 6, 3, 2, generator=generator) * 2 - 1
        found, expected = [], []
        for function, into in ((compiled, found), (both, expected)):
            leaves = features.clone().requires_grad_(), points.clone().requires_grad_()
            out = function(leaves[0], boxes, leaves[1])
            into += [out.detach(), *torch.autograd.grad(out, leaves)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradcheck():
    features, boxes, points = inputs(7, 5, channels=2)
    features, boxes, points = features[:1].requires_grad_(), boxes[:1, :9], points[:1, :9, :3]
    points = points.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: roi_align(f, boxes, 3), (features,))
    assert torch.autograd.gradcheck(lambda f, p: salient_points(f, boxes, p), (features, points))


def test_reference_gives_the_gradient_of_the_boxes():
    features, _, points = inputs(25, 38, channels=2)
    boxes = torch.tensor([[[3.1, 4.2, 11.7, 12.9], [20.3, 6.6, 35.9, 19.2]]], dtype=torch.float64)
    features, points = features[:1], points[:1, :2].clamp(-0.9, 0.9)
    boxes.requires_grad_()
    # float64 finite differences stay on one smooth piece of the piecewise-bilinear function
    assert torch.autograd.gradcheck(lambda b: roi_align_reference(features, b), (boxes,), eps=1e-8, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda b: salient_points_reference(features, b, points), (boxes,), eps=1e-8, atol=1e-5
    )


def test_valid_sizes_make_a_padded_map_equal_to_the_map_alone():
    features, boxes, points = inputs(7, 5)
    padded = torch.full((2, 11, 9, 5), 1e3, dtype=torch.float64)
    padded[:, :7, :5] = features
    valid = torch.tensor([[7, 5], [7, 5]])
    difference = roi_align(padded, boxes, 7, valid) - roi_align(features, boxes)
    assert difference.abs().max() < 1e-12
    difference = salient_points(padded, boxes, points, 7, valid) - salient_points(features, boxes, points)
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_loses_no_more_than_its_inputs_do(dtype):
    features, boxes, points = inputs(25, 38)
    rounded = features.to(dtype)
    expected = salient_points_reference(rounded.double(), boxes.float().double(), points.float().double())
    out = salient_points(rounded, boxes.float(), points.float())
    assert out.dtype == dtype
    # one rounding of the output, and fp32 round-off of weights on coordinates of up to about 40 cells
    bound = torch.finfo(dtype).eps * expected.abs() + 40 * torch.finfo(torch.float32).eps * 8
    assert ((out.double() - expected).abs() <= bound).all()


def test_empty_and_repeated():
    features, boxes, points = inputs(7, 5)
    assert roi_align(features, boxes[:, :0]).shape == (2, 0, 7, 7, 5)
    assert salient_points(features, boxes[:, :0], points[:, :0]).shape == (2, 0, 8, 5)
    assert torch.equal(roi_align(features, boxes), roi_align(features, boxes))


@pytest.mark.parametrize("valid", [None, torch.tensor([[5, 4], [7, 5]])])
def test_opcheck_compact_and_permuted(valid):
    features, boxes, points = (part.float() for part in inputs(7, 5))
    boxes, points = boxes[:, :6], points[:, :6]
    permuted = features.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for candidate in (features, permuted):
        candidate = candidate.detach().requires_grad_()
        torch.library.opcheck(torch.ops.samdetr.roi_align.default, (candidate, boxes, 7, valid))
        torch.library.opcheck(
            torch.ops.samdetr.salient_points.default,
            (candidate, boxes, points.detach().requires_grad_(), 7, valid),
        )
        for wanted in ((True, True), (False, True), (True, False)):
            arguments = (torch.ones(2, 6, 8, 5), candidate.detach(), boxes, points, 7, valid, *wanted)
            torch.library.opcheck(torch.ops.samdetr.salient_points_backward.default, arguments)


def test_bad_shapes_are_named():
    features, boxes, points = inputs(7, 5)
    with pytest.raises(ValueError, match=r"boxes must be a floating \[2, N, 4\]"):
        roi_align(features, boxes[0])
    with pytest.raises(ValueError, match=r"features must be a floating \[B, H, W, C\]"):
        roi_align(features[0], boxes)
    with pytest.raises(ValueError, match=r"output_size must be between 1 and 64, got 0"):
        roi_align(features, boxes, 0)
    with pytest.raises(ValueError, match=r"points must be a floating \[2, 60, P, 2\]"):
        salient_points(features, boxes, points[:, :5])
    with pytest.raises(ValueError, match=r"valid_sizes must be an integer \[2, 2\]"):
        roi_align(features, boxes, 7, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"points must be a floating \[2, 60, P, 2\] tensor, got torch.int64"):
        salient_points(features, boxes, points.long())
    with pytest.raises(ValueError, match=r"features must be a floating .* got torch.float8_e5m2"):
        roi_align(features.to(torch.float8_e5m2), boxes)
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"valid_sizes must be an integer \[2, 2\]"):
            roi_align(features, boxes, 7, torch.ones(2, 2).to(dtype))


def test_a_tensor_on_another_device_is_named():
    features, boxes, points = inputs(7, 5)
    for op in (roi_align, lambda *given: salient_points(*given[:2], points, *given[2:])):
        with pytest.raises(ValueError, match=r"boxes must be on cpu, got .* on meta"):
            op(features, boxes.to("meta"))
        with pytest.raises(ValueError, match=r"valid_sizes must be on cpu, got .* on meta"):
            op(features, boxes, 7, torch.ones(2, 2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"salient_points: points must be on cpu, got .* on meta"):
        salient_points(features, boxes, points.to("meta"))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_a_gradient_that_nobody_wants_is_not_computed(wanted, monkeypatch, launches):
    features, boxes, points = inputs(7, 5)
    upstream = torch.randn(2, 60, 8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (upstream, features, boxes, points, 7, None)
    expected = salient_points_backward_reference(*arguments)
    found = torch.ops.samdetr.salient_points_backward(*arguments, *wanted)
    for grad, right, is_wanted in zip(found, expected, wanted, strict=True):
        assert torch.equal(grad, right) if is_wanted else grad.numel() == 0
    small = [part[:, :6].float().contiguous() for part in (upstream, boxes, points)]
    salient_points_backward_triton(small[0], features.float(), *small[1:], wanted=wanted)
    names = ["features", "points"]
    assert len(launches) == 1 and f"_{names[wanted.index(True)]}_kernel" in launches[0].kernel.__name__

    seen = []
    op = MODULE._salient_points_backward
    monkeypatch.setattr(MODULE, "_salient_points_backward", lambda *given: seen.append(given[-2:]) or op(*given))
    leaves = [part.clone().requires_grad_(want) for part, want in zip((features, points), wanted, strict=True)]
    salient_points(leaves[0], boxes, leaves[1]).backward(upstream)
    assert seen == [wanted] and torch.equal(leaves[wanted.index(True)].grad, expected[wanted.index(True)])
