"""Image files to arrays and back without losing what they hold: 16 bits, transparency, colour profile, orientation.

Pillow reads and writes; colour of 16 bits a channel, which it reduces to 8, goes through GDAL (rasterio).
"""

from __future__ import annotations

import base64
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from zoo.files import existing, refused, whole
from zoo_registry import optional

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
DEEP = (".png", ".tif", ".tiff")
NO_ALPHA = (".jpg", ".jpeg", ".bmp")
#: EXIF orientation -> what turns the stored array (height, width, ...) upright
UPRIGHT = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@dataclass(frozen=True)
class Picture:
    """An image, upright. ``colours`` (height, width, 3) or, of a grey image, (height, width, 1), float32 from 0 to 1;
    ``alpha`` (height, width) likewise, or None; ``bits`` of a channel in the file, 8 or 16; ``profile``: ICC."""

    colours: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    profile: bytes | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as Pillow and people say it."""
        return self.colours.shape[1], self.colours.shape[0]

    @property
    def grey(self) -> bool:
        return self.colours.shape[2] == 1

    def pixels(self, bits: int | None = None) -> np.ndarray:
        """(height, width, channels) uint8 or uint16, alpha last; values rounded and clipped."""
        bits = self.bits if bits is None else bits
        parts = [self.colours] if self.alpha is None else [self.colours, self.alpha[..., None]]
        top = (1 << bits) - 1
        whole = np.concatenate(parts, axis=2, dtype=np.float64)
        return np.clip(np.rint(whole * top), 0, top).astype(np.uint8 if bits == 8 else np.uint16)

    def pillow(self) -> Image.Image:
        """As an image of 8 bits: L, LA, RGB or RGBA."""
        pixels = self.pixels(8)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def read_picture(source: Any) -> Picture:
    """A file, a ``PIL.Image`` or an array (height, width[, 1 to 4 channels]) of uint8 or uint16.

    Palettes, CMYK and others become RGB. Raises ValueError that says what is wrong, BadFile where a file is at fault,
    LocalFileMissing where there is none.
    """
    if isinstance(source, np.ndarray):
        return from_pixels(source)
    if isinstance(source, Image.Image):
        return _from_pillow(source, "the given image")
    if not isinstance(source, (str, Path)):
        raise ValueError(f"a {type(source).__name__} was given; expected a file, a PIL image or an array")
    path = existing(source, "an image")
    with refused(path):
        return _from_file(path)


def _from_file(path: Path) -> Picture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large images are what tiles are for
            image = Image.open(path)
        with image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":
                raise ValueError(f"{path}: holds {frames} frames; save the one that is meant as a file of its own")
            if _is_deep_colour(image, path):
                return _read_deep(path, image)
            image.load()
            return _from_pillow(image, str(path))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; PIL.Image.MAX_IMAGE_PIXELS raises the limit") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); expected {', '.join(EXTENSIONS)}") from error


def from_pixels(pixels: np.ndarray, profile: bytes | None = None) -> Picture:
    """Grey, grey with alpha, RGB or RGBA by the number of channels."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if (
        pixels.dtype not in (np.uint8, np.uint16)
        or pixels.ndim != 3
        or not 1 <= pixels.shape[2] <= 4
        or not pixels.size
    ):
        raise ValueError(
            f"an array of {pixels.dtype} and shape {pixels.shape} was given; expected uint8 or uint16, (height, width) "
            "or (height, width, 1 to 4 channels)"
        )
    bits = pixels.dtype.itemsize * 8
    values = pixels.astype(np.float32) / np.float32((1 << bits) - 1)
    has_alpha = pixels.shape[2] in (2, 4)
    alpha = np.ascontiguousarray(values[..., -1]) if has_alpha else None
    return Picture(np.ascontiguousarray(values[..., :-1] if has_alpha else values), alpha, bits, profile)


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(0x0112, 1) or 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return UPRIGHT[orientation](pixels) if orientation in UPRIGHT else pixels


