"""zoo train-points, and zoo validate of what it saves: classes of clouds, parts of objects, labels of scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import zoo
import zoo.testing
from zoo.cli import run
from zoo.training import Settings, Shuffled, fit
from zoo_point_cloud.datasets import Reading, read_classes
from zoo_point_cloud.files import Cloud, read_labelled
from zoo_point_cloud.labelled import Classes
from zoo_point_cloud.measures import PointMeasure, accuracies, confusion
from zoo_point_cloud.training import Moves, Samples, cross_entropy

#: A PCM that learns in seconds on one core.
SMALL = {
    "embed_dim": 12, "k_neighbors": [6, 6, 6], "head_dropout": 0.0, "orders": ["z", "xyz-snake", "z-trans"],
}  # fmt: skip
SET = [f"--set={k}={json.dumps(v)}" for k, v in SMALL.items()]
TRUNK = [f"--set={k}={v}" for k, v in {"depth": 1, "embed_dim": 24, "num_groups": 8, "group_size": 8}.items()]


def sphere(r, n):
    p = r.normal(size=(n, 3))
    return p / np.linalg.norm(p, axis=1, keepdims=True)


SHAPES = {
    "ball": sphere,
    "disc": lambda r, n: sphere(r, n) * [1, 1, 0.05],
    "rod": lambda r, n: sphere(r, n) * [0.05, 0.05, 1],
}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Balls, discs and rods, as a scanner that stands anywhere has them; two formats."""
    folder, r = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, shape in SHAPES.items():
        (folder / name).mkdir()
        for i in range(10):
            points = (shape(r, 90) + r.normal(0, 0.02, (90, 3))) * r.uniform(2, 5) + [700, 40, 3]
            if i % 2:
                np.save(folder / name / f"{i}.npy", points.astype(np.float32))
            else:
                np.savetxt(folder / name / f"{i}.xyz", points, fmt="%.5f")
    return folder


