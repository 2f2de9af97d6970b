"""Faster R-CNN beside torchvision's own model with the same weights, and its sizes."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from perf.inputs import training_batch
from samdetr.cost.meta import KeepAll
from samdetr.engine.evaluate import best_detections
from samdetr.errors import CheckpointError, RecipeError
from samdetr.loss import RegionCriterion
from samdetr.models import build_model
from samdetr.models.backbone import load_backbone_weights
from samdetr.models.faster_rcnn import Coder, FasterRCNN
from samdetr.models.official import load_official, to_official
from samdetr.recipe import load_recipe
from samdetr.structures import RegionLosses, Targets

RECIPES = Path(__file__).parents[2] / "recipes"
FROZEN = 222_400  # parameters of the stem and layer1
PARAMETERS = {"c4_12ep": 33_799_840, "dc5_12ep": 165_585_568, "fpn_108ep": 41_704_036}
SIZES = [(128, 128), (128, 112)]  # of whole cells of 64: torchvision's anchors have no other stride there
CLASSES, PROPOSALS, DETECTIONS = 5, 60, 20  # classes with no object
SMALL = (
    f"model.num_classes={CLASSES}",
    f"model.num_queries={DETECTIONS}",
    "model.regions.candidates_train=200",
    "model.regions.candidates_eval=100",
    f"model.regions.proposals_train={PROPOSALS}",
    f"model.regions.proposals_eval={PROPOSALS}",
    'model.backbone.weights="none"',
)
SMALL_THERE = {
    "min_size": 128,
    "max_size": 128,
    "image_mean": [0.0] * 3,
    "image_std": [1.0] * 3,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_train": PROPOSALS,
    "rpn_post_nms_top_n_test": PROPOSALS,
    "box_detections_per_img": DETECTIONS,
}


def model_of(name: str, *overrides: str) -> FasterRCNN:
    model = build_model(load_recipe(RECIPES / f"faster_rcnn_r50_{name}.toml", overrides).model)
    assert isinstance(model, FasterRCNN)
    return model


class _Calls(TorchDispatchMode):
    """Counts ops by name, those of the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "maps"), [("fpn_108ep", 4), ("c4_12ep", 0)])
def test_the_host_waits_as_often_as_the_docstring_says(name: str, maps: int) -> None:
    batch, criterion = training_batch(2, 128, 128, classes=CLASSES - 1), RegionCriterion()
    model = model_of(name, *SMALL).train()
    with _Calls() as calls:
        criterion(model(batch.images, batch.image_sizes, batch.targets), batch.targets).total.backward()
    reads = ("aten::nonzero", "torchvision::nms", "aten::_local_scalar_dense")
    assert sum(calls.count[read] for read in reads) == 9 * len(batch.images) + 3 + maps
    batch, model = batch.to(torch.device("meta")), model.to("meta")
    with KeepAll(), _Calls() as calls:
        model(batch.images, batch.image_sizes, batch.targets)
    # what a constant that becomes a tensor begins with; the epsilon of the FPN's mapper stays on the host
    assert calls.count["aten::lift_fresh"] == len(batch.images) + bool(maps)


def test_boxes_are_coded_to_the_bit_as_torchvision_does() -> None:
    ours, theirs = Coder((10.0, 10.0, 5.0, 5.0)), BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes, others = (torch.rand(2, 37, 2) * 100 for _ in range(2))
    boxes, others = (torch.cat((corner, corner + 1 + 50 * torch.rand(2, 37, 2)), -1) for corner in (boxes, others))
    changes = 4 * torch.randn(74, 4 * CLASSES)  # some beyond the largest
    assert torch.equal(ours.decode(changes, [*boxes]), theirs.decode(changes, [*boxes]))
    for found, expected in zip(ours.encode([*others], [*boxes]), theirs.encode([*others], [*boxes]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("faster_rcnn_*.toml")), ids=lambda file: file.stem)
