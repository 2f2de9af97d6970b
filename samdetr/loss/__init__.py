"""Losses and matching. `build_criterion` builds the criterion of a recipe."""

from samdetr.loss.criterion import Criterion, RegionCriterion, SetCriterion, build_criterion

__all__ = ["Criterion", "RegionCriterion", "SetCriterion", "build_criterion"]
