"""Decoding of image files: `decode_image` is the only way from a file to pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from samdetr.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
Pixels = Literal["published", "fast"]

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error)


def decode_image(
    path: Path | str,
    *,
    width: int | None = None,
    height: int | None = None,
    max_pixels: int,
    pixels: Pixels = "published",
) -> Tensor:
    """Decode a JPEG, PNG, WEBP or BMP file to RGB, uint8 [3, H, W] (strides may be channels-last).

    ``width`` and ``height`` are the sides that the annotation file states: the EXIF orientation is applied
    or not so that the picture has these sides. Where both ways fit (square pictures, mirrored or turned by
    180 degrees), and where no sides are given, it is applied, as annotation tools and browsers do.
    Transparency is discarded; 16-bit values v become v / 257.

    pixels: "published": PIL decodes; "fast": libjpeg-turbo decodes sound grey and RGB JPEGs to the same pixels (within
    one level, should PIL bring another libjpeg), and PIL the rest, so that PIL alone judges what is damaged.

    Raises:
        DataError: the file is missing, of another format, damaged, larger than ``max_pixels`` pixels
            (found in the header, before the pixels take memory), or has other sides than stated.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: too many pixels to decode ({error}): shrink or remove it") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image file does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not a readable {', '.join(FORMATS)} image: convert or remove it") from error
    except _BROKEN as error:
        raise DataError(f"{path}: cannot be opened as an image ({error}): replace or remove it") from error
    with image:
        return _decode(image, path, width, height, max_pixels, pixels)


def _decode(
    image: Image.Image, path: Path | str, width: int | None, height: int | None, max_pixels: int, pixels: Pixels
) -> Tensor:
    """Decode an opened file of which only the header has been read."""
    if image.width * image.height > max_pixels:
        raise DataError(
            f"{path}: {image.width} x {image.height} pixels are more than data.max_pixels = {max_pixels}: "
            "shrink the image or raise data.max_pixels"
        )
    try:
        orientation = _orientation(image)
        rgb = _decode_turbo(image, path) if pixels == "fast" else None
        if rgb is None:
            image.load()
            rgb = np.array(_to_rgb(image))
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the image is damaged or cut off ({error}): replace or remove it") from error
    if _applies_orientation(rgb.shape[1::-1], orientation, width, height, path):
        rgb = np.array(Image.fromarray(rgb).transpose(_UPRIGHT[orientation]))
    return torch.from_numpy(rgb).permute(2, 0, 1)


def _decode_turbo(image: Image.Image, path: Path | str) -> NDArray[np.uint8] | None:
    """Decode a grey or RGB JPEG to [H, W, 3]; None for other files and where libjpeg warns."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    try:
        rgb: NDArray[np.uint8] = simplejpeg.decode_jpeg(Path(path).read_bytes(), colorspace="RGB", strict=True)
    except ValueError:
        return None
    return rgb if rgb.shape[1::-1] == image.size else None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (as stored) to 8; 1 where EXIF is absent or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _applies_orientation(
    stored: tuple[int, int], orientation: int, width: int | None, height: int | None, path: Path | str
) -> bool:
    """Decide whether to apply the EXIF orientation to a picture of (width, height) = ``stored``."""
    upright = stored[::-1] if orientation in _SWAPS_SIDES else stored
    if width is None or height is None or upright == (width, height):
        return orientation != 1
    if stored == (width, height):
        return False
    turned = f" ({upright[0]} x {upright[1]} upright)" if upright != stored else ""
    raise DataError(
        f"{path}: the image is {stored[0]} x {stored[1]}{turned}, but the annotation file says {width} x "
        f"{height}: correct width and height there, or replace the image"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of the allowed formats to 8-bit RGB."""
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
