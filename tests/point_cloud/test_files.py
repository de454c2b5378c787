"""Formats that need a library, large coordinates, packed pcd files, and what is written."""

import struct

import numpy as np
import pytest

from zoo_point_cloud.files import Cloud, read_cloud, write_labels
from zoo_point_cloud.pcd import unpack_lzf

laspy = pytest.importorskip("laspy")
trimesh = pytest.importorskip("trimesh")


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)


@pytest.mark.parametrize("ending", ["ply", "las", "laz"])
def test_labels_are_written_and_read(tmp_path, points, ending):
    r = np.random.default_rng(1)
    labels, colors = r.integers(0, 300, 300), r.integers(1, 256, (300, 3)).astype(np.uint8)
    path = write_labels(tmp_path / "out" / f"a.{ending}", Cloud(points), labels, colors, ["floor", "wall"])
    back = read_cloud(path)
    assert np.abs(back.points - points).max() < 1e-7
    assert np.array_equal((back.colors * 255).round().astype(int), colors)
    if ending == "ply":
        from plyfile import PlyData

        written = PlyData.read(str(path))
        assert written.comments == ["label 0 floor", "label 1 wall"]
        assert np.array_equal(written["vertex"]["label"], labels)
    else:
        data = laspy.read(path)
        assert np.array_equal(data.label, labels)
        (text,) = data.header.vlrs.get_by_id("LASF_Spec", (3,))
        assert text.record_data_bytes() == b"label 0 floor\nlabel 1 wall"


@pytest.mark.parametrize("ending", ["ply", "las", "xyz", "npy"])
def test_survey_coordinates_keep_their_place(tmp_path, points, ending):
    """Coordinates of a map projection are too large for float32; the cloud moves near the origin and back."""
    world = points.astype(np.float64) + np.array([451234.5, 5412345.25, 310.0])
    path = tmp_path / f"a.{ending}"
    if ending == "xyz":
        np.savetxt(path, world, fmt="%.6f")
    elif ending == "npy":
        np.save(path, world)
    else:
        write_labels(path, read_cloud(world), np.zeros(300, int), np.ones((300, 3), np.uint8))
    cloud = read_cloud(path)
    assert cloud.points.dtype == np.float32
    assert np.abs(cloud.points).max() < 100
    assert np.abs(cloud.world() - world).max() < 1e-5
    again = write_labels(tmp_path / "b.laz", cloud.take(np.arange(10)), np.zeros(10, int), np.ones((10, 3), np.uint8))
    data = laspy.read(again)
    assert np.abs(np.stack([data.x, data.y, data.z], axis=1) - world[:10]).max() < 1e-5


@pytest.mark.parametrize("version", ["1.2", "1.4"])
def test_las_of_other_writers(tmp_path, points, version):
    header = laspy.LasHeader(version=version, point_format=2 if version == "1.2" else 7)
    header.scales = np.full(3, 1e-4)
    data = laspy.LasData(header)
    data.x, data.y, data.z = points.astype(np.float64).T
    data.write(tmp_path / "plain.las")
    assert read_cloud(tmp_path / "plain.las").colors is None  # fields that nobody filled
    data.red, data.green, data.blue = np.full((3, 300), 128)  # eight bits, as many writers do
    data.write(tmp_path / "colors.las")
    cloud = read_cloud(tmp_path / "colors.las")
    assert np.allclose(cloud.points, points, atol=1e-4)
    assert np.allclose(cloud.colors, 128 / 255)


@pytest.mark.parametrize("ending", ["obj", "stl", "off", "ply"])
def test_meshes_are_sampled_evenly(tmp_path, ending):
    box = trimesh.creation.box((2.0, 1.0, 1.0))
    box.export(tmp_path / f"box.{ending}")
    cloud = read_cloud(tmp_path / f"box.{ending}")
    if ending == "ply":  # a ply's vertices are its points, whether or not it has faces
        assert len(cloud) == 8
        return
    assert len(cloud) == 8192
    assert np.allclose(np.abs(cloud.points / [1.0, 0.5, 0.5]).max(axis=1), 1, atol=1e-5)  # all on the surface
    on_ends = (np.abs(cloud.points[:, 0]) > 1 - 1e-6).mean()
    assert on_ends == pytest.approx(0.2, abs=0.02)  # 2 of 10 units of area
    assert np.allclose(np.linalg.norm(cloud.normals, axis=1), 1, atol=1e-5)
    assert np.array_equal(read_cloud(tmp_path / f"box.{ending}").points, cloud.points)  # the same points every time


