"""Recipes: one TOML file for each training run, read strictly into typed sections.

The section of each system is imported from `samdetr.recipe.model`.
"""

from samdetr.recipe.loading import (
    ENVIRONMENT_FILE,
    RECIPE_FILE,
    dump_recipe,
    load_recipe,
    override_recipe,
    stored_recipe,
)
from samdetr.recipe.model import ModelSection
from samdetr.recipe.recipe import Recipe, with_absolute_paths, with_micro_batch
from samdetr.recipe.sections import (
    AugmentSection,
    ComputeSection,
    DataSection,
    LossSection,
    OptimSection,
    ParallelSection,
)

__all__ = [
    "ENVIRONMENT_FILE",
    "RECIPE_FILE",
    "AugmentSection",
    "ComputeSection",
    "DataSection",
    "LossSection",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "Recipe",
    "dump_recipe",
    "load_recipe",
    "override_recipe",
    "stored_recipe",
    "with_absolute_paths",
    "with_micro_batch",
]
