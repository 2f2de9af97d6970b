"""Comparing state dicts, for errors that name what does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """List why ``given`` cannot be loaded into a module with the state dict ``own``, a phrase a key."""
    missing = [f"{key} is missing" for key in own if key not in given]
    surplus = [f"{key} is not part of this model" for key in given if key not in own]
    shapes = [
        f"{key} is {list(given[key].shape)}, the model needs {list(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    return missing + surplus + shapes


def first_of(problems: list[str]) -> str:
    """Return the first problem, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else "")
