"""What spoils an image: blur, noise, loss of resolution, missing parts. Functions, and their names as text.

Images are (..., channels, height, width), floats from 0 to 1. Which of these the papers take: Serpent (arXiv
2403.17902) Gaussian blur, 8-fold down-sampling with an output of full size, and inpainting; Contrast (arXiv 2501.13353)
bicubic down-sampling by 2, 3 and 4. Strengths (sigma, noise, sizes of holes) are ours.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sizes import mirrored


def gaussian_kernel(sigma: float, size: int | None = None) -> Tensor:
    """``size`` weights (odd; by default up to 3 sigma each way) of a Gaussian of deviation sigma; their sum is 1."""
    size = 2 * math.ceil(3 * sigma) + 1 if size is None else size
    if sigma <= 0 or size < 1 or size % 2 == 0:
        raise ValueError(f"sigma is {sigma} and size {size}; expected a positive deviation and an odd size")
    weights = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def gaussian_blur(x: Tensor, sigma: float, size: int | None = None) -> Tensor:
    """x convolved with :func:`gaussian_kernel` along both axes, mirrored at its edges."""
    kernel = gaussian_kernel(sigma, size).to(x)
    half = len(kernel) // 2
    for axis in (-2, -1):
        length = x.shape[axis]
        around = mirrored(length, length + half, x.device)
        before = mirrored(length, half + 1, x.device).flip(0)[:half]
        wide = x.index_select(x.dim() + axis, torch.cat([before, around])).movedim(axis, -1)
        x = F.conv1d(wide.reshape(-1, 1, wide.shape[-1]), kernel[None, None]).view(*wide.shape[:-1], length)
        x = x.movedim(-1, axis)
    return x


def add_noise(x: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """x plus Gaussian noise of deviation ``std`` (25 grey levels of 255 are 0.098). Not clipped."""
    return x + std * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, the one of MATLAB's ``imresize`` and of Pillow."""
    x = x.abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@functools.lru_cache(maxsize=64)
def bicubic_matrix(length: int, wanted: int) -> Tensor:
    """(wanted, length) float64: every new position as a weighted sum of old ones.

    MATLAB's ``imresize(..., 'bicubic')``: centres align, the kernel widens where the result is smaller (antialiasing),
    and positions beyond an edge are mirrored, the edge included.
    """
    ratio = wanted / length
    stretch = max(1 / ratio, 1.0)
    centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) / ratio - 0.5
    first = torch.floor(centres - 2 * stretch).long()
    at = first[:, None] + torch.arange(math.ceil(4 * stretch) + 2)
    weights = _cubic((at - centres[:, None]) / stretch)
    weights = weights / weights.sum(1, keepdim=True)
    at = at % (2 * length)
    at = torch.where(at < length, at, 2 * length - 1 - at)
    return torch.zeros(wanted, length, dtype=torch.float64).scatter_add_(1, at, weights)


def resize_bicubic(x: Tensor, height: int, width: int) -> Tensor:
    """x (..., H, W) at another size, as MATLAB's ``imresize`` computes it (see :func:`bicubic_matrix`). Not clipped."""
    if min(height, width) < 1 or 0 in x.shape[-2:]:
        raise ValueError(
            f"an image of {tuple(x.shape[-2:])} cannot become {height} x {width}; expected sides of 1 or more"
        )
    rows, columns = bicubic_matrix(x.shape[-2], height).to(x), bicubic_matrix(x.shape[-1], width).to(x)
    return rows @ (x @ columns.T)


