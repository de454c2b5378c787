"""Pictures from the files that people have: any format, upright, grey or colour.

Two readings, which differ in greys of more than 8 bits: :func:`open_image` for networks that say what is to be seen
stretches them to their own range; :func:`read_picture`, for those that work on the picture itself, keeps their shades.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo_registry import errors, optional

from .files import existing, unreadable

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(source: Any, channels: int) -> Image.Image:
    """A path, PIL image or array as a PIL image of 1 or 3 channels, upright as its EXIF data says.

    Arrays: uint8, (height, width) or (height, width, 1, 3 or 4). Greys of 16 bits and of floats are stretched to 8 bits
    by their own range (of finite values: others become black); transparent parts become white. Raises BadArgument for
    what is no picture, MissingExtra without Pillow.
    """
    Image, ImageOps = _pillow()
    if isinstance(source, np.ndarray):
        if source.ndim == 3 and source.shape[2] == 1:
            source = source[:, :, 0]
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise errors.BadArgument(
                f"an array of {source.dtype} and shape {source.shape} was given; expected uint8, (height, width) or "
                "(height, width, 3 or 4)",
                argument="inputs",
                accepted=[],
            )
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    elif isinstance(source, (str, Path)):
        try:
            image = Image.open(source)
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # ValueError: a broken PPM
            raise errors.BadArgument(
                f"{source} is not an image that can be read ({error}); expected {', '.join(EXTENSIONS)}",
                argument="inputs",
                accepted=[],
            ) from error
    else:
        raise errors.BadArgument(
            f"a {type(source).__name__} was given; expected a file, a PIL image, an array or a tensor",
            argument="inputs",
            accepted=[],
        )
    if not all(image.size):
        raise errors.BadArgument(
            f"a picture of {image.width} x {image.height} pixels was given; expected one or more each way",
            argument="inputs",
            accepted=[],
        )
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit and float greys: stretch their own range to 8 bits
        values = np.asarray(image, dtype=np.float64)
        real = np.isfinite(values)
        if not real.any():
            raise errors.BadArgument("the picture holds no finite value", argument="inputs", accepted=[])
        low, high = float(values[real].min()), float(values[real].max())
        values = np.where(real, values, low)
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        solid = Image.new("RGBA", image.size, (255, 255, 255, 255))
        solid.alpha_composite(image.convert("RGBA"))
        image = solid
    if image.mode == "LAB":  # Pillow makes no grey of it in one step
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def read_picture(source: Any) -> Any:
    """A ``PIL.Image`` in RGB, upright, from a file, an image, or an array of bytes (height, width[, 3 or 4]).

    Greys of 16 bits keep their shades (Pillow alone would make nearly all of them white). Raises BadFile for a file
    that is no picture, and for one of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` allows; ValueError for other
    objects.
    """
    Image, ImageOps = _pillow()
    if isinstance(source, Image.Image):
        return _rgb(ImageOps.exif_transpose(source), "the picture")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or not (source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))):
            raise ValueError(
                f"a picture is an array of {source.dtype} and shape {source.shape}; expected uint8, (height, width) or "
                "(height, width, 3 or 4)"
            )
        return Image.fromarray(source).convert("RGB")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"a picture is given as {type(source).__name__}; expected a file, a PIL image or an array")
    path = existing(source, "a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _rgb(ImageOps.exif_transpose(image), str(path))
    except errors.ZooError:  # a ValueError, with a sentence of its own
        raise
    except PermissionError as error:
        raise unreadable(path, error) from error
    except Image.DecompressionBombError as error:
        raise errors.BadFile(
            f"{path} has too many pixels: {error} PIL.Image.MAX_IMAGE_PIXELS raises the limit", path=str(path)
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's own is an OSError; a broken PNG is a SyntaxError
        raise errors.BadFile(
            f"{path} is no picture that can be read ({error}); expected png, jpg, webp, bmp, tif ...", path=str(path)
        ) from error


def _rgb(image: Any, name: str) -> Any:
    """RGB of 8 bits. Raises BadFile for greys whose range says nothing about what is white."""
    Image, _ = _pillow()
    if image.mode == "F":
        raise errors.BadFile(f"{name} holds floating-point numbers; expected 8 or 16 bits a channel", path=name)
    if image.mode.startswith("I"):  # 16 bits; older releases of Pillow read them as 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise errors.BadFile(f"{name} has values outside 0 to 65535; expected 8 or 16 bits a channel", path=name)
        image = Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def _pillow() -> tuple[Any, Any]:
    """PIL's modules Image and ImageOps."""
    what = "reading a picture"
    return optional("PIL.Image", what, "pillow"), optional("PIL.ImageOps", what, "pillow")
