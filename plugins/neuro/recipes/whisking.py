"""Whisking on simple solids: a 5 x 7 array of whiskers touches a sphere, box, cylinder, cone, ring or wedge.

    python plugins/neuro/recipes/whisking.py folder --objects 20        # folder/CATEGORY/object_....npz

A quasi-static model, for data to try the networks on; it is not the paper's simulator. Every whisker is a straight cone
that leaves its base in a row-dependent elevation and swings forward and back, twice in 110 samples (1000 a second),
while the solid comes nearer. Where the whisker would lie deepest inside the solid, at the distance a along its length
L, it is pushed out by the depth d along the surface's normal n. A cone that is clamped at its base and loaded at a
answers with the stiffness

    k = 3 E I (L - a) / (a^3 L)        (Birdwell et al., J. Neurophysiol. 98, 2007), I = pi r^4 / 4 at the base,

so the force at the base is f = k d n, without its part along the whisker (nothing rubs, nothing is stretched), and the
torque is a u x f for the whisker's direction u. Units: mm, mN, mN mm. Nothing is touched: zeros.

Solids have random sizes and proportions, and each sweep a random place and rotation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

CLASSES = ("box", "cone", "cylinder", "ring", "sphere", "wedge")
ROWS, COLUMNS, STEPS, POINTS = 5, 7, 110, 16
YOUNG = 3e3  # N / mm^2


def array() -> dict[str, np.ndarray]:
    """The whiskers, row by row: bases (35, 3), lengths, base radii, azimuths at rest and elevations."""
    row, column = (m.ravel() for m in np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), indexing="ij"))
    length = 42.0 * np.exp(-0.16 * column)
    return {
        "base": np.stack([1.6 * (column - 3), 0.05 * (column - 3) ** 2, 2.0 * (2 - row)], 1),
        "length": length,
        "radius": 0.0022 * length,
        "azimuth": np.deg2rad(-15 + 7 * column),
        "elevation": np.deg2rad(18.0 * (2 - row)),
    }


def directions(amplitude: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Unit vectors of the whiskers: (sweeps,) each to (sweeps, STEPS, 35, 3); x forward, y away from the face, z up."""
    whiskers = array()
    t = np.arange(STEPS) / STEPS
    swing = amplitude[:, None] * (1 - np.cos(2 * np.pi * (2 * t[None] + phase[:, None]))) / 2
    azimuth = whiskers["azimuth"] + swing[:, :, None]
    flat = np.cos(whiskers["elevation"])
    up = np.broadcast_to(np.sin(whiskers["elevation"]), azimuth.shape)
    return np.stack([np.sin(azimuth) * flat, np.cos(azimuth) * flat, up], -1)


def depth(kind: str, p: np.ndarray, size: np.ndarray) -> np.ndarray:
    """How far points (..., 3) in the solid's frame lie inside it (negative: outside). size: (..., 3), mm."""
    a, b, c = size[..., 0], size[..., 1], size[..., 2]
    x, y, z = p[..., 0], p[..., 1], p[..., 2]
    if kind == "sphere":
        return a - np.sqrt(x * x + y * y + z * z)
    if kind == "box":
        return np.minimum(np.minimum(a - abs(x), b - abs(y)), c - abs(z))
    if kind == "cylinder":
        return np.minimum(0.7 * a - np.hypot(x, y), 1.3 * b - abs(z))
    if kind == "ring":
        return 0.38 * b - np.hypot(np.hypot(x, y) - a, z)
    if kind == "cone":  # the tip at +b, the base at -b
        slope = np.hypot(2 * b, a)
        return np.minimum((a * (b - z) - 2 * b * np.hypot(x, y)) / slope, z + b)
    # two planes that meet in an edge, cut off at its ends and at the back
    lean = np.deg2rad(20) + 0.02 * c
    return np.minimum(np.minimum(np.cos(lean) * (a - z) - abs(x) * 1.2, z + a), 1.6 * b - abs(y))


