"""The sections of a recipe except the model's: every key with its type, default and meaning."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from samdetr.errors import RecipeError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Value = TypeVar("Value")


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are frozen, no type is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def keep_default_unless(section: type[Section], value: Value, info: ValidationInfo, key: str, *choices: str) -> Value:
    """Reject a non-default value unless ``key`` (an earlier key of this section) is one of ``choices``.

    key: with its section, such as "loss.classification". Returns the value. Raises ValueError.
    """
    chosen = info.data.get(key.rpartition(".")[2])
    default = section.model_fields[str(info.field_name)].default
    if chosen is not None and chosen not in choices and value != default:
        raise ValueError(f'has no meaning with {key} = "{chosen}": leave it out')
    return value


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
    activation_checkpointing: Literal["off", "layers"] = Field(
        "off",
        description="layers: encoder and decoder layers keep only their inputs and compute again in the backward pass; "
        "less memory, the same numbers, more time",
    )
    on_failure: Literal["error", "eager"] = Field(
        "error", description="when compiling or recording fails: stop with the reason, or say so and go on without"
    )
    kernels: Literal["triton", "reference"] = Field(
        "triton", description="how the ops run on a GPU; reference: plain torch, for comparison. A CPU has only that"
    )


class ParallelSection(Section):
    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="how processes train together; ddp: each holds all parameters; fsdp: each holds a shard of every "
        "layer; hsdp: shards within a machine, replicas across machines",
    )
    reshard: bool = Field(True, description="fsdp, hsdp: free gathered layers between forward and backward")
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
        description="random: micro-batches padded to their largest image (published); buckets: images of similar size "
        "together, in a few fixed shapes",
    )
    buckets: int = Field(16, ge=2, description="batching buckets: how many padded shapes")
    bucket_grid: PositiveInt = Field(32, description="batching buckets: sides are multiples of it, pixels")
    pixels: Literal["published", "fast"] = Field(
        "published",
        description="published: PIL decodes, the loader normalises; fast: libjpeg-turbo decodes, 8-bit pixels travel "
        "and are normalised on the device",
    )
    shapes: ShapesSection = ShapesSection()


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
    focal_alpha: float = Field(0.25, ge=0.0, le=1.0, description="alpha of the focal loss")
    focal_gamma: NonNegative = Field(2.0, description="gamma of the focal loss")
    no_object_weight: Positive = Field(0.1, description="weight of queries without an object in the softmax loss")

    @field_validator("focal_alpha", "focal_gamma")
    @classmethod
    def _is_focal(cls, value: float, info: ValidationInfo) -> float:
        return keep_default_unless(cls, value, info, "loss.classification", "focal")

    @field_validator("no_object_weight")
    @classmethod
    def _is_softmax(cls, value: float, info: ValidationInfo) -> float:
        return keep_default_unless(cls, value, info, "loss.classification", "softmax")


class OptimSection(Section):
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw (published, DETR family) or sgd")
    momentum: Probability = Field(0.9, description="momentum of SGD")
    lr: Positive = Field(1e-4, description="learning rate")
    backbone_lr: NonNegative = Field(1e-5, description="learning rate of the backbone")
    sampling_lr_factor: Positive = Field(
        1.0,
        description="factor of the rate of sampling offsets and reference points (Deformable-DETR: 0.1)",
    )
    weight_decay: NonNegative = Field(1e-4, description="weight decay; that of SGD is part of the gradient")
    clip_norm: NonNegative = Field(0.1, description="largest gradient norm; 0: no clipping")
    # for a new schedule that depends on the number of epochs, `find_run` must forbid changing train.epochs on resume
    schedule: Literal["step", "cosine"] = Field(
        "step", description="step: drops after drop_epochs (published); cosine: to zero at the last step"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    drop_epochs: tuple[PositiveInt, ...] = Field((40,), description="schedule step: epochs after which the rates drop")
    drop_factor: float = Field(0.1, gt=0.0, le=1.0, description="the factor of each drop")
    ema_decay: Probability = Field(
        0.0, description="decay per step of the EMA (moving average) of weights, used for evaluation; 0: off"
    )

    @field_validator("momentum")
    @classmethod
    def _is_sgd(cls, value: float, info: ValidationInfo) -> float:
        return keep_default_unless(cls, value, info, "optim.optimizer", "sgd")

    @field_validator("drop_epochs")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)):
            raise ValueError(f"must ascend (got {list(value)})")
        return value


class TrainSection(Section):
    epochs: PositiveInt = Field(50, description="passes over the training split")
    total_batch: PositiveInt = Field(16, description="images of one optimizer step, over all devices")
    micro_batch: int | Literal["auto"] = Field(
        2,
        description="images of one forward pass on one device; divides total_batch. auto: the most that fits, "
        "found by steps of the largest batches on the GPU when a run begins",
    )
    log_every: PositiveInt = Field(50, description="steps between two lines of metrics.jsonl")
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="where a loss or gradient is NaN or infinite, the step is never applied; stop: end the run with a "
        "file that samdetr debug-nan replays; skip: go on",
    )
    max_skips: PositiveInt = Field(3, description="steps in a row that are skipped; one more stops")

    @field_validator("micro_batch", mode="before")
    @classmethod
    def _divides_total(cls, value: object, info: ValidationInfo) -> object:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'expected a whole number >= 1 or "auto", got {value!r}')
        if info.data.get("total_batch", 0) % value:
            raise ValueError(f"must divide train.total_batch, {info.data['total_batch']} (got {value})")
        return value

    @field_validator("max_skips")
    @classmethod
    def _skips(cls, value: int, info: ValidationInfo) -> int:
        return keep_default_unless(cls, value, info, "train.on_nonfinite", "skip")

    @property
    def skips_allowed(self) -> int:
        """The number of steps that may be skipped in a row."""
        return self.max_skips if self.on_nonfinite == "skip" else 0

    @property
    def images(self) -> int:
        """``micro_batch`` as a number, as every run has it. Raises RecipeError where it is "auto"."""
        if self.micro_batch == "auto":
            raise RecipeError('train.micro_batch = "auto" is a number once a run has begun: give one here.')
        return self.micro_batch


class CheckpointSection(Section):
    every: int = Field(0, ge=0, description="steps between two saves within an epoch; 0: only at ends of epochs")
    keep: PositiveInt = Field(2, description="newest checkpoints that stay on the disk; the best one stays besides")


class EvalSection(Section):
    every: PositiveInt = Field(1, description="epochs between two evaluations; the last epoch always has one")
    batch: PositiveInt = Field(1, description="images of one forward pass")
    top_k: PositiveInt = Field(100, description="detections kept of each image, by score")
    evaluator: Literal["auto", "fast", "pycocotools"] = Field(
        "auto", description="COCO numbers; fast: hotcoco, with pycocotools' own numbers; auto: fast where installed"
    )