def lamps(folder, kinds=("lamp", "mast"), count=6):
    """Objects of two parts with labels 4 (a foot, flat) and 7 (a pole), and some points labelled -1."""
    r = np.random.default_rng(1)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            foot = np.concatenate([r.uniform(-0.5, 0.5, (50, 2)), np.zeros((50, 1))], axis=1)
            pole = np.concatenate([r.normal(0, 0.02, (50, 2)), r.uniform(0.1, 2, (50, 1))], axis=1)
            labels = np.repeat([4, 7], 50)
            labels[:3] = -1
            rows = np.concatenate([np.concatenate([foot, pole]), labels[:, None]], axis=1)
            np.save(folder / kind / f"{i}.npy", r.permutation(rows).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return lamps(tmp_path_factory.mktemp("parts"))


def train(capsys, *words, status=0):
    """What the command says: its JSON, or its error."""
    assert run(["train-points", *map(str, words), *(["--json", "--score-every=99"] if status == 0 else [])]) == status
    said = capsys.readouterr()
    return json.loads(said.out) if status == 0 else said.err


def validated(capsys, model, data, *words):
    assert run(["validate", str(model), str(data), *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_learns_classes(classes, tmp_path, capsys):
    """Well above a third on held-out clouds, and the saved folder answers with the folders' names and those figures."""
    out = tmp_path / "out"
    found = train(
        capsys, "pcm_micro", classes, "--out", out, *SET, "--steps=30", "--batch-size=8", "--rate=5e-3",
        "--held-out=0.3", "--smoothing=0.1",
    )  # fmt: skip
    assert found["classes"] == ["ball", "disc", "rod"]
    assert (found["clouds"], found["held_out"]) == (21, 9)
    assert found["figures"]["OA"] >= 0.8
    model = zoo.load(out)
    assert model.zoo_info.weights.preprocess == {"points": 90, "normalize": "unit_sphere"}  # clouds have no 256 points
    assert {m.name: m.value for m in model.zoo_info.weights.metrics} == found["figures"]
    data = read_classes(classes, {"points": 90, "normalize": "unit_sphere"}, None, Moves(), Reading(share=0.3))
    pipe = zoo.pipeline(model)
    answers = [pipe(cloud).labels[0] for cloud, _, _ in data.rest]
    right = [answer == data.names[truth] for answer, (_, truth, _) in zip(answers, data.rest, strict=True)]
    assert np.mean(right) == found["figures"]["OA"]


def test_a_validation_folder_of_its_own_gives_what_zoo_validate_gives(classes, tmp_path, capsys):
    """A model whose answers depend on the others of a batch, as published, is measured one cloud at a time."""
    out = tmp_path / "out"
    found = train(
        capsys, "pcm_micro", classes, "--out", out, *SET, "--set=per_cloud_order=false", "--steps=12",
        "--batch-size=4", "--rate=5e-3", "--points=64", f"--validation={classes}",
    )  # fmt: skip
    assert found["held_out"] == 30
    measured = validated(capsys, out, classes)
    assert measured["metrics"] == pytest.approx(found["figures"], abs=1e-12)
    assert set(measured["per_class"]) == {"ball", "disc", "rod"}
    assert validated(capsys, out, classes, "--limit", "6")["samples"] == 6
    (tmp_path / "other" / "cube").mkdir(parents=True)
    assert run(["validate", str(out), str(tmp_path / "other")]) == 2
    assert "sub-folder cube, which is no class; expected ball, disc, rod" in capsys.readouterr().err


def test_it_learns_parts(parts, tmp_path, capsys):
    """Labels that are not 0, 1, 2 ...; points without one; instance and class mIoU of two kinds."""
    out, names = tmp_path / "out", tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\nfoot\nf\ng\npole\n")
    found = train(
        capsys, "pcm_micro_parts", parts, "--out", out, *SET, "--steps=30", "--batch-size=4", "--rate=5e-3",
        "--label-names", names, f"--validation={parts}", "--scale", "0.9", "1.1", "--turn=up",
    )  # fmt: skip
    assert found["classes"] == ["foot", "pole"]
    assert found["figures"]["instance mIoU"] > 0.7
    measured = validated(capsys, out, parts)
    assert measured["metrics"] == pytest.approx(found["figures"], abs=1e-12)
    assert set(measured["per_class"]) == {"foot", "pole"}
    pipe = zoo.pipeline(str(out))
    result = pipe(np.load(parts / "lamp" / "0.npy")[:, :3])
    assert set(result.counts) == {"foot", "pole"}
    back = read_labelled(result.save_labels(tmp_path / "lamp.ply"))  # with the labels of the files it learnt from
    assert np.array_equal(back.labels, np.array([4, 7])[result.labels])
    other = zoo.pipeline(zoo.load(out, num_classes=3))(result.cloud)
    assert set(read_labelled(other.save_labels(tmp_path / "other.ply")).labels) <= {0, 1, 2}  # a head of its own
    assert b"comment label 7 pole" in (tmp_path / "lamp.ply").read_bytes()


def test_kinds_of_objects_are_told_to_the_models_that_ask(parts, tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--set=depth=3", "--set=embed_dim=24", "--set=num_groups=8", "--set=group_size=8"]
    words = ["pointmamba_shapenetpart", parts, "--out", out, *small, "--batch-size=4", f"--validation={parts}"]
    found = train(capsys, *words, "--steps=3")
    model = zoo.load(out)
    assert (model.shapes, model.num_classes) == (2, 2)
    assert model.zoo_info.weights.preprocess["kinds"] == ["lamp", "mast"]
    assert validated(capsys, out, parts)["metrics"] == pytest.approx(found["figures"], abs=1e-12)
    cloud = np.load(parts / "mast" / "0.npy")[:, :3]
    assert sum(zoo.pipeline(model, shape="mast")(cloud).counts.values()) == 100
    with pytest.raises(zoo.errors.BadArgument, match="lamp, mast"):
        zoo.pipeline(model, shape="chair")


def test_scenes_in_pieces(tmp_path, capsys):
    """Ground and walls of a scene that is larger than a piece; the piece's size is kept for the pipeline."""
    laspy = pytest.importorskip("laspy")
    r, data, out = np.random.default_rng(2), tmp_path / "tiles", tmp_path / "out"
    data.mkdir()
    for i in range(3):
        ground = np.concatenate([r.uniform(0, 20, (1500, 2)), r.normal(0, 0.05, (1500, 1))], axis=1)
        wall = np.concatenate([r.uniform(0, 20, (500, 1)), np.full((500, 1), 7), r.uniform(1, 6, (500, 1))], axis=1)
        header = laspy.LasHeader(version="1.4", point_format=6)
        header.offsets, header.scales = np.array([4e5, 5e6, 0]), np.full(3, 1e-3)
        cloud = laspy.LasData(header)
        cloud.x, cloud.y, cloud.z = (np.concatenate([ground, wall]) + np.array([4e5, 5e6, 100])).T
        cloud.classification = np.repeat([2, 6], [1500, 500]).astype(np.uint8)
        cloud.write(str(data / f"{i}.las"))
    found = train(
        capsys, "pcm_micro_parts", data, "--out", out, *SET, "--voxel=0.3", "--features=height", "--points=256",
        "--steps=20", "--batch-size=4", "--rate=5e-3", "--held-out=0.3",
    )  # fmt: skip
    assert found["classes"] == ["label 2", "label 6"]
    assert set(found["figures"]) == {"OA", "mAcc", "mIoU"}
    assert found["figures"]["mIoU"] > 0.6
    model = zoo.load(out)
    assert (model.test_crop, model.encoder.in_chans) == (256, 1)
    settings = model.zoo_info.weights.preprocess
    assert settings == {"voxel": 0.3, "normalize": "floor", "features": ["height"], "label_values": [2, 6]}
    assert validated(capsys, out, data)["metrics"]["mIoU"] > 0.6
    words = ["pcm_micro_parts", data, "--out", tmp_path / "more", "--start", out, "--steps=1", "--batch-size=2"]
    assert train(capsys, *words, "--rate=1e-9", "--held-out=0.3")["figures"]["mIoU"] > 0.6  # it goes on from there,
    assert zoo.load(tmp_path / "more").test_crop == 256  # in pieces of the same size
    assert "the model takes 1: --features" in train(capsys, *words, "--features=xyz", status=2)


def test_it_begins_with_a_masked_autoencoder(classes, tmp_path, capsys):
    pretrained, out = tmp_path / "pretrained", tmp_path / "out"
    torch.manual_seed(3)
    autoencoder = zoo.create("pointmamba_pretrain", embed_dim=24, depth=1, num_groups=8, group_size=8, decoder_depth=1)
    zoo.save(autoencoder, pretrained, licence="mit")
    words = ["pointmamba_modelnet", classes, "--out", out, "--start", pretrained, "--set=num_groups=8"]
    words += ["--set=group_size=8", "--batch-size=8"]
    train(capsys, *words, "--steps=1", "--rate=1e-12")
    trunk, own = autoencoder.trunk.state_dict(), zoo.load(out).state_dict()
    assert all(
        torch.allclose(own[k], v, atol=1e-6) for k, v in trunk.items() if v.is_floating_point() and "running" not in k
    )
    assert zoo.load(out).zoo_info.weights.licence == "mit"  # of the weights that it began with
    words[0] = "pcm_micro"
    assert "name a pointmamba" in train(capsys, *words[:6], "--steps=1", status=2)
    words = ["pointmamba_modelnet", classes, "--out", tmp_path / "more", "--start", out, "--steps=1", "--batch-size=8"]
    found = train(capsys, *words, "--held-out=0")  # its own weights, and all clouds to learn from
    assert (found["clouds"], found["held_out"], found["figures"]) == (30, 0, {})
    assert "--held-out and --validation: give one" in train(
        capsys, *words, "--held-out=0.1", f"--validation={classes}", status=2
    )


def test_training_goes_on_after_an_interruption(classes, tmp_path):
    data = read_classes(classes, {"points": 64, "normalize": "unit_sphere"}, 64, Moves(turn="any"), Reading())
    order = Shuffled(len(data.train), 4)

    def trained(run, report):
        torch.manual_seed(0)
        model = zoo.create("pcm_micro", num_classes=3, **SMALL)
        batch = lambda index: data.train(order(index), order.random(index))  # noqa: E731
        score = lambda model: data.scores(model)["OA"]  # noqa: E731
        fit(model, batch, cross_entropy(0.1), Settings(steps=5), run=run, report=report, score=score, score_every=2)
        return model

    zoo.testing.check_resume(trained, tmp_path, after=3)


def test_what_is_drawn_from_a_cloud():
    r = np.random.default_rng(0)
    scene = r.uniform(0, 9, (3000, 3)).astype(np.float32)
    labels = np.arange(3000)
    pieces = Samples({"voxel": 0.01}, 64, Moves(scale=(1, 1), shift=0))
    pieces.add(Cloud(scene), labels)
    batch = pieces([0, 0], r)
    for pos, own in zip(batch["pos"].numpy(), batch["classes"].numpy(), strict=True):
        assert np.array_equal(pos, scene[own])  # labels go with their points
        assert (np.ptp(pos, axis=0) < 5).all()  # which lie together
    few = Samples({"points": 64}, 64, Moves())
    few.add(Cloud(scene[:40]), labels[:40])
    assert set(few([0], r)["classes"].flatten().tolist()) == set(range(40))  # all of them, some again
    many = Samples({"points": 64, "features": ["normal"]}, 64, Moves())
    many.add(Cloud(scene, normals=scene), labels)
    assert len(many.clouds[0]) == 77  # what samples are drawn from
    assert len(set(many([0], r)["classes"].flatten().tolist())) == 64
    with pytest.raises(ValueError, match="reads a normal"):
        many.add(Cloud(scene), labels)


@pytest.mark.parametrize("turn", ["up", "any"])
def test_turns(turn):
    r = np.random.default_rng(0)
    cloud = Cloud(r.normal(size=(50, 3)).astype(np.float32), normals=r.normal(size=(50, 3)).astype(np.float32))
    moves = Moves(turn=turn, up=1)
    found = moves.turned(cloud, r)
    assert np.allclose(
        np.linalg.norm(found.points - found.points[0], axis=1),
        np.linalg.norm(cloud.points - cloud.points[0], axis=1),
        atol=1e-5,
    )
    assert np.allclose(found.points[:, 1], cloud.points[:, 1], atol=1e-6) == (turn == "up")
    there = np.linalg.lstsq(cloud.points - cloud.points.mean(0), found.points - found.points.mean(0), rcond=None)[0]
    assert np.linalg.det(there) == pytest.approx(1, abs=1e-4)
    assert np.allclose(cloud.normals @ there, found.normals, atol=1e-4)
    assert not np.allclose(moves.turned(cloud, r).points, found.points)


def test_measures():
    table = confusion(np.array([0, 0, 1, -1, 2]), np.array([0, 1, 1, 1, 0]), 4)
    assert accuracies(table) == {"OA": 0.5, "mAcc": pytest.approx((0.5 + 1 + 0) / 3)}
    measure = PointMeasure("abcd", objects=True)
    measure.update(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), "chair")  # 2/3, 1/2
    measure.update(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 0]), "chair")  # 1, and 1 for the part that it lacks
    measure.update(np.array([2, 2, 2, 3]), np.array([2, 2, 2, 2]), "lamp")  # 3/4, 0
    found = measure.compute()
    assert found["instance mIoU"] == pytest.approx((7 / 12 + 1 + 3 / 8) / 3)
    assert found["class mIoU"] == pytest.approx(((7 / 12 + 1) / 2 + 3 / 8) / 2)
    assert found["mIoU"] == pytest.approx((6 / 7 + 1 / 2 + 3 / 4 + 0) / 4)
    assert measure.per_class()["d"] == {"IoU": 0.0}
    with pytest.raises(ValueError, match="no point has a label"):
        PointMeasure("ab", objects=False).compute()


def test_labels_of_points():
    cloud = Cloud(np.zeros((4, 3), np.float32), labels=np.array([2, 9, 0, 2]))
    classes = Classes.found([cloud], [0], None)
    assert (classes.values, classes.names) == ([2, 9], ["label 2", "label 9"])
    assert classes.of(cloud, ignored=[0]).tolist() == [0, 1, -1, 0]
    assert classes.of(Cloud(cloud.points, labels=np.array([9, 10, 1, 2]))).tolist() == [1, -1, -1, 0]
    with pytest.raises(zoo.errors.BadArgument, match="has the label 0, which is none of"):
        classes.of(cloud, "a.ply", ignored=[-1])
    with pytest.raises(zoo.errors.BadArgument, match="two or more to tell apart"):
        Classes.found([cloud], [0, 2], None)
    with pytest.raises(zoo.errors.BadArgument, match="3 names are given"):
        Classes.found([cloud], [0], ["a", "b", "c"])


def test_what_is_refused(classes, parts, tmp_path, capsys):
    def refused(*words, status=2):
        assert not (tmp_path / "out").exists()
        return train(capsys, *words, "--out", tmp_path / "out", "--steps=1", status=status)

    assert "expected a model of PCM or PointMamba" in refused("occmamba_lidar", classes)
    assert "--voxel is for scenes" in refused("pcm_micro", classes, "--voxel=0.1")
    assert "--label-names and --ignore" in refused("pcm_micro", classes, "--ignore=3")
    assert "reads the points alone" in refused("pointmamba_modelnet", classes, "--features=height")
    assert "expected some of xyz" in refused("pcm_micro", classes, "--features=colour")
    assert "they follow from the data" in refused("pcm_micro", classes, "--set=num_classes=3")
    assert "needs at least 64" in refused("pointmamba_modelnet", classes, "--points=32")
    assert "has no sub-folders" in refused("pcm_micro", classes / "ball")
    assert "the smaller one first" in refused("pcm_micro", classes, "--scale", "2", "1")
    assert "reads a normal" in refused("pcm_micro", classes, "--features=normal", status=5)
    assert "sub-folder lamp, which is no class" in refused("pcm_micro", classes, f"--validation={parts}")
    (tmp_path / "whole" / "Train").mkdir(parents=True)
    assert "which is no class; give" in refused("pcm_micro", tmp_path / "whole")
    lone = tmp_path / "lone"
    for name in "ab":
        (lone / name).mkdir(parents=True)
        np.save(lone / name / "1.npy", np.zeros((99, 3)))
    assert "none can be held out" in refused("pcm_micro", lone)
    (lone / "b" / "2.npy").write_bytes(b"nothing")
    assert "2.npy is no .npz or .npy file" in refused("pcm_micro", lone, status=5)
    np.save(lone / "b" / "2.npy", np.zeros((3, 3)))
    assert "has 3 points" in refused("pcm_micro", lone, status=5)
