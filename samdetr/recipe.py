"""Recipes: the typed sections, and the strict loader. The only place where a recipe key exists."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.config import JsonDict

from samdetr.errors import RecipeError
from samdetr.recipe_messages import explain, keys_named
from samdetr.toml_text import apply_override, key_lines, syntax_mistake, value_text, with_tuples

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Keys = tuple[str | int, ...]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are frozen, no type is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*")
    @classmethod
    def _means_something(cls, value: object, info: ValidationInfo) -> object:
        """A key keeps its default where it has no meaning (see `only_with`)."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(field.json_schema_extra, dict) and value != field.default:
            for key, choices in field.json_schema_extra.items():
                chosen = info.data.get(key.rpartition(".")[2])
                if isinstance(choices, list) and chosen is not None and chosen not in choices:
                    raise ValueError(f'has no meaning with {key} = "{chosen}": leave it out')
        return value


def only_with(key: str, *choices: str) -> JsonDict:
    """For a field that has a meaning only where an earlier key of its section has one of these values."""
    return {key: list(choices)}


class RunSection(Section):
    name: str = Field("", description="name of the run folder; empty: the recipe's file name")
    folder: str = Field("runs", description="where run folders are made: <folder>/<name>/<n>")
    seed: int = Field(42, ge=0, description="seed of initialisation, order, augmentation and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the first GPU if there is one")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if value in (".", "..") or "/" in value or "\\" in value:
            raise ValueError(f'must be a plain folder name, without slashes (got "{value}")')
        return value


class ComputeSection(Section):
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="of matrix products and convolutions; parameters, boxes and losses are fp32. auto: bf16 where the "
        "hardware has it (GPUs from sm_80, CPUs with AVX512-BF16 or AMX)",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description='torch.compile; needs data.batching = "buckets". auto: with those, on a GPU'
    )
    cuda_graph: Literal["on", "off"] = Field(
        "off", description='replay each step as CUDA graphs; needs a GPU and data.batching = "buckets"'
    )
    on_failure: Literal["error", "eager"] = Field(
        "error", description="when compiling or recording fails: stop with the reason, or say so and go on without"
    )
    kernels: Literal["triton", "reference"] = Field(
        "triton", description="what the ops run on a GPU; reference: plain torch, for comparison. A CPU has only these"
    )


class ParallelSection(Section):
    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="of several processes; ddp: each holds everything; fsdp: each holds a share of every layer; "
        "hsdp: shares within a machine, copies between machines",
    )
    reshard: bool = Field(True, description="fsdp, hsdp: give up gathered layers between forward and backward")
    timeout: PositiveInt = Field(600, description="seconds that a process waits for the others before it gives up")


