"""Pictures from the files that people have: any format, upright, grey or colour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo_registry import errors, optional

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(source: Any, channels: int) -> Image.Image:
    """A path, PIL image or array as a PIL image of 1 or 3 channels, upright as its EXIF data says.

    Arrays: uint8, (height, width) or (height, width, 3). Greys of 16 bits and of floats are stretched to 8 bits by
    their own range; transparent parts become white. Raises BadArgument for what is no picture, MissingExtra without
    Pillow.
    """
    Image: Any = optional("PIL.Image", "reading a picture", "pillow")
    ImageOps: Any = optional("PIL.ImageOps", "reading a picture", "pillow")
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise errors.BadArgument(
                f"an array of {source.dtype} and shape {source.shape} was given; expected uint8, (height, width) or "
                "(height, width, 3)",
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
        except OSError as error:
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
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit and float greys: stretch their own range to 8 bits
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        image = Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        solid = Image.new("RGBA", image.size, (255, 255, 255, 255))
        solid.alpha_composite(image.convert("RGBA"))
        image = solid
    return image.convert("L" if channels == 1 else "RGB")