def test_parameter_counts(file: Path) -> None:
    total = next(number for name, number in PARAMETERS.items() if name.split("_")[0] in file.stem)
    with torch.device("meta"):
        model = build_model(load_recipe(file).model)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total - FROZEN
    assert f"{total:,} parameters, {total - FROZEN:,} of them trainable" in file.read_text()


def test_the_published_count_of_the_pyramid_has_the_batch_norms() -> None:
    with torch.device("meta"):
        model = model_of("fpn_108ep", 'model.backbone.norm="batch"')
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) == 41_757_156


class Stage4(nn.Module):
    """torchvision's fourth stage as a head."""

    def __init__(self, layer4: nn.Module) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(x).mean((2, 3))


class Body(nn.Module):
    """torchvision's ResNet up to one map."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.body(x)


def torchvisions(kind: str) -> TorchvisionFasterRCNN:
    """The model that torchvision makes of its own parts; for FPN with live BatchNorm, which is what it gives."""
    if kind == "fpn":
        return fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES, **SMALL_THERE)
    anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
    align = MultiScaleRoIAlign(["0"], output_size=7 if kind == "dc5" else 14, sampling_ratio=2)
    parts = {"rpn_anchor_generator": anchors, "box_roi_pool": align, **SMALL_THERE}
    head: nn.Module
    if kind == "dc5":
        body = resnet50(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, True])
        stage, channels, features, head = "layer4", 2048, 64, TwoMLPHead(2048 * 7 * 7, 64)
    else:
        body = resnet18(norm_layer=FrozenBatchNorm2d)
        stage, channels, features, head = "layer3", 256, 512, Stage4(body.layer4)
    map_of = Body(IntermediateLayerGetter(body, {stage: "0"}), channels)
    predictor = FastRCNNPredictor(features, CLASSES)
    return TorchvisionFasterRCNN(map_of, box_head=head, box_predictor=predictor, **parts)


AS_THERE = {
    "fpn": ('model.backbone.norm="batch"',),
    "dc5": ("model.regions.hidden=64",),
    "c4": ('model.backbone.name="resnet18"',),
}


def pair(name: str) -> tuple[FasterRCNN, TorchvisionFasterRCNN]:
    """Ours and torchvision's with the same random weights, all of them with a gradient."""
    kind = name.split("_")[0]
    torch.manual_seed(3)
    theirs = torchvisions(kind)
    for module in theirs.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.weight.data.uniform_(0.2, 0.6)  # keeps 16 blocks of random weights within bounds
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    for layer in (theirs.rpn.head.cls_logits, theirs.roi_heads.box_predictor.cls_score):
        nn.init.normal_(layer.weight, std=0.1)  # scores that differ
    theirs.transform.torch_choice = lambda sizes: sizes[0]  # which would draw a number for nothing
    ours = model_of(name, *SMALL, "model.backbone.frozen_stages=0", *AS_THERE[kind])
    prefixes = {"backbone.": "backbone.body.", "neck.": "backbone.fpn."}
    state = theirs.state_dict()

    def theirs_of(key: str) -> str:
        return next((there + key.removeprefix(here) for here, there in prefixes.items() if key.startswith(here)), key)

    assert {theirs_of(key) for key in ours.state_dict()} == set(state)
    ours.load_state_dict({key: state[theirs_of(key)] for key in ours.state_dict()})
    return ours, theirs


