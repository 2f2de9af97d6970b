"""A whole recipe, the checks between its sections, and copies of it with changes."""

from __future__ import annotations

import os

from pydantic import ValidationInfo, field_validator

from samdetr.recipe.model import DetectorSection, ModelSection, SAMDETRSection
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
    TrainSection,
)


class Recipe(Section):
    """A whole recipe. A key that a file leaves out has its default."""

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
        if compute and compute.activation_checkpointing != "off" and not value.can_checkpoint_activations:
            raise ValueError(
                f'system "{value.system}" has no layers for activation checkpointing: set '
                'compute.activation_checkpointing = "off"'
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


def with_micro_batch(recipe: Recipe, images: int) -> Recipe:
    """Return the recipe with ``train.micro_batch`` set to a number."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": images})})


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths of what it reads, so that its run can be used from any folder."""

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
