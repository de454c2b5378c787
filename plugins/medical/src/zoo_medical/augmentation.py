"""Patches as other scanners and other bodies might give them: nnU-Net's augmentation by MONAI's transforms.

Rotations, sizes and flips move image and labels alike; noise, blur, brightness and contrast change the image alone.
Kinds, ranges and probabilities are about those of Isensee et al., "nnU-Net", Nature Methods 18 (2021), supplement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

#: A patch whose sides differ more than so is turned in the plane of its long sides only.
ISOTROPIC = 3


def augmented(image: Tensor, labels: Tensor, seed: int, *, flips: bool = True) -> tuple[Tensor, Tensor]:
    """An image (channels, *sides) and its labels (1, *sides), of two or three sides, changed at random from ``seed``.

    What a rotation brings in from outside is reflected. ``flips``: along every axis, each with probability 1/2.
    """
    from monai.transforms import (
        Compose,
        RandAdjustContrastd,
        RandAffined,
        RandFlipd,
        RandGaussianNoised,
        RandGaussianSmoothd,
        RandScaleIntensityd,
    )

    both = ("image", "labels")
    sides = image.shape[1:]
    steps: list[Any] = [
        RandAffined(
            both, prob=0.3, rotate_range=_turns(sides), scale_range=[(-0.3, 0.3)] * len(sides),
            mode=("bilinear", "nearest"), padding_mode="reflection",
        ),
        RandGaussianNoised("image", prob=0.1, std=0.3 * float(image.std())),
        RandGaussianSmoothd("image", (0.5, 1.0), (0.5, 1.0), (0.5, 1.0), prob=0.2),
        RandScaleIntensityd("image", prob=0.15, factors=0.25),
        RandAdjustContrastd("image", prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    ]  # fmt: skip
    if flips:
        steps += [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(len(sides))]
    made = Compose(steps).set_random_state(seed=seed)({"image": image, "labels": labels})
    return tuple(made[key].as_subclass(Tensor).contiguous() for key in both)  # type: ignore[return-value]


def _turns(sides: Sequence[int]) -> list[float]:
    """The largest angle, to both sides, about each axis of a volume; of a picture, one angle."""
    angle = math.pi / 6
    if len(sides) == 2:
        return [angle]
    if max(sides) <= ISOTROPIC * min(sides):
        return [angle] * 3
    short = min(range(3), key=lambda axis: sides[axis])
    return [angle if axis == short else 0.0 for axis in range(3)]
