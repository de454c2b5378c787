"""Labelled pairs as data sets lay them out: which files belong together, and the maps that their labels are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.files import existing
from zoo_registry import errors

from .folders import AFTER, BEFORE, files_of, find_folder, together
from .palettes import Colour, colours
from .pipelines import ChangeDetection
from .rasters import GEOTIFFS, bad_input, open_raster
from .tiling import Box

#: name, and its files: the earlier image, the later one, labels
Sample = tuple[str, list[Path]]
#: names of the folders of labels
CHANGE = ("GT", "label", "GT_CD", "OUT")
LABEL_BEFORE, LABEL_AFTER = ("GT_T1", "labelA", "label1"), ("GT_T2", "labelB", "label2")


def labelled_pairs(data: Path, kind: str, limit: int | None = None) -> list[Sample]:
    """The labelled pairs of a folder, as data sets lay them out: "binary" and "semantic" changes in a folder for each
    date and each label, "damage" as xBD; at most ``limit``. See ``zoo validate`` for the names of the folders.

    Raises BadArgument for folders and files that are not there."""
    if kind == "damage":
        return _damage(data)[:limit]
    names = (CHANGE,) if kind == "binary" else (LABEL_BEFORE, LABEL_AFTER)
    folders = [find_folder(data, one) for one in (BEFORE, AFTER, *names)]
    folders.append(find_folder(data, ("GT_CD",), needed=False) if kind == "semantic" else None)
    return together([f for f in folders if f is not None], limit)


def _damage(data: Path) -> list[Sample]:
    images = find_folder(data, ("images",))
    labels = find_folder(data, ("masks", "targets"))
    assert images is not None
    assert labels is not None
    pictures, masks = files_of(images), files_of(labels)
    tail = "_target" if labels.name == "targets" else ""
    samples: list[Sample] = []
    for stem in [s for s in pictures if s.split("_")[-2:] == ["pre", "disaster"]]:
        dates = (stem, stem.replace("_pre_disaster", "_post_disaster"))
        files = [*(pictures.get(s) for s in dates), *(masks.get(s + tail) for s in dates)]
        if None in files:
            raise bad_input(f"{data}: {stem} lacks its later image or one of its labels", "data")
        samples.append((stem, [file for file in files if file is not None]))
    if not samples:
        raise bad_input(f"{images} holds no NAME_pre_disaster image", "data")
    return samples


def truth(pipe: ChangeDetection, files: Sequence[Path], box: Box | None = None) -> dict[str, np.ndarray]:
    """The true maps (H, W) int64 of a sample, under the names of the model's outputs; of a window (``box``).

    Land cover is 0 where nothing changed. Raises BadArgument, BadFile and ValueError for labels that are none."""
    if pipe.kind == "binary":
        return {"change": binary(read_label(files[2], box=box))}
    if pipe.kind == "damage":
        return {"building": binary(read_label(files[2], box=box)), "damage": read_label(files[3], box=box)}
    palette = colours(pipe.layers["after"])
    before, after = (read_label(path, palette, box) for path in files[2:4])
    moved = binary(read_label(files[4], box=box)) if len(files) > 4 else ((before > 0) | (after > 0)).astype(np.int64)
    return {"change": moved, "before": before * moved, "after": after * moved}


def read_label(path: Path, palette: Sequence[Colour] | None = None, box: Box | None = None) -> np.ndarray:
    """(H, W) class numbers from a file of one band, or of a label set's colours (``palette``); of a window (``box``).

    Raises BadArgument for a colour that is none of the palette's, BadFile for what cannot be read.
    """
    if path.suffix.lower() in GEOTIFFS:
        with open_raster(path) as file:
            values = file.read(window=None if box is None else _window(box)).transpose(1, 2, 0)
    else:
        try:
            with Image.open(existing(path, "a picture of labels")) as image:
                plain = image.mode in ("L", "P", "RGB", "1") or image.mode.startswith("I")  # 16 bits: class numbers
                values = np.asarray(image if plain else image.convert("RGB"))
        except errors.ZooError:
            raise
        except (OSError, SyntaxError) as error:
            raise errors.BadFile(f"{path} is no picture that can be read ({error})", path=str(path)) from error
        if box is not None:
            values = values[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    values = values if values.ndim == 3 else values[..., None]
    if values.shape[2] < 3:
        return values[..., 0].astype(np.int64)
    if (values[..., :1] == values[..., :3]).all() and not palette:
        return values[..., 0].astype(np.int64)
    if not palette:
        raise bad_input(f"{path} is a colour image; expected one band of class numbers", "data")
    codes = (values[..., :3].astype(np.int64) * np.array([65536, 256, 1])).sum(-1)
    known = {r * 65536 + g * 256 + b: i for i, (r, g, b) in enumerate(palette)}
    known.setdefault(0xFFFFFF, 0)  # SECOND and others draw "unchanged" in white
    result = np.full(codes.shape, -1, np.int64)
    for code, index in known.items():
        result[codes == code] = index
    if (result < 0).any():
        code = int(codes[result < 0][0])
        raise bad_input(
            f"{path} holds the colour {(code >> 16, code >> 8 & 255, code & 255)}, which is no class of the label set; "
            f"expected class numbers or {', '.join(map(str, palette))}",
            "data",
        )
    return result


def _window(box: Box) -> Any:
    from rasterio.windows import Window

    top, left, height, width = box
    return Window(left, top, width, height)


def binary(values: np.ndarray) -> np.ndarray:
    """A change label in 0 and 1, or 0 and 255, as 0 and 1. Raises ValueError for other values."""
    found = set(np.unique(values).tolist())
    if not (found <= {0, 1} or found <= {0, 255}):
        raise ValueError(f"the change label holds {sorted(found)[:5]}; expected 0 and 1, or 0 and 255")
    return (values > 0).astype(np.int64)
