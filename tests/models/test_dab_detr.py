"""DAB-DETR's recipe, and how its anchors begin, look around and learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samdetr.engine.optim import build_optimizer
from samdetr.models import EncoderDecoder, build_model
from samdetr.models.dab_detr import AnchorQueries, DABDETRDecoder
from samdetr.models.position import sine_points
from samdetr.recipe import load_recipe
from samdetr.recipe.sections import AugmentSection, EvalSection, LossSection

RECIPE = Path(__file__).parents[2] / "recipes" / "dab_detr_r50_50ep.toml"
SMALL = (
    *("model.width=32", "model.heads=4", "model.encoder_layers=1", "model.decoder_layers=3", "model.ffn=32"),
    *("model.num_queries=5", "model.num_classes=3", "model.backbone.weights=none", "model.backbone.width=16"),
)


def small(seed: int = 0) -> tuple[EncoderDecoder, DABDETRDecoder]:
    torch.manual_seed(seed)
    model = build_model(load_recipe(RECIPE, SMALL).model)
    assert isinstance(model, EncoderDecoder)
    assert isinstance(model.decoder, DABDETRDecoder)
    return model, model.decoder


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1)), torch.tensor([[96, 128], [64, 96]])


def test_the_published_schedule() -> None:
    recipe = load_recipe(RECIPE)
    model, optim, train = recipe.model, recipe.optim, recipe.train
    assert (train.epochs, optim.drop_epochs, train.total_batch, train.micro_batch) == (50, (40,), 16, 2)
    assert (optim.lr, optim.backbone_lr, optim.weight_decay, optim.clip_norm) == (1e-4, 1e-5, 1e-4, 0.1)
    assert (model.num_classes, model.num_queries, model.dropout, model.input_norm) == (91, 300, 0.0, "none")
    assert recipe.loss == LossSection(class_weight=1.0)
    assert (recipe.augment, recipe.eval) == (AugmentSection(), EvalSection(top_k=300))


def test_boxes_of_all_layers_begin_at_the_anchors() -> None:
    model, decoder = small()
    outputs = model.eval()(*batch())
    assert outputs.logits.shape == (3, 2, 5, 3)
    anchors = decoder.anchors.sigmoid().expand(3, 2, -1, -1)
    torch.testing.assert_close(outputs.boxes, anchors, rtol=0, atol=2e-3)  # the inverse sigmoid is clamped at 1e-3


def test_a_wider_anchor_is_looked_at_more_flatly() -> None:
    """The sine embedding of x is divided by the anchor's width, that of y by its height."""
    torch.manual_seed(3)
    queries, x = AnchorQueries(32), torch.randn(1, 1, 32)
    anchors = torch.tensor([[[0.3, 0.6, 0.2, 0.1]]])
    wider = torch.tensor([[[0.3, 0.6, 0.4, 0.1]]])
    (_, narrow), (_, wide) = queries(x, anchors, first=True), queries(x, wider, first=True)
    torch.testing.assert_close(wide[..., :16], narrow[..., :16])
    torch.testing.assert_close(wide[..., 16:], narrow[..., 16:] / 2)
    size = queries.size_head(x).sigmoid()
    expected = sine_points(anchors[..., :2], 32)[..., :16] * size[..., 1:] / 0.1
    torch.testing.assert_close(narrow[..., :16], expected)


def test_a_prediction_reaches_the_layer_before_through_its_anchors() -> None:
    """The next layer's boxes are relative to refined anchors with their gradient; all else of them is constant."""
    model, decoder = small()
    torch.nn.init.normal_(decoder.refine.box_head.last.weight, std=0.1)
    seen: list[Tensor] = []
    decoder.queries.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    outputs = model(*batch())
    assert [anchors.requires_grad for anchors in seen] == [True, False, False]
    (grad,) = torch.autograd.grad(outputs.boxes[1].sum(), decoder.anchors)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(seen[1], seen[1].clamp(0, 1))


@pytest.mark.parametrize("name", ["anchors", "queries.position_head.0.weight", "classes.class_head.weight"])
def test_all_of_the_decoder_learns_at_the_rate_of_the_rest(name: str) -> None:
    model, decoder = small()
    groups = build_optimizer(model, load_recipe(RECIPE).optim).param_groups
    rates = {id(parameter): group["base_lr"] for group in groups for parameter in group["params"]}
    assert rates[id(dict(decoder.named_parameters())[name])] == 1e-4
    assert rates[id(model.backbone.layer4[0].conv1.weight)] == 1e-5  # type: ignore[index]
