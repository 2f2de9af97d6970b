"""The section of a recipe that says which detector is built: one class for each system.

`DetectorSection` has the keys of all detectors, `TransformerSection` those of all transformers. To these
`SingleScaleSection` and `DeformableSection` add a key of their encoders, `AlignerKeys` those of SAM-DETR's decoder, and
each system its own.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from samdetr.recipe.sections import NonNegative, PositiveInt, Probability, Section, keep_default_unless

NORM_GROUPS = 32  # of the GroupNorm after the input projection


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
    candidates_train: PositiveInt = Field(
        2000, description="best anchors of each map before non-maximum suppression, in training"
    )
    candidates_eval: PositiveInt = Field(1000, description="the same in evaluation")
    proposals_train: PositiveInt = Field(2000, description="most proposals of an image, in training")
    proposals_eval: PositiveInt = Field(1000, description="the same in evaluation")
    hidden: PositiveInt = Field(1024, description="channels of the two fully connected layers; C4 has the fourth stage")
    score_threshold: Probability = Field(0.05, description="lowest score of a detection before suppression")


class DetectorSection(Section):
    """The keys that all systems have, and the facts about a system that other sections depend on."""

    can_be_recorded: ClassVar[bool] = True  # a step never waits for the device, so CUDA graphs can record it
    can_checkpoint_activations: ClassVar[bool] = True  # has layers for compute.activation_checkpointing
    samples_maps: ClassVar[bool] = False  # has sampling offsets, whose rate is optim.sampling_lr_factor's
    matches_queries: ClassVar[bool] = True  # trained with the losses of [loss]; otherwise with torchvision's

    system: str = Field(description="which detector")
    num_classes: PositiveInt = Field(
        91, description="class logits (91: raw COCO category ids); with softmax the last one is no object"
    )
    num_queries: PositiveInt = Field(300, description="object queries; the most objects an image can have")
    width: int = Field(256, ge=32, multiple_of=8, description="channels of the transformer, or of an FPN")
    backbone: BackboneSection = BackboneSection()

    @property
    def most_objects(self) -> int | None:
        """The most objects that an image can have in training; None: any number."""
        return self.num_queries


class TransformerSection(DetectorSection):
    """The keys of all transformers."""

    heads: PositiveInt = Field(8, description="attention heads; divides width. SAM-DETR: salient points too")
    encoder_layers: int = Field(6, ge=0, description="encoder layers")
    decoder_layers: PositiveInt = Field(6, description="decoder layers")
    ffn: PositiveInt = Field(2048, description="hidden channels of the feed-forward blocks")
    dropout: Probability = Field(0.1, description="dropout in attention, residuals and feed-forward blocks")
    padding: Literal["published", "masked"] = Field(
        "published",
        description="published: padded cells reach the result through convolutions and RoIAlign; masked: they are zero",
    )

    @field_validator("heads")
    @classmethod
    def _divides_width(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("width", 0) % value:
            raise ValueError(f"must divide model.width, {info.data['width']} (got {value})")
        return value


class SingleScaleSection(TransformerSection):
    """The keys of transformers on one map: those of all transformers and input_norm."""

    input_norm: Literal["group_norm", "none"] = Field(
        "group_norm",
        description="after the input projection: GroupNorm(32) (SAM-DETR in 12 epochs) or none",
    )

    @field_validator("input_norm")
    @classmethod
    def _has_groups(cls, value: str, info: ValidationInfo) -> str:
        if value == "group_norm" and info.data.get("width", 0) % NORM_GROUPS:
            raise ValueError(
                f'"group_norm" has {NORM_GROUPS} groups, which do not divide model.width, {info.data["width"]}'
            )
        return value


class DeformableSection(TransformerSection):
    """The keys of transformers whose encoder samples maps, each with a GroupNorm: also feature_levels."""

    samples_maps: ClassVar[bool] = True

    feature_levels: int = Field(
        1,
        ge=1,
        le=4,
        description="maps that the encoder sees: of the last stages; a fourth is a convolution of the last stage",
    )

    @field_validator("width")
    @classmethod
    def _has_groups(cls, value: int) -> int:
        if value % NORM_GROUPS:
            raise ValueError(f"must be a multiple of {NORM_GROUPS}, the groups of the input norm (got {value})")
        return value

    @field_validator("feature_levels")
    @classmethod
    def _has_stages(cls, value: int, info: ValidationInfo) -> int:
        backbone = info.data.get("backbone")
        if backbone and backbone.stages < min(value, 3):
            raise ValueError(
                f"model.backbone.stages must be at least {min(value, 3)} with model.feature_levels = {value} "
                f"(got {backbone.stages})"
            )
        return value


class AlignerKeys(Section):
    """The keys of the semantic aligner, which SAM-DETR adds to those of a transformer."""

    resampling: Literal["points", "point", "average", "max"] = Field(
        "points",
        description="what a query is resampled from; points: a salient point for each head (published). For ablations: "
        "point: one for all heads; average, max: the 7 x 7 bins of its box",
    )
    reweighting: bool = Field(
        True, description="multiply sampled features by weights predicted from the previous query"
    )
    search_range: Literal["box", "image"] = Field(
        "box",
        description="where salient points may lie: in the query's reference box (published) or in the whole image",
    )
    smca: bool = Field(False, description="add the spatially modulated (Gaussian) term to cross-attention")
    smca_initial_scale: NonNegative = Field(
        0.0, description="initial Gaussian scale, 2 / sigma in map cells; 0: published, the term starts flat"
    )

    @field_validator("reweighting", "search_range")
    @classmethod
    def _has_points(cls, value: Any, info: ValidationInfo) -> Any:
        return keep_default_unless(cls, value, info, "model.resampling", "points", "point")

    @field_validator("smca", "smca_initial_scale")
    @classmethod
    def _has_a_point_for_each_head(cls, value: Any, info: ValidationInfo) -> Any:
        return keep_default_unless(cls, value, info, "model.resampling", "points")


class SAMDETRSection(AlignerKeys, SingleScaleSection):
    system: Literal["sam_detr"] = Field("sam_detr", description="SAM-DETR, on one map")


class MultiScaleSAMDETRSection(AlignerKeys, DeformableSection):
    system: Literal["sam_detr_ms"] = Field("sam_detr_ms", description="SAM-DETR with a deformable encoder")


class DETRSection(SingleScaleSection):
    system: Literal["detr"] = Field("detr", description="DETR")
    class_prior: Probability = Field(
        0.01,
        description="initial probability of every class, for the focal loss; 0: torch's initialisation (softmax). "
        "All other systems have 0.01",
    )


class ConditionalDETRSection(SingleScaleSection):
    system: Literal["conditional_detr"] = Field("conditional_detr", description="Conditional DETR")


class DABDETRSection(SingleScaleSection):
    system: Literal["dab_detr"] = Field("dab_detr", description="DAB-DETR")


class SMCADETRSection(SingleScaleSection):
    system: Literal["smca_detr"] = Field("smca_detr", description="SMCA-DETR, on one map")
    smca_stride: Literal["published", "feature"] = Field(
        "published",
        description="unit of the Gaussians; published: 32 pixels, also with DC5; feature: a cell of the map",
    )


class MultiScaleSMCADETRSection(TransformerSection):
    system: Literal["smca_detr_ms"] = Field("smca_detr_ms", description="SMCA-DETR, on several maps")
    scale_encoder: Literal["convolution", "attention"] = Field(
        "convolution",
        description="what mixes the maps; convolution: maps of stride 8 to 64 (as released); attention: maps of stride "
        "16 to 64, each by itself and in the middle layer together (as in the paper, never released)",
    )

    @field_validator("backbone")
    @classmethod
    def _has_maps(cls, value: BackboneSection) -> BackboneSection:
        if value.stages < 3 or value.dilation:
            raise ValueError('with model.system = "smca_detr_ms" stages must be at least 3 and dilation false')
        return value


class DeformableDETRSection(DeformableSection):
    system: Literal["deformable_detr"] = Field("deformable_detr", description="Deformable-DETR")
    box_refine: bool = Field(
        False, description="each layer samples around the boxes of the layer before it, and has its own heads"
    )
    two_stage: bool = Field(
        False,
        description="queries are the best proposals of the cells of the encoded maps; needs model.box_refine",
    )

    @field_validator("two_stage")
    @classmethod
    def _refines(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("box_refine"):
            raise ValueError("needs model.box_refine = true")
        return value


class FasterRCNNSection(DetectorSection):
    """Faster R-CNN is C4 where model.backbone.stages = 3, DC5 with model.backbone.dilation, otherwise FPN."""

    can_be_recorded: ClassVar[bool] = False
    can_checkpoint_activations: ClassVar[bool] = False
    matches_queries: ClassVar[bool] = False

    system: Literal["faster_rcnn"] = Field(
        "faster_rcnn",
        description="Faster R-CNN: C4 where model.backbone.stages = 3, DC5 with model.backbone.dilation, else FPN",
    )
    num_queries: PositiveInt = Field(300, description="most detections of an image")
    regions: RegionsSection = RegionsSection()

    @property
    def most_objects(self) -> None:
        """None: an image can have any number of objects in training."""
        return None

    @field_validator("backbone")
    @classmethod
    def _gives_regions(cls, value: BackboneSection) -> BackboneSection:
        if value.stages < 3:
            raise ValueError('with model.system = "faster_rcnn" stages must be 3 (C4) or 4 (DC5, FPN)')
        return value


def _sam_detr_by_default(value: object) -> object:
    return {"system": "sam_detr", **value} if isinstance(value, dict) else value


ModelSection = Annotated[
    SAMDETRSection
    | MultiScaleSAMDETRSection
    | DETRSection
    | ConditionalDETRSection
    | DABDETRSection
    | SMCADETRSection
    | MultiScaleSMCADETRSection
    | DeformableDETRSection
    | FasterRCNNSection,
    Field(discriminator="system"),
    BeforeValidator(_sam_detr_by_default),
]
