"""Errors a person can act on.

Everything derived from SamdetrError is printed by the commands as one sentence, without a traceback.
The message names the file, key or id that is wrong and says what to do about it.
"""

from __future__ import annotations


class SamdetrError(Exception):
    """Base class: a problem of the user's input or machine, not of the program."""

    exit_code = 1


class RecipeError(SamdetrError):
    """One or more mistakes in a recipe or in ``--set``; the message has one line a mistake."""

    exit_code = 2


class DataError(SamdetrError):
    """A data set, annotation file or image that cannot be used."""


class CheckpointError(SamdetrError):
    """A checkpoint that cannot be read, written, or does not fit the model."""


class NonFiniteError(SamdetrError):
    """A loss, gradient or prediction became NaN or infinite; the message names the images."""
