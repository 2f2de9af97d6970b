"""Losses and matching. `build_criterion` makes the criterion of a recipe."""

from samdetr.loss.criterion import SetCriterion, build_criterion

__all__ = ["SetCriterion", "build_criterion"]