def _from_pillow(image: Image.Image, name: str) -> Picture:
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    if image.mode.startswith("I"):  # grey, 16 bits (older Pillow: as 32)
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{name}: has values outside 0 .. 65535; expected 8 or 16 bits a channel")
        return from_pixels(_upright(pixels.astype(np.uint16), orientation), profile)
    if image.mode == "F":
        raise ValueError(f"{name}: holds floating-point numbers; expected 8 or 16 bits a channel")
    wanted = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr"):
        profile = None  # belongs to the colours that were converted
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        wanted = {"L": "LA", "RGB": "RGBA"}[wanted]
        if wanted == "LA":
            image = image.convert("RGBA")  # knows what a transparent value of a grey file is
    return from_pixels(_upright(np.asarray(image.convert(wanted)), orientation), profile)


def _is_deep_colour(image: Image.Image, path: Path) -> bool:
    """Whether the file has several channels of 16 bits."""
    if image.format == "PNG":
        with path.open("rb") as file:
            header = file.read(26)
        return header[24] == 16 and header[25] != 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
        return len(bits) > 1 and bits[0] == 16
    return False


def _rasterio() -> Any:
    return optional("rasterio", "colour of 16 bits a channel", "ssm-zoo-restoration[deep]")


def _read_deep(path: Path, image: Image.Image) -> Picture:
    rasterio = _rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as file:
                pixels = file.read()
        except rasterio.errors.RasterioError as error:
            raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if pixels.dtype != np.uint16 or not 1 <= len(pixels) <= 4:
        raise ValueError(
            f"{path}: has {len(pixels)} channels of {pixels.dtype}; expected grey or RGB, with or without alpha, of 8 "
            "or 16 bits"
        )
    upright = _upright(np.moveaxis(pixels, 0, -1), _orientation(image))
    return from_pixels(upright, image.info.get("icc_profile"))


def write_picture(picture: Picture, path: str | Path, *, quality: int = 95) -> Path:
    """Write by the path's ending: PNG and TIFF (compressed without loss) with 8 or 16 bits as ``picture.bits`` says,
    others with 8. ``quality``: of JPEG and WebP. The file appears whole or not at all.

    Raises ValueError for an unknown ending, and for transparency in a format that has none.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in EXTENSIONS:
        raise ValueError(f"{path}: an image is written as {', '.join(EXTENSIONS)}")
    if picture.alpha is not None and ending in NO_ALPHA:
        raise ValueError(f"{path}: the image has transparency, which {ending} cannot hold; write .png, .tif or .webp")
    with whole(path) as part:
        if picture.bits == 16 and ending in DEEP:
            _write_deep(picture, part, ending)
        else:
            options: dict[str, Any] = {} if picture.profile is None else {"icc_profile": picture.profile}
            if ending in (".tif", ".tiff"):
                options["compression"] = "tiff_adobe_deflate"
            elif ending in (".jpg", ".jpeg", ".webp"):
                options["quality"] = quality
            replace(picture, bits=8).pillow().save(part, **options)
    return path


def _write_deep(picture: Picture, path: Path, ending: str) -> None:
    pixels = picture.pixels(16)
    if pixels.shape[2] == 1:
        options: dict[str, Any] = {} if picture.profile is None else {"icc_profile": picture.profile}
        if ending != ".png":
            options["compression"] = "tiff_adobe_deflate"
        Image.fromarray(pixels[..., 0]).save(path, **options)
        return
    rasterio = _rasterio()
    if ending != ".png" and pixels.shape[2] == 2:  # Pillow and others do not read such a TIFF: as colours
        pixels = np.concatenate([np.repeat(pixels[..., :1], 3, axis=2), pixels[..., 1:]], axis=2)
    height, width, channels = pixels.shape
    options = {"driver": "PNG"}
    if ending != ".png":
        options = {"driver": "GTiff", "compress": "deflate", "predictor": 2, "interleave": "pixel"}
        options["photometric"] = "rgb"
        if channels == 4:
            options["alpha"] = "unspecified"
    if picture.profile is not None:
        options["source_icc_profile"] = base64.b64encode(picture.profile).decode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", width=width, height=height, count=channels, dtype="uint16", **options) as file:
            file.write(np.moveaxis(pixels, -1, 0))