def pack_lzf(plain: bytes) -> bytes:
    """A simple packer: literals, and references to what lies up to 64 bytes back."""
    out, literals, i = bytearray(), bytearray(), 0

    def flush():
        for k in range(0, len(literals), 32):
            part = literals[k : k + 32]
            out.extend([len(part) - 1, *part])
        literals.clear()

    while i < len(plain):
        best, back = 0, 0
        for distance in range(1, min(64, i) + 1):
            n = 0
            while n < 100 and i + n < len(plain) and plain[i + n] == plain[i + n - distance]:
                n += 1
            if n > best:
                best, back = n, distance
        if best < 3:
            literals.append(plain[i])
            i += 1
            continue
        flush()
        length, offset = best - 2, back - 1
        if length < 7:
            out.extend([length << 5 | offset >> 8, offset & 255])
        else:
            out.extend([7 << 5 | offset >> 8, length - 7, offset & 255])
        i += best
    flush()
    return bytes(out)


def test_compressed_pcd(tmp_path):
    points = np.round(np.random.default_rng(0).normal(size=(50, 3)), 1).astype(np.float32)
    points[10:30] = 0.5  # long runs
    plain = b"".join(np.ascontiguousarray(points[:, i]).tobytes() for i in range(3))
    packed = pack_lzf(plain)
    assert len(packed) < len(plain)
    assert unpack_lzf(packed, len(plain)) == plain
    assert unpack_lzf(b"\x01ab" + bytes([6 << 5, 1]), 10) == b"ababababab"  # a copy that runs into itself
    head = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nPOINTS 50\nDATA binary_compressed\n"
    (tmp_path / "a.pcd").write_bytes(head + struct.pack("<II", len(packed), len(plain)) + packed)
    assert np.array_equal(read_cloud(tmp_path / "a.pcd").points, points)
    (tmp_path / "b.pcd").write_bytes(head + struct.pack("<II", 3, len(plain)) + bytes([5 << 5, 9, 0]))
    with pytest.raises(ValueError, match="damaged"):
        read_cloud(tmp_path / "b.pcd")


def test_a_laz_file_that_ends_too_early(tmp_path, points):
    whole = write_labels(tmp_path / "a.laz", Cloud(points), np.zeros(300, int), np.ones((300, 3), np.uint8))
    content = whole.read_bytes()
    for share in (2, 5):
        (tmp_path / "b.laz").write_bytes(content[: len(content) * share // 6])
        with pytest.raises(ValueError, match="no readable las file"):
            read_cloud(tmp_path / "b.laz")


def test_columns_by_their_number(points):
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    shade = np.full((300, 3), 51.0)
    normals = read_cloud(np.concatenate([points, unit], axis=1))  # negative values are no colours
    assert normals.colors is None
    assert np.allclose(normals.normals, unit)
    scanner = read_cloud(np.concatenate([points, np.full((300, 1), -800.0), shade], axis=1))  # intensity, then colours
    assert np.allclose(scanner.colors, 0.2)
    both = read_cloud(np.concatenate([points, shade, unit], axis=1))
    assert np.allclose(both.colors, 0.2)
    assert np.allclose(both.normals, unit)


def test_invalid_points(points):
    points[3, 1], points[7, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match="2 of 300 points have NaN"):
        read_cloud(points)
    assert len(read_cloud(points, invalid="drop")) == 298
    with pytest.raises(ValueError, match="all 300 points"):
        read_cloud(points * np.nan, invalid="drop")
    with pytest.raises(ValueError, match="expected 'error' or 'drop'"):
        read_cloud(points, invalid="keep")


def test_labels_are_not_written_as_anything_else(tmp_path, points):
    with pytest.raises(ValueError, match=r"\.ply, \.las or \.laz"):
        write_labels(tmp_path / "a.obj", Cloud(points), np.zeros(300), np.zeros((300, 3)))


def test_arrays_that_are_none(tmp_path):
    """Damaged, an archive under the name of an array, Python objects: told in a sentence, never unpickled."""
    np.save(tmp_path / "whole.npy", np.zeros((4, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-9])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with (tmp_path / "archive.npy").open("wb") as file:
        np.savez(file, points=np.zeros((4, 3)))
    for name in ("cut", "empty", "objects"):
        with pytest.raises(ValueError, match=rf"{name}\.npy is no \.npz or \.npy file"):
            read_cloud(tmp_path / f"{name}.npy")
    with pytest.raises(ValueError, match="an archive with the arrays points"):
        read_cloud(tmp_path / "archive.npy")
