"""NIfTI files, DICOM series and pictures in, label maps in the same space out. Not for clinical use."""

from __future__ import annotations

import copy
import itertools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.files import check_ending, whole
from zoo.pipelines import Pipeline, Result

from . import dicom
from .label_sets import LABEL_SETS, label_names
from .scans import NIFTI, PICTURES, Scan, read_scan


@dataclass(kw_only=True)
class Segmentation(Result):
    """A label for every voxel, in the input's own space. For research; not for clinical use."""

    volumes_ml: dict[str, float] = field(default_factory=dict)  #: millilitres of every label but the background
    shares: dict[str, float] = field(default_factory=dict)  #: of pictures instead: the part of the pixels of each label
    #: uint8 or uint16, in the file's own axes; of pictures (height, width)
    labels: np.ndarray | None = field(default=None, repr=False)
    affine: np.ndarray | None = field(default=None, repr=False)  #: (4, 4), voxel to mm in RAS
    #: first channel, in the file's own axes; of pictures (channels, height, width)
    image: np.ndarray | None = field(default=None, repr=False)
    flat: bool = field(default=False, repr=False)  #: whether it is of a picture
    names: dict[int, str] = field(default_factory=dict, repr=False)  #: of the labels that were found
    spacing: tuple[float, ...] = ()  #: mm, of the file's axes
    warning: str = "not for clinical use"

    def summary(self) -> str:
        found = [f"{name} {ml:.1f} ml" for name, ml in self.volumes_ml.items()]
        found += [f"{name} {share:.1%}" for name, share in self.shares.items()]
        return ", ".join(found) or "background only"

    @property
    def ending(self) -> str:
        """What the name of a label map ends in."""
        return "_labels.png" if self.flat else ".nii.gz"

    def save(self, path: str | Path) -> Path:
        """Write the label map: of a scan as NIfTI (.nii or .nii.gz) with the input's affine, in mm; of a picture as a
        grey picture of the label numbers (.png)."""
        import nibabel

        assert self.labels is not None
        if self.flat:
            check_ending(path, (".png", ".tif", ".tiff"))
            with whole(path) as work:
                Image.fromarray(self.labels).save(work)
            return Path(path)
        if not str(path).lower().endswith(NIFTI):
            raise errors.BadArgument(
                f"{path}: a label map is written as .nii or .nii.gz", argument="path", accepted=list(NIFTI)
            )
        path = Path(path)
        written = nibabel.Nifti1Image(self.labels, self.affine)
        written.header.set_xyzt_units("mm")
        with whole(path) as work:
            nibabel.save(written, str(work))
        return path

    def picture(self, slices: int = 9) -> Image.Image:
        """A montage of axial slices, or the picture, with the labels in colour; see :mod:`zoo_medical.montage`."""
        from .montage import montage, overlay

        assert self.labels is not None
        assert self.image is not None
        assert self.affine is not None
        if self.flat:
            return overlay(self.image, self.labels, {v: f"{n}: {self.shares[n]:.1%}" for v, n in self.names.items()})
        legend = {value: f"{name}: {self.volumes_ml[name]:.1f} ml" for value, name in self.names.items()}
        return montage(self.image, self.labels, self.affine, legend, slices)


