"""The weights that training, evaluation and prediction start from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from samdetr.engine.checkpoint.format import find_checkpoint, load_checkpoint, load_model_state
from samdetr.errors import CheckpointError, RecipeError
from samdetr.models import Detector, build_model
from samdetr.models.backbone import load_backbone_weights
from samdetr.models.official import load_official, read_official
from samdetr.recipe import Recipe, stored_recipe
from samdetr.structures import Categories


class Trained(NamedTuple):
    """A trained model as its checkpoint has it."""

    model: Detector  # on the CPU
    recipe: Recipe
    categories: Categories
    path: Path  # the checkpoint folder


def load_initial_weights(model: Detector, recipe: Recipe) -> str:
    """Load the weights that the recipe starts from, and return a sentence that names them.

    From another model (init.official, init.checkpoint) the class heads are loaded only if they have as many classes.
    Raises CheckpointError when a file is absent or does not fit.
    """
    if recipe.init.official:
        remade = load_official(model, read_official(recipe.init.official), remake_class_heads=True)
        source = f"the published checkpoint {recipe.init.official}"
    elif recipe.init.checkpoint:
        checkpoint = load_checkpoint(find_checkpoint(recipe.init.checkpoint), with_optimizer=False)
        remade = load_model_state(model, checkpoint, remake_class_heads=True)
        source = str(checkpoint.path)
    else:
        weights = recipe.model.backbone.weights
        load_backbone_weights(model.backbone, weights)
        return "weights: random" + ("" if weights == "none" else f", backbone {weights}")
    sentence = f"weights: {source}"
    if remade:
        sentence += f"; class heads are made anew, for {recipe.model.num_classes} classes (it has {remade})"
    return sentence


def load_trained(path: str) -> Trained:
    """Load the model of a run or checkpoint. Raises CheckpointError when it cannot be read."""
    checkpoint = load_checkpoint(find_checkpoint(path), with_optimizer=False)
    try:
        recipe = stored_recipe(checkpoint.meta["recipe"], str(checkpoint.path))
    except RecipeError as error:
        raise CheckpointError(f"the recipe of a checkpoint is not one of this version of samdetr:\n{error}") from error
    model = build_model(recipe.model)
    load_model_state(model, checkpoint)
    return Trained(model, recipe, Categories.from_json(checkpoint.meta["categories"]), checkpoint.path)
