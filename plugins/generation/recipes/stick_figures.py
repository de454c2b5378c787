"""Generated people to try an animation model on: coloured figures of random build and clothes that wave, walk and bend.

A figure is drawn with its clothes (the video) or as key points (the poses); the two agree by construction.

    python plugins/generation/recipes/stick_figures.py folder --clips 20

writes clips as ``zoo train-animation`` reads them: CLIP/frames.gif, CLIP/poses.npz.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from zoo_generation.unianimate.data import Clip
from zoo_generation.unianimate.poses import Poses

#: length of a limb as a share of the picture, before the figure's own build
TRUNK, SHOULDER, HIP, UPPER_ARM, LOWER_ARM, THIGH, SHANK, NECK = 0.24, 0.085, 0.05, 0.13, 0.12, 0.16, 0.16, 0.1
FINE = 4  #: pictures are drawn so many times as large and shrunk, which smooths edges


@dataclass
class Figure:
    """Who is shown: build and colours."""

    build: np.ndarray  #: (3,) factors of trunk, arms, legs
    thickness: float
    shirt: np.ndarray
    trousers: np.ndarray
    skin: np.ndarray
    background: np.ndarray


def random_figure(r: np.random.Generator) -> Figure:
    def colour(low: int, high: int) -> np.ndarray:
        return r.integers(low, high, 3).astype(float)

    shirt, trousers, background = colour(0, 256), colour(0, 256), colour(0, 256)
    while min(np.abs(shirt - background).sum(), np.abs(trousers - background).sum()) < 150:
        background = colour(0, 256)
    skin = np.array([224.0, 172.0, 140.0]) * r.uniform(0.45, 1.1)
    return Figure(r.uniform(0.85, 1.15, 3), r.uniform(0.05, 0.075), shirt, trousers, np.clip(skin, 0, 255), background)


def random_motion(r: np.random.Generator, frames: int) -> dict[str, np.ndarray]:
    """Angles (radians) and places over the frames: smooth, of random kind, size and speed."""
    phase = np.arange(frames) * r.uniform(0.25, 0.6) + r.uniform(0, 6.28)
    wave, step = np.sin(phase), np.sin(phase + r.uniform(0, 6.28))
    lift = r.uniform(0, 2.6, 2)
    return {
        "lean": 0.15 * r.uniform(-1, 1) + 0.12 * r.uniform(0, 1) * wave,
        "right_arm": lift[0] + r.uniform(0.2, 0.7) * wave,
        "left_arm": lift[1] + r.uniform(0.2, 0.7) * (step if r.random() < 0.5 else wave),
        "right_elbow": r.uniform(-0.8, 0.8) + 0.5 * step,
        "left_elbow": r.uniform(-0.8, 0.8) + 0.5 * wave,
        "right_leg": r.uniform(0.05, 0.5) * wave + 0.12,
        "left_leg": -r.uniform(0.05, 0.5) * wave + 0.12,
        "right_knee": -0.4 * np.maximum(step, 0),
        "left_knee": -0.4 * np.maximum(-step, 0),
        "x": 0.5 + r.uniform(-0.08, 0.08) + r.uniform(-0.06, 0.06) * wave,
        "y": 0.26 + r.uniform(-0.03, 0.03) + 0.02 * np.abs(step),
    }


def standing(r: np.random.Generator) -> dict[str, np.ndarray]:
    """One frame of somebody who stands, arms a little away."""
    still = {"lean": 0.0, "right_arm": 0.5, "left_arm": 0.5, "right_elbow": 0.1, "left_elbow": 0.1}
    still |= {"right_leg": 0.12, "left_leg": 0.12, "right_knee": 0.0, "left_knee": 0.0, "x": 0.5, "y": 0.27}
    return {k: np.array([v + r.normal(0, 0.02)]) for k, v in still.items()}


def _along(angle: np.ndarray, length: float) -> np.ndarray:
    """A limb that hangs down at angle 0, (frames, 2)."""
    return length * np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def key_points(figure: Figure, motion: dict[str, np.ndarray]) -> np.ndarray:
    """(frames, 20, 2) in shares of a square picture, toes unseen."""
    trunk, arms, legs = figure.build
    m, points = motion, np.full((len(motion["x"]), 20, 2), np.nan)
    neck = np.stack([m["x"], m["y"]], axis=-1)
    down = _along(m["lean"], 1.0)
    side = np.stack([-down[:, 1], down[:, 0]], axis=-1)  # towards the figure's right, the viewer's left
    hips = neck + TRUNK * trunk * down
    points[:, 1], points[:, 0] = neck, neck - NECK * down
    for sign, (shoulder, hip), name in ((1, (2, 8), "right"), (-1, (5, 11), "left")):
        points[:, shoulder] = neck + sign * SHOULDER * side
        points[:, hip] = hips + sign * HIP * side
        outwards = -sign * (m[f"{name}_arm"]) + m["lean"]
        points[:, shoulder + 1] = points[:, shoulder] + _along(outwards, UPPER_ARM * arms)
        bent = outwards - sign * m[f"{name}_elbow"]
        points[:, shoulder + 2] = points[:, shoulder + 1] + _along(bent, LOWER_ARM * arms)
        leg = -sign * m[f"{name}_leg"]
        points[:, hip + 1] = points[:, hip] + _along(leg, THIGH * legs)
        points[:, hip + 2] = points[:, hip + 1] + _along(leg - sign * m[f"{name}_knee"], SHANK * legs)
        points[:, 14 if sign == 1 else 15] = points[:, 0] + 0.018 * (sign * side - 0.5 * down)
        points[:, 16 if sign == 1 else 17] = points[:, 0] + 0.04 * sign * side
    return points


def picture(figure: Figure, points: np.ndarray, size: int) -> np.ndarray:
    """One frame, (size, size, 3) uint8: limbs as thick lines, from the back to the front."""
    wide = size * FINE
    image = Image.new("RGB", (wide, wide), tuple(figure.background.astype(int)))
    pen, p = ImageDraw.Draw(image), points * wide
    thick = figure.thickness * wide

    def limb(a: int, b: int, colour: np.ndarray, width: float) -> None:
        fill = tuple(colour.astype(int))
        pen.line([tuple(p[a]), tuple(p[b])], fill=fill, width=round(width))
        for x, y in (p[a], p[b]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=fill)

    for hip in (8, 11):
        limb(hip, hip + 1, figure.trousers, thick)
        limb(hip + 1, hip + 2, figure.trousers, 0.85 * thick)
    middle = (p[8] + p[11]) / 2
    trunk = [tuple(p[2]), tuple(p[5]), tuple(p[11]), tuple(p[8])]
    pen.polygon(trunk, fill=tuple(figure.shirt.astype(int)))
    pen.line([tuple(p[1]), tuple(middle)], fill=tuple(figure.shirt.astype(int)), width=round(1.6 * thick))
    for shoulder in (2, 5):
        limb(shoulder, shoulder + 1, figure.shirt, 0.85 * thick)
        limb(shoulder + 1, shoulder + 2, figure.skin, 0.7 * thick)
    x, y = p[0]
    head = 0.07 * wide
    pen.ellipse((x - head, y - head, x + head, y + head), fill=tuple(figure.skin.astype(int)))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def random_clip(r: np.random.Generator, frames: int, size: int) -> Clip:
    """A video of ``frames`` frames with its poses, and the reference: the same figure, standing."""
    figure = random_figure(r)
    points, still = key_points(figure, random_motion(r, frames)), key_points(figure, standing(r))
    video = np.stack([picture(figure, p, size) for p in points])
    return Clip(video, Poses.of(points), picture(figure, still[0], size), Poses.of(still))


def save_clip(clip: Clip, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    first, *rest = [Image.fromarray(f) for f in clip.frames]
    first.save(folder / "frames.gif", save_all=True, append_images=rest, duration=100, loop=0)
    assert clip.reference is not None
    Image.fromarray(clip.reference).save(folder / "reference.png")
    clip.poses.save(folder / "poses.npz", clip.reference_pose)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    r = np.random.default_rng(arguments.seed)
    for i in range(arguments.clips):
        save_clip(random_clip(r, arguments.frames, arguments.size), arguments.out / f"clip_{i:04d}")


if __name__ == "__main__":
    main()
