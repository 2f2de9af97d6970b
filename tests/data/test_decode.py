"""Decoding: modes, orientation, damaged and oversized files, through PIL and past it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samdetr.data import decode
from samdetr.data.decode import decode_image
from samdetr.errors import DataError

LIMIT = 64_000_000
WIDTH, HEIGHT = 24, 16
MODE = {"pixels": "published"}


@pytest.fixture(params=["published", "fast"], autouse=True)
def pixels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test here runs both ways."""
    monkeypatch.setitem(MODE, "pixels", request.param)
    return request.param


STORED = {  # upright pixels -> pixels as stored, from the definition of the EXIF orientation
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Black with a white object in the top left corner; no symmetry. uint8 [height, width, 3]."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[2:6, 3:10] = 255
    return pixels


def decoded(path: Path, **sides: int) -> np.ndarray:
    return decode_image(path, max_pixels=LIMIT, **MODE, **sides).permute(1, 2, 0).numpy()


def save_oriented(path: Path, upright: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    stored.save(path, exif=exif, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("stated", ["upright", "raw", "absent"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_follows_the_stated_size(tmp_path: Path, orientation: int, stated: str, suffix: str) -> None:
    path, upright = tmp_path / f"a{suffix}", picture()
    save_oriented(path, upright, orientation)
    raw = STORED[orientation](upright)
    want = upright
    sides = {"width": WIDTH, "height": HEIGHT}
    if stated == "raw":
        sides = {"width": raw.shape[1], "height": raw.shape[0]}
        # Orientations 2 to 4 keep the sides: the file cannot say which was meant, and upright is the rule.
        want = raw if orientation >= 5 else upright
    got = decoded(path, **({} if stated == "absent" else sides))
    assert got.shape == want.shape
    assert ((got > 127) == (want > 127)).mean() > 0.98


@pytest.mark.parametrize("orientation", range(1, 9))
def test_square_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    upright = picture(20, 20)
    save_oriented(tmp_path / "a.png", upright, orientation)
    assert np.array_equal(decoded(tmp_path / "a.png", width=20, height=20), upright)


def test_other_sides_are_an_error(tmp_path: Path) -> None:
    save_oriented(tmp_path / "a.png", picture(), 6)
    with pytest.raises(DataError, match=r"a\.png: the image is 16 x 24 \(24 x 16 upright\).*says 24 x 17"):
        decoded(tmp_path / "a.png", width=24, height=17)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_nonsense_exif_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", quality=95)
    assert decoded(tmp_path / "a.jpg", width=WIDTH, height=HEIGHT).shape == (HEIGHT, WIDTH, 3)


def random_rgb() -> Image.Image:
    smooth = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, ".png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [(mode, ".jpg") for mode in ("L", "RGB", "CMYK")]
    + [("RGB", ".webp"), ("RGBA", ".webp"), ("RGB", ".bmp"), ("P", ".bmp")],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    random_rgb().convert(mode).save(path)
    with Image.open(path) as image:
        want = np.asarray(image.convert("RGB")).astype(int)
    got = decoded(path)
    assert got.dtype == np.uint8 and got.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(got.astype(int) - want).max() <= 2


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_palette_with_transparency_keeps_its_colours(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 250, 1, 2, 3])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert decoded(tmp_path / "a.png").tolist() == [[[200, 10, 20], [30, 40, 250]]]


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None) -> bytes:
    """A PNG from its parts; without ``rows`` it ends after the header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_scaled(tmp_path: Path, colour: int, channels: int) -> None:
    values = np.array([0, 128, 129, 255, 256, 30000, 32768, 65279, 65535])
    samples = np.repeat(values[:, None], channels, axis=1)
    rows = b"\x00" + samples.astype(">u2").tobytes()
    (tmp_path / "a.png").write_bytes(png(len(values), 1, 16, colour, rows))
    got = decoded(tmp_path / "a.png")[0].astype(float)
    assert np.abs(got - values[:, None] / 257).max() <= 1


@pytest.mark.parametrize("share", [0.5, 0.95, 0.02])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_cut_off_files_are_named(tmp_path: Path, suffix: str, share: float) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    with pytest.raises(DataError, match=rf"^{path}: "):
        decoded(path)


def test_random_damage_raises_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    errors = 0
    for suffix in (".jpg", ".png", ".webp", ".bmp"):
        save = tmp_path / f"a{suffix}"
        random_rgb().save(save)
        original = save.read_bytes()
        for _ in range(60):
            damaged = bytearray(original)
            for place in rng.integers(0, len(original), 4):
                damaged[place] = rng.integers(256)
            save.write_bytes(bytes(damaged))
            try:
                decoded(save)
            except DataError:
                errors += 1
    assert errors > 60


def test_missing_foreign_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jpg: the image file does not exist"):
        decoded(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    random_rgb().save(tmp_path / "gif.jpg", "GIF")
    (tmp_path / "empty.png").touch()
    for name in ("text.jpg", "gif.jpg", "empty.png"):
        with pytest.raises(DataError, match=rf"{name}: not a readable JPEG, PNG, WEBP, BMP"):
            decoded(tmp_path / name)
    with pytest.raises(DataError, match="cannot be opened"):
        decoded(tmp_path)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("side", [8001, 10_000, 20_000, 60_000])
def test_bombs_are_refused_from_the_header(tmp_path: Path, side: int) -> None:
    # There are no pixels after the header: any attempt to decode would call the file cut off.
    (tmp_path / "bomb.png").write_bytes(png(side, side, 8, 2, None))
    with pytest.raises(DataError, match=r"bomb\.png.*pixels.*shrink"):
        decoded(tmp_path / "bomb.png")


def test_limit_is_inclusive(tmp_path: Path) -> None:
    random_rgb().save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", max_pixels=WIDTH * HEIGHT, **MODE).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"data\.max_pixels = 383"):
        decode_image(tmp_path / "a.png", max_pixels=WIDTH * HEIGHT - 1, **MODE)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 90},
        {"quality": 30, "progressive": True},
        {"quality": 95, "subsampling": 0},
        {"quality": 75, "subsampling": 1},
        {"quality": 90, "restart_marker_blocks": 3},
    ],
    ids=lambda options: " ".join(options),
)
def test_fast_pixels_are_those_of_pil(tmp_path: Path, mode: str, options: dict) -> None:
    """Equal with the libjpeg-turbo that PIL brings today; another one may round otherwise."""
    smooth = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize((131, 77), Image.Resampling.BICUBIC).convert(mode)
    image.save(tmp_path / "a.jpg", **options)
    fast, published = (
        decode_image(tmp_path / "a.jpg", max_pixels=LIMIT, pixels=pixels).int() for pixels in ("fast", "published")
    )
    assert fast.shape == published.shape == (3, 77, 131)
    assert (fast - published).abs().max() <= 1
    assert (fast - published).abs().float().mean() <= 0.02


def test_who_decodes(tmp_path: Path, pixels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound grey and RGB JPEGs do not pass through PIL on the fast path; all others do, and damaged ones."""
    seen: list[str] = []
    through: Callable[[Image.Image], Image.Image] = decode._to_rgb
    monkeypatch.setattr(decode, "_to_rgb", lambda image: seen.append(image.mode) or through(image))
    for mode, name in (("RGB", "rgb.jpg"), ("L", "grey.jpg"), ("CMYK", "cmyk.jpg"), ("RGB", "rgb.png")):
        random_rgb().convert(mode).save(tmp_path / name)
        decoded(tmp_path / name)
    assert seen == (["RGB", "L", "CMYK", "RGB"] if pixels == "published" else ["CMYK", "RGB"])
    seen.clear()
    raw = (tmp_path / "rgb.jpg").read_bytes()
    (tmp_path / "rgb.jpg").write_bytes(raw[:-2] + bytes(9) + raw[-2:])  # libjpeg only warns about these
    decoded(tmp_path / "rgb.jpg")
    assert seen == ["RGB"]
