"""Generated clouds of solids and household-like composites, with the part that every point belongs to: random
proportions, pose, noise, occlusion and density."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from zoo_point_cloud.geometry import farthest_point_sample

CLASSES = (
    "sphere", "box", "cylinder", "cone", "torus", "pyramid", "table", "chair", "lamp", "mug", "bottle", "shelf",
)  # fmt: skip
#: The parts of each composite; solids have none.
PARTS = {
    "table": ("table top", "table leg"),
    "chair": ("chair seat", "chair back", "chair leg"),
    "lamp": ("lamp shade", "lamp pole", "lamp base"),
    "mug": ("mug body", "mug handle"),
    "bottle": ("bottle body", "bottle neck"),
    "shelf": ("shelf board", "shelf side"),
}
PART_NAMES = tuple(part for parts in PARTS.values() for part in parts)
#: Points of a prepared cloud.
POINTS = 256

Piece = tuple[str, np.ndarray]


# -- surfaces ---------------------------------------------------------------------------------------------------------


def _box(r: np.random.Generator, n: int, size, centre=(0, 0, 0)) -> np.ndarray:
    size = np.asarray(size, dtype=float)
    area = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    axis = r.choice(3, n, p=area / area.sum())
    p = r.uniform(-0.5, 0.5, (n, 3))
    p[np.arange(n), axis] = r.choice([-0.5, 0.5], n)
    return p * size + centre


def _tube(r: np.random.Generator, n: int, radius, height, centre=(0, 0, 0), top=None, caps=True) -> np.ndarray:
    """A cylinder, or a cone frustum with the upper radius ``top``."""
    top = radius if top is None else top
    side = np.pi * (radius + top) * np.hypot(height, radius - top)
    ends = np.pi * np.array([radius**2, top**2]) * caps
    which = r.choice(3, n, p=np.array([side, *ends]) / (side + ends.sum()))
    t = r.uniform(0, 1, n)
    if radius != top:  # even over the surface: more points where the frustum is wider
        t = (radius - np.sqrt(radius**2 - t * (radius**2 - top**2))) / (radius - top)
    t = np.where(which == 0, t, which - 1.0)
    rho = radius + (top - radius) * t
    rho = np.where(which == 0, rho, rho * np.sqrt(r.uniform(0, 1, n)))
    phi = r.uniform(0, 2 * np.pi, n)
    return np.stack([rho * np.cos(phi), rho * np.sin(phi), (t - 0.5) * height], 1) + centre


def _sphere(r: np.random.Generator, n: int) -> np.ndarray:
    p = r.normal(size=(n, 3))
    return p / np.linalg.norm(p, axis=1, keepdims=True)


def _ring(r: np.random.Generator, n: int, major, minor, arc=2 * np.pi) -> np.ndarray:
    phi, theta = r.uniform(-arc / 2, arc / 2, n), r.uniform(0, 2 * np.pi, n)
    rho = major + minor * np.cos(theta)
    return np.stack([rho * np.cos(phi), rho * np.sin(phi), minor * np.sin(theta)], 1)


def _pyramid(r: np.random.Generator, n: int, base, height) -> np.ndarray:
    p = _box(r, n, (base, base, 0.0))
    on_side = r.random(n) < 0.7
    t, along, side = 1 - np.sqrt(r.uniform(0, 1, n)), r.uniform(-0.5, 0.5, n), r.integers(0, 4, n)
    x = np.select([side < 2, side == 2], [along, 0.5], -0.5)
    y = np.select([side == 0, side == 1], [0.5, -0.5], along)
    p[on_side] = np.stack([x * base * (1 - t), y * base * (1 - t), t * height], 1)[on_side]
    return p


def _share(n: int, *weights: float) -> np.ndarray:
    cut = np.round(np.cumsum(weights) / np.sum(weights) * n).astype(int)
    return np.diff([0, *cut])


def _corners(width: float, depth: float) -> list[tuple[float, float]]:
    return [(sx * width / 2, sy * depth / 2) for sx in (-1, 1) for sy in (-1, 1)]


# -- composites: (part, points) pieces --------------------------------------------------------------------------------


def _table(r: np.random.Generator, n: int) -> list[Piece]:
    w, d, h = r.uniform(1.2, 2.0), r.uniform(0.9, 1.4), r.uniform(0.7, 1.1)
    top, *legs = _share(n, 5, 1, 1, 1, 1)
    places = _corners(w - 0.2, d - 0.2)
    return [("table top", _box(r, top, (w, d, 0.08)))] + [
        ("table leg", _box(r, k, (0.1, 0.1, h), (x, y, -h / 2))) for k, (x, y) in zip(legs, places, strict=True)
    ]


def _chair(r: np.random.Generator, n: int) -> list[Piece]:
    w, h, back = r.uniform(0.8, 1.1), r.uniform(0.7, 1.0), r.uniform(0.8, 1.2)
    seat, rest, *legs = _share(n, 4, 4, 1, 1, 1, 1)
    places = _corners(w - 0.12, w - 0.12)
    return [
        ("chair seat", _box(r, seat, (w, w, 0.1))),
        ("chair back", _box(r, rest, (w, 0.08, back), (0, w / 2, back / 2))),
    ] + [("chair leg", _box(r, k, (0.1, 0.1, h), (x, y, -h / 2))) for k, (x, y) in zip(legs, places, strict=True)]


def _lamp(r: np.random.Generator, n: int) -> list[Piece]:
    h = r.uniform(1.4, 2.0)
    a, b, c = _share(n, 4, 2, 2)
    shade = _tube(r, a, r.uniform(0.5, 0.7), 0.6, (0, 0, h / 2), top=r.uniform(0.25, 0.35), caps=False)
    return [
        ("lamp shade", shade),
        ("lamp pole", _tube(r, b, 0.06, h)),
        ("lamp base", _tube(r, c, 0.45, 0.1, (0, 0, -h / 2))),
    ]


def _mug(r: np.random.Generator, n: int) -> list[Piece]:
    a, b = _share(n, 5, 2)
    handle = _ring(r, b, 0.32, 0.07, np.pi)[:, [0, 2, 1]] + np.array([0.48, 0, 0])
    return [("mug body", _tube(r, a, 0.5, r.uniform(0.9, 1.2), caps=False)), ("mug handle", handle)]


def _bottle(r: np.random.Generator, n: int) -> list[Piece]:
    h = r.uniform(1.2, 1.7)
    a, b, c = _share(n, 6, 2, 1.5)
    shoulder = _tube(r, b, 0.4, 0.35, (0, 0, h / 2 + 0.175), top=0.14)
    neck = _tube(r, c, 0.14, 0.45, (0, 0, h / 2 + 0.55))
    return [("bottle body", _tube(r, a, 0.4, h)), ("bottle neck", shoulder), ("bottle neck", neck)]


def _shelf(r: np.random.Generator, n: int) -> list[Piece]:
    w, h, boards = r.uniform(0.9, 1.4), r.uniform(1.6, 2.2), int(r.integers(4, 6))
    *levels, left, right = _share(n, *[1.5] * boards, 2, 2)
    heights = np.linspace(-h / 2, h / 2, boards)
    return [("shelf board", _box(r, k, (w, 0.4, 0.05), (0, 0, z))) for k, z in zip(levels, heights, strict=True)] + [
        ("shelf side", _box(r, k, (0.05, 0.4, h), (s * w / 2, 0, 0))) for k, s in ((left, -1), (right, 1))
    ]


_SOLIDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sphere": lambda r, n: _sphere(r, n) * r.uniform(0.8, 1.2, 3),
    "box": lambda r, n: _box(r, n, r.uniform(0.6, 1.6, 3)),
    "cylinder": lambda r, n: _tube(r, n, 0.5, r.uniform(0.9, 2.2)),
    "cone": lambda r, n: _tube(r, n, r.uniform(0.5, 0.8), r.uniform(1.0, 1.8), top=0.01),
    "torus": lambda r, n: _ring(r, n, 1.0, r.uniform(0.2, 0.4)),
    "pyramid": lambda r, n: _pyramid(r, n, r.uniform(0.9, 1.5), r.uniform(0.8, 1.5)),
}
_COMPOSITES: dict[str, Callable[[np.random.Generator, int], list[Piece]]] = {
    "table": _table, "chair": _chair, "lamp": _lamp, "mug": _mug, "bottle": _bottle, "shelf": _shelf,
}  # fmt: skip


def make(name: str, r: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """``n`` points (n, 3) on a surface of the class, upright, and their parts (n,): numbers in ``PART_NAMES``, -1 for
    solids."""
    if name in _SOLIDS:
        return _SOLIDS[name](r, n), np.full(n, -1)
    if name not in _COMPOSITES:
        raise ValueError(f"no shape is called {name!r}; known: {', '.join(CLASSES)}")
    pieces = _COMPOSITES[name](r, n)
    return (
        np.concatenate([p for _, p in pieces]),
        np.concatenate([np.full(len(p), PART_NAMES.index(part)) for part, p in pieces]),
    )


# -- as a scanner sees them -------------------------------------------------------------------------------------------


def rotation(r: np.random.Generator) -> np.ndarray:
    """A rotation matrix (3, 3), even over all rotations (a random unit quaternion)."""
    w, x, y, z = (q := r.normal(size=4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def scan(
    name: str, r: np.random.Generator, points: int, turn: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One scan: points (points, 3) float32 and their parts (points,). The shape is stretched by up to a tenth along
    each axis, denser on one side than on the other by up to e in a standard deviation, in half of the scans up to a
    fifth of it is not seen from one side, turned any way (``turn``: this way), and every coordinate has noise of about
    1 % of the radius."""
    p, parts = make(name, r, 4 * points)
    direction = r.normal(size=3)
    along = p @ (direction / np.linalg.norm(direction))
    weight = np.exp(r.uniform(0, 1.0) * (along - along.mean()) / along.std())
    if r.random() < 0.5:
        weight[along > np.quantile(along, r.uniform(0.8, 1.0))] = 0
    kept = r.choice(len(p), points, replace=False, p=weight / weight.sum())
    p = (p[kept] * r.uniform(0.9, 1.1, 3)) @ (rotation(r) if turn is None else turn).T
    radius = np.sqrt(((p - p.mean(axis=0)) ** 2).sum(axis=1)).max()
    return (p + r.normal(0, 0.01 * radius, p.shape)).astype(np.float32), parts[kept]


def cloud(name: str, r: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scan as the pipelines prepare it: ``POINTS`` points in the unit sphere, and their parts. A quarter of the scans
    have up to three times as many points, thinned by farthest points."""
    count = POINTS if r.random() < 0.75 else int(r.integers(POINTS, 3 * POINTS))
    p, parts = scan(name, r, count)
    if count > POINTS:
        kept = farthest_point_sample(torch.from_numpy(p)[None], POINTS)[0].numpy()
        p, parts = p[kept], parts[kept]
    p = p - p.mean(axis=0)
    return p / np.sqrt((p**2).sum(axis=1)).max(), parts


def batch(
    r: np.random.Generator, size: int, names: tuple[str, ...] = CLASSES
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clouds (size, POINTS, 3), their classes (size,), as numbers in ``names``, and parts (size, POINTS)."""
    labels = r.integers(0, len(names), size)
    clouds, parts = zip(*(cloud(names[i], r) for i in labels), strict=True)
    return np.stack(clouds), labels, np.stack(parts)
