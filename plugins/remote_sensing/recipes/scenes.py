"""Generated pairs of aerial pictures with a map of what changed between them: the data of the demo recipe.

A scene is drawn twice, at two dates, at 1 m a pixel: meadow and wood, a road, fields with rows, buildings with lit and
unlit halves of a roof. Between the dates

- *changes* (label 1): fields are laid out, given up, or sown with something else (rows of another direction and width);
  buildings are put up, pulled down, or replaced by one with another roof;
- *nuisances* (label 0): the season, which recolours everything that grows, each kind in its own way; the sun, which
  moves the shadows; light, haze and noise; cars; and a registration error of up to 1.5 pixels of the later picture.

The label lies on the grid of the earlier picture. Everything follows from the seed.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, shift, zoom

MAX_SHIFT = 1.5  #: pixels, of the later picture against the earlier one
MARGIN = 4  #: drawn around a scene and cut off, so that a shift brings in no border
#: colours in spring, summer, autumn and winter, and back: what the season does to each kind of ground
SEASONS = {
    "meadow": [(112, 146, 74), (126, 138, 76), (140, 130, 88), (128, 122, 96)],
    "wood": [(72, 108, 52), (46, 82, 44), (128, 92, 44), (92, 82, 70)],
    "wheat": [(98, 142, 66), (206, 178, 100), (186, 164, 118), (122, 134, 88)],
    "maize": [(132, 112, 84), (62, 112, 50), (156, 136, 74), (140, 120, 96)],
    "soil": [(128, 98, 72), (142, 112, 84), (118, 90, 66), (108, 86, 70)],
}
ROOFS = [(176, 84, 62), (120, 122, 128), (214, 212, 206), (92, 70, 62), (70, 92, 120)]
ROAD = (128, 126, 124)
CARS = [(230, 230, 230), (40, 40, 46), (170, 36, 36), (50, 80, 150)]


def seasonal(kind: str, season: float) -> np.ndarray:
    """The colour of ``kind`` at ``season`` (0 to 4, cyclic; 0 spring, 1 summer ...)."""
    colours = np.array(SEASONS[kind], np.float32)
    low = int(season) % 4
    part = season - int(season)
    return colours[low] * (1 - part) + colours[(low + 1) % 4] * part


def smooth_noise(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    """(size, size) of deviation about 1, varying over ``cell`` pixels."""
    coarse = rng.normal(size=(size // cell + 3, size // cell + 3)).astype(np.float32)
    return zoom(coarse, cell, order=1)[:size, :size]


def rectangle(size: int, box: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inside, u, v): which pixels a turned rectangle covers, and its own coordinates in pixels."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    cos, sin = np.cos(box["angle"]), np.sin(box["angle"])
    u = (x - box["x"]) * cos + (y - box["y"]) * sin
    v = (y - box["y"]) * cos - (x - box["x"]) * sin
    return (np.abs(u) <= box["width"] / 2) & (np.abs(v) <= box["height"] / 2), u, v


def _overlaps(box: dict, others: list[dict]) -> bool:
    reach = max(box["width"], box["height"]) * 0.6
    return any(
        np.hypot(box["x"] - o["x"], box["y"] - o["y"]) < reach + max(o["width"], o["height"]) * 0.6 for o in others
    )


def _place(
    rng: np.random.Generator, size: int, low: float, high: float, angle: float, taken: list[dict]
) -> dict | None:
    for _ in range(8):
        box = {
            "x": rng.uniform(0, size), "y": rng.uniform(0, size), "width": rng.uniform(low, high),
            "height": rng.uniform(low, high), "angle": angle + rng.normal(0, 0.08) + rng.integers(2) * np.pi / 2,
        }  # fmt: skip
        if not _overlaps(box, taken):
            return box
    return None


def _field(rng: np.random.Generator, other_than: dict | None = None) -> dict:
    """What grows in a field: a kind, and rows of a direction (along or across) and a width."""
    kinds = [k for k in ("wheat", "maize", "soil") if other_than is None or k != other_than["kind"]]
    across = bool(rng.integers(2)) if other_than is None else not other_than["across"]
    return {"kind": str(rng.choice(kinds)), "across": across, "period": rng.uniform(4, 7)}


def _building(rng: np.random.Generator, other_than: dict | None = None) -> dict:
    roofs = [i for i in range(len(ROOFS)) if other_than is None or i != other_than["roof"]]
    return {"roof": int(rng.choice(roofs)), "tone": rng.uniform(0.9, 1.1), "height_m": rng.uniform(3, 8)}


def layout(rng: np.random.Generator, size: int) -> list[dict]:
    """The objects of a scene, fields first: boxes with what is there ``before`` and ``after`` (None: nothing)."""
    angle, objects, taken = rng.uniform(0, np.pi / 2), [], []
    area = size * size
    wanted = [("field", 26, 52, _field)] * max(1, round(area / 4500)) + [("building", 13, 28, _building)] * max(
        1, round(area / 3000)
    )
    quiet = rng.random() < 0.1  # now and then nothing changes at all
    for what, low, high, draw in wanted:
        box = _place(rng, size, low, high, angle, taken)
        if box is None:
            continue
        taken.append(box)
        one = draw(rng)
        fate = rng.choice(["same", "appears", "vanishes", "changes"], p=[0.49, 0.17, 0.17, 0.17])
        if quiet:
            fate = "same"
        before, after = {
            "same": (one, one), "appears": (None, one), "vanishes": (one, None), "changes": (one, draw(rng, one)),
        }[str(fate)]  # fmt: skip
        objects.append({"what": what, "box": box, "before": before, "after": after})
    return objects


def ground(rng: np.random.Generator, size: int) -> dict:
    """What lies under the objects at both dates: where wood is, textures, and the road."""
    wood = smooth_noise(rng, size, 24) + 0.4 * smooth_noise(rng, size, 8) > 1.1
    road = rectangle(size, {
        "x": rng.uniform(0, size), "y": rng.uniform(0, size), "width": 4 * size, "height": rng.uniform(5, 9),
        "angle": rng.uniform(0, np.pi),
    })  # fmt: skip
    return {
        "wood": wood, "broad": smooth_noise(rng, size, 20), "fine": rng.normal(size=(size, size)).astype(np.float32),
        "crowns": smooth_noise(rng, size, 4), "road": road if rng.random() < 0.7 else None,
    }  # fmt: skip


def draw(rng: np.random.Generator, size: int, under: dict, objects: list[dict], date: str, season: float) -> np.ndarray:
    """One date of a scene, (size, size, 3) float32 in 0 to 255, before light and noise."""
    picture = np.broadcast_to(seasonal("meadow", season), (size, size, 3)).copy()
    picture *= (1 + 0.06 * under["broad"] + 0.03 * under["fine"])[..., None]
    crowns = seasonal("wood", season) * (1 + 0.16 * under["crowns"] + 0.06 * under["fine"])[..., None]
    picture[under["wood"]] = crowns[under["wood"]]
    if under["road"] is not None:
        inside, u, v = under["road"]
        picture[inside] = np.array(ROAD, np.float32) * (1 + 0.03 * under["fine"][inside])[:, None]
        for _ in range(rng.integers(0, 5)):
            at, lane = rng.uniform(-size, size), rng.choice([-1.5, 1.5])
            car = inside & (np.abs(u - at) < 2.2) & (np.abs(v - lane) < 1.0)
            picture[car] = CARS[rng.integers(len(CARS))]
    for one in objects:
        if one["what"] == "field" and one[date] is not None:
            inside, u, v = rectangle(size, one["box"])
            rows = np.sin((u if one[date]["across"] else v) * (2 * np.pi / one[date]["period"]))
            shade = 1 + 0.12 * rows + 0.03 * under["broad"] + 0.03 * under["fine"]
            picture[inside] = (seasonal(one[date]["kind"], season) * shade[..., None])[inside]
    sun = rng.uniform(0, 2 * np.pi)
    length = rng.uniform(0.4, 1.0)
    standing = [o for o in objects if o["what"] == "building" and o[date] is not None]
    for one in standing:
        box, far = one["box"], one[date]["height_m"] * length
        cast = {**box, "x": box["x"] - far * np.cos(sun) / 2, "y": box["y"] - far * np.sin(sun) / 2}
        shadow, _, _ = rectangle(size, {**cast, "width": box["width"] + far / 2, "height": box["height"] + far / 2})
        picture[shadow] *= 0.6
    for one in standing:
        inside, u, v = rectangle(size, one["box"])
        along = v if one["box"]["width"] >= one["box"]["height"] else u  # the ridge follows the longer side
        facing = np.where(along > 0, 1.0, -1.0) * np.sign(np.sin(sun - one["box"]["angle"]) + 1e-6)
        shade = one[date]["tone"] * (1 + 0.13 * facing) + 0.02 * under["fine"]
        picture[inside] = (np.array(ROOFS[one[date]["roof"]], np.float32) * shade[..., None])[inside]
    return picture


def photograph(rng: np.random.Generator, picture: np.ndarray, move: tuple[float, float]) -> np.ndarray:
    """Registration error, optics, light, haze and noise: to uint8, with the margin cut off."""
    picture = shift(picture, (*move, 0), order=1, mode="nearest")
    picture = gaussian_filter(picture, (0.5, 0.5, 0))
    light = rng.uniform(0.85, 1.15) * (1 + rng.normal(0, 0.03, 3))
    haze = rng.uniform(0, 18)
    picture = picture * light + haze + rng.normal(0, 3.0, picture.shape)
    return np.clip(picture[MARGIN:-MARGIN, MARGIN:-MARGIN].round(), 0, 255).astype(np.uint8)


def changed(size: int, objects: list[dict]) -> np.ndarray:
    """(size, size) bool: what is on top differs between the dates."""
    owner = {date: np.zeros((size, size), np.int32) for date in ("before", "after")}
    for number, one in enumerate(objects, start=1):
        inside, _, _ = rectangle(size, one["box"])
        same = one["before"] is one["after"]
        for i, date in enumerate(("before", "after")):
            if one[date] is not None:
                owner[date][inside] = 2 * number + (0 if same else i)
    return owner["before"] != owner["after"]


def scene_pair(seed: int, size: int = 128) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures (size, size, 3) of both dates and the label (size, size), 1 where changed; all uint8."""
    rng = np.random.default_rng(seed)
    full = size + 2 * MARGIN
    under, objects = ground(rng, full), layout(rng, full)
    radius, direction = MAX_SHIFT * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
    pictures = []
    for date, move in (
        ("before", (0.0, 0.0)),
        ("after", (radius * np.cos(direction), radius * np.sin(direction))),
    ):
        season = rng.uniform(0, 4)
        pictures.append(photograph(rng, draw(rng, full, under, objects, date, season), move))
    label = changed(full, objects)[MARGIN:-MARGIN, MARGIN:-MARGIN].astype(np.uint8)
    return pictures[0], pictures[1], label
