"""NIfTI files in, label maps in the same space out. Not for clinical use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from .sliding_window import sliding_window

#: colours of the labels in pictures, repeated when there are more
COLOURS = ((230, 60, 60), (60, 160, 230), (80, 190, 90), (240, 180, 40), (170, 90, 210), (60, 200, 190), (240, 130, 60))


@dataclass
class Scan:
    """One patient's image: ``data`` (channels, x, y, z) in RAS, and what leads back to the file's own axes."""

    data: np.ndarray
    spacing: tuple[float, float, float]  #: mm, of the RAS axes
    affine: np.ndarray  #: of the file
    orientation: np.ndarray  #: nibabel's, from the file's axes to RAS
    shape: tuple[int, ...]  #: of the file


@dataclass(kw_only=True)
class Segmentation(Result):
    """A label for every voxel, in the input's own space. For research; not for clinical use."""

    volumes_ml: dict[str, float] = field(default_factory=dict)  #: millilitres of every label but the background
    labels: np.ndarray | None = field(default=None, repr=False)  #: uint8 or uint16, in the file's own axes
    affine: np.ndarray | None = field(default=None, repr=False)
    image: np.ndarray | None = field(default=None, repr=False)  #: first channel, in the file's own axes
    spacing: tuple[float, ...] = ()  #: mm, of the file's axes

    def summary(self) -> str:
        return ", ".join(f"{name} {ml:.1f} ml" for name, ml in self.volumes_ml.items()) or "background only"

    def save(self, path: str | Path) -> Path:
        """Write the label map as NIfTI (.nii or .nii.gz) with the input's affine."""
        import nibabel

        if not str(path).endswith((".nii", ".nii.gz")):
            raise ValueError(f"{path}: a label map is written as .nii or .nii.gz")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(self.labels, self.affine), str(path))
        return path

    def picture(self, slices: int = 9) -> Image.Image:
        """A montage of slices along the last axis (those that hold labels, where there are any), labels in colour."""
        assert self.labels is not None
        assert self.image is not None
        holding = np.flatnonzero((self.labels > 0).any(axis=(0, 1)))
        if len(holding) == 0:
            holding = np.arange(self.labels.shape[2])
        chosen = holding[np.linspace(0, len(holding) - 1, min(slices, len(holding))).round().astype(int)]
        low, high = np.percentile(self.image, (1, 99))
        grey = np.clip((self.image - low) / max(high - low, 1e-6), 0, 1) * 255
        columns = int(np.ceil(np.sqrt(len(chosen))))
        rows = -(-len(chosen) // columns)
        width, height = self.labels.shape[:2]
        sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
        for i, z in enumerate(chosen):
            tile = np.repeat(grey[:, :, z].T[::-1, :, None], 3, axis=2)
            label = self.labels[:, :, z].T[::-1]
            for value in np.unique(label[label > 0]):
                colour = np.array(COLOURS[(int(value) - 1) % len(COLOURS)], float)
                tile[label == value] = 0.5 * tile[label == value] + 0.5 * colour
            r, c = divmod(i, columns)
            sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = tile.astype(np.uint8)
        return Image.fromarray(sheet)


def read_scan(source: str | Path | Sequence[str | Path], channels: Sequence[int]) -> Scan:
    """One NIfTI file (3 axes, or 4 with the channels last), or one for each channel, all on one grid."""
    import nibabel

    paths = [Path(source)] if isinstance(source, (str, Path)) else [Path(p) for p in source]
    parts: list[np.ndarray] = []
    first, affine = None, np.eye(4)
    for path in paths:
        if not path.is_file():
            raise errors.LocalFileMissing(f"there is no file {str(path)!r}", path=str(path))
        try:
            image = nibabel.load(str(path))
            data = np.asarray(image.dataobj, dtype=np.float32)  # type: ignore[attr-defined]
        except Exception as error:
            raise ValueError(
                f"{path}: cannot be read as NIfTI; is the file truncated or of another kind? ({error})"
            ) from error
        grid = np.asarray(image.affine)  # type: ignore[attr-defined]
        if data.ndim == 2:
            data = data[:, :, None]
        if data.ndim not in (3, 4):
            raise ValueError(f"{path}: {data.ndim} axes of shape {data.shape}; expected 3, or 4 with the channels last")
        if not np.isfinite(data).all():
            raise ValueError(f"{path}: holds values that are not finite; repair the file first")
        if first is None:
            first, affine = path, grid
        elif data.shape[:3] != parts[0].shape[1:] or not np.allclose(grid, affine, atol=1e-3):
            raise ValueError(f"{path}: lies on another grid than {first}; resample the sequences to one grid first")
        parts.append(data[None] if data.ndim == 3 else np.moveaxis(data, 3, 0))
    stacked = np.concatenate(parts)
    if len(stacked) not in channels:
        raise ValueError(
            f"{', '.join(map(str, paths))}: {len(stacked)} channels, the model takes "
            f"{' or '.join(map(str, channels))}. Give one file for each "
            "channel as a tuple, or one file with a fourth axis"
        )
    orientation = nibabel.orientations.io_orientation(affine)
    data = np.stack([nibabel.orientations.apply_orientation(c, orientation) for c in stacked])
    zooms = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    order = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    spacing = (float(zooms[order[0]]), float(zooms[order[1]]), float(zooms[order[2]]))
    return Scan(data, spacing, affine, orientation, tuple(stacked.shape[1:]))


class MedicalSegmentation(Pipeline):
    """NIfTI volumes to label maps, volumes per label and a montage. For research; not for clinical use.

    Options: ``spacing`` (mm of the RAS axes, that the network was trained on; default: the weights' card's, else the
    file's own); ``patch`` (default: the card's input, padded up to what the network takes); ``overlap``
    of windows; ``mirror``: mean over all flips; ``normalisation``: "z-score" a channel, "none", or (low, high) of
    intensities mapped to 0..1; ``anisotropy``: the largest ratio of spacings accepted without ``spacing``.
    """

    task = "medical-segmentation"
    extensions = (".nii", ".nii.gz")

    def __init__(
        self,
        model: nn.Module,
        spacing: Sequence[float] | None = None,
        patch: Sequence[int] | None = None,
        overlap: float = 0.5,
        mirror: bool | None = None,
        normalisation: str | Sequence[float] | None = None,
        anisotropy: float = 8.0,
    ) -> None:
        super().__init__(model)
        card = self.info.card if self.info is not None else None
        shape = list((card.input.get("shape") if card is not None else None) or [])
        own = getattr(model, "input_size", None) or ([model.img_size] * 3 if hasattr(model, "img_size") else None)
        found = patch or own or self.preprocess.get("patch") or shape[1:]
        if not found or len(found) not in (2, 3):
            raise errors.BadArgument(
                f"patch is {patch}; expected the sides of a window, two or three numbers", argument="patch", accepted=[]
            )
        self.patch = [int(p) for p in found]
        self.channels = list(getattr(model, "accepted_channels", None) or [int(getattr(model, "in_chans", 1))])
        given = spacing if spacing is not None else self.preprocess.get("spacing")
        self.spacing = None if given is None else tuple(float(s) for s in given)
        self.overlap, self.anisotropy = overlap, anisotropy
        self.mirror = bool(self.preprocess.get("mirror", False)) if mirror is None else mirror
        self.normalisation = normalisation or self.preprocess.get("normalisation") or "z-score"

    def read(self, source: Any) -> Scan:
        scan = read_scan(source, self.channels)
        ratio = max(scan.spacing) / min(scan.spacing)
        if self.spacing is None and len(self.patch) == 3 and ratio > self.anisotropy:
            raise ValueError(
                f"{source}: voxels of {' x '.join(f'{s:.2f}' for s in scan.spacing)} mm, {ratio:.1f} times longer in "
                "one axis; give spacing=(x, y, z) in mm that the network was trained on, or a larger anisotropy="
            )
        return scan

    def prepare(self, sample: Scan) -> Tensor:
        from scipy.ndimage import zoom

        data = sample.data
        if self.spacing is not None and len(self.patch) == 3:
            factors = [have / want for have, want in zip(sample.spacing, self.spacing, strict=True)]
            data = np.stack([zoom(c, factors, order=1) for c in data])
        image = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        if self.normalisation == "z-score":
            flat = image.flatten(1)
            image = (image - flat.mean(1).view(-1, 1, 1, 1)) / flat.std(1).clamp(min=1e-6).view(-1, 1, 1, 1)
        elif not isinstance(self.normalisation, str):
            low, high = self.normalisation
            image = ((image - low) / (high - low)).clamp(0, 1)
        elif self.normalisation != "none":
            raise ValueError(f"normalisation is {self.normalisation!r}; expected 'z-score', 'none' or (low, high)")
        return image

    def forward(self, batch: Tensor) -> Tensor:
        """(batch, channels, x, y, z) to class indices (batch, x, y, z)."""
        return torch.stack([self._labels(image) for image in batch])

    def _labels(self, image: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return sliding_window(x, self._scores, self.patch, overlap=self.overlap, mirror=self.mirror)

        if len(self.patch) == 3:
            return _classes(run(image))
        return torch.stack([_classes(run(image[..., z])) for z in range(image.shape[-1])], dim=-1)

    def _scores(self, window: Tensor) -> Tensor:
        output = self.model(window)
        output = output if isinstance(output, Tensor) else output[0]  # deep supervision: full size first
        # one class: the network gives its probability
        return output if output.shape[1] == 1 else output.float().softmax(dim=1)

    def finish(self, output: Tensor, sample: Scan) -> Segmentation:
        import nibabel

        grid = sample.data.shape[1:]
        if tuple(output.shape) != grid:  # back to the file's voxels, labels are not interpolated
            scale = nn.functional.interpolate(output[None, None].float(), size=grid, mode="nearest-exact")
            output = scale[0, 0].round().long()
        kind = np.uint8 if int(output.max()) < 256 else np.uint16
        labels = nibabel.orientations.apply_orientation(output.numpy().astype(kind), _inverse(sample.orientation))
        image = nibabel.orientations.apply_orientation(sample.data[0], _inverse(sample.orientation))
        millilitres = abs(float(np.linalg.det(sample.affine[:3, :3]))) / 1000
        names = self.labels() or []
        values, counts = np.unique(labels[labels > 0], return_counts=True)
        volumes = {
            names[int(v)] if int(v) < len(names) else f"label {int(v)}": float(n) * millilitres
            for v, n in zip(values, counts, strict=True)
        }
        zooms = tuple(float(v) for v in np.sqrt((sample.affine[:3, :3] ** 2).sum(axis=0)))
        return Segmentation(volumes_ml=volumes, labels=labels, affine=sample.affine, image=image, spacing=zooms)


def _inverse(orientation: np.ndarray) -> np.ndarray:
    """From RAS back to the file's axes."""
    import nibabel

    return nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), orientation)


def _classes(scores: Tensor) -> Tensor:
    """(classes, *size) to indices; one class is a probability, cut at 0.5."""
    return (scores[0] > 0.5).long() if scores.shape[0] == 1 else scores.argmax(dim=0)
