"""Training change detectors on labelled pairs: crops of scenes and labels, and the papers' losses by kind of model.

Recipe as published (arXiv 2404.03425, section IV; MambaCD ``changedetection/script``): crops of 256 pixels, flips and
quarter turns, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import zoo
from zoo.cli import training
from zoo.files import refused
from zoo.loading import card_of
from zoo.pipelines import progress_bar

from .changemamba import Damage, SemanticChange
from .labelled import Sample, truth
from .losses import IGNORE, SeKLoss, bcd_loss, bda_loss, fcs_loss, scd_loss
from .mamba_fcs import MambaFCS
from .pipelines import ChangeDetection
from .rasters import bad_input


def begun(name: str, start: str | None, seed: int, **arguments: Any) -> nn.Module:
    """As :func:`zoo.cli.training.begun`; where ``start`` names a VMamba that classifies pictures, random weights with
    its encoder, as the authors begin. Raises BadArgument where that is another one than the model's."""
    if start is None or (classifier := card_of(start)).task != "image-classification":
        return training.begun(name, start, seed, **arguments)
    model: Any = training.begun(name, None, seed, **arguments)
    given = zoo.load(start, features_only=True).float().state_dict()
    own = model.encoder.state_dict()
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    # The norms of the four maps are a detector's own, and a longer stage of the classifier's gives its first blocks.
    if strange := [k for k in own if k not in fitting and "norm" not in k]:
        raise bad_input(
            f"--start {start} is a {classifier.name}, and the encoder of {name} is another: {len(strange)} of its "
            f"{len(own)} tensors do not fit, as {strange[0]}",
            "start",
        )
    model.encoder.load_state_dict(own | fitting)
    return model


def check_samples(pipe: ChangeDetection, samples: Sequence[Sample], crop: int, *, progress: bool = False) -> None:
    """Open every file: raises BadArgument or BadFile for one that cannot be read, dates and labels that do not fit
    together, scenes smaller than ``crop``, and labels that are none of the model's classes."""
    classes = {key: len(pipe.layers["after"]) for key in ("before", "after", "damage")} if pipe.kind != "binary" else {}
    with progress_bar(progress, len(samples), "checking") as advance:
        for _, files in samples:
            pair = pipe.read((files[0], files[1]))
            size = (pair[0].height, pair[0].width)
            for scene in pair:
                scene.close()
            if min(size) < crop:
                raise bad_input(f"{files[0]} has {size[0]} x {size[1]} pixels; expected {crop} or more, or --crop less")
            with refused(files[2]):
                labels = truth(pipe, files)
            for key, values in labels.items():
                if values.shape != size:
                    raise bad_input(f"the labels of {files[0]} have {values.shape} pixels and it has {size}", "data")
                if (largest := int(np.where(values == IGNORE, 0, values).max())) >= classes.get(key, 2):
                    raise bad_input(
                        f"the labels of {files[0]} hold class {largest}; the model has {classes.get(key, 2)} classes, "
                        "the first for unchanged: name them all (--labels FILE)",
                        "data",
                    )
            advance()


class Crops:
    """Windows of ``crop`` x ``crop`` pixels of labelled pairs, turned and mirrored; read from the files as they are
    needed. ``pipe``: how files are read and prepared."""

    def __init__(self, pipe: ChangeDetection, samples: Sequence[Sample], crop: int) -> None:
        self.pipe, self.samples, self.crop = pipe, list(samples), crop
        self.mean, self.std = pipe.mean.clone(), pipe.std.clone()

    def __len__(self) -> int:
        return len(self.samples)

    def __call__(self, numbers: Sequence[int], random: np.random.Generator) -> dict[str, Any]:
        """A batch of these pairs: ``dates``, two tensors (B, C, crop, crop), and ``labels``, int64 (B, crop, crop) by
        the names of the model's outputs, 255 where a date has no data."""
        rows = [self._crop(self.samples[number][1], random) for number in numbers]
        dates = [torch.stack([row[0][i] for row in rows]) for i in range(2)]
        return {"dates": dates, "labels": {k: torch.stack([row[1][k] for row in rows]) for k in rows[0][1]}}

    def _crop(self, files: list[Path], random: np.random.Generator) -> tuple[list[Tensor], dict[str, Tensor]]:
        pair = self.pipe.read((files[0], files[1]))
        side = self.crop
        top, left = (int(random.integers(size - side + 1)) for size in (pair[0].height, pair[0].width))
        box, turns, mirrored = (top, left, side, side), int(random.integers(4)), bool(random.integers(2))

        def placed(values: np.ndarray) -> Tensor:
            turned = np.rot90(values, turns)
            return torch.from_numpy(np.ascontiguousarray(turned[:, ::-1] if mirrored else turned))

        labels = truth(self.pipe, files, box)
        dates = []
        for scene in pair:
            dates.append((placed(scene.read(*box)).permute(2, 0, 1) / 255 - self.mean) / self.std)
            if (valid := scene.read_valid(*box)) is not None:
                labels = {k: np.where(valid, v, IGNORE) for k, v in labels.items()}
            scene.close()
        return dates, {k: placed(v) for k, v in labels.items()}


class _Positive(nn.Module):
    """The SeK loss where kappa is above zero: below it has no logarithm, which would end the training."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.sek = SeKLoss(classes, legacy_eps=False)

    def forward(self, before: Tensor, *rest: Tensor) -> Tensor:
        value = self.sek(before, *rest)
        return value if bool(torch.isfinite(value)) else before.sum() * 0.0


def loss_of(model: nn.Module) -> Callable[[nn.Module, dict[str, Any]], Tensor]:
    """The loss of a batch of :class:`Crops`: ChangeMamba's for its task, Mamba-FCS's for its semantic model."""
    sek = _Positive(int(model.semantic_classes)) if isinstance(model, MambaFCS) else None  # type: ignore[arg-type]

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        found, labels = model(*batch["dates"]), batch["labels"]
        if isinstance(found, Damage):
            return bda_loss(*found, labels["building"], labels["damage"])
        if isinstance(found, SemanticChange):
            true = labels["change"], labels["before"], labels["after"]
            return scd_loss(*found, *true) if sek is None else fcs_loss(*found, *true, sek=sek)
        return bcd_loss(found, labels["change"])

    return loss