class VolumePipeline(Pipeline):
    """What the tasks of volumes share: files and series to the grid and the intensities that a network reads."""

    extensions = NIFTI

    def __init__(
        self,
        model: nn.Module,
        patch: Sequence[int] | None,
        spacing: Sequence[float] | None,
        orientation: str | None,
        crop: bool | None,
        normalisation: str | Sequence[float] | None,
        anisotropy: float,
        series: str | None,
    ) -> None:
        super().__init__(model)
        card = self.info.card if self.info is not None else None
        shape = list((card.input.get("shape") if card is not None else None) or [])
        own = getattr(model, "input_size", None) or ([model.img_size] * 3 if hasattr(model, "img_size") else None)
        found = patch or own or self.preprocess.get("patch") or shape[1:]
        sides = len(own or shape[1:]) or None  # of the network's input, where that is known
        if not found or len(found) not in (2, 3) or len(found) != (sides or len(found)) or not _whole(found):
            expected = {2: "two numbers", 3: "three numbers"}.get(sides or 0, "two or three numbers")
            raise errors.BadArgument(
                f"patch is {found or patch}; expected the sides of a window, {expected} of at least 1",
                argument="patch", accepted=[],
            )  # fmt: skip
        self.patch = [int(p) for p in found]
        if len(self.patch) == 2:
            self.extensions = NIFTI + PICTURES  # type: ignore[misc, assignment]
        if not anisotropy >= 1:
            raise errors.BadArgument(
                f"anisotropy is {anisotropy}; expected the largest ratio of voxel sides, 1 or more",
                argument="anisotropy", accepted=[],
            )  # fmt: skip
        # what the network was trained on needs no asking
        self.anisotropy, self.series = max(anisotropy, float(self.preprocess.get("anisotropy", 1))), series
        self.channels = list(getattr(model, "accepted_channels", None) or [int(getattr(model, "in_chans", 1))])
        self.spacing = _spacing(spacing if spacing is not None else self.preprocess.get("spacing"))
        self.spacing_asked = spacing is not None
        asked = self.preprocess.get("orientation", "RAS") if orientation == "card" else orientation
        self.orientation = _orientation(asked)
        self.crop = bool(self.preprocess.get("crop", False)) if crop is None else crop
        self.normalise = _normaliser(normalisation or self.preprocess.get("normalisation") or "z-score")
        self.to_grid = self._grid_transforms()

    @property
    def preprocess(self) -> dict[str, Any]:
        """The weights' settings, and for what they leave out those of the model's authors."""
        return dict(getattr(self.model, "preparation", {})) | super().preprocess

    def _grid_transforms(self) -> Any:
        """From the file's grid to the network's; invertible."""
        from monai.transforms import Compose, CropForeground, Orientation, Spacing

        steps: list[Any] = [] if self.orientation is None else [Orientation(axcodes=self.orientation, labels=None)]
        if self.spacing is not None:
            steps.append(Spacing(pixdim=self.spacing, mode="bilinear", padding_mode="border"))
        if self.crop:
            steps.append(CropForeground(select_fn=_not_zero, allow_smaller=True))
        return Compose(steps)

    def _found(self, one: Any) -> tuple[list[Any], bool]:
        """A folder that holds DICOM and no NIfTI files is one input."""
        if isinstance(one, (str, Path)):
            folder = Path(one).expanduser()
            if folder.is_dir() and not any(self._wanted(f) for f in folder.rglob("*")) and dicom.holds_dicom(folder):
                return [folder], True
        return super()._found(one)

    def read(self, source: Any) -> Scan:
        scan = read_scan(source, self.channels, self.series)
        if scan.flat:
            if len(self.patch) == 3 or self.spacing_asked:
                raise errors.BadArgument(
                    f"{source} is a picture; "
                    + ("the model takes volumes" if len(self.patch) == 3 else "spacing= is for scans, leave it out"),
                    argument="inputs", accepted=[],
                )  # fmt: skip
            return scan
        ratio = max(scan.spacing) / min(scan.spacing)
        if not self.spacing_asked and len(self.patch) == 3 and ratio > self.anisotropy:
            raise ValueError(
                f"{source}: voxels of {' x '.join(f'{s:.2f}' for s in scan.spacing)} mm, {ratio:.1f} times longer in "
                f"one axis, where at most {self.anisotropy:g} are read without being asked: most of what the network "
                "sees would be made up between slices. Take thinner slices, or give spacing=(x, y, z) in mm that the "
                "network was trained on, or a larger anisotropy="
            )
        return scan

    def prepare(self, sample: Scan) -> Tensor:
        from monai.data import MetaTensor

        placed = MetaTensor(torch.from_numpy(sample.data), affine=torch.from_numpy(sample.affine))
        if sample.flat:
            return torch.as_tensor(self.normalise(placed)).as_subclass(Tensor).float().contiguous()
        placed = self.to_grid(placed)
        sample.steps, sample.grid = list(placed.applied_operations), placed.affine.numpy()
        return torch.as_tensor(self.normalise(placed)).as_subclass(Tensor).float().contiguous()


