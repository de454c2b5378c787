"""DICOM series: a folder of slices to one volume and its place in the patient. Needs the extra ``dicom`` (pydicom)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zoo import errors
from zoo_registry import optional

#: what places a slice, and what tells series apart
_HEADER = (
    "SeriesInstanceUID", "SeriesDescription", "Modality", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames",
    "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness",
)  # fmt: skip
#: mm and cosines that may differ between the slices of one series
_TOLERANCE = 1e-2


def bad_file(message: str) -> errors.BadFile:
    """The error for a file of the user's that does not fit; the message names it."""
    return errors.BadFile(message)


def _pydicom() -> Any:
    return optional("pydicom", "reading DICOM", "ssm-zoo-medical[dicom]")


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do: "DICM" behind 128 bytes."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether any file in ``folder`` or below is DICOM."""
    return any(is_dicom(p) for p in folder.rglob("*") if p.is_file())


def read_series(folder: str | Path, series: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (column, row, slice) float32, rescaled as the files say, and the (4, 4) affine to mm in RAS.

    ``series``: the SeriesInstanceUID, or the description, of the one to read where the folder holds several.
    Slices are ordered by their place, whatever the files are called. Raises BadFile, naming what is wrong, for no or
    several series, slices without a place, of different sizes or directions, missing or doubled slices, a tilted
    gantry, colour, several frames in a file, and files that are cut short.
    """
    slices = _one_series(Path(folder), series)
    first_path, first = slices[0]
    for path, header in slices:
        _check_slice(path, header)
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise bad_file(
                f"{path}: {header.Columns} x {header.Rows} pixels, but {first_path.name} of the same series has "
                f"{first.Columns} x {first.Rows}"
            )
        for tag in ("ImageOrientationPatient", "PixelSpacing"):
            if not np.allclose(header[tag].value, first[tag].value, atol=_TOLERANCE):
                raise bad_file(f"{path}: its {tag} differs from that of {first_path.name}, in the same series")
    across, down = (np.array(first.ImageOrientationPatient[i : i + 3], float) for i in (0, 3))
    normal = np.cross(across, down)
    slices.sort(key=lambda one: float(np.dot(normal, one[1].ImagePositionPatient)))
    between = _slice_step(slices, normal)
    affine = np.eye(4)
    affine[:3, 0] = across * float(first.PixelSpacing[1])
    affine[:3, 1] = down * float(first.PixelSpacing[0])
    affine[:3, 2] = between
    affine[:3, 3] = np.array(slices[0][1].ImagePositionPatient, float)
    affine[:2] *= -1  # DICOM's axes run to the left and to the back, NIfTI's to the right and to the front
    voxels = np.stack([_pixels(path).T for path, _ in slices], axis=-1)
    return np.ascontiguousarray(voxels, dtype=np.float32), affine


def _one_series(folder: Path, series: str | None) -> list[tuple[Path, Any]]:
    """Paths and headers of the images of the series that was asked for, or of the only one."""
    pydicom = _pydicom()
    if not folder.is_dir():
        raise errors.LocalFileMissing(f"there is no folder {str(folder)!r}", path=str(folder))
    found: dict[str, list[tuple[Path, Any]]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not is_dicom(path):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER))
        except (OSError, EOFError, ValueError, KeyError, pydicom.errors.InvalidDicomError) as error:
            raise bad_file(f"{path}: cannot be read as DICOM; is the file truncated? ({error})") from error
        if "Rows" in header and "SeriesInstanceUID" in header:  # else an index, a report, a plan
            found.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    if not found:
        raise bad_file(f"{folder}: holds no DICOM images")
    names = {uid: str(slices[0][1].get("SeriesDescription", "")) for uid, slices in found.items()}
    wanted = [uid for uid in found if series in (uid, names[uid])] if series is not None else list(found)
    if len(wanted) != 1:
        listing = "; ".join(
            f"{uid} ({found[uid][0][1].get('Modality', '?')} {names[uid]!r}, {len(found[uid])} files)" for uid in found
        )
        asked = f"{len(wanted)} series are called {series!r}" if series is not None else f"{len(found)} series"
        raise bad_file(f"{folder}: {asked}; give series= one of these UIDs or descriptions: {listing}")
    return found[wanted[0]]


def _check_slice(path: Path, header: Any) -> None:
    for tag in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        if header.get(tag) is None:
            raise bad_file(f"{path}: has no {tag}, so its place is not known; convert the series with dcm2niix")
    if int(header.get("NumberOfFrames") or 1) != 1:
        raise bad_file(f"{path}: holds {header.NumberOfFrames} frames; convert enhanced DICOM with dcm2niix")
    if int(header.get("SamplesPerPixel") or 1) != 1:
        raise bad_file(f"{path}: is a colour image; expected one grey value a pixel")


def _slice_step(slices: list[tuple[Path, Any]], normal: np.ndarray) -> np.ndarray:
    """mm from one slice to the next."""
    if len(slices) == 1:
        path, header = slices[0]
        if not header.get("SliceThickness"):
            raise bad_file(f"{path}: one slice without a SliceThickness; its third voxel size is not known")
        return normal * float(header.SliceThickness)
    places = np.array([header.ImagePositionPatient for _, header in slices], float)
    steps = np.diff(places @ normal)
    usual = float(np.median(steps))
    if usual < _TOLERANCE or steps.min() < _TOLERANCE:
        i = int(steps.argmin())
        raise bad_file(
            f"{slices[i][0]} and {slices[i + 1][0].name} lie at the same place: are these several time points or "
            "echoes in one series? Put one of them into a folder of its own"
        )
    if steps.max() - usual > max(_TOLERANCE, 0.02 * usual) or usual - steps.min() > max(_TOLERANCE, 0.02 * usual):
        i = int(np.abs(steps - usual).argmax())
        raise bad_file(
            f"{slices[i][0].name} and {slices[i + 1][0].name} are {steps[i]:.2f} mm apart, the others {usual:.2f} mm: "
            "slices are missing"
        )
    step = (places[-1] - places[0]) / (len(places) - 1)
    if np.linalg.norm(np.cross(step / np.linalg.norm(step), normal)) > 0.01:
        raise bad_file(f"{slices[0][0].parent}: the gantry was tilted, slices are sheared; convert with dcm2niix")
    return step


def _pixels(path: Path) -> np.ndarray:
    """(rows, columns) in the file's physical units (Hounsfield for CT)."""
    pydicom = _pydicom()
    try:
        data = pydicom.dcmread(path)
        return np.asarray(pydicom.pixels.apply_modality_lut(data.pixel_array, data), dtype=np.float32)
    except (OSError, EOFError, ValueError, KeyError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise bad_file(
            f"{path}: its pixels cannot be read; is the file truncated, or compressed in a way that needs one of "
            f"pydicom's decoders? ({error})"
        ) from error
