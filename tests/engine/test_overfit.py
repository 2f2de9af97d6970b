"""Every system learns eight pictures by heart: what no shape, sign or gradient that is wrong would let it do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from samdetr.data.device import prefetch
from samdetr.data.splits import load_splits
from samdetr.engine.build import build_loaders
from samdetr.engine.distributed.world import ALONE
from samdetr.engine.optim import build_optimizer, set_learning_rate
from samdetr.engine.step import train_step
from samdetr.loss import build_criterion
from samdetr.models import build_model
from samdetr.recipe import Recipe, override_recipe
from samdetr.structures import Batch
from tests.engine.test_systems import reduced

SYSTEMS = ("r50_12ep", "r50_smca_12ep", "r50_12ep_max", "detr_r50_500ep", "detr_focal_r50_12ep")
SYSTEMS += ("conditional_detr_r50_12ep", "smca_detr_r50_12ep")
SYSTEMS += ("r50_ms_12ep", "r50_ms_smca_12ep")
SYSTEMS += ("deformable_detr_r50_12ep", "deformable_detr_r50_ms_50ep")
SYSTEMS += ("deformable_detr_r50_ms_refine_50ep", "deformable_detr_r50_ms_two_stage_50ep")
SYSTEMS += ("smca_detr_r50_ms_50ep", "smca_detr_r50_ms_attention_50ep")
STEPS, FALL, CPU = 400, 10, torch.device("cpu")


@pytest.mark.long
@pytest.mark.parametrize("name", SYSTEMS)
def test_eight_pictures_are_learned_by_heart(name: str, tmp_path: Path, shapes_folder: Path) -> None:
    settings = {
        "data.batching": '"random"',
        "data.pixels": '"published"',
        "data.shapes.max_objects": 3,
        "augment.flip": 0.0,
        "model.dropout": 0.0,
        "model.width": 64,
        "model.ffn": 128,
        "model.backbone.norm": '"batch"',
        "model.backbone.frozen_stages": 0,
        "model.backbone.stages": 4,
        "optim.lr": 1e-3,
        "optim.backbone_lr": 1e-3,
        "train.total_batch": 8,
        "train.micro_batch": 8,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    recipe = override_recipe(reduced(name, tmp_path, shapes_folder), words)
    torch.manual_seed(0)
    model, criterion, batch = build_model(recipe.model), build_criterion(recipe), eight_pictures(recipe)
    optimizer = build_optimizer(model.train(), recipe.optim)
    losses = []
    for step in range(STEPS):
        set_learning_rate(optimizer, min(1.0, (step + 1) / 20) * (0.1 if step > STEPS * 3 // 4 else 1.0))
        values = train_step(model, criterion, optimizer, batch, device=CPU, clip_norm=1.0)
        losses.append(values[0].item())
    assert losses[-1] < losses[0] / FALL, losses[:: STEPS // 10]


def eight_pictures(recipe: Recipe) -> list[Batch]:
    """The only step of an epoch."""
    softmax = recipe.loss.classification == "softmax"
    splits = load_splits(
        recipe.data, num_queries=recipe.model.most_objects, num_classes=recipe.model.num_classes, no_object=softmax
    )
    loader, _ = build_loaders(recipe, splits, CPU, ALONE)
    (batch,) = prefetch(loader.epoch(0, 0), CPU)
    return list(batch)
