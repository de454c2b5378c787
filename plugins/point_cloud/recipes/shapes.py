"""Generated clouds of solids and household-like composites: random pose, proportions, noise, occlusion and density."""

from __future__ import annotations

import numpy as np

CLASSES = (
    "sphere", "box", "cylinder", "cone", "torus", "pyramid", "table", "chair", "lamp", "mug", "bottle", "shelf",
)  # fmt: skip


def _box(r, n, size, centre=(0, 0, 0)):
    size = np.asarray(size, dtype=float)
    area = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    axis = r.choice(3, n, p=area / area.sum())
    p = r.uniform(-0.5, 0.5, (n, 3))
    p[np.arange(n), axis] = r.choice([-0.5, 0.5], n)
    return p * size + centre


def _tube(r, n, radius, height, centre=(0, 0, 0), top=None, caps=True):
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


def _sphere(r, n, radius=1.0, centre=(0, 0, 0)):
    p = r.normal(size=(n, 3))
    return radius * p / np.linalg.norm(p, axis=1, keepdims=True) + centre


def _ring(r, n, major, minor, arc=2 * np.pi):
    phi, theta = r.uniform(-arc / 2, arc / 2, n), r.uniform(0, 2 * np.pi, n)
    rho = major + minor * np.cos(theta)
    return np.stack([rho * np.cos(phi), rho * np.sin(phi), minor * np.sin(theta)], 1)


def _share(n, *weights):
    cut = np.round(np.cumsum(weights) / np.sum(weights) * n).astype(int)
    return np.diff([0, *cut])


def make(name: str, r: np.random.Generator, n: int) -> np.ndarray:
    """``n`` points on a surface of the class, upright, before pose and noise."""
    u = r.uniform
    if name == "sphere":
        return _sphere(r, n) * u(0.8, 1.2, 3)
    if name == "box":
        return _box(r, n, u(0.6, 1.6, 3))
    if name == "cylinder":
        return _tube(r, n, 0.5, u(0.9, 2.2))
    if name == "cone":
        return _tube(r, n, u(0.5, 0.8), u(1.0, 1.8), top=0.01)
    if name == "torus":
        return _ring(r, n, 1.0, u(0.2, 0.4))
    if name == "pyramid":
        base, height, t = u(0.9, 1.5), u(0.8, 1.5), 1 - np.sqrt(u(0, 1, n))
        p = _box(r, n, (base, base, 0.0))
        rim = r.random(n) < 0.7
        edge, side = u(-0.5, 0.5, n), r.integers(0, 4, n)
        x = np.select([side == 0, side == 1], [edge, edge], np.where(side == 2, 0.5, -0.5))
        y = np.select([side == 0, side == 1], [0.5, -0.5], edge)
        p[rim] = np.stack([x * base * (1 - t), y * base * (1 - t), t * height], 1)[rim]
        return p
    if name == "table":
        w, d, h = u(1.2, 2.0), u(0.9, 1.4), u(0.7, 1.1)
        parts = _share(n, 5, 1, 1, 1, 1)
        legs = [(sx * (w / 2 - 0.1), sy * (d / 2 - 0.1), -h / 2) for sx in (-1, 1) for sy in (-1, 1)]
        return np.concatenate(
            [_box(r, parts[0], (w, d, 0.08))]
            + [_box(r, k, (0.1, 0.1, h), c) for k, c in zip(parts[1:], legs, strict=True)]
        )
    if name == "chair":
        w, h, back = u(0.8, 1.1), u(0.7, 1.0), u(0.8, 1.2)
        parts = _share(n, 4, 4, 1, 1, 1, 1)
        legs = [(sx * (w / 2 - 0.06), sy * (w / 2 - 0.06), -h / 2) for sx in (-1, 1) for sy in (-1, 1)]
        return np.concatenate(
            [_box(r, parts[0], (w, w, 0.1)), _box(r, parts[1], (w, 0.08, back), (0, w / 2, back / 2))]
            + [_box(r, k, (0.1, 0.1, h), c) for k, c in zip(parts[2:], legs, strict=True)]
        )
    if name == "lamp":
        h = u(1.4, 2.0)
        a, b, c = _share(n, 4, 2, 2)
        shade = _tube(r, a, u(0.5, 0.7), 0.6, (0, 0, h / 2), top=u(0.25, 0.35), caps=False)
        return np.concatenate([shade, _tube(r, b, 0.06, h), _tube(r, c, 0.45, 0.1, (0, 0, -h / 2))])
    if name == "mug":
        a, b = _share(n, 5, 2)
        body = _tube(r, a, 0.5, u(0.9, 1.2), caps=False)
        handle = _ring(r, b, 0.32, 0.07, np.pi)[:, [0, 2, 1]] + np.array([0.48, 0, 0])
        return np.concatenate([body, handle])
    if name == "bottle":
        h = u(1.2, 1.7)
        a, b, c = _share(n, 6, 2, 1.5)
        return np.concatenate(
            [
                _tube(r, a, 0.4, h),
                _tube(r, b, 0.4, 0.35, (0, 0, h / 2 + 0.175), top=0.14),
                _tube(r, c, 0.14, 0.45, (0, 0, h / 2 + 0.55)),
            ]
        )
    if name == "shelf":
        w, h, boards = u(0.9, 1.4), u(1.6, 2.2), int(r.integers(4, 6))
        parts = _share(n, *[1.5] * boards, 2, 2)
        levels = [
            _box(r, k, (w, 0.4, 0.05), (0, 0, z))
            for k, z in zip(parts, np.linspace(-h / 2, h / 2, boards), strict=False)
        ]
        sides = [_box(r, k, (0.05, 0.4, h), (s * w / 2, 0, 0)) for k, s in zip(parts[-2:], (-1, 1), strict=True)]
        return np.concatenate(levels + sides)
    raise ValueError(f"no shape is called {name!r}; known: {', '.join(CLASSES)}")


def cloud(name: str, r: np.random.Generator, points: int = 256) -> np.ndarray:
    """One cloud (points, 3) float32: turned about z and tilted up to 20 degrees, scaled, noisy, with a side cut away
    and denser on one side than on the other."""
    p = make(name, r, 4 * points)
    direction = r.normal(size=3)
    along = p @ (direction / np.linalg.norm(direction))
    weight = np.exp(r.uniform(0, 1.0) * (along - along.mean()) / along.std())
    if r.random() < 0.5:  # occlusion: up to a fifth of the points on one side are not seen
        weight[along > np.quantile(along, r.uniform(0.8, 1.0))] = 0
    p = p[r.choice(len(p), points, replace=False, p=weight / weight.sum())]
    a, b, c = r.uniform(0, 2 * np.pi), *r.normal(0, np.radians(10), 2).clip(-np.radians(20), np.radians(20))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    tilt_y = np.array([[np.cos(c), 0, np.sin(c)], [0, 1, 0], [-np.sin(c), 0, np.cos(c)]])
    p = (p * r.uniform(0.9, 1.1, 3)) @ (tilt_y @ tilt_x @ turn).T
    p = p - p.mean(axis=0)
    p = p / np.sqrt((p**2).sum(axis=1)).max()
    return (p + r.normal(0, 0.01, p.shape)).astype(np.float32)


def batch(r: np.random.Generator, size: int, points: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Clouds (size, points, 3) and their classes (size,)."""
    labels = r.integers(0, len(CLASSES), size)
    return np.stack([cloud(CLASSES[i], r, points) for i in labels]), labels
