"""The section of a recipe that says which detector is built."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from samdetr.recipe.sections import PYRAMIDS, NonNegative, PositiveInt, Probability, Section, only_with


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
    # from 16: torch's own 1x1 convolution of 8 channels corrupts memory in its backward at some sizes (oneDNN, AVX512)
    width: int = Field(64, ge=16, le=256, multiple_of=8, description="channels of the stem; 64 is torchvision's")

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


class RegionsSection(Section):
    candidates_train: PositiveInt = Field(2000, description="best anchors of each map before suppression, in training")
    candidates_eval: PositiveInt = Field(1000, description="the same in evaluation")
    proposals_train: PositiveInt = Field(2000, description="most proposals of an image, in training")
    proposals_eval: PositiveInt = Field(1000, description="the same in evaluation")
    hidden: PositiveInt = Field(1024, description="channels of the two fully connected layers; C4 has the fourth stage")
    score_threshold: Probability = Field(0.05, description="lowest score of a detection before suppression")


# keys that have no meaning for Faster R-CNN
OF_TRANSFORMERS = ("heads", "encoder_layers", "decoder_layers", "ffn", "dropout", "input_norm", "padding")
ALIGNED = ("sam_detr", "sam_detr_ms")  # systems with the semantic aligner


class ModelSection(Section):
    system: Literal[
        "sam_detr",
        "sam_detr_ms",
        "detr",
        "conditional_detr",
        "smca_detr",
        "smca_detr_ms",
        "deformable_detr",
        "faster_rcnn",
    ] = Field(
        "sam_detr",
        description="which detector; ..._ms: on several maps; faster_rcnn is C4 where "
        "model.backbone.stages = 3, DC5 with model.backbone.dilation, else FPN",
    )
    num_classes: PositiveInt = Field(
        91, description="class logits (91: raw COCO category ids); with softmax the last one is no object"
    )
    num_queries: PositiveInt = Field(
        300, description="object queries; the most objects an image can have. faster_rcnn: most detections of an image"
    )
    class_prior: Probability = Field(
        0.01,
        description="initial probability of every class, for the focal loss; 0: torch's own start (softmax). "
        "All other systems have 0.01",
        json_schema_extra=only_with("model.system", "detr"),
    )
    resampling: Literal["points", "point", "average", "max"] = Field(
        "points",
        description="what of its box becomes a query; points: a salient point for each head (published); for ablation "
        "point: one for all heads; average, max: of the box's 7 x 7 bins",
        json_schema_extra=only_with("model.system", *ALIGNED),
    )
    reweighting: bool = Field(
        True,
        description="weigh what was sampled by numbers predicted from the previous query",
        json_schema_extra=only_with("model.system", *ALIGNED) | only_with("model.resampling", "points", "point"),
    )
    search_range: Literal["box", "image"] = Field(
        "box",
        description="where salient points may lie: in the query's reference box (published) or in the whole image",
        json_schema_extra=only_with("model.system", *ALIGNED) | only_with("model.resampling", "points", "point"),
    )
    smca: bool = Field(
        False,
        description="add the spatially modulated (Gaussian) term to cross-attention",
        json_schema_extra=only_with("model.system", *ALIGNED) | only_with("model.resampling", "points"),
    )
    smca_initial_scale: NonNegative = Field(
        0.0,
        description="initial Gaussian scale, 2 / sigma in map cells; 0: published, the term starts flat",
        json_schema_extra=only_with("model.system", *ALIGNED) | only_with("model.resampling", "points"),
    )
    smca_stride: Literal["published", "feature"] = Field(
        "published",
        description="pixels a unit of SMCA-DETR's Gaussians: published, 32 also under DC5; feature: a cell of the map",
        json_schema_extra=only_with("model.system", "smca_detr"),
    )
    scale_encoder: Literal["convolution", "attention"] = Field(
        "convolution",
        description="what mixes the maps of SMCA-DETR; convolution: of stride 8 to 64 (released); attention: within "
        "maps of stride 16 to 64, in the middle layer across them (the paper's, never released)",
        json_schema_extra=only_with("model.system", "smca_detr_ms"),
    )
    feature_levels: int = Field(
        1,
        ge=1,
        le=4,
        description="maps that the encoder sees: of so many last stages; the fourth is a convolution of the last stage",
        json_schema_extra=only_with("model.system", *PYRAMIDS),
    )
    box_refine: bool = Field(
        False,
        description="each layer looks where the boxes of the one before it lie, and has heads of its own",
        json_schema_extra=only_with("model.system", "deformable_detr"),
    )
    two_stage: bool = Field(
        False,
        description="the queries are the best of what all cells of the encoded maps propose; needs model.box_refine",
        json_schema_extra=only_with("model.system", "deformable_detr"),
    )
    width: int = Field(256, ge=32, multiple_of=8, description="channels of the transformer, or of an FPN")
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
    regions: RegionsSection = Field(RegionsSection(), json_schema_extra=only_with("model.system", "faster_rcnn"))

    @property
    def most_objects(self) -> int | None:
        """How many objects an image can have in training; None: any number."""
        return None if self.system == "faster_rcnn" else self.num_queries

    @field_validator(*OF_TRANSFORMERS)
    @classmethod
    def _is_of_a_transformer(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("system") == "faster_rcnn" and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError('has no meaning with model.system = "faster_rcnn": leave it out')
        return value

    @field_validator("backbone")
    @classmethod
    def _gives_regions(cls, value: BackboneSection, info: ValidationInfo) -> BackboneSection:
        if info.data.get("system") == "faster_rcnn" and value.stages < 3:
            raise ValueError('with model.system = "faster_rcnn" stages must be 3 (C4) or 4 (DC5, FPN)')
        return value

    @field_validator("two_stage")
    @classmethod
    def _refines(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("box_refine"):
            raise ValueError("needs model.box_refine = true")
        return value

    @field_validator("heads")
    @classmethod
    def _divides_width(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("width", 0) % value:
            raise ValueError(f"must divide model.width, {info.data['width']} (got {value})")
        return value

    @field_validator("input_norm")
    @classmethod
    def _has_groups(cls, value: str, info: ValidationInfo) -> str:
        system = info.data.get("system")
        if value == "none" and system in PYRAMIDS:
            raise ValueError(f'must be "group_norm" with model.system = "{system}"')
        if value == "group_norm" and system == "smca_detr_ms":
            raise ValueError(f'must be "none" with model.system = "{system}"')
        if value == "group_norm" and info.data.get("width", 0) % 32:
            raise ValueError(f'"group_norm" has 32 groups, which do not divide model.width, {info.data["width"]}')
        return value

    @field_validator("backbone")
    @classmethod
    def _has_levels(cls, value: BackboneSection, info: ValidationInfo) -> BackboneSection:
        needed = min(info.data.get("feature_levels", 1), 3)
        if value.stages < needed:
            raise ValueError(
                f"model.backbone.stages must be at least {needed} with model.feature_levels (got {value.stages})"
            )
        if info.data.get("system") == "smca_detr_ms" and (value.stages < 3 or value.dilation):
            raise ValueError('with model.system = "smca_detr_ms" stages must be at least 3 and dilation false')
        return value
