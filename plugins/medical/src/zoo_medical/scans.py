"""Scans from the files people have: NIfTI files, folders of DICOM slices and pictures, to voxels and an affine."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from zoo import errors
from zoo.images import EXTENSIONS, read_picture

from . import dicom

NIFTI = (".nii", ".nii.gz")
PICTURES = EXTENSIONS
#: what the units of a NIfTI header are in mm; a header that names none means mm
MILLIMETRES = {"meter": 1000.0, "micron": 0.001}


@dataclass
class Scan:
    """One patient's image on the grid of its file."""

    data: np.ndarray  #: (channels, i, j, k) float32, in the file's own axes
    affine: np.ndarray  #: (4, 4), voxel to mm in RAS
    flat: bool = False  #: a picture: (channels, height, width, 1), whose place in a body nobody knows
    #: the sides (of the first two axes) that it had before it was resized to the network's window; None: it was not
    sides: tuple[int, int] | None = None
    #: how it was brought onto the network's grid: MONAI's record of it, by which label maps find the way back
    steps: list[Any] = field(default_factory=list, repr=False)
    grid: np.ndarray = field(default_factory=lambda: np.eye(4), repr=False)  #: affine of the network's grid

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm, of the file's axes."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))
        return float(x), float(y), float(z)


def read_scan(source: str | Path | Sequence[str | Path], channels: Sequence[int], series: str | None = None) -> Scan:
    """One file or DICOM folder, or one for each channel, all on one grid.

    A picture gives its three colours, or its grey values where the model takes one channel; greys of 16 bits keep their
    values. A NIfTI file has 3 axes, or 4 with the channels last (5 where ITK wrote the channels behind an empty time
    axis).
    ``channels``: the numbers that the model takes. ``series``: see :func:`zoo_medical.dicom.read_series`. Raises
    ``LocalFileMissing``, or BadFile, which is a ValueError that names the file and what is wrong with it.
    """
    given: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
    if not given or not all(isinstance(one, (str, Path)) for one in given):
        raise errors.BadArgument(
            f"{' + '.join(type(one).__name__ for one in given) or 'no file'} was given; expected the path of a scan, "
            "or a tuple of paths, one for each channel",
            argument="inputs", accepted=[],
        )  # fmt: skip
    paths = [Path(one).expanduser() for one in given]
    parts: list[np.ndarray] = []
    affine = np.eye(4)
    for path in paths:
        data, grid = _read_picture(path, channels) if is_picture(path) else _read(path, series)
        if not np.isfinite(data).all():
            raise dicom.bad_file(f"{path}: holds values that are not finite; repair the file first")
        if not parts:
            affine = grid
        elif data.shape[1:] != parts[0].shape[1:] or not np.allclose(grid, affine, atol=1e-3):
            raise dicom.bad_file(
                f"{path}: lies on another grid than {paths[0]}; resample the sequences to one grid first"
            )
        parts.append(data)
    stacked = np.concatenate(parts)
    if len(stacked) not in channels:
        raise dicom.bad_file(
            f"{', '.join(map(str, paths))}: {len(stacked)} channels, the model takes "
            f"{' or '.join(map(str, channels))}. Give one file for each channel as a tuple, or one file with a fourth "
            "axis"
        )
    return Scan(stacked, affine, flat=is_picture(paths[0]))


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURES


def _read_picture(path: Path, channels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(channels, height, width, 1) and an affine that says nothing."""
    image = read_picture(path) if _depth(path) == 8 else None
    if image is None:
        try:
            with Image.open(path) as grey:
                values = np.asarray(ImageOps.exif_transpose(grey), np.float32)
        except OSError as error:
            raise dicom.bad_file(f"{path}: is no picture that can be read ({error})") from error
        values = np.repeat(values[..., None], 3 if 3 in channels else 1, axis=2)
    else:
        values = np.asarray(image if 3 in channels else image.convert("L"), np.float32).reshape(*image.size[::-1], -1)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[..., None]), np.eye(4)


def _depth(path: Path) -> int:
    """8, or 16 for greys of more bits; 8 where the file is none, which reading it will say."""
    try:
        with Image.open(path) as image:
            return 16 if image.mode.startswith(("I", "F")) else 8
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return 8


def _read(path: Path, series: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(channels, i, j, k) and the affine."""
    if path.is_dir():
        voxels, affine = dicom.read_series(path, series)
        return voxels[None], affine
    if not path.is_file():
        raise errors.LocalFileMissing(f"there is no file {str(path)!r}", path=str(path))
    if dicom.is_dicom(path):
        raise dicom.bad_file(f"{path}: is one slice of a DICOM series; give the folder that holds the series")
    return read_nifti(path)


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(channels, i, j, k) float32 and the (4, 4) affine to mm. Raises BadFile."""
    import nibabel

    bad = (OSError, EOFError, ValueError, TypeError, zlib.error, nibabel.filebasedimages.ImageFileError,
           nibabel.spatialimages.HeaderDataError)  # fmt: skip
    try:
        image = nibabel.load(str(path))
        kind = image.get_data_dtype()  # type: ignore[attr-defined]
        if kind.kind not in "uif":
            raise dicom.bad_file(f"{path}: holds voxels of {kind}; expected one number a voxel")
        data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
    except errors.BadFile:
        raise
    except bad as error:
        raise dicom.bad_file(
            f"{path}: cannot be read as NIfTI; is the file truncated or of another kind? ({error})"
        ) from error
    affine = np.asarray(image.affine, dtype=np.float64)  # type: ignore[attr-defined]
    units = getattr(image.header, "get_xyzt_units", lambda: ("mm", "sec"))()[0]
    affine[:3] *= MILLIMETRES.get(units, 1.0)
    if data.ndim == 5 and data.shape[3] == 1:
        data = data[:, :, :, 0]
    if data.ndim not in (2, 3, 4):
        raise dicom.bad_file(f"{path}: {data.ndim} axes of shape {data.shape}; expected 3, or 4 with the channels last")
    if 0 in data.shape or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise dicom.bad_file(f"{path}: shape {data.shape} with voxels of no volume; the header is broken")
    if data.ndim == 2:
        data = data[:, :, None]
    return (data[None] if data.ndim == 3 else np.ascontiguousarray(np.moveaxis(data, 3, 0))), affine
