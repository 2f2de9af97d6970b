"""Access to the reference fixtures: numbers of the official models under deterministic weights.

Each MODEL.npz holds arrays of one official model, each MODEL.keys.txt its state dict. `fill.py` makes the weights,
images and targets. The tolerances are those the measured float32 noise of the official code calls for.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samdetr.models import Detector, build_model
from samdetr.models.official import load_official
from samdetr.recipe import Recipe, load_recipe
from samdetr.structures import Targets
from tests.parity import fill

FOLDER = Path(__file__).parent
RECIPES = FOLDER.parents[1] / "recipes"
RECIPE_OF = {  # SAM-DETR's
    "samdetr_r50_12ep": "r50_12ep",
    "samdetr_r50_50ep": "r50_50ep",
    "samdetr_r50_smca_50ep": "r50_smca_50ep",
    "samdetr_r50_dc5_50ep": "r50_dc5_50ep",
    "samdetr_r50_dc5_smca_12ep": "r50_dc5_smca_12ep",
}
MODELS = tuple(RECIPE_OF)
RECIPE_OF_OTHER = {  # other systems'
    "detr_r50": "detr_r50_500ep",
    "detr_r50_dc5": "detr_r50_dc5_500ep",
    "conditional_detr_r50": "conditional_detr_r50_50ep",
    "conditional_detr_r50_dc5": "conditional_detr_r50_dc5_50ep",
    "smca_detr_r50": "smca_detr_r50_50ep",
}
OTHERS = tuple(RECIPE_OF_OTHER)
RECIPE_OF_DEFORMABLE = {
    "deformable_detr_r50_single_scale": "deformable_detr_r50_50ep",
    "deformable_detr_r50_dc5_single_scale": "deformable_detr_r50_dc5_50ep",
    "deformable_detr_r50_multiscale": "deformable_detr_r50_ms_50ep",
    "deformable_detr_r50_multiscale_refine": "deformable_detr_r50_ms_refine_50ep",
    "deformable_detr_r50_multiscale_refine_two_stage": "deformable_detr_r50_ms_two_stage_50ep",
}
RECIPE_OF_MULTI_SCALE = {  # SAM-DETR's on several maps
    "samdetr_r50_ms_50ep": "r50_ms_50ep",
    "samdetr_r50_ms_smca_50ep": "r50_ms_smca_50ep",
}
RECIPE_OF_DAB = {"dab_detr_r50": "dab_detr_r50_50ep"}
RECIPE_OF_SMCA_MS = {"smca_detr_r50_multiscale": "smca_detr_r50_ms_50ep"}
RECIPES_COMPARED = (
    RECIPE_OF | RECIPE_OF_MULTI_SCALE | RECIPE_OF_OTHER | RECIPE_OF_DEFORMABLE | RECIPE_OF_DAB | RECIPE_OF_SMCA_MS
)


class Inputs(NamedTuple):
    """The padded batch of a fixture."""

    images: Tensor  # [2, 3, H, W]
    image_sizes: Tensor  # [2, 2]
    targets: Targets
    original_sizes: Tensor  # [2, 2]


@cache
def arrays(name: str) -> dict[str, NDArray[np.generic]]:
    """All arrays of a fixture."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def meta(name: str) -> dict[str, object]:
    """Arguments, seeds and counts of a fixture."""
    return json.loads(str(arrays(name)["meta"]))


def official_state_dict(name: str) -> dict[str, Tensor]:
    """The published state dict of a fixture, all keys."""
    return fill.state_dict_from_keys(FOLDER / f"{name}.keys.txt", meta(name)["fill_seed"])


def recipe_of(name: str) -> Recipe:
    """The recipe that the fixture's command corresponds to."""
    return load_recipe(RECIPES / f"{RECIPES_COMPARED[name]}.toml")


def model_of(name: str) -> Detector:
    """Our model of the fixture's recipe, with the fixture's weights, in eval mode."""
    model = build_model(recipe_of(name).model)
    load_official(model, official_state_dict(name))
    return model.eval()


def inputs_of(name: str, padded_targets: int = 7) -> Inputs:
    """The fixture's batch, zero-padded at the bottom and right; T is larger than any count on purpose."""
    facts = meta(name)
    images, targets = fill.make_batch(facts["batch_seed"], facts["sizes"], facts["counts"], facts["target_seed"])
    assert fill.checksum(images) == int(arrays(name)["image_crc32"])
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    labels = torch.zeros(len(images), padded_targets, dtype=torch.int64)
    boxes = torch.zeros(len(images), padded_targets, 4)
    for row, (image, target) in enumerate(zip(images, targets, strict=True)):
        batch[row, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
        count = len(target["labels"])
        labels[row, :count] = torch.from_numpy(target["labels"])
        boxes[row, :count] = torch.from_numpy(target["boxes"])
    counts = torch.tensor([len(target["labels"]) for target in targets])
    original = torch.tensor(np.stack([target["orig_size"] for target in targets]))
    return Inputs(batch, torch.tensor(facts["sizes"]), Targets(labels, boxes, counts), original)


def first_image(inputs: Inputs) -> Inputs:
    """The clean image alone (it is the largest, hence has no padding)."""
    return Inputs(
        inputs.images[:1],
        inputs.image_sizes[:1],
        Targets(*(part[:1] for part in inputs.targets)),
        inputs.original_sizes[:1],
    )