def crop_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """The upper left part of x (..., H, W) whose sides are multiples, as benchmarks of super-resolution crop images."""
    height, width = (side // multiple * multiple for side in x.shape[-2:])
    if not height or not width:
        raise ValueError(
            f"an image of {tuple(x.shape[-2:])} is smaller than one pixel of the {multiple} times smaller one"
        )
    return x[..., :height, :width]


def downsample(x: Tensor, factor: int) -> Tensor:
    """Bicubic, sides divided by ``factor``, of which they must be multiples (:func:`crop_to_multiple`)."""
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(
            f"an image of {height} x {width} has no {factor} times smaller one; crop it to multiples first"
        )
    return resize_bicubic(x, height // factor, width // factor)


def lose_resolution(x: Tensor, factor: int = 8) -> Tensor:
    """Down by ``factor`` and up again to the size of x, both bicubic: the input of same-size super-resolution."""
    height, width = x.shape[-2:]
    small = resize_bicubic(x, max(round(height / factor), 1), max(round(width / factor), 1))
    return resize_bicubic(small, height, width)


def box_mask(x: Tensor, share: float = 0.25, generator: torch.Generator | None = None) -> Tensor:
    """(batch, 1, H, W) of 0 in one box an image at a random place, which covers ``share`` of it, and 1 elsewhere."""
    _check_share(share)
    batch, _, height, width = x.shape
    mask = torch.ones(batch, 1, height, width, dtype=x.dtype)
    h, w = max(round(height * share**0.5), 1), max(round(width * share**0.5), 1)
    for one in mask[:, 0]:
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        one[top : top + h, left : left + w] = 0
    return mask.to(x.device)


def pixel_mask(x: Tensor, share: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """(batch, 1, H, W) of 0 in exactly ``share`` of the pixels of every image, drawn at random, and 1 elsewhere."""
    _check_share(share)
    batch, _, height, width = x.shape
    order = torch.rand(batch, height * width, generator=generator).argsort(1)
    mask = (order >= round(share * height * width)).to(x.dtype)
    return mask.view(batch, 1, height, width).to(x.device)


def _check_share(share: float) -> None:
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected a part of the image, above 0 and below 1")


# -- by name ----------------------------------------------------------------------------------------------------------

#: kind -> its parameters, with defaults
KINDS: dict[str, dict[str, float]] = {
    "blur": {"sigma": 2.0, "size": 0, "noise": 0.0},
    "noise": {"std": 0.1},
    "down": {"factor": 8, "noise": 0.0},
    "bicubic": {"scale": 2, "noise": 0.0},
    "box": {"share": 0.25},
    "pixels": {"share": 0.5},
}


@dataclass(frozen=True)
class Degradation:
    """One of :data:`KINDS` with its numbers. ``parse("blur:sigma=1.5,noise=0.02")`` reads one; ``str`` writes it.

    blur: Gaussian (``size`` 0: up to 3 sigma); noise; down: ``factor`` down and up again, same size; bicubic: an image
    ``scale`` times smaller; box, pixels: parts set to 0. ``noise`` is added where a kind has it.
    """

    kind: str
    numbers: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the degradation is {self.kind!r}; expected one of {', '.join(KINDS)}")
        unknown = sorted(set(self.numbers) - set(KINDS[self.kind]))
        if unknown:
            raise ValueError(
                f"{self.kind} has no {', '.join(unknown)}; it has {', '.join(KINDS[self.kind])} "
                f"(as {self.kind}:{next(iter(KINDS[self.kind]))}=...)"
            )
        object.__setattr__(self, "numbers", {**KINDS[self.kind], **self.numbers})

    @classmethod
    def parse(cls, text: str) -> Degradation:
        """``kind`` or ``kind:name=number,...``. Raises ValueError that names the known kinds and numbers."""
        kind, _, rest = text.partition(":")
        numbers: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            name, _, value = part.partition("=")
            try:
                numbers[name.strip()] = float(value)
            except ValueError:
                raise ValueError(f"{text!r}: {part!r} is no name=number") from None
        return cls(kind.strip(), numbers)

    def __str__(self) -> str:
        given = [
            f"{k}={v:g}"
            for k, v in self.numbers.items()
            if v != KINDS[self.kind][k] or k == next(iter(KINDS[self.kind]))
        ]
        return f"{self.kind}:{','.join(given)}"

    @property
    def scale(self) -> int:
        """How many times smaller the degraded image is."""
        return int(self.numbers["scale"]) if self.kind == "bicubic" else 1

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x (batch, channels, H, W) degraded, 0 to 1 and clipped to it; sides are multiples of :attr:`scale`."""
        n: dict[str, Any] = self.numbers
        if self.kind == "blur":
            y = gaussian_blur(x, n["sigma"], int(n["size"]) or None)
        elif self.kind == "down":
            y = lose_resolution(x, int(n["factor"]))
        elif self.kind == "bicubic":
            y = downsample(x, self.scale)
        elif self.kind == "noise":
            y = add_noise(x, n["std"], generator)
        else:
            y = x * (box_mask if self.kind == "box" else pixel_mask)(x, n["share"], generator)
        if n.get("noise"):
            y = add_noise(y, n["noise"], generator)
        return y.clamp(0, 1)
