"""The demo checkpoints as a user meets them: sample files of every format, and unseen clouds of the recipe."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.cli import run
from zoo_point_cloud.files import read_cloud

laspy = pytest.importorskip("laspy")
trimesh = pytest.importorskip("trimesh")

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "examples" / "shapes"


@pytest.fixture(scope="module")
def shapes():
    """The recipe's generator."""
    path = ROOT / "plugins" / "point_cloud" / "recipes" / "shapes.py"
    spec = importlib.util.spec_from_file_location("point_cloud_recipe_shapes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_sample_file_gets_its_name(tmp_path, capsys):
    cloud = read_cloud(SAMPLES / "mug.ply").points
    np.save(tmp_path / "mug.npy", cloud)
    np.savetxt(tmp_path / "mug.xyz", cloud, fmt="%.4f")
    head = f"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nPOINTS {len(cloud)}\nDATA binary\n"
    (tmp_path / "mug.pcd").write_bytes(head.encode() + cloud.tobytes())
    header = laspy.LasHeader(version="1.2", point_format=0)
    header.scales = np.full(3, 1e-4)
    data = laspy.LasData(header)
    data.x, data.y, data.z = cloud.astype(np.float64).T
    data.write(tmp_path / "mug.las")
    assert run(["predict", "pcm_micro.shapes", str(SAMPLES), str(tmp_path), "--pictures", str(tmp_path / "out")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": " in line]
    endings = set()
    for line in lines:
        file, answer = Path(line.split(": ")[0]), line.split(": ")[1]
        assert answer.startswith(file.stem), line
        endings.add(file.suffix)
    assert endings == {".ply", ".pcd", ".las", ".laz", ".xyz", ".npy", ".obj", ".stl"}
    assert len(list((tmp_path / "out").iterdir())) == len(lines)


def test_unseen_shapes_are_named(shapes):
    model = zoo.load("pcm_micro.shapes")
    points, labels, _ = shapes.batch(np.random.default_rng(777), 96)
    with torch.no_grad():
        right = (model(torch.from_numpy(points)).argmax(1).numpy() == labels).mean()
    assert right >= 0.9


def test_unseen_parts_are_labelled(shapes):
    model = zoo.load("pcm_micro_parts.shapes")
    points, _, parts = shapes.batch(np.random.default_rng(778), 48, tuple(shapes.PARTS))
    with torch.no_grad():
        right = (model(torch.from_numpy(points)).argmax(1).numpy() == parts).mean()
    assert right >= 0.8


def test_a_result_does_not_depend_on_the_batch():
    model = zoo.load("pcm_micro.shapes")
    clouds = torch.randn(3, 256, 3)
    clouds[1] *= 0.2
    with torch.no_grad():
        torch.testing.assert_close(model(clouds)[:1], model(clouds[:1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ending", ["ply", "las", "laz"])
def test_points_are_labelled_and_written(tmp_path, capsys, ending):
    out = tmp_path / "labelled"
    command = ["label-points", "pcm_micro_parts.shapes", str(SAMPLES / "chair.ply"), "--out", str(out)]
    assert run([*command, "--format", ending, "--pictures"]) == 0
    assert "chair" in capsys.readouterr().out
    written = read_cloud(out / f"chair.{ending}")
    given = read_cloud(SAMPLES / "chair.ply")
    assert np.allclose(written.points, given.points, atol=1e-6)
    assert len(np.unique(written.colors, axis=0)) >= 3  # seat, back and legs
    assert (out / "chair.png").stat().st_size > 1000


def test_an_input_is_not_written_over(tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        shutil.copy(SAMPLES / "chair.ply", tmp_path / folder / "chair.ply")
    before = (tmp_path / "one" / "chair.ply").read_bytes()
    command = ["label-points", "pcm_micro_parts.shapes", str(tmp_path / "one" / "chair.ply"), "--out"]
    assert run([*command, str(tmp_path / "two" / ".." / "one")]) == 2
    assert "would take the place of" in capsys.readouterr().err
    assert (tmp_path / "one" / "chair.ply").read_bytes() == before
    assert run([*command, str(tmp_path / "one" / "chair.ply" / "out")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert run([*command, str(tmp_path / "one"), "--format=las"]) == 0
    assert run([*command, str(tmp_path / "three"), str(tmp_path / "two")]) == 0
    assert [f.name for f in sorted((tmp_path / "three").iterdir())] == ["000_chair.ply", "001_chair.ply"]


def test_label_points_goes_on(tmp_path, capsys):
    (tmp_path / "a.xyz").write_text("1 2 3\n")
    command = ["label-points", "pcm_micro_parts.shapes", str(tmp_path / "a.xyz"), str(SAMPLES / "mug.ply")]
    assert run([*command, "--out", str(tmp_path / "out"), "--keep-going", "--json"]) == 1
    printed = capsys.readouterr().out
    assert "needs at least" in printed
    assert len(list((tmp_path / "out").glob("*mug.ply"))) == 1


@pytest.mark.parametrize("name", ["pcm_micro.shapes", "pcm_micro_parts.shapes"])
def test_clouds_at_the_edge(name):
    pipe = zoo.pipeline(name)
    with pytest.raises(ValueError, match="is empty"):
        pipe(np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="needs at least"):
        pipe(np.random.default_rng(0).normal(size=(20, 3)))
    with pytest.raises(ValueError, match="NaN"):
        pipe(np.full((300, 3), np.nan))
    assert np.isfinite(pipe(np.ones((300, 3))).confidence)  # all points at one place
    doubled = np.repeat(np.random.default_rng(0).normal(size=(100, 3)), 3, axis=0)
    assert np.isfinite(pipe(doubled).confidence)
    holes = np.random.default_rng(0).normal(size=(300, 3))
    holes[::7] = np.inf
    assert np.isfinite(zoo.pipeline(name, invalid="drop")(holes).confidence)


def test_demo_runs(tmp_path, capsys):
    assert run(["demo", "--domain", "point_cloud", "--out", str(tmp_path)]) == 0
    assert "chair" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 2