class MedicalSegmentation(VolumePipeline):
    """Volumes to label maps, volumes per label and a montage. For research; not for clinical use.

    An input is a NIfTI file, a folder with a DICOM series, for two-dimensional networks also a picture, or a tuple of
    these, one for each channel. It is turned to
    ``orientation``, resampled to ``spacing``, normalised, and read in overlapping windows whose logits are blended
    with Gaussian weights (MONAI's transforms and sliding window). The blended logits go back to the file's own grid,
    and the largest one there is the label.

    Options; the defaults are those of the weights' card. ``spacing``: mm of the axes after orientation, which the
    network was trained on; None keeps the file's. ``orientation``: directions of the axes, "RAS" or another of
    nibabel's codes; None keeps the file's. ``crop``: True reads only the box around what is not zero. ``patch``: sides
    of a window (the card's input). ``overlap`` of windows. ``mirror``: mean over all flips of all axes, or of the given
    ones, as (0, 1). ``normalisation``: "z-score" a channel, "none", "min-max" (the scan's own range mapped to 0..255,
    as VM-UNet reads pictures), or (low, high) of intensities mapped to 0..1. ``fit``: True resizes slices and pictures
    to the window of a two-dimensional network, and its logits back, instead of moving the window over them (VM-UNet).
    ``anisotropy``: the largest ratio of voxel sides that is accepted where ``spacing`` is not given. ``series``: which
    one of a DICOM folder with several. ``window_batch``: windows at a time. ``label_set``: names of the labels,
    background first, or of a set of :data:`zoo_medical.label_sets.LABEL_SETS`. Two-dimensional networks read axial
    slices. A network of one class is read as logits, or as a probability if it says so (``gives_probability``).
    """

    task = "medical-segmentation"

    def __init__(
        self,
        model: nn.Module,
        spacing: Sequence[float] | None = None,
        orientation: str | None = "card",
        crop: bool | None = None,
        patch: Sequence[int] | None = None,
        overlap: float = 0.5,
        mirror: bool | Sequence[int] | None = None,
        normalisation: str | Sequence[float] | None = None,
        anisotropy: float = 8.0,
        series: str | None = None,
        window_batch: int = 1,
        label_set: str | Sequence[str] | None = None,
        fit: bool | None = None,
    ) -> None:
        super().__init__(model, patch, spacing, orientation, crop, normalisation, anisotropy, series)
        self.label_set = None if label_set is None else label_names(label_set)
        if not 0 <= overlap < 1:
            raise errors.BadArgument(
                f"overlap is {overlap}; expected a share of the window, 0 or more and below 1",
                argument="overlap", accepted=[],
            )  # fmt: skip
        if window_batch < 1:
            raise errors.BadArgument(
                f"window_batch is {window_batch}; expected 1 window or more", argument="window_batch", accepted=[]
            )
        self.overlap, self.window_batch = overlap, window_batch
        self.fit = bool(self.preprocess.get("fit", False)) if fit is None else fit
        if self.fit and len(self.patch) == 3:
            raise errors.BadArgument(
                "fit is True; only slices and pictures are resized to a window: give spacing= for volumes",
                argument="fit", accepted=[],
            )  # fmt: skip
        self._check_fit()
        asked = self.preprocess.get("mirror", False) if mirror is None else mirror
        self.flips = _flips(asked, len(self.patch))

    def _check_fit(self) -> None:
        """What the network can be asked that it is known to refuse, or to answer under wrong names."""
        steps = getattr(self.model, "reduction", None) or getattr(self.model, "multiple", None) or 1
        steps = [steps] * len(self.patch) if isinstance(steps, int) else list(steps)
        if any(side % step for side, step in zip(self.patch, steps, strict=True)):
            near = [-(-side // step) * step for side, step in zip(self.patch, steps, strict=True)]
            raise errors.BadArgument(
                f"patch is {self.patch}; {self.name} takes sides that are multiples of {steps}, as {near} (smaller "
                "scans are filled up)",
                argument="patch", accepted=[],
            )  # fmt: skip
        if self.label_set is None:
            return
        count = getattr(self.model, "num_classes", None)
        classes = None if count is None else max(int(count), 2)  # one class has a background, too
        if len(set(self.label_set)) != len(self.label_set) or len(self.label_set) != (classes or len(self.label_set)):
            raise errors.BadArgument(
                f"label_set has {len(self.label_set)} names, {len(set(self.label_set))} of them different; expected "
                f"{'a name of its own' if classes is None else f'{classes} different names, one'} for each label, "
                "background first",
                argument="label_set", accepted=[],
            )  # fmt: skip

    def named_labels(self, name: str) -> list[str] | None:
        return list(LABEL_SETS[name]) if name in LABEL_SETS else None

    def prepare(self, sample: Scan) -> Tensor:
        volume = super().prepare(sample)
        if self.fit:
            sample.sides = (volume.shape[1], volume.shape[2])
            volume = _resized(volume, self.patch)
        return volume

    def forward(self, batch: Tensor) -> Tensor:
        """(batch, channels, x, y, z) to blended logits (batch, classes, x, y, z)."""
        from monai.inferers import SliceInferer, SlidingWindowInferer

        options: dict[str, Any] = {
            "roi_size": self.patch, "sw_batch_size": self.window_batch, "overlap": self.overlap, "mode": "gaussian",
        }  # fmt: skip
        run = SlidingWindowInferer(**options) if len(self.patch) == 3 else SliceInferer(spatial_dim=2, **options)
        return torch.cat([run(image[None], self._scores) for image in batch])

    def _scores(self, window: Tensor) -> Tensor:
        """Logits of windows, the mean over flips."""
        total: Tensor | None = None
        for axes in self.flips:
            output = self.model(window.flip(axes))
            output = output if isinstance(output, Tensor) else output[0]  # deep supervision: full size first
            output = output.float().flip(axes)
            total = output if total is None else total + output
        assert total is not None
        return total / len(self.flips)

    def finish(self, output: Tensor, sample: Scan) -> Segmentation:
        labels = self._back(output, sample)
        if sample.flat:
            labels = labels[..., 0]
        millilitres = abs(float(np.linalg.det(sample.affine[:3, :3]))) / 1000
        known = self.label_set or self.labels() or []
        values, counts = np.unique(labels[labels > 0], return_counts=True)
        names = {int(v): known[int(v)] if int(v) < len(known) else f"label {int(v)}" for v in values}
        if sample.flat:
            shares = {names[int(v)]: float(n) / labels.size for v, n in zip(values, counts, strict=True)}
            return Segmentation(
                shares=shares, labels=labels, affine=sample.affine, image=sample.data[..., 0], names=names, flat=True
            )
        volumes = {names[int(v)]: float(n) * millilitres for v, n in zip(values, counts, strict=True)}
        return Segmentation(
            volumes_ml=volumes, labels=labels, affine=sample.affine, image=sample.data[0], names=names,
            spacing=sample.spacing,
        )  # fmt: skip

    def _back(self, scores: Tensor, sample: Scan) -> np.ndarray:
        """Scores on the network's grid to labels on the file's, one class at a time to spare memory."""
        from monai.data import MetaTensor

        labels = np.zeros(sample.data.shape[1:], np.uint8 if len(scores) <= 256 else np.uint16)
        best: np.ndarray | None = None
        for index, one in enumerate(scores):
            here = one[None] if sample.sides is None else _resized(one[None], sample.sides)
            if not sample.flat:
                steps = copy.deepcopy(sample.steps)
                placed = MetaTensor(here, affine=torch.from_numpy(sample.grid), applied_operations=steps)
                here = self.to_grid.inverse(placed).as_subclass(Tensor)
            found = here[0].numpy()
            if len(scores) == 1:
                limit = 0.5 if getattr(self.model, "gives_probability", False) else 0.0  # the same of logits
                return (found > limit).astype(np.uint8)
            if best is None:
                best = found
            else:
                labels[found > best] = index
                best = np.maximum(best, found)
        return labels


def _whole(sides: Sequence[Any]) -> bool:
    return all(isinstance(side, numbers.Integral) and int(side) >= 1 for side in sides)


def _orientation(given: str | None) -> str | None:
    """Three directions, one of each axis of the body, in capitals; None keeps the file's."""
    if given is None:
        return None
    code = given.upper()
    if len(code) != 3 or any(len(set(code) & set(pair)) != 1 for pair in ("RL", "AP", "SI")):
        raise errors.BadArgument(
            f"orientation is {given!r}; expected one letter of each pair R L, A P, S I, as RAS or SPL",
            argument="orientation", accepted=[],
        )  # fmt: skip
    return code


def _resized(volume: Tensor, sides: Sequence[int]) -> Tensor:
    """(channels, x, y, slices) with other first two sides, bilinearly, averaged where it shrinks."""
    slices = volume.permute(3, 0, 1, 2)
    found = F.interpolate(slices, size=tuple(sides), mode="bilinear", align_corners=False, antialias=True)
    return found.permute(1, 2, 3, 0).contiguous()


def _spacing(given: Any) -> tuple[float, ...] | None:
    """Three numbers; two leave the distance of slices as it is."""
    if given is None:
        return None
    found = tuple(float(s) for s in given)
    if len(found) not in (2, 3) or not all(0 < s < math.inf for s in found):
        raise errors.BadArgument(
            f"spacing is {given}; expected the mm of three axes, or of two for networks of slices",
            argument="spacing", accepted=[],
        )  # fmt: skip
    return found if len(found) == 3 else (*found, -1.0)


def _flips(mirror: bool | Sequence[int], dims: int) -> list[tuple[int, ...]]:
    """The axes of a window (batch, channels, ...) to flip in each pass; the first pass flips none."""
    chosen = range(dims) if mirror is True else () if mirror is False else tuple(mirror)
    if any(a not in range(dims) for a in chosen) or len(set(chosen)) != len(chosen):
        raise errors.BadArgument(
            f"mirror is {mirror!r}; expected True, False or axes of {list(range(dims))}, each once",
            argument="mirror", accepted=[],
        )  # fmt: skip
    axes = [a + 2 for a in chosen]
    return [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


def _normaliser(wanted: str | Sequence[float]) -> Any:
    from monai.transforms import Identity, NormalizeIntensity, ScaleIntensity, ScaleIntensityRange

    if wanted == "z-score":
        return NormalizeIntensity(channel_wise=True)
    if wanted == "none":
        return Identity()
    if wanted == "min-max":
        return ScaleIntensity(minv=0.0, maxv=255.0)
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) == 2 and wanted[0] < wanted[1]:
        return ScaleIntensityRange(a_min=wanted[0], a_max=wanted[1], b_min=0.0, b_max=1.0, clip=True)
    raise errors.BadArgument(
        f"normalisation is {wanted!r}; expected 'z-score', 'none', 'min-max' or (low, high)",
        argument="normalisation", accepted=[],
    )  # fmt: skip


def _not_zero(image: Any) -> Any:
    return image != 0
