"""Recipes: one TOML file for each training run, read strictly into typed sections."""

from samdetr.recipe.loading import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    dump_recipe,
    load_recipe,
    override_recipe,
    stored_recipe,
)
from samdetr.recipe.model import BackboneSection, ModelSection, RegionsSection
from samdetr.recipe.recipe import Recipe, with_absolute_paths, with_micro_batch
from samdetr.recipe.sections import (
    AugmentSection,
    CheckpointSection,
    ComputeSection,
    DataSection,
    EvalSection,
    InitSection,
    LossSection,
    OptimSection,
    ParallelSection,
    RunSection,
    ShapesSection,
    TrainSection,
)

__all__ = [
    "ENVIRONMENT_FILE",
    "RECIPE_FILE",
    "AugmentSection",
    "BackboneSection",
    "CheckpointSection",
    "ComputeSection",
    "DataSection",
    "EvalSection",
    "InitSection",
    "LossSection",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "Recipe",
    "RegionsSection",
    "RunSection",
    "ShapesSection",
    "TrainSection",
    "dump_recipe",
    "load_recipe",
    "override_recipe",
    "stored_recipe",
    "with_absolute_paths",
    "with_micro_batch",
]
