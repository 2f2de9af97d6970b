"""A detector of an image encoder and a decoder, which all systems but Faster R-CNN are."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from samdetr.models.backbone import Backbone
from samdetr.models.deformable_encoder import PyramidImageEncoder
from samdetr.models.encoder import ImageEncoder
from samdetr.models.system import System
from samdetr.structures import Outputs


class Decoder(Protocol):
    """An nn.Module that predicts logits and boxes from the image encoder's output."""

    @property
    def layers(self) -> nn.ModuleList:
        """Layers that are compiled, sharded and checkpointed one by one."""

    def __call__(self, encoded: Any) -> Outputs:
        """Predict logits and boxes after every layer. encoded: output of the detector's encoder."""

    @property
    def compiled_parts(self) -> tuple[nn.Module, ...]:
        """Modules around the layers, each compiled as one graph."""


class EncoderDecoder(nn.Module):
    """An image encoder, then a decoder."""

    def __init__(self, system: System, encoder: ImageEncoder | PyramidImageEncoder, decoder: Decoder) -> None:
        super().__init__()
        self.system = system
        self.encoder = encoder
        self.decoder = decoder
        self.layers = (*encoder.layers, *decoder.layers)  # those of a stack run the same graph
        # besides the backbone, each as one graph for maps of all sizes
        self.compiled_parts = (*encoder.compiled_parts, *self.layers, *decoder.compiled_parts)

    def forward(self, images: Tensor, image_sizes: Tensor) -> Outputs:
        """Detect objects in images [B, 3, H, W], normalised, zero-padded bottom/right.

        image_sizes: [B, 2] int, valid (h, w) in pixels.
        """
        return self.decoder(self.encoder(images, image_sizes))

    @property
    def backbone(self) -> Backbone:
        """The backbone, which is compiled for each size of images, and sharded as a whole."""
        return self.encoder.backbone
