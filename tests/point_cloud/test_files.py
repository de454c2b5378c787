"""Formats that need a library, large coordinates, packed pcd files, and what is written."""

import struct

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from zoo_point_cloud.files import Cloud, read_cloud, write_labels
from zoo_point_cloud.pcd import unpack_lzf
from zoo_registry import errors

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


@pytest.mark.parametrize(
    ("content", "points", "colors", "normals"),
    [
        ("id,x,y,z\n7,1,2,3\n", [1, 2, 3], None, None),
        ("Y;X;Z\n1,5;2;3\n", [2, 1.5, 3], None, None),
        ("R,G,B,X [m],Y [m],Z [m]\n255,0,51,1,2,3\n", [1, 2, 3], [1, 0, 0.2], None),
        ("x y z nx ny nz\n1 2 3 0 0 1\n", [1, 2, 3], None, [0, 0, 1]),  # nothing is negative
        ("//X Y Z R G B Nx Ny Nz scalar_Intensity\n1 2 3 255 0 0 0 0 1 8\n", [1, 2, 3], [1, 0, 0], [0, 0, 1]),
        ("//X Y Z R G B Rf Gf Bf\n1 2 3 51 0 0 1 0 0\n", [1, 2, 3], [0.2, 0, 0], None),  # colours twice: the first
        ('"x","y","z"\n"1","2","3"\n', [1, 2, 3], None, None),
        ("# metres, of a chair\n1 2 3\n", [1, 2, 3], None, None),
        ("chair number three\n1 2 3 7\n", [1, 2, 3], None, None),
        ("1,5 2,5 3\n", [1.5, 2.5, 3], None, None),  # where spaces part them, commas are decimal points
        ("1, 2, 3\n", [1, 2, 3], None, None),
        ("1 2 3 0 0 -1 255 0 0\n", [1, 2, 3], [1, 0, 0], [0, 0, -1]),  # negative values are no colours
    ],
)
def test_columns_of_text_are_what_the_file_calls_them(tmp_path, content, points, colors, normals):
    (tmp_path / "a.csv").write_text(content)
    cloud = read_cloud(tmp_path / "a.csv")
    for found, expected in ((cloud.points, points), (cloud.colors, colors), (cloud.normals, normals)):
        assert (expected is None and found is None) or np.allclose(found, [expected])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("easting,northing,height\n1,2,3\n", "heading 'easting,northing,height' and the 3 numbers of line 2"),
        ("Points:0,Points:1,Points:2\n1,2,3\n", "heading 'Points:0,Points:1,Points:2' and the 3"),
        ("x,y,z,label\n1,2,3\n", "heading 'x,y,z,label' and the 3 numbers"),
        ("0x10 2 3\n4 5 6\n", "line 1 is '0x10 2 3'; expected numbers"),  # no heading: a point would be lost
        ("1.234,5;2;3\n4;5;6\n", "line 1 is '1.234,5;2;3'"),
        ("x,y,z\n1,,3\n", "line 2 is '1,,3'"),
        ("5\n1 2 3\n4 5 6\n", "says that it has 5 points and has 2"),
        ("1 2 3\n4 5 6\n".encode("utf-16"), "bytes of zero"),
    ],
)
def test_text_in_which_points_or_columns_would_be_lost(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(errors.BadFile, match=message):
        read_cloud(tmp_path / "a.txt")


@pytest.mark.parametrize("order", ["<", ">"])
def test_fields_of_a_ply_in_any_order(tmp_path, order):
    kinds = [("g", "u1"), ("Z", order + "f8"), ("X", order + "f8"), ("r", "u1"), ("Y", order + "f8"), ("b", "u1")]
    rows = np.array([(0, 3.5, 1.5, 1, 2.5, 0), (1, 6, 4, 0, 5, 0)], dtype=kinds)
    PlyData([PlyElement.describe(rows, "vertex")], byte_order=order).write(str(tmp_path / "a.ply"))
    cloud = read_cloud(tmp_path / "a.ply")
    assert cloud.points.tolist() == [[1.5, 2.5, 3.5], [4, 5, 6]]
    assert np.allclose(cloud.colors * 255, [[1, 0, 0], [0, 1, 0]])  # bytes are bytes, however dark
    assert np.array_equal(read_cloud(rows).points, cloud.points)  # records of numpy's too


def test_colors_have_a_known_scale(points):
    whole = np.ones((300, 3), np.float32)
    assert np.array_equal(read_cloud(np.concatenate([points, whole * 1.0000002], axis=1)).colors, whole)
    for colors, message in ((whole * 200, "from 200 to 200; expected 0 to 1"), (whole * -1, "from -1 to -1")):
        with pytest.raises(ValueError, match=message):
            read_cloud(Cloud(points, colors))


def test_packed_colors_of_a_dark_pcd(tmp_path):
    head = b"FIELDS x y z rgba\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nPOINTS 1\nDATA binary\n"
    (tmp_path / "a.pcd").write_bytes(head + struct.pack("<3fI", 1, 2, 3, 0xFF010001))
    assert np.allclose(read_cloud(tmp_path / "a.pcd").colors * 255, [[1, 0, 1]])


@pytest.mark.parametrize("header", ["SIZE 4 4 3", "COUNT 1 1 0", "POINTS -1"])
def test_pcd_headers_that_cannot_be(tmp_path, header):
    lines = {"FIELDS": "x y z", "SIZE": "4 4 4", "TYPE": "F F F", "COUNT": "1 1 1", "POINTS": "1", "DATA": "binary"}
    name, _, value = header.partition(" ")
    text = "".join(f"{k} {v}\n" for k, v in (lines | {name: value}).items())
    (tmp_path / "a.pcd").write_bytes(text.encode() + bytes(12))
    with pytest.raises(errors.BadFile, match="header lacks or misstates"):
        read_cloud(tmp_path / "a.pcd")


def test_a_las_file_that_ends_between_two_points(tmp_path, points):
    whole = write_labels(tmp_path / "a.las", Cloud(points), np.zeros(300, int), np.ones((300, 3), np.uint8))
    size = laspy.read(whole).point_format.size
    whole.write_bytes(whole.read_bytes()[:-size])
    with pytest.raises(errors.BadFile, match="ends after 299 of 300 points"):
        read_cloud(whole)


def test_small_things_keep_their_digits_too(points):
    """A part of 6 mm, 9 m from the origin of the machine that measured it, in double precision."""
    world = points * 0.001 + np.array([9.0, -3.0, 0.5])
    cloud = read_cloud(world)
    assert cloud.origin is not None
    assert np.abs(cloud.world() - world).max() < 1e-7
    assert read_cloud(points + 20).origin is None


def test_a_stray_point_does_not_cost_the_others_their_digits(points):
    world = np.concatenate([np.zeros((1, 3)), points + np.array([451234.5, 5412345.25, 310.0])])
    assert np.abs(read_cloud(world).world() - world)[1:].max() < 1e-5


def test_other_letters(tmp_path, points):
    """ply knows ASCII only: in comments others are passed over, in names of labels escaped."""
    path = write_labels(tmp_path / "Stühle" / "grün.ply", Cloud(points), np.zeros(300), np.zeros((300, 3)), ["Tür"])
    assert PlyData.read(str(path)).comments == [r"label 0 T\xfcr"]
    path.write_bytes(path.read_bytes().replace(rb"T\xfcr", "Tür".encode()))
    assert np.array_equal(read_cloud(path).points, points)


def test_arrays_and_tensors(tmp_path, points):
    np.savez(tmp_path / "a.npz", points=points, colors=np.full((300, 3), 51, np.uint8), other=np.array("text"))
    assert np.allclose(read_cloud(tmp_path / "a.npz").colors, 0.2)
    tensor = torch.from_numpy(points).bfloat16().requires_grad_()
    assert np.array_equal(read_cloud(tensor).points, tensor.detach().float().numpy())
    assert np.array_equal(read_cloud(Cloud(points.tolist())).points, points)
    for wrong in ({"points": None}, {"points": points, "origin": np.zeros(2)}):
        with pytest.raises(ValueError, match="expected"):
            Cloud(**wrong)


def test_no_file(tmp_path):
    (tmp_path / "a.ply").mkdir()
    with pytest.raises(errors.BadFile, match="is a folder"):
        read_cloud(tmp_path / "a.ply")
    with pytest.raises(errors.LocalFileMissing, match="there is no file"):
        read_cloud(tmp_path / "b.ply")