def rotations(r: np.random.Generator, count: int) -> np.ndarray:
    """Uniform rotations (count, 3, 3), from unit quaternions."""
    q = r.normal(size=(count, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def sweep(kind: str, size: np.ndarray, r: np.random.Generator) -> np.ndarray:
    """One sweep over each solid of ``size`` (sweeps, 3): forces and torques (sweeps, STEPS, 35, 6), float32."""
    whiskers, count = array(), len(size)
    u = directions(np.deg2rad(r.uniform(30, 42, count)), r.uniform(-0.08, 0.08, count))
    turn = rotations(r, count)
    centre = np.stack([r.uniform(9, 17, count), r.uniform(17, 21, count), r.uniform(-4, 4, count)], 1)
    nearer = r.uniform(2, 6, count)[:, None] * np.arange(STEPS) / STEPS
    centre = centre[:, None] - nearer[..., None] * np.array([0.3, 1.0, 0.0])

    along = (np.linspace(0.15, 0.98, POINTS)[:, None] * whiskers["length"]).astype(np.float32)  # (POINTS, 35)
    # in the solid's frame, where a whisker's points are start + a * toward
    u = u.astype(np.float32)
    start = np.einsum("nji,ntwj->ntwi", turn, whiskers["base"] - centre[:, :, None]).astype(np.float32)
    toward = np.einsum("nji,ntwj->ntwi", turn, u, optimize=True).astype(np.float32)
    sizes = size[:, None, None].astype(np.float32)
    best = np.full(u.shape[:-1], -np.inf, np.float32)
    where = np.zeros_like(best)
    for a in along:
        d = depth(kind, start + a[:, None] * toward, sizes)
        better = d > best
        best, where = np.where(better, d, best), np.where(better, a, where)
    touch, h = start + where[..., None] * toward, np.float32(0.02)
    slope = [depth(kind, touch + h * e, sizes) - depth(kind, touch - h * e, sizes) for e in np.eye(3, dtype=np.float32)]
    normal = -np.einsum("nij,ntwj->ntwi", turn, np.stack(slope, -1), optimize=True)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    L, moment = whiskers["length"], np.pi * whiskers["radius"] ** 4 / 4
    stiffness = 3 * YOUNG * moment * (L - where) / (np.maximum(where, 1.0) ** 3 * L) * 1e3  # mN / mm
    force = (stiffness * np.maximum(best, 0))[..., None] * normal
    force -= (force * u).sum(-1, keepdims=True) * u
    torque = np.cross(where[..., None] * u, force)
    return np.concatenate([force, torque], -1).astype(np.float32)


def solids(r: np.random.Generator, count: int) -> np.ndarray:
    """Sizes and proportions of ``count`` solids, (count, 3) mm."""
    return r.uniform(6.5, 10.5, (count, 1)) * r.uniform(0.8, 1.25, (count, 3))


def data(objects: int, sweeps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``sweeps`` over each of ``objects`` solids of every category, all new for another seed: recordings
    (n, STEPS, 35, 6) and categories (n,) as indices of CLASSES."""
    r = np.random.default_rng(seed)
    found, labels = [], []
    for i, kind in enumerate(CLASSES):
        size = np.repeat(solids(r, objects), sweeps, 0)
        for part in np.array_split(size, max(1, len(size) // 32)):
            found.append(sweep(kind, part, r))
        labels += [i] * len(size)
    return np.concatenate(found), np.array(labels)


def write_folder(folder: str | Path, objects: int, seed: int) -> Path:
    """One sweep over each solid as folder/CATEGORY/object_NNN.npz with ``data`` and ``label``, as the paper's files."""
    recordings, labels = data(objects, 1, seed)
    for i, (recording, label) in enumerate(zip(recordings, labels, strict=True)):
        place = Path(folder) / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(place / f"object_{i % objects:03}.npz", data=recording, label=label)
    return Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--objects", type=int, default=20, help="of each category")
    parser.add_argument("--seed", type=int, default=5)
    given = parser.parse_args()
    print(write_folder(given.folder, given.objects, given.seed))