def example() -> tuple[Tensor, Tensor, Targets]:
    """Two images, the second narrower and padded, one with two objects and one with one."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(2, 3, 128, 128, generator=generator)
    images[1, :, :, 112:] = 0
    boxes = torch.zeros(2, 3, 4)
    boxes[0, :2] = torch.tensor([[0.3, 0.4, 0.5, 0.6], [0.7, 0.6, 0.3, 0.4]])
    boxes[1, 0] = torch.tensor([0.5, 0.5, 0.4, 0.7])
    labels = torch.tensor([[0, 3, 0], [2, 0, 0]])
    return images, torch.tensor(SIZES), Targets(labels, boxes, torch.tensor([2, 1]))


def as_theirs(images: Tensor, targets: Targets) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The same in torchvision's form, by hand."""
    truth = []
    for (height, width), labels, boxes, count in zip(SIZES, *targets, strict=True):
        x, y, w, h = (boxes[:count] * torch.tensor([width, height, width, height])).unbind(-1)
        corners = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), -1)
        truth.append({"boxes": corners, "labels": labels[:count] + 1})
    return [image[:, :h, :w] for image, (h, w) in zip(images, SIZES, strict=True)], truth


@pytest.mark.parametrize("name", PARAMETERS)
def test_losses_and_detections_are_torchvisions(name: str) -> None:
    ours, theirs = pair(name)
    images, sizes, targets = example()
    there = as_theirs(images, targets)

    with torch.no_grad():
        expected = theirs.eval()(there[0])
        outputs = ours.eval()(images, sizes)
    assert outputs.logits.shape == (1, 2, DETECTIONS, CLASSES)
    found = best_detections(outputs, sizes, 100, "softmax")
    for image, detections in enumerate(expected):
        count = len(detections["scores"])
        assert 0 < count <= DETECTIONS
        torch.testing.assert_close(found.scores[image, :count], detections["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found.labels[image, :count], detections["labels"] - 1)
        torch.testing.assert_close(found.boxes_xyxy[image, :count], detections["boxes"], rtol=1e-5, atol=1e-3)
        assert (found.scores[image, count:] == 0).all()

    losses = []
    for model, arguments in ((theirs, there), (ours, (images, sizes, targets))):
        torch.manual_seed(5)
        losses.append(model.train()(*arguments))
    assert losses[0].keys() == set(RegionLosses._fields[:-1])
    for key, value in losses[0].items():
        assert value > 0
        torch.testing.assert_close(getattr(losses[1], key), value, rtol=1e-5, atol=1e-6)
    assert 0 <= losses[1].class_error <= 100


def test_a_step_is_the_mean_over_its_images() -> None:
    losses = RegionLosses(*(torch.tensor(float(value)) for value in (1, 2, 4, 8, 50)))
    targets = Targets(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, 4), torch.ones(2, dtype=torch.int64))
    alone = RegionCriterion(step_images=8)(losses, targets)
    assert alone.total == 15
    part = RegionCriterion(step_images=8)(losses, targets, torch.tensor(9))
    assert part.total == 15 / 4
    assert {name: float(value) for name, value in part.terms.items()} == {
        "loss_objectness": 0.25,
        "loss_rpn_box_reg": 0.5,
        "loss_classifier": 1.0,
        "loss_box_reg": 2.0,
        "class_error": 50.0,
    }


NARROW = (*SMALL, "model.backbone.width=16", "model.regions.hidden=16")


@pytest.mark.parametrize("name", ["dc5_12ep", "fpn_108ep"])
def test_padding_of_a_bucket_does_not_change_the_scale(name: str) -> None:
    """An image in a much larger frame: torchvision would infer another stride from it."""
    torch.manual_seed(6)
    model = model_of(name, *NARROW, "model.regions.score_threshold=0.0").eval()
    frame = torch.zeros(1, 3, 250, 250)
    frame[..., :64, :64] = torch.randn(3, 64, 64)
    anchors: list[Tensor] = []
    model.rpn.anchor_generator.register_forward_hook(lambda _, __, out: anchors.append(out[0]))
    with torch.no_grad():
        boxes = model(frame, torch.tensor([[64, 64]])).boxes
        model(frame[..., :160, :160], torch.tensor([[64, 64]]))
    large, small = ({tuple(anchor) for anchor in found.tolist()} for found in anchors)
    assert small < large
    assert model.roi_heads.box_roi_pool.scales == ([1 / 16] if name == "dc5_12ep" else [1 / 4, 1 / 8, 1 / 16, 1 / 32])
    corners = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)
    assert corners.min() >= -1e-6
    assert corners.max() <= 1 + 1e-6


