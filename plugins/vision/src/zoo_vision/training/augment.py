"""Random changes of the pictures that are trained on.

What is drawn comes from a numpy generator, so that a batch stays a function of its number; what is done with it is
torchvision's (``transforms.v2.functional``).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

ASPECTS = (3 / 4, 4 / 3)
TRIES = 10

Item = TypeVar("Item")
Sample = TypeVar("Sample")


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16), thread_name_prefix="picture")


def samples(
    make: Callable[[Item, np.random.Generator], Sample], items: Iterable[Item], random: np.random.Generator
) -> list[Sample]:
    """``make`` of every item, with random numbers of its own that follow from ``random``, on threads: most of the time
    goes into reading files."""
    given = list(items)
    return list(_threads().map(make, given, random.spawn(len(given))))


def window(random: np.random.Generator, width: int, height: int, least: float) -> tuple[int, int, int, int]:
    """left, top, width and height of a part of a picture: between ``least`` and all of its area, of an aspect between
    3:4 and 4:3; where ten draws do not fit, the largest such part in the middle.

    Source: Szegedy et al., arXiv 1409.4842, section 6; as torchvision's ``RandomResizedCrop``.
    """
    for _ in range(TRIES):
        area = width * height * random.uniform(least, 1)
        aspect = math.exp(random.uniform(*np.log(ASPECTS)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, round(height * ASPECTS[1])), min(height, round(width / ASPECTS[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def jittered(pixels: Tensor, random: np.random.Generator, strength: float) -> Tensor:
    """``pixels`` (1 or 3, H, W), uint8, with brightness, contrast and saturation times 1 - ``strength`` to
    1 + ``strength`` each."""
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change in changes if strength else ():
        pixels = change(pixels, random.uniform(max(0.0, 1 - strength), 1 + strength))
    return pixels


def mixed(x: Tensor, shares: Tensor, random: np.random.Generator, alpha: float) -> tuple[Tensor, Tensor]:
    """A batch x (batch, ...) and its classes' shares (batch, classes), each sample blended with another one of the
    batch. ``alpha``: of the beta distribution of the weights; 0: as they are.

    Source: Zhang et al., "mixup", arXiv 1710.09412.
    """
    if not alpha:
        return x, shares
    weight, other = random.beta(alpha, alpha), torch.from_numpy(random.permutation(len(x)))
    return x.lerp(x[other], weight), shares.lerp(shares[other], weight)
