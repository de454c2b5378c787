"""Poses of a person over frames: key points from files, and their alignment to the reference's build.

Order of reading: :class:`Poses`, files (npz, JSON), whole-body detections, alignment.

Key points are OpenPose's: body 0 nose, 1 neck, 2-4 right shoulder, elbow, wrist, 5-7 left ones, 8-10 right hip, knee,
ankle, 11-13 left ones, 14 and 15 eyes, 16 and 17 ears (right, left), 18 and 19 toes (left, right); hands left, right
with 21 points each, 68 points of the face. x and y are shares of the picture's width and height, NaN where a point is
unseen.

Alignment: arXiv 2406.01188, section 3.3 (pose alignment); ali-vilab/UniAnimate @ 643c963 ``run_align_pose.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo import files

BODY, TOES, HAND, FACE = 18, 2, 21, 68
SEEN = 0.3  #: the confidence above which a detected point counts
EXTENSIONS = (".npz", ".json")


@dataclass
class Poses:
    """One person in ``len(poses)`` frames. body (frames, 20, 2), hands (frames, 2, 21, 2), face (frames, 68, 2)."""

    body: np.ndarray
    hands: np.ndarray
    face: np.ndarray
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.body)

    def __getitem__(self, which: slice | Sequence[int]) -> Poses:
        return Poses(self.body[which], self.hands[which], self.face[which], list(self.notes))

    def copy(self) -> Poses:
        return Poses(self.body.copy(), self.hands.copy(), self.face.copy(), list(self.notes))

    @classmethod
    def of(cls, body: Any, hands: Any = None, face: Any = None, size: Sequence[float] | None = None) -> Poses:
        """From arrays: body (frames, 18 or 20, 2 or 3), hands (frames, 2, 21, 2 or 3), face (frames, 68, 2 or 3).

        A third number is a confidence; points below :data:`SEEN` are unseen, as are negative ones. size (width,
        height): coordinates are pixels of such a picture. Raises ValueError for other shapes.
        """
        points = _points(body, (BODY, BODY + TOES), "body", size)
        frames = len(points)
        if points.shape[1] == BODY:
            points = np.concatenate([points, np.full((frames, TOES, 2), np.nan)], axis=1)
        if hands is None:
            both = np.full((frames, 2, HAND, 2), np.nan)
        else:
            given = np.asarray(hands, float)
            if given.ndim != 4 or given.shape[1:3] != (2, HAND):
                raise ValueError(f"hands are of shape {given.shape}; expected (frames, 2, {HAND}, 2 or 3)")
            both = _points(given.reshape(len(given), 2 * HAND, -1), (2 * HAND,), "hands", size)
            both = both.reshape(-1, 2, HAND, 2)
        face_ = np.full((frames, FACE, 2), np.nan) if face is None else _points(face, (FACE,), "face", size)
        if not len(both) == len(face_) == frames:
            raise ValueError(f"there are {frames} bodies, {len(both)} pairs of hands and {len(face_)} faces")
        return cls(points, both, face_)

    def save(self, path: str | Path, reference: Poses | None = None) -> Path:
        """Write an npz file that :func:`read_poses` reads."""
        path = Path(path)
        arrays = {"body": self.body, "hands": self.hands, "face": self.face}
        if reference is not None:
            arrays |= {f"reference_{k}": getattr(reference, k)[0] for k in ("body", "hands", "face")}
        kept = {k: v.astype(np.float32) for k, v in arrays.items() if not np.isnan(v).all()}
        with path.open("wb") as file:
            np.savez_compressed(file, **kept)  # type: ignore[arg-type]
        return path


def _points(given: Any, counts: tuple[int, ...], what: str, size: Sequence[float] | None) -> np.ndarray:
    points = np.array(given, float)
    if points.ndim != 3 or points.shape[1] not in counts or points.shape[2] not in (2, 3) or not len(points):
        expected = " or ".join(map(str, counts))
        raise ValueError(f"{what} is of shape {points.shape}; expected (frames, {expected}, 2 or 3)")
    seen = (points[..., :2] >= 0).all(-1)
    if points.shape[2] == 3:
        seen &= points[..., 2] > SEEN
    sides = np.ones(2) if size is None else np.asarray(size, float)
    if sides.shape != (2,) or not (sides > 0).all():
        raise ValueError(f"size is {sides.tolist()}; expected the picture's width and height in pixels")
    points = points[..., :2] / sides
    points[~seen] = np.nan
    largest = np.nanmax(points) if seen.any() else 0.0
    if size is None and largest > 4:
        raise ValueError(
            f"{what} has coordinates up to {largest:.0f}; expected shares of the picture's width and height, or pixels "
            "with the picture's size (width, height) beside them"
        )
    return points


# -- files ------------------------------------------------------------------------------------------------------------


def read_poses(path: str | Path) -> tuple[Poses, Poses | None]:
    """The poses of a file, and the reference's pose where the file has one.

    npz: arrays ``body`` and, if there are, ``hands``, ``face``, ``size`` (see :meth:`Poses.of`), the same with
    ``reference_`` in front for one frame. JSON: a list of frames as OpenPose and ControlNet's tools write them
    (``people`` with ``pose_keypoints_2d`` of 18 or 25 points, ``canvas_width``, ``canvas_height``), the first person of
    each; or an object with ``frames`` and ``reference``. Raises ValueError for anything else.
    """
    path = Path(path)
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    if path.suffix.lower() == ".json":
        return _read_json(path)
    raise ValueError(f"{path}: expected key points in one of {', '.join(EXTENSIONS)}")


def _read_npz(path: Path) -> tuple[Poses, Poses | None]:
    arrays = files.read_arrays(path)
    if "body" not in arrays:
        raise ValueError(f"{path} has the arrays {sorted(arrays)}; expected body (frames, 18 or 20, 2 or 3)")
    size = arrays.get("size")
    poses = _named(path, arrays.get("body"), arrays.get("hands"), arrays.get("face"), size)
    if "reference_body" not in arrays:
        return poses, None
    body, hands, face = (
        None if (a := arrays.get(f"reference_{k}")) is None else a[None] for k in ("body", "hands", "face")
    )
    return poses, _named(path, body, hands, face, arrays.get("reference_size", size))


def _named(path: Path, body: Any, hands: Any, face: Any, size: Any) -> Poses:
    try:
        return Poses.of(body, hands, face, size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> tuple[Poses, Poses | None]:
    content = files.read_json(path)
    reference = None
    if isinstance(content, Mapping) and "frames" in content:
        reference, content = content.get("reference"), content["frames"]
    frames = [content] if isinstance(content, Mapping) else content
    if not isinstance(frames, list) or not frames:
        raise ValueError(f"{path} holds no frames; expected a list of objects with 'people'")
    return _people(path, frames), None if reference is None else _people(path, [reference])


def _people(path: Path, frames: list[Any]) -> Poses:
    bodies, hands, faces, several = [], [], [], 0
    for number, frame in enumerate(frames):
        people = frame.get("people") if isinstance(frame, Mapping) else None
        if not isinstance(people, list) or not all(isinstance(one, Mapping) for one in people):
            raise ValueError(f"{path}: frame {number} has no 'people', a list of objects with pose_keypoints_2d")
        several += len(people) > 1
        person = people[0] if people else {}
        size = frame.get("canvas_width"), frame.get("canvas_height")
        where = f"{path}: frame {number}"
        bodies.append(_body(_flat(person, "pose_keypoints_2d", (BODY, 25), size, where)))
        hands.append([_flat(person, f"hand_{s}_keypoints_2d", (HAND,), size, where) for s in ("left", "right")])
        faces.append(_flat(person, "face_keypoints_2d", (FACE, FACE + 2), size, where)[:FACE])
    poses = Poses.of(np.array(bodies), np.array(hands), np.array(faces))
    if several:
        poses.notes.append(f"{several} frames of {path.name} show several people; the first of each was taken")
    return poses


def _flat(
    person: Mapping[str, Any], key: str, counts: tuple[int, ...], size: tuple[Any, Any], where: str
) -> np.ndarray:
    """x, y, confidence in a row to (points, 3), coordinates as shares; unseen ones where the key is missing."""
    values = person.get(key)
    if not values:
        return np.full((counts[0], 3), -1.0)
    expected = " or ".join(str(3 * n) for n in counts)
    if not isinstance(values, list) or not all(v is None or isinstance(v, (int, float)) for v in values):
        raise ValueError(f"{where}: {key} is {values!r:.60}; expected {expected} numbers")
    if len(values) % 3 or len(values) // 3 not in counts:
        raise ValueError(f"{where}: {key} holds {len(values)} numbers; expected {expected}")
    points = np.array([-1.0 if v is None else v for v in values], float).reshape(-1, 3)
    seen = points[:, 2] > 0
    if seen.any() and points[seen, :2].max() > 4:
        if not all(isinstance(side, (int, float)) and side > 0 for side in size):
            raise ValueError(f"{where} is in pixels without canvas_width and canvas_height, which say of what")
        points[:, :2] /= np.array(size, float)
    points[~seen] = -1.0
    return points


def _body(points: np.ndarray) -> np.ndarray:
    """18 or OpenPose's 25 points to 20: without the middle of the hips, toes as the middle of a foot's two."""
    if len(points) == BODY:
        return np.concatenate([points, np.full((TOES, 3), -1.0)])
    toes = [_middle(points[a], points[b]) for a, b in ((19, 20), (22, 23))]
    return np.concatenate([points[:8], points[9:19], np.array(toes)])


def _middle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a + b) / 2 if min(a[2], b[2]) > SEEN else np.full(3, -1.0)


# -- whole-body detections --------------------------------------------------------------------------------------------

#: OpenPose's body from COCO's: nose, (neck), right and left arm, right and left leg, eyes, ears
_FROM_COCO = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)


def from_coco_wholebody(points: np.ndarray, scores: np.ndarray, size: Sequence[float]) -> Poses:
    """One person's COCO-WholeBody points, (frames, 133, 2) in pixels and (frames, 133), as DWPose gives them.

    The neck is the middle of the shoulders, a foot's toes the middle of its two, each seen where both are.
    """
    points, scores = np.asarray(points, float), np.asarray(scores, float)
    if points.ndim != 3 or points.shape[1:] != (133, 2) or scores.shape != points.shape[:2]:
        raise ValueError(f"points are {points.shape}, scores {scores.shape}; expected (frames, 133, 2), (frames, 133)")
    marked = np.concatenate([points, scores[..., None]], axis=-1)
    body = marked[:, list(_FROM_COCO)]
    for place, (a, b) in {1: (5, 6)}.items():
        body[:, place] = np.array([_middle(x, y) for x, y in zip(marked[:, a], marked[:, b], strict=True)])
    toes = [
        np.array([_middle(x, y) for x, y in zip(marked[:, a], marked[:, b], strict=True)])
        for a, b in ((17, 18), (20, 21))
    ]
    body = np.concatenate([body, np.stack(toes, axis=1)], axis=1)
    hands = marked[:, 91:].reshape(len(marked), 2, HAND, 3)
    return Poses.of(body, hands, marked[:, 23:91], size)


# -- alignment --------------------------------------------------------------------------------------------------------

#: (from, to, body points that move along, hand that moves along): limbs from the neck outwards
LIMBS: tuple[tuple[int, int, tuple[int, ...], int | None], ...] = (
    (1, 0, (0, 14, 15, 16, 17), None),
    (1, 2, (2, 3, 4), 1),
    (1, 5, (5, 6, 7), 0),
    (2, 3, (3, 4), 1),
    (3, 4, (4,), 1),
    (5, 6, (6, 7), 0),
    (6, 7, (7,), 0),
    (0, 14, (14, 16), None),
    (0, 15, (15, 17), None),
    (14, 16, (16,), None),
    (15, 17, (17,), None),
    (8, 9, (9, 10, 19), None),
    (9, 10, (10, 19), None),
    (11, 12, (12, 13, 18), None),
    (12, 13, (13, 18), None),
)


def align(poses: Poses, reference: Poses) -> Poses:
    """The same movements by a body built as the reference's.

    Widths are scaled by the ratio of the shoulders' and heights by that of the trunks in the first frame; then every
    limb, from the neck outwards, is given the length that it has in the reference relative to the first frame, and all
    that hangs on it moves along; at last the first frame's neck comes to the reference's, and all frames move with it.
    Lengths are of coordinates in shares of the picture, as the original takes them.

    A limb that is unseen in the reference or the first frame keeps its length, and a missing trunk the ratio of the
    shoulders (and the other way round), with a note; the original computes with the marks of unseen points there.
    Raises ValueError where neither is seen, or the neck is not.
    """
    found, target = poses.copy(), reference.body[0]
    first = found.body[0]
    across = (target[5, 0] - target[2, 0]) / (first[5, 0] - first[2, 0] or np.nan)
    trunk = [0.5 * (b[8, 1] + b[11, 1]) - 0.5 * (b[2, 1] + b[5, 1]) for b in (target, first)]
    down = trunk[0] / (trunk[1] or np.nan)
    if (np.isnan(across) and np.isnan(down)) or np.isnan(target[1]).any() or np.isnan(first[1]).any():
        raise ValueError("the reference and the first pose must both show the neck and the shoulders or the hips")
    if np.isnan(across) or np.isnan(down):
        found.notes.append("shoulders or hips are unseen; widths and heights were scaled alike")
        across, down = (down, down) if np.isnan(across) else (across, across)
    for points in (found.body, found.hands, found.face):
        points *= np.array([across, down])
    kept = 0
    for a, b, along, hand in LIMBS:
        now = np.linalg.norm(first[b] - first[a])
        ratio = np.linalg.norm(target[b] - target[a]) / (now or np.nan)
        if np.isnan(ratio):
            kept += 1
            continue
        move = np.nan_to_num((found.body[:, b] - found.body[:, a]) * (ratio - 1))
        found.body[:, list(along)] += move[:, None]
        if hand is not None:
            found.hands[:, hand] += move[:, None]
    if kept:
        found.notes.append(f"{kept} of {len(LIMBS)} limbs are unseen in the reference or the first pose; kept as long")
    shift = target[1] - found.body[0, 1]
    for points in (found.body, found.hands, found.face):
        points += shift
    return found
