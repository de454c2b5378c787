"""Made-up bodies with known labels: volumes to train and to try things on where no patient's data may be used.

Five organs in a body, each an ellipsoid that smooth waves deform, in random place, size and turn. What makes real
scans hard is there on purpose: organs whose intensities overlap, texture inside them, voxels that share two tissues
(partial volume), a field of sensitivity that drifts over the volume (bias field), and the noise of magnitude images.
The two twins look alike and differ only by the side of the body, so that a voxel's neighbourhood does not tell them
apart. They stand for no anatomy, and what is measured on them says nothing about patients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: the label map's values: 0 is everything else
LABELS = ("background", "large organ", "left twin", "right twin", "round organ", "tube")

#: centre (mm from the body's, RAS), half axes (mm), mean intensity of each organ; the body has intensity 1
_ORGANS = (
    ("large organ", (18.0, 5.0, 14.0), (19.0, 16.0, 15.0), 1.45),
    ("left twin", (-20.0, -12.0, -12.0), (9.0, 8.0, 14.0), 1.75),
    ("right twin", (20.0, -12.0, -16.0), (9.0, 8.0, 14.0), 1.75),
    ("round organ", (-18.0, 7.0, 15.0), (12.0, 11.0, 11.0), 1.3),
    ("tube", (0.0, -15.0, 0.0), (9.0, 8.0, 36.0), 0.45),
)
_BODY = (45.0, 36.0, 60.0)


@dataclass
class Phantom:
    """``image`` (x, y, z) float32 with intensities of about 0 to 3, ``labels`` (x, y, z) uint8 (see ``LABELS``)."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]  #: mm

    @property
    def affine(self) -> np.ndarray:
        """Voxel to mm, RAS, the middle of the volume at 0."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(self.image.shape, self.spacing, strict=True)]
        return affine


def phantom(
    seed: int,
    shape: tuple[int, int, int] = (48, 48, 48),
    spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
    noise: float = 0.08,
    fine: int = 2,
) -> Phantom:
    """The phantom ``seed`` on a grid of ``shape`` voxels of ``spacing`` mm.

    ``noise``: deviation of the noise, in units of the body's intensity. ``fine``: every voxel is the mean over
    fine^3 points, which makes the partial volumes; its label is what most of them are.
    The same seed gives the same body on every grid (noise and texture are drawn for the grid).
    """
    draw = np.random.default_rng(seed)
    points = [
        ((np.arange(n * fine, dtype=np.float32) + 0.5) / fine - n / 2) * s for n, s in zip(shape, spacing, strict=True)
    ]
    body = _blob(draw, points, np.zeros(3), np.array(_BODY) * draw.uniform(0.92, 1.05, 3), turn=0.08)
    owner = np.zeros(body.shape, np.uint8)
    shift = draw.normal(0, 2.5, 3)
    for label, (_, centre, axes, _) in enumerate(_ORGANS, start=1):
        where = np.array(centre) + shift + draw.normal(0, 2.5, 3)
        organ = _blob(draw, points, where, np.array(axes) * draw.uniform(0.82, 1.18, 3), turn=0.35)
        owner[organ & body & (owner == 0)] = label
    levels = np.array([1.0, *(mean for *_, mean in _ORGANS)]) * draw.normal(1, 0.08, 1 + len(_ORGANS))
    contrast = draw.uniform(0.05, 0.12, 1 + len(_ORGANS))
    tissue = np.where(body, levels.astype(np.float32)[owner], np.float32(0.02))
    tissue *= 1 + contrast.astype(np.float32)[owner] * _texture(draw, tissue.shape, points)
    image = _blocks(tissue, fine).mean(axis=(1, 3, 5)) * _bias(draw, shape)
    image = np.hypot(image + draw.normal(0, noise, shape), draw.normal(0, noise, shape))
    shares = [_blocks(owner == label, fine).mean(axis=(1, 3, 5)) for label in range(len(LABELS))]
    labels = np.argmax(shares, axis=0).astype(np.uint8)
    return Phantom(image.astype(np.float32), labels, spacing)


def _blob(
    draw: np.random.Generator, points: list[np.ndarray], centre: np.ndarray, axes: np.ndarray, turn: float
) -> np.ndarray:
    """Where a turned ellipsoid lies whose radius three smooth waves change by up to about a tenth each."""
    angles = draw.normal(0, turn, 3)
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [i for i in range(3) if i != axis]
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ step
    x, y, z = np.meshgrid(*(p - c for p, c in zip(points, centre, strict=True)), indexing="ij", sparse=True)
    u, v, w = (
        (row[0] * x + row[1] * y + row[2] * z) / a for row, a in zip(rotation.astype(np.float32), axes, strict=True)
    )
    limit = np.float32(1)
    for _ in range(3):
        waves, phase = draw.normal(0, 2.0, 3).astype(np.float32), np.float32(draw.uniform(0, 2 * np.pi))
        limit = limit + np.float32(draw.uniform(0.04, 0.1)) * np.sin(waves[0] * u + waves[1] * v + waves[2] * w + phase)
    return u * u + v * v + w * w < limit * limit


def _texture(draw: np.random.Generator, shape: tuple[int, ...], points: list[np.ndarray]) -> np.ndarray:
    """Noise smoothed to grains of about 4 mm, deviation 1."""
    from scipy.ndimage import gaussian_filter

    width = [2.0 / float(p[1] - p[0]) for p in points]
    grain = gaussian_filter(draw.standard_normal(shape, dtype=np.float32), width, mode="wrap")
    return grain / grain.std()


def _bias(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """exp of a random polynomial of degree two over the volume, about 0.7 to 1.4."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    c = draw.normal(0, 0.12, 9)
    linear = c[0] * x + c[1] * y + c[2] * z
    return np.exp(linear + c[3] * x * y + c[4] * y * z + c[5] * x * z + c[6] * x * x + c[7] * y * y + c[8] * z * z)


def _blocks(fine_grid: np.ndarray, fine: int) -> np.ndarray:
    """(X f, Y f, Z f) as (X, f, Y, f, Z, f)."""
    x, y, z = (n // fine for n in fine_grid.shape)
    return fine_grid.reshape(x, fine, y, fine, z, fine)
