"""Recipes: one TOML file a schedule, read strictly into typed sections. No key exists elsewhere than in these."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo, field_validator

from samdetr.errors import RecipeError
from samdetr.recipe.messages import explain, keys_named, place_of
from samdetr.recipe.model import (
    AlignedSection,
    BackboneSection,
    ConditionalDETRSection,
    DeformableDETRSection,
    DeformableSection,
    DetectorSection,
    DETRSection,
    FasterRCNNSection,
    ModelSection,
    MultiScaleSAMDETRSection,
    MultiScaleSMCADETRSection,
    RegionsSection,
    SAMDETRSection,
    SingleScaleSection,
    SMCADETRSection,
    TransformerSection,
)
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
    Section,
    ShapesSection,
    TrainSection,
)
from samdetr.recipe.toml_text import apply_override, key_lines, syntax_mistake, value_text, with_tuples

__all__ = [
    "AlignedSection",
    "AugmentSection",
    "BackboneSection",
    "CheckpointSection",
    "ComputeSection",
    "ConditionalDETRSection",
    "DETRSection",
    "DataSection",
    "DeformableDETRSection",
    "DeformableSection",
    "DetectorSection",
    "EvalSection",
    "FasterRCNNSection",
    "InitSection",
    "LossSection",
    "ModelSection",
    "MultiScaleSAMDETRSection",
    "MultiScaleSMCADETRSection",
    "OptimSection",
    "ParallelSection",
    "Recipe",
    "RegionsSection",
    "RunSection",
    "SAMDETRSection",
    "SMCADETRSection",
    "ShapesSection",
    "SingleScaleSection",
    "TrainSection",
    "TransformerSection",
    "dump_recipe",
    "load_recipe",
    "override_recipe",
    "with_absolute_paths",
    "with_micro_batch",
]

Keys = tuple[str | int, ...]


class Recipe(Section):
    """A whole recipe: complete in itself."""

    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()
    init: InitSection = InitSection()
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    model: ModelSection = SAMDETRSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()

    @field_validator("model")
    @classmethod
    def _can_be_computed(cls, value: DetectorSection, info: ValidationInfo) -> DetectorSection:
        compute = info.data.get("compute")
        if compute and compute.cuda_graph == "on" and not value.can_be_recorded:
            raise ValueError(f'system "{value.system}" waits for the device: set compute.cuda_graph = "off"')
        if compute and compute.activation_checkpointing != "off" and not value.can_be_recomputed:
            raise ValueError(
                f'system "{value.system}" has no layers to recompute: set compute.activation_checkpointing = "off"'
            )
        return value

    @field_validator("loss")
    @classmethod
    def _fits_the_model(cls, value: LossSection, info: ValidationInfo) -> LossSection:
        model = info.data.get("model")
        if model and not model.matches_queries and value != LossSection(classification="softmax"):
            raise ValueError(
                f'with model.system = "{model.system}" the losses are torchvision\'s: set classification = "softmax" '
                "and no other key"
            )
        return value

    @field_validator("optim")
    @classmethod
    def _samples_maps(cls, value: OptimSection, info: ValidationInfo) -> OptimSection:
        model = info.data.get("model")
        if model and not model.samples_maps and value.sampling_lr_factor != 1:
            raise ValueError(f'sampling_lr_factor has no meaning with model.system = "{model.system}": leave it out')
        return value

    @field_validator("optim")
    @classmethod
    def _can_be_shared(cls, value: OptimSection, info: ValidationInfo) -> OptimSection:
        parallel = info.data.get("parallel")
        if value.optimizer == "sgd" and parallel and parallel.strategy != "ddp":
            raise ValueError('optimizer "sgd" cannot be shared among processes: set parallel.strategy = "ddp"')
        return value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a TOML recipe, applies ``section.key=value`` overrides, and checks everything.

    The value of an override is TOML; what is not valid TOML is taken as a string. A recipe without
    ``run.name`` gets the file's stem.

    Raises:
        RecipeError: with one line for each mistake, ``<path>:<line>: <key>: <what is wrong>``.
    """
    path = Path(path)
    text = _read(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}:{syntax_mistake(text, str(error))}") from None
    recipe = _validated(values, overrides, path, text)
    if recipe.run.name:
        return recipe
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": path.stem})})


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with ``section.key=value`` changes, checked as `load_recipe` checks them (RecipeError)."""
    values = tomllib.loads(dump_recipe(recipe))
    return _validated(values, overrides, "the stored recipe", "")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as TOML, every key written out; `load_recipe` reads an equal recipe from it."""
    return "\n".join(_tables(recipe, "")).lstrip() + "\n"


def _validated(values: dict[str, Any], overrides: Sequence[str], path: Path | str, text: str) -> Recipe:
    """The recipe of ``values`` after the overrides; ``path`` and ``text`` are where the values stand."""
    overridden: dict[Keys, str] = {}
    mistakes = []
    for override in overrides:
        try:
            overridden[apply_override(values, override)] = override
        except ValueError as error:
            meant = keys_named(override.partition("=")[0].strip(), Recipe)
            hint = f". Did you mean {' or '.join(meant)}?" if meant else ""
            mistakes.append(f"--set {override}: {error}{hint}")
    try:
        recipe = Recipe.model_validate(with_tuples(values))
    except ValidationError as error:
        mistakes = _located(error, path, key_lines(text), overridden) + mistakes
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return recipe


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: this is a folder: give a recipe file; that of a run is its recipe.toml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from None


def _located(
    error: ValidationError, path: Path | str, lines: dict[Keys, int], overridden: dict[Keys, str]
) -> list[str]:
    """The mistakes with their place in front: those of the file by line, then those of ``--set`` in order."""
    found: list[tuple[bool, int, str]] = []
    for entry in error.errors(include_url=False):
        keys = place_of(entry)
        explanation = explain(entry, Recipe)
        for position, (changed, override) in enumerate(overridden.items()):
            if keys[: len(changed)] == changed or (keys not in lines and changed[: len(keys)] == keys):
                found.append((True, position, f"--set {override}: {explanation}"))
                break
        else:
            line = next((lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in lines), 0)
            found.append((False, line, f"{path}:{line}: {explanation}" if line else f"{path}: {explanation}"))
    return [sentence for *_, sentence in sorted(found, key=lambda item: item[:2])]


def _tables(section: Section, name: str) -> list[str]:
    rows = [f"\n[{name}]"] if name else []
    below: list[str] = []
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            below += _tables(value, f"{name}.{key}".removeprefix("."))
        else:
            rows.append(f"{key} = {value_text(value)}")
    return rows + below


def with_micro_batch(recipe: Recipe, images: int) -> Recipe:
    """The recipe with ``train.micro_batch`` set to a number."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": images})})


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with what it reads named from the root, so that a run can be used from any folder."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if path else path

    data, init, backbone = recipe.data, recipe.init, recipe.model.backbone
    files = ("train_images", "train_annotations", "val_images", "val_annotations")
    shapes = data.shapes.model_copy(update={"folder": absolute(data.shapes.folder)})
    weights = backbone.weights if backbone.weights in ("none", "imagenet") else absolute(backbone.weights)
    model = recipe.model.model_copy(update={"backbone": backbone.model_copy(update={"weights": weights})})
    return recipe.model_copy(
        update={
            "data": data.model_copy(update={"shapes": shapes} | {key: absolute(getattr(data, key)) for key in files}),
            "init": init.model_copy(update={key: absolute(getattr(init, key)) for key in ("official", "checkpoint")}),
            "model": model,
        }
    )
