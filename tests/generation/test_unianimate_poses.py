"""Poses: files, detections, alignment, drawing."""

import json

import numpy as np
import pytest
from PIL import Image

from zoo_generation.unianimate import media
from zoo_generation.unianimate.drawing import COLOURS, FINGERS, draw
from zoo_generation.unianimate.drawing import LIMBS as DRAWN
from zoo_generation.unianimate.poses import LIMBS, Poses, align, from_coco_wholebody, read_poses

BODY = np.array(
    [
        [0.5, 0.15], [0.5, 0.25], [0.42, 0.25], [0.38, 0.36], [0.36, 0.46], [0.58, 0.25], [0.62, 0.36], [0.64, 0.46],
        [0.45, 0.5], [0.45, 0.66], [0.45, 0.82], [0.55, 0.5], [0.55, 0.66], [0.55, 0.82], [0.48, 0.14], [0.52, 0.14],
        [0.46, 0.15], [0.54, 0.15], [0.57, 0.86], [0.43, 0.86],
    ]
)  # fmt: skip


def person(frames=3, seed=0):
    r = np.random.default_rng(seed)
    body = BODY[None] + r.normal(0, 0.01, (frames, 20, 2))
    hands = body[:, [7, 4], None] + r.normal(0, 0.01, (frames, 2, 21, 2))
    face = body[:, :1] + r.normal(0, 0.02, (frames, 68, 2))
    return Poses.of(body, hands, face)


def length(poses, a, b, frame=0):
    return np.linalg.norm(poses.body[frame, b] - poses.body[frame, a])


# -- files


def test_npz(tmp_path):
    poses, own = person(), person(1, seed=1)
    again, reference = read_poses(poses.save(tmp_path / "a.npz", own))
    for name in ("body", "hands", "face"):
        assert np.allclose(getattr(again, name), getattr(poses, name), atol=1e-6)
        assert np.allclose(getattr(reference, name), getattr(own, name), atol=1e-6)
    np.savez(
        tmp_path / "b.npz", body=np.concatenate([poses.body * [512, 768], np.ones((3, 20, 1))], -1), size=[512, 768]
    )
    again, reference = read_poses(tmp_path / "b.npz")
    assert reference is None
    assert np.allclose(again.body, poses.body)
    assert np.isnan(again.hands).all()


def frame_of(body, hands=None, size=(512, 768), confidence=0.9):
    def row(points):
        return [v for x, y in points * np.array(size) for v in (x, y, confidence)]

    one = {"pose_keypoints_2d": row(body)}
    if hands is not None:
        one |= {f"hand_{s}_keypoints_2d": row(h) for s, h in zip(("left", "right"), hands, strict=True)}
    return {"people": [one], "canvas_width": size[0], "canvas_height": size[1]}


def test_json(tmp_path):
    poses = person()
    frames = [frame_of(b[:18], h) for b, h in zip(poses.body, poses.hands, strict=True)]
    frames[1]["people"][0]["pose_keypoints_2d"][3:6] = [0, 0, 0]
    frames[2]["people"].append(frames[0]["people"][0])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(frames))
    found, reference = read_poses(path)
    assert reference is None
    assert np.allclose(found.body[0, :18], poses.body[0, :18])
    assert np.isnan(found.body[1, 1]).all()
    assert np.isnan(found.body[:, 18:]).all()
    assert np.allclose(found.hands, poses.hands)
    assert found.notes == ["1 frames of a.json show several people; the first of each was taken"]
    path.write_text(json.dumps({"frames": frames[:1], "reference": frames[2]}))
    found, reference = read_poses(path)
    assert len(found) == len(reference) == 1


def test_body_25(tmp_path):
    body = BODY.copy()
    toes = [body[18] - 0.01, body[18] + 0.01, body[13], body[19] - 0.02, body[19] + 0.02, body[10]]
    order = np.concatenate([body[:8], [(body[8] + body[11]) / 2], body[8:18], toes])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(frame_of(order)))
    found, _ = read_poses(path)
    assert np.allclose(found.body[0], body)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("nothing", "is no JSON"),
        ("[]", "holds no frames"),
        ("[{}]", "frame 0 has no 'people'"),
        (json.dumps([{"people": [{"pose_keypoints_2d": [1, 2]}]}]), "holds 2 numbers; expected 54 or 75"),
        (json.dumps([{"people": [{"pose_keypoints_2d": [100, 200, 1] * 18}]}]), "without canvas_width"),
    ],
)
def test_bad_json(tmp_path, content, match):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        read_poses(path)


def test_bad_arrays(tmp_path):
    with pytest.raises(ValueError, match=r"body is of shape \(2, 17, 2\)"):
        Poses.of(np.zeros((2, 17, 2)))
    with pytest.raises(ValueError, match="coordinates up to 300"):
        Poses.of(np.full((1, 18, 2), 300.0))
    with pytest.raises(ValueError, match="3 bodies, 2 pairs of hands"):
        Poses.of(np.zeros((3, 18, 2)), np.zeros((2, 2, 21, 2)))
    np.savez(tmp_path / "a.npz", points=np.zeros(3))
    with pytest.raises(ValueError, match=r"arrays \['points'\]"):
        read_poses(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"b\.npz is no \.npz or \.npy file of plain arrays"):
        read_poses(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="expected key points"):
        read_poses(tmp_path / "a.txt")
    for size in ([0, 10], [3], 4):
        with pytest.raises(ValueError, match="expected the picture's width and height in pixels"):
            Poses.of(np.ones((1, 18, 2)), size=size)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"people": "Anna"}, "has no 'people', a list of objects"),
        ({"people": [5]}, "has no 'people', a list of objects"),
        ({"people": [{"pose_keypoints_2d": ["a"] * 54}]}, "expected 54 or 75 numbers"),
        ({"people": [{"pose_keypoints_2d": [300, 200, 1] * 18}], "canvas_width": "a", "canvas_height": 4}, "of what"),
    ],
)
def test_frames_of_other_shapes(frame, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([frame]))
    with pytest.raises(ValueError, match=rf"a\.json: frame 0.*{message}"):
        read_poses(tmp_path / "a.json")


