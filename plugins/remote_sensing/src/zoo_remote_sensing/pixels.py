"""Training a classifier of hyperspectral pixels on the labelled pixels of one scene.

Recipe as published (arXiv 2408.01372; the notebook of MorpMamba): Adam at 1e-3, 256 pixels a step, a quarter of each
class's pixels to learn from, and 0.01 times the squared weights of the hidden layer in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.placement import device_of

from .hyperspectral import Cube, principal_components, windows
from .metrics import IGNORE, Classes

#: Of the squared weights of the hidden layer, in the loss.
HIDDEN_DECAY = 0.01


class Pixels:
    """The labelled pixels of a scene, each with its window of principal components.

    ``truth`` (H, W): classes, 255 for unlabelled pixels. ``bands``, ``window``: the model's. ``classes`` (N,) are those
    of the labelled pixels, row by row.
    """

    def __init__(self, cube: Cube, truth: np.ndarray, bands: int, window: int) -> None:
        self.views = windows(principal_components(cube.values, bands, cube.valid), window)
        self.rows, self.columns = np.nonzero(truth != IGNORE)
        self.classes = truth[self.rows, self.columns]

    def __len__(self) -> int:
        return len(self.classes)

    def __call__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Windows (B, window, window, bands) and classes (B,) of these pixels."""
        chosen = np.asarray(numbers)
        values = np.ascontiguousarray(self.views[self.rows[chosen], self.columns[chosen]])
        return torch.from_numpy(values), torch.from_numpy(self.classes[chosen])

    def score(self, model: nn.Module, numbers: Sequence[int], names: Sequence[str]) -> Classes:
        """What the model's answers for these pixels are worth."""
        measure, device = Classes(names), device_of(model)
        with torch.inference_mode():
            for first in range(0, len(numbers), 1024):
                values, classes = self(numbers[first : first + 1024])
                measure.update(classes, model(values.to(device)).argmax(-1).cpu())
        return measure


def pixel_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy, and the decay of the hidden layer."""
    decay = model.hidden.weight.square().sum()  # type: ignore[union-attr, operator]
    return F.cross_entropy(model(batch[0]), batch[1]) + HIDDEN_DECAY * decay
