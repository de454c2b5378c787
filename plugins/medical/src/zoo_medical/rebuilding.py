"""A volume in; the cells that masked pre-training hides, rebuilt from the others, out. Not for clinical use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo import errors
from zoo.files import whole
from zoo.pipelines import Result

from .mambamim import STRIDE
from .mambamim_pretrain import MambaMIM
from .pipelines import VolumePipeline
from .scans import NIFTI, Scan

VOLUMES = ("image", "masked", "rebuilt", "hidden")


@dataclass(kw_only=True)
class RebuiltVolume(Result):
    """A volume, what the model saw of it, and what it made of that: on the network's grid and in its intensities."""

    loss: float  #: as in training: mean squared error in hidden cells, each scaled to mean 0 and deviation 1
    error: float  #: mean absolute difference of hidden voxels, in the network's intensities
    mask_ratio: float
    hidden_cells: int
    cells: int  #: of 16^3 voxels, those that hold some of the volume
    image: np.ndarray = field(repr=False)  #: (i, j, k) float32
    masked: np.ndarray = field(repr=False)  #: hidden voxels at 0
    rebuilt: np.ndarray = field(repr=False)  #: hidden voxels by the model
    hidden: np.ndarray = field(repr=False)  #: bool, True where the model saw nothing
    affine: np.ndarray = field(repr=False)  #: (4, 4), voxel to mm in RAS
    warning: str = "not for clinical use"

    def summary(self) -> str:
        if not self.hidden_cells:  # of a volume of few cells
            return f"none of its {self.cells} cells was hidden; give another seed or a larger mask_ratio"
        return (
            f"{self.hidden_cells} of {self.cells} cells rebuilt: loss {self.loss:.4f}, hidden voxels "
            f"{self.error:.4f} off on average"
        )

    def save(self, path: str | Path, what: str = "rebuilt") -> Path:
        """Write one of the volumes ("image", "masked", "rebuilt", or the mask "hidden") as .nii or .nii.gz."""
        import nibabel

        if what not in VOLUMES:
            raise errors.BadArgument(
                f"what is {what!r}; expected one of {', '.join(VOLUMES)}", argument="what", accepted=list(VOLUMES)
            )
        if not str(path).lower().endswith(NIFTI):
            raise errors.BadArgument(
                f"{path}: a volume is written as .nii or .nii.gz", argument="path", accepted=list(NIFTI)
            )
        voxels = getattr(self, what)
        written = nibabel.Nifti1Image(voxels.astype(np.uint8) if what == "hidden" else voxels, self.affine)
        written.header.set_xyzt_units("mm")
        with whole(path) as work:
            nibabel.save(written, str(work))
        return Path(path)

    def picture(self, slices: int = 4) -> Image.Image:
        """Axial slices, each three times side by side: the volume, what the model saw, what it made of that."""
        from nibabel.orientations import io_orientation

        from .montage import montage

        turn = io_orientation(self.affine)
        across = int(np.argmin(turn[:, 0]))  # the array's axis from the patient's left to the right
        parts = [self.image, self.masked, self.rebuilt]  # drawn with the patient's right on the left
        both = np.concatenate(parts[::-1] if turn[across, 1] > 0 else parts, axis=across)
        legend = {1: "from left: the volume, what was seen, what was rebuilt"}
        return montage(both, np.zeros(both.shape, np.uint8), self.affine, legend, slices)