class InitSection(Section):
    official: str = Field("", description="path of a published .pth checkpoint to start from; empty: none")
    checkpoint: str = Field("", description="path of one of our checkpoints to start from; empty: none")

    @field_validator("checkpoint")
    @classmethod
    def _one_start(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("official"):
            raise ValueError("init.official is set too; a run starts from one of them")
        return value


class ShapesSection(Section):
    """The embedded synthetic data set, used with data.format = "shapes"."""

    folder: str = Field("", description="cache folder; empty: ~/.cache/samdetr/shapes")
    train_images: PositiveInt = Field(2000, description="photos in the train split")
    val_images: PositiveInt = Field(200, description="photos in the val split")
    image_size: int = Field(128, ge=48, le=1024, description="longer side of a picture, pixels")
    max_objects: int = Field(12, ge=1, le=12, description="most objects in a picture")
    seed: int = Field(0, ge=0, description="seed of the pictures")


class DataSection(Section):
    format: Literal["coco", "shapes"] = Field("coco", description="coco: the four paths below; shapes: generated")
    train_images: str = Field("", description="folder of the training photos")
    train_annotations: str = Field("", description="COCO JSON of the training split")
    val_images: str = Field("", description="folder of the validation photos")
    val_annotations: str = Field("", description="COCO JSON of the validation split")
    class_index: Literal["category_id", "contiguous"] = Field(
        "category_id",
        description="class logit of a category: its raw id (published; 91 logits for COCO) or its rank",
    )
    on_bad: Literal["error", "drop"] = Field("error", description="bad boxes: stop, or drop them (counted aloud)")
    max_pixels: PositiveInt = Field(64_000_000, description="largest photo to decode, pixels")
    workers: int = Field(4, ge=0, le=256, description="loader processes; 0: load in the main process")
    batching: Literal["random", "buckets"] = Field(
        "random",
        description="random: micro-batches padded to their largest image (published); buckets: alike images together, "
        "in a few fixed shapes",
    )
    buckets: int = Field(16, ge=2, description="batching buckets: how many padded shapes")
    bucket_grid: PositiveInt = Field(32, description="batching buckets: sides are multiples of it, pixels")
    pixels: Literal["published", "fast"] = Field(
        "published",
        description="published: PIL decodes, the loader normalises; fast: libjpeg-turbo decodes, 8-bit pixels travel "
        "and are normalised on the device",
    )
    resize: Literal["worker", "device"] = Field(
        "worker",
        description="who augments training pixels: the loader processes (published), or the device, from whole photos",
    )
    shapes: ShapesSection = ShapesSection()

    @field_validator("resize")
    @classmethod
    def _has_bytes(cls, value: str, info: ValidationInfo) -> str:
        if value == "device" and info.data.get("pixels") == "published":
            raise ValueError('"device" needs data.pixels = "fast"')
        return value


class AugmentSection(Section):
    flip: float = Field(0.5, ge=0.0, le=1.0, description="probability of a horizontal flip")
    train_sizes: tuple[PositiveInt, ...] = Field(
        tuple(range(480, 801, 32)), min_length=1, description="short sides to draw from, pixels"
    )
    max_size: PositiveInt = Field(1333, description="longest long side after a resize, pixels")
    crop: float = Field(0.5, ge=0.0, le=1.0, description="probability of the resize-crop-resize branch")
    crop_resize_sizes: tuple[PositiveInt, ...] = Field(
        (400, 500, 600), min_length=1, description="short sides before the crop, pixels"
    )
    crop_min: PositiveInt = Field(384, description="shortest side of the crop, pixels")
    crop_max: PositiveInt = Field(600, description="longest side of the crop, pixels")
    eval_size: PositiveInt = Field(800, description="short side in evaluation, pixels")
    eval_max_size: PositiveInt = Field(1333, description="longest long side in evaluation, pixels")

    @field_validator("max_size")
    @classmethod
    def _holds_train_sizes(cls, value: int, info: ValidationInfo) -> int:
        largest = max(info.data.get("train_sizes", (0,)))
        if largest > value:
            raise ValueError(f"must be at least the largest of augment.train_sizes, {largest} (got {value})")
        return value

    @field_validator("crop_max")
    @classmethod
    def _holds_crop_min(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("crop_min", 0) > value:
            raise ValueError(f"must be at least augment.crop_min, {info.data['crop_min']} (got {value})")
        return value

    @field_validator("eval_max_size")
    @classmethod
    def _holds_eval_size(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("eval_size", 0) > value:
            raise ValueError(f"must be at least augment.eval_size, {info.data['eval_size']} (got {value})")
        return value


class BackboneSection(Section):
    name: Literal["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"] = Field(
        "resnet50", description="torchvision ResNet"
    )
    weights: str = Field("imagenet", description='"imagenet", "none", or the path of a state dict')
    norm: Literal["frozen", "batch"] = Field(
        "frozen",
        description="frozen: published, for pretrained weights; batch: live statistics, from scratch",
    )
    dilation: bool = Field(False, description="DC5: dilation 2 in place of the last stride (resnet50, resnet101)")
    frozen_stages: int = Field(2, ge=0, le=5, description="stages without gradient: 1 the stem, 2 also layer1, ...")
    stages: int = Field(4, ge=1, le=4, description="residual stages used; 4 is C5 (stride 32), 3 is C4 (stride 16)")
    width: int = Field(64, ge=8, le=256, multiple_of=8, description="channels of the stem; 64 is torchvision's")

    @field_validator("dilation")
    @classmethod
    def _dilatable(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("name") in ("resnet10", "resnet18", "resnet34"):
            raise ValueError(f"{info.data['name']} cannot be dilated; use resnet50 or resnet101")
        return value

    @field_validator("stages")
    @classmethod
    def _has_dilated_stage(cls, value: int, info: ValidationInfo) -> int:
        if value < 4 and info.data.get("dilation"):
            raise ValueError(f"must be 4 with model.backbone.dilation, which changes the fourth stage (got {value})")
        return value

    @field_validator("width")
    @classmethod
    def _fits_weights(cls, value: int, info: ValidationInfo) -> int:
        if value != 64 and info.data.get("weights") == "imagenet":
            raise ValueError(f'must be 64 with model.backbone.weights = "imagenet" (got {value})')
        return value

    @field_validator("weights")
    @classmethod
    def _exist(cls, value: str, info: ValidationInfo) -> str:
        if value == "imagenet" and info.data.get("name") == "resnet10":
            raise ValueError('resnet10 has no ImageNet weights; use "none" or a path')
        return value


class ModelSection(Section):
    system: Literal["sam_detr", "detr", "conditional_detr", "smca_detr"] = Field(
        "sam_detr", description="which detector"
    )
    num_classes: PositiveInt = Field(
        91, description="class logits (91: raw COCO category ids); with softmax the last one is no object"
    )
    num_queries: PositiveInt = Field(300, description="object queries; the most objects an image can have")
    class_prior: Probability = Field(
        0.01,
        description="initial probability of every class, for the focal loss; 0: torch's own start (softmax). "
        "All other systems have 0.01",
        json_schema_extra=only_with("model.system", "detr"),
    )
    smca: bool = Field(
        False,
        description="add the spatially modulated (Gaussian) term to cross-attention",
        json_schema_extra=only_with("model.system", "sam_detr"),
    )
    smca_initial_scale: NonNegative = Field(
        0.0,
        description="initial Gaussian scale, 2 / sigma in map cells; 0: published, the term starts flat",
        json_schema_extra=only_with("model.system", "sam_detr"),
    )
    smca_stride: Literal["published", "feature"] = Field(
        "published",
        description="pixels a unit of SMCA-DETR's Gaussians: published, 32 also under DC5; feature: a cell of the map",
        json_schema_extra=only_with("model.system", "smca_detr"),
    )
    width: int = Field(256, ge=32, multiple_of=8, description="channels of the transformer")
    heads: PositiveInt = Field(8, description="attention heads and salient points; divides width")
    encoder_layers: int = Field(6, ge=0, description="encoder layers")
    decoder_layers: PositiveInt = Field(6, description="decoder layers")
    ffn: PositiveInt = Field(2048, description="hidden channels of the feed-forward blocks")
    dropout: Probability = Field(0.1, description="dropout in attention, residuals and feed-forward blocks")
    input_norm: Literal["group_norm", "none"] = Field(
        "group_norm",
        description="after the input projection: GroupNorm(32) (SAM-DETR in 12 epochs, multi-scale) or none",
    )
    padding: Literal["published", "masked"] = Field(
        "published",
        description="published: padded cells reach the result through convolutions and RoIAlign; masked: they are zero",
    )
    backbone: BackboneSection = BackboneSection()

    @field_validator("heads")
    @classmethod
    def _divides_width(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("width", 0) % value:
            raise ValueError(f"must divide model.width, {info.data['width']} (got {value})")
        return value

    @field_validator("input_norm")
    @classmethod
    def _has_groups(cls, value: str, info: ValidationInfo) -> str:
        if value == "group_norm" and info.data.get("width", 0) % 32:
            raise ValueError(f'"group_norm" has 32 groups, which do not divide model.width, {info.data["width"]}')
        return value


class LossSection(Section):
    classification: Literal["focal", "softmax"] = Field(
        "focal", description="focal: a sigmoid for each class; softmax: cross-entropy over the classes and no object"
    )
    class_weight: NonNegative = Field(2.0, description="weight of the classification loss")
    l1_weight: NonNegative = Field(5.0, description="weight of the L1 box loss")
    giou_weight: NonNegative = Field(2.0, description="weight of the generalised IoU loss")
    class_cost: NonNegative = Field(2.0, description="weight of the class term in matching")
    l1_cost: NonNegative = Field(5.0, description="weight of the L1 term in matching")
    giou_cost: NonNegative = Field(2.0, description="weight of the generalised IoU term in matching")
    focal_alpha: float = Field(
        0.25,
        ge=0.0,
        le=1.0,
        description="alpha of the focal loss",
        json_schema_extra=only_with("loss.classification", "focal"),
    )
    focal_gamma: NonNegative = Field(
        2.0, description="gamma of the focal loss", json_schema_extra=only_with("loss.classification", "focal")
    )
    no_object_weight: Positive = Field(
        0.1,
        description="weight of queries without an object in the softmax loss",
        json_schema_extra=only_with("loss.classification", "softmax"),
    )


class OptimSection(Section):
    lr: Positive = Field(1e-4, description="learning rate")
    backbone_lr: NonNegative = Field(1e-5, description="learning rate of the backbone")
    weight_decay: NonNegative = Field(1e-4, description="AdamW weight decay")
    clip_norm: NonNegative = Field(0.1, description="largest gradient norm; 0: no clipping")
    schedule: Literal["step", "cosine"] = Field(
        "step", description="step: drops after drop_epochs (published); cosine: to zero at the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    drop_epochs: tuple[PositiveInt, ...] = Field((40,), description="schedule step: epochs after which the rates drop")
    drop_factor: float = Field(0.1, gt=0.0, le=1.0, description="the factor of each drop")
    ema_decay: Probability = Field(
        0.0, description="decay a step of the moving average of the weights, which is then evaluated; 0: no average"
    )

    @field_validator("drop_epochs")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"must ascend (got {list(value)})")
        return value


class TrainSection(Section):
    epochs: PositiveInt = Field(50, description="passes over the training split")
    total_batch: PositiveInt = Field(16, description="images of one optimizer step, over all devices")
    micro_batch: PositiveInt = Field(2, description="images of one forward pass on one device; divides total_batch")
    log_every: PositiveInt = Field(50, description="steps between two lines of metrics.jsonl")

    @field_validator("micro_batch")
    @classmethod
    def _divides_total(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("total_batch", 0) % value:
            raise ValueError(f"must divide train.total_batch, {info.data['total_batch']} (got {value})")
        return value


class EvalSection(Section):
    every: PositiveInt = Field(1, description="epochs between two evaluations; the last epoch always has one")
    batch: PositiveInt = Field(1, description="images of one forward pass")
    top_k: PositiveInt = Field(100, description="detections kept of each image, by score")
    evaluator: Literal["auto", "fast", "pycocotools"] = Field(
        "auto", description="COCO numbers; fast: hotcoco, with pycocotools' own numbers; auto: fast where installed"
    )


class Recipe(Section):
    """A whole recipe: complete in itself."""

    run: RunSection = RunSection()
    compute: ComputeSection = ComputeSection()
    parallel: ParallelSection = ParallelSection()
    init: InitSection = InitSection()
    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()


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
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from None


def _located(
    error: ValidationError, path: Path | str, lines: dict[Keys, int], overridden: dict[Keys, str]
) -> list[str]:
    """The mistakes with their place in front: those of the file by line, then those of ``--set`` in order."""
    found: list[tuple[bool, int, str]] = []
    for entry in error.errors(include_url=False):
        keys: Keys = tuple(entry["loc"])
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
