"""Every recipe of an ablation or another system: its size, and two steps and an evaluation of a reduced version."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from samdetr.engine.train import train
from samdetr.models import build_model
from samdetr.recipe import Recipe, load_recipe
from tests.engine.runs import metrics

RECIPES = Path(__file__).parents[2] / "recipes"
FROZEN = 222_400  # parameters of the stem and layer1
PARAMETERS = {
    "r50_12ep_average": 44_648_618,  # without the point branch and the gates
    "r50_12ep_max": 44_648_618,
    "r50_12ep_1point": 51_937_334,  # in a layer 256 x 64 + 64, 3136 x 256 + 256, 256 x 512 + 512, 512 x 512 + 512, ...
    "r50_12ep_1point_reweighted": 52_726_838,  # and twice 256 x 256 + 256
    "r50_12ep_8points": 51_980_426,
    "r50_12ep_whole_image": 58_296_458,
    "r50_ms_12ep": 55_194_698,
    "r50_ms_50ep": 55_194_698,
    "r50_ms_smca_12ep": 55_243_946,
    "r50_ms_smca_50ep": 55_243_946,
    "detr_r50_500ep": 41_524_768,
    "detr_r50_dc5_500ep": 41_524_768,
    "detr_focal_r50_12ep": 41_575_968,
    "detr_focal_r50_50ep": 41_575_968,
    "detr_focal_r50_dc5_12ep": 41_575_968,
    "detr_focal_r50_dc5_50ep": 41_575_968,
    "conditional_detr_r50_12ep": 43_418_401,
    "conditional_detr_r50_50ep": 43_418_401,
    "conditional_detr_r50_dc5_12ep": 43_418_401,
    "conditional_detr_r50_dc5_50ep": 43_418_401,
    "smca_detr_r50_12ep": 41_760_482,
    "smca_detr_r50_50ep": 41_760_482,
    "smca_detr_r50_dc5_12ep": 41_760_482,
    "smca_detr_r50_dc5_50ep": 41_760_482,
    "smca_detr_r50_ms_50ep": 40_199_738,
    "smca_detr_r50_ms_attention_50ep": 39_752_308,
    "deformable_detr_r50_12ep": 34_066_593,
    "deformable_detr_r50_50ep": 34_066_593,
    "deformable_detr_r50_dc5_12ep": 34_066_593,
    "deformable_detr_r50_dc5_50ep": 34_066_593,
    "deformable_detr_r50_ms_50ep": 40_069_665,
    "deformable_detr_r50_ms_refine_50ep": 40_849_660,
    "deformable_detr_r50_ms_two_stage_50ep": 41_181_529,
}
SHAPES_CLASSES = 8


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    file = RECIPES / f"{name}.toml"
    with torch.device("meta"):
        model = build_model(load_recipe(file).model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable) == (PARAMETERS[name], PARAMETERS[name] - FROZEN)
    assert f"{total:,} parameters, {trainable:,} of them trainable" in file.read_text()


def reduced(name: str, folder: Path, shapes_folder: Path) -> Recipe:
    """The recipe with a narrow, shallow model and a few small pictures; what it says of loss and system stays."""
    file = RECIPES / f"{name}.toml"
    no_object = load_recipe(file).loss.classification == "softmax"
    numbers = {
        "data.workers": 0,
        "data.shapes.train_images": 8,
        "data.shapes.val_images": 2,
        "data.shapes.image_size": 64,
        "data.shapes.max_objects": 5,
        "data.buckets": 2,
        "augment.train_sizes": [64],
        "augment.max_size": 96,
        "augment.crop": 0.0,
        "augment.eval_size": 64,
        "augment.eval_max_size": 96,
        "model.num_classes": SHAPES_CLASSES + no_object,
        "model.num_queries": 12,
        "model.width": 32,
        "model.heads": 4,
        "model.encoder_layers": 1,
        "model.decoder_layers": 2,
        "model.ffn": 32,
        "model.backbone.width": 16,
        "train.epochs": 1,
        "train.total_batch": 4,
        "train.micro_batch": 2,
        "train.log_every": 1,
        "eval.every": 1,
    }
    words = {
        "run.folder": str(folder),
        "run.device": "cpu",
        "compute.precision": "fp32",
        "data.format": "shapes",
        "data.class_index": "contiguous",
        "data.shapes.folder": str(shapes_folder),
        "model.backbone.weights": "none",
    }
    return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in (numbers | words).items()])


@pytest.mark.parametrize("name", PARAMETERS)
def test_two_steps_and_an_evaluation(name: str, tmp_path: Path, shapes_folder: Path) -> None:
    run = train(reduced(name, tmp_path, shapes_folder))
    steps = metrics(run, "train")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in steps)
    assert [0 <= line["AP"] <= 1 for line in metrics(run, "eval")] == [True]