class VolumeRebuilding(VolumePipeline):
    """Volumes to the cells that a masked autoencoder rebuilds from the others. For research; not for clinical use.

    An input is a NIfTI file or a folder with a DICOM series. It is brought to the network's grid and intensities,
    filled up with zeros to whole windows, and each window (a cube of the model's ``img_size``) has ``mask_ratio`` of
    its cells of 16^3 voxels hidden (default: the model's), by chance from ``seed``: the same file gives the same
    answer. The model predicts cells up to their mean and deviation; they are shown with the true ones, as the original
    shows them. What was filled up counts in no error.

    ``crop``: read only the box around what lies above the lowest intensity (of CT: no air around the patient).
    spacing, orientation, normalisation, anisotropy, series: as in
    :class:`~zoo_medical.pipelines.MedicalSegmentation`; defaults are the published weights' (CT: 1.5 mm, RAS,
    -175 to 250 HU as 0 to 1), also for weights of your own.
    """

    task = "masked-pretraining"

    def __init__(
        self,
        model: nn.Module,
        mask_ratio: float | None = None,
        seed: int = 0,
        spacing: Sequence[float] | None = None,
        orientation: str | None = "card",
        crop: bool = True,
        normalisation: str | Sequence[float] | None = None,
        anisotropy: float = 8.0,
        series: str | None = None,
    ) -> None:
        if not isinstance(model, MambaMIM):
            raise errors.BadArgument(
                f"{type(model).__name__} rebuilds nothing; expected a masked autoencoder (mambamim_pretrain)",
                argument="model",
                accepted=[],
            )
        super().__init__(model, None, spacing, orientation, False, normalisation, anisotropy, series)
        self.autoencoder, self.seed, self.trim = model, seed, crop
        self.mask_ratio = model.mask_ratio if mask_ratio is None else mask_ratio
        count = model.grid**3
        if not 0 < self.mask_ratio < 1 or not 0 < round(count * (1 - self.mask_ratio)) < count:
            raise errors.BadArgument(
                f"mask_ratio is {mask_ratio}; expected a share above 0 and below 1 that hides and shows at least one "
                f"of {count} cells",
                argument="mask_ratio",
                accepted=[],
            )

    @property
    def preprocess(self) -> dict[str, Any]:
        """The weights' settings; for weights of one's own those of the published ones."""
        own = super().preprocess
        card = self.info.card if self.info is not None else None
        if own or card is None or card.default_weights is None:
            return own
        return dict(card.default_weights.preprocess)

    def prepare(self, sample: Scan) -> Tensor:
        """(1, x, y, z); ``sample.grid`` becomes the affine of the box. As in the original the box is found in
        normalised intensities: air is no zero before."""
        volume = super().prepare(sample)
        where = (volume[0] > volume.min()).nonzero()
        if not self.trim or not len(where):
            return volume
        low, high = where.amin(dim=0).tolist(), (where.amax(dim=0) + 1).tolist()
        sample.grid = sample.grid.copy()
        sample.grid[:3, 3] += sample.grid[:3, :3] @ np.array(low)
        return volume[(..., *(slice(a, b) for a, b in zip(low, high, strict=True)))].contiguous()

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """(B, 1, x, y, z) to volumes of that shape and the squared errors and masks of all cells."""
        found = [self._one(volume[None]) for volume in batch]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def _one(self, volume: Tensor) -> dict[str, Tensor]:
        """Window by window: the original counts what it walks over a whole batch, so that windows would mix."""
        model, side = self.autoencoder, self.autoencoder.img_size
        sizes = [-(-n // side) * side for n in volume.shape[2:]]
        more = [size - n for size, n in zip(sizes, volume.shape[2:], strict=True)]
        whole = F.pad(volume, (0, more[2], 0, more[1], 0, more[0]))
        rebuilt = torch.zeros_like(whole)
        cells = [size // STRIDE for size in sizes]
        error, hidden = whole.new_zeros(1, *cells), torch.zeros(1, *cells, dtype=torch.bool, device=whole.device)
        chance = torch.Generator().manual_seed(self.seed)
        for corner in product(*(range(0, size, side) for size in sizes)):
            here = (..., *(slice(c, c + side) for c in corner))
            there = (..., *(slice(c // STRIDE, (c + side) // STRIDE) for c in corner))
            window = whole[here]
            active = model.draw_mask(1, window.device, ratio=self.mask_ratio, generator=chance)
            made = model.reconstruct(window, active)
            rebuilt[here] = model.filled(window, made, active)
            error[there] = model.cell_errors(window, made).view(active.shape[1:]).to(error.dtype)
            hidden[there] = ~active[0]
        x, y, z = volume.shape[2:]
        return {
            "image": volume[:, 0],
            "rebuilt": rebuilt[:, 0, :x, :y, :z],
            "error": error[:, : -(-x // STRIDE), : -(-y // STRIDE), : -(-z // STRIDE)],
            "hidden": hidden[:, : -(-x // STRIDE), : -(-y // STRIDE), : -(-z // STRIDE)],
        }

    def finish(self, output: dict[str, Tensor], sample: Scan) -> RebuiltVolume:
        image, rebuilt, cells = output["image"].float(), output["rebuilt"].float(), output["hidden"]
        hidden = cells
        for axis, size in enumerate(image.shape):
            hidden = hidden.repeat_interleave(STRIDE, dim=axis).narrow(axis, 0, size)
        return RebuiltVolume(
            loss=float(output["error"].float()[cells].mean()),
            error=float((rebuilt - image).abs()[hidden].mean()),
            mask_ratio=self.mask_ratio,
            hidden_cells=int(cells.sum()),
            cells=cells.numel(),
            image=image.numpy(),
            masked=image.masked_fill(hidden, 0).numpy(),
            rebuilt=rebuilt.numpy(),
            hidden=hidden.numpy(),
            affine=sample.grid,
        )