def test_wholebody():
    """COCO's 133 points: the neck between the shoulders, sides as OpenPose has them."""
    points = np.random.default_rng(0).uniform(0, 100, (2, 133, 2))
    scores = np.full((2, 133), 0.9)
    scores[1, 6] = 0.2  # a shoulder is unseen, and so is the neck
    found = from_coco_wholebody(points, scores, (100, 200))
    scale = np.array([100, 200])
    assert np.allclose(found.body[0, 1], (points[0, 5] + points[0, 6]) / 2 / scale)
    assert np.allclose(found.body[0, 2], points[0, 6] / scale)  # right
    assert np.allclose(found.body[0, 5], points[0, 5] / scale)  # left
    assert np.allclose(found.body[0, 18], (points[0, 17] + points[0, 18]) / 2 / scale)
    assert np.isnan(found.body[1, [1, 2]]).all()
    assert np.allclose(found.hands[0, 0], points[0, 91:112] / scale)
    assert np.allclose(found.face[0], points[0, 23:91] / scale)
    with pytest.raises(ValueError, match="expected"):
        from_coco_wholebody(points[:, :100], scores, (1, 1))


# -- alignment


def test_alignment_gives_the_references_limbs():
    poses, own = person(4), person(1, seed=5)
    found = align(poses, own)
    for a, b, _, _ in LIMBS[1:]:  # the neck's ends are moved by the eyes' limbs no more, the rest hangs on them
        assert length(found, a, b) == pytest.approx(length(own, a, b), rel=1e-9)
    assert length(found, 1, 0) == pytest.approx(length(own, 1, 0), rel=1e-9)
    assert np.allclose(found.body[0, 1], own.body[0, 1])
    # hands hang on their wrists, and the whole moves by one vector
    shift = found.hands[0, 0] - found.body[0, 7]
    across = (own.body[0, 5, 0] - own.body[0, 2, 0]) / (poses.body[0, 5, 0] - poses.body[0, 2, 0])
    assert np.allclose(shift[:, 0], (poses.hands[0, 0] - poses.body[0, 7])[:, 0] * across)
    assert np.allclose(poses.body, person(4).body)  # the given ones are not changed


def test_alignment_with_oneself_is_nothing():
    poses = person(3)
    assert np.allclose(align(poses, poses[:1]).body, poses.body)


def test_alignment_scales_later_frames_alike():
    """Limbs of all frames get the first frame's ratios: one that is bent keeps its bend."""
    poses, own = person(2), person(1, seed=5)
    poses.body[1] = poses.body[0] + 0.1
    found = align(poses, own)
    assert np.allclose(found.body[1] - found.body[1, 1], found.body[0] - found.body[0, 1])


def test_alignment_of_half_a_person():
    poses, own = person(2), person(1, seed=5)
    poses.body[:, 8:14] = np.nan
    found = align(poses, own)
    assert len(found.notes) == 2
    assert length(found, 2, 3) == pytest.approx(length(own, 2, 3))
    poses.body[:, 1] = np.nan
    with pytest.raises(ValueError, match="must both show the neck"):
        align(poses, own)


# -- drawing


def test_drawing():
    """Colours as the network sees them: the right shoulder's limb is blue, at 60 % between its joints."""
    poses = Poses.of(BODY[None])
    picture = draw(poses)[0]
    assert picture.shape == (768, 512, 3)
    x, y = (BODY[1] + BODY[2]) / 2 * [512, 768]
    assert picture[int(y), int(x)].tolist() == [0, 0, 153]
    x, y = BODY[10] * [512, 768]
    assert picture[int(y), int(x)].tolist() == list(COLOURS[10])
    assert not picture[:50].any()
    assert len(DRAWN) == 19
    assert len(FINGERS) == 20
    assert FINGERS[4] == (0, 5)
    small = draw(poses, (64, 96))[0]
    assert small.any()
    poses.body[:] = np.nan
    assert not draw(poses).any()


def test_hands_and_faces():
    poses = person(1)
    poses.body[:] = np.nan
    hands = draw(poses)[0]
    red = (hands == [255, 0, 0]).all(-1)
    assert red.sum() > 200
    white = (draw(poses, face=True)[0] == 255).all(-1)
    assert white.sum() > 500


# -- pictures


def test_animations(tmp_path):
    frames = np.zeros((5, 8, 6, 3), np.uint8)
    frames[:, 2:4] = np.arange(5)[:, None, None, None] * 40
    for name in ("a.gif", "a.webp"):
        again = media.read_frames(media.write_frames(frames, tmp_path / name, 10))
        assert np.abs(np.stack([np.asarray(f) for f in again]).astype(int) - frames).max() < 8
    media.write_frames(frames, tmp_path / "a.npz", 10)
    assert np.array_equal(np.load(tmp_path / "a.npz")["frames"], frames)
    assert Image.open(media.write_frames(frames, tmp_path / "a.png", 10, scale=2)).size == (60, 16)
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:04d}.png")
    assert np.array_equal(np.stack([np.asarray(f) for f in media.read_frames(folder)]), frames)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        media.read_frames(tmp_path / "empty")
    (tmp_path / "b.gif").write_bytes(b"no")
    with pytest.raises(ValueError, match="no readable animation"):
        media.read_frames(tmp_path / "b.gif")
    with pytest.raises(ValueError, match="a picture is an array of float64"):
        media.read_picture(np.zeros((2, 2)))