def test_bfloat16_leaves_coordinates_exact() -> None:
    torch.manual_seed(7)
    model = model_of("fpn_108ep", *NARROW).eval()
    images, sizes, targets = example()
    with torch.no_grad():
        exact = model.rpn.anchor_generator
        seen: list[Tensor] = []
        exact.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        model(images, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images, sizes)
            losses = model.train()(images, sizes, targets)
    assert torch.equal(seen[0], seen[1])
    assert outputs.boxes.dtype == outputs.logits.dtype == torch.float32
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert all(math.isfinite(loss) for loss in losses)


def test_scores_keep_their_digits_under_autocast() -> None:
    torch.manual_seed(9)
    model = model_of("fpn_108ep", *NARROW).eval()
    seen: list[Tensor] = []
    model.rpn.head.register_forward_hook(lambda _, __, out: seen.extend((*out[0], *out[1])))
    predict = model.roi_heads.predict
    model.roi_heads.predict = lambda *arguments: seen.extend(found := predict(*arguments)) or found
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*example()[:2])
    assert len(seen) == 12
    assert not any(torch.equal(part, part.bfloat16().float()) for part in seen)


def test_the_fourth_stage_of_c4_has_the_backbones_weights(tmp_path: Path) -> None:
    torch.manual_seed(8)
    state = resnet18(norm_layer=FrozenBatchNorm2d).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    model = model_of("c4_12ep", *SMALL, *AS_THERE["c4"])
    load_backbone_weights(model.backbone, str(tmp_path / "resnet18.pth"))
    loaded = model.state_dict()
    for key in ("layer4.1.conv2.weight", "layer4.0.downsample.1.running_var"):
        assert torch.equal(loaded[f"roi_heads.box_head.{key}"], state[key])
    assert torch.equal(loaded["backbone.layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    del state["layer4.1.conv2.weight"]
    torch.save(state, tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match=r"layer4\.1\.conv2\.weight is missing"):
        load_backbone_weights(model.backbone, str(tmp_path / "resnet18.pth"))


def test_training_needs_targets_and_there_is_no_published_layout() -> None:
    model = model_of("fpn_108ep", *NARROW)
    images, sizes, _ = example()
    with pytest.raises(ValueError, match="needs targets"):
        model(images, sizes)
    for call in (lambda: to_official(model), lambda: load_official(model, {})):
        with pytest.raises(CheckpointError, match=r'model\.system = "faster_rcnn" has no published layout'):
            call()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder_layers=2", "encoder_layers: unknown key. It belongs to systems sam_detr, "),
        ('model.padding="masked"', "padding: unknown key. It belongs to systems sam_detr, "),
        ("model.backbone.stages=2", "stages must be 3"),
        ('loss.classification="focal"', "set classification"),
        ("loss.class_weight=1.0", "no other key"),
        ('compute.cuda_graph="on"', 'set compute.cuda_graph = "off"'),
        ('parallel.strategy="fsdp"', 'set parallel.strategy = "ddp"'),
        ('optim.optimizer="adamw"', 'momentum: has no meaning with optim.optimizer = "adamw"'),
    ],
)
def test_recipe_errors(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            RECIPES / "faster_rcnn_r50_fpn_108ep.toml", [override, *(["optim.momentum=0.8"] * ("adamw" in override))]
        )
    assert message in str(caught.value)


def test_regions_belong_to_faster_rcnn() -> None:
    with pytest.raises(RecipeError, match=r"model.regions: unknown section. It belongs to system faster_rcnn;"):
        load_recipe(RECIPES / "detr_r50_500ep.toml", ["model.regions.hidden=8"])
