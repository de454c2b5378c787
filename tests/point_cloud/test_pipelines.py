"""Files in, answers out; and the clouds that cannot be answered."""

import numpy as np
import pytest
import torch

import zoo
from zoo_point_cloud.files import Cloud, read_cloud, write_labels
from zoo_point_cloud.pipelines import prepare_cloud

PCD = b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\n"


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return zoo.create("pointmamba_modelnet", depth=1, embed_dim=24)


def test_formats_agree(tmp_path, points):
    np.save(tmp_path / "a.npy", points)
    np.savetxt(tmp_path / "a.xyz", points, fmt="%.9g")
    np.savetxt(tmp_path / "a.csv", points, fmt="%.9g", delimiter=",", header="x,y,z", comments="")
    write_labels(tmp_path / "a.ply", Cloud(points), np.arange(300), np.zeros((300, 3), np.uint8))
    head = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 300\nHEIGHT 1\nPOINTS 300\n"
    )
    (tmp_path / "a.pcd").write_bytes(f"{head}DATA binary\n".encode() + points.tobytes())
    rows = "\n".join(" ".join(f"{v:.9g}" for v in row) for row in points)
    (tmp_path / "b.pcd").write_text(f"{head}DATA ascii\n{rows}\n")
    for name in ("a.npy", "a.xyz", "a.csv", "a.ply", "a.pcd", "b.pcd"):
        assert np.array_equal(read_cloud(tmp_path / name).points, points), name


def test_colors_are_scaled(points):
    eight = read_cloud(np.concatenate([points, np.full((300, 3), 128.0)], axis=1))
    assert eight.colors is not None
    assert np.allclose(eight.colors, 128 / 255)


@pytest.mark.parametrize("kind", ["F", "U"])
def test_packed_colors_of_pcd(tmp_path, kind):
    head = f"FIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F {kind}\nCOUNT 1 1 1 1\nPOINTS 1\nDATA binary\n"
    packed = np.uint32(255 << 16 | 51 << 8 | 102).tobytes()
    (tmp_path / "a.pcd").write_bytes(head.encode() + np.zeros(3, np.float32).tobytes() + packed)
    assert np.allclose(read_cloud(tmp_path / "a.pcd").colors, [[1.0, 0.2, 0.4]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xyz", b"", "is empty"),
        ("a.xyz", b"1 2 3\n1 nan 3\n", "1 of 2 points have NaN"),
        ("a.xyz", b"1 2 3\n4 5\n", "line 2 is '4 5'; expected 3 numbers"),
        ("a.xyz", b"1 2\n3 4\n", "x y z"),
        ("a.xyz", b"1 2 3 4 5\n", "x y z r g b"),
        ("a.csv", b"x,y,z,what\n1,2,3,chair\n", "line 2 is '1,2,3,chair'; expected numbers"),
        ("a.csv", b"x,y,z\n", "is empty"),
        ("a.ply", b"no ply", "no readable ply"),
        ("a.pcd", b"VERSION 0.7\n", "no DATA line"),
        ("a.pcd", PCD + b"POINTS 9\nDATA binary\n123", "after 0 of 9"),
        (
            "a.pcd",
            PCD + b"POINTS 9\nDATA binary_compressed\n12",
            "before its compressed",
        ),
        ("a.pcd", PCD + b"POINTS 9\nDATA packed\n", "DATA packed is not known"),
        ("a.pcd", PCD + b"POINTS 1\nDATA ascii\n1 2\n", "not every row"),
        ("a.pcd", PCD + b"POINTS 9\nDATA ascii\n1 2 3\n", "1 rows; its header says 9"),
        ("a.las", b"no las", "no readable las"),
        ("a.laz", b"", "no readable las"),
        ("a.npy", b"", "is no .npz or .npy file"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\n", "no surface to draw points on"),
        ("a.stl", b"junk", "no surface|no readable mesh"),
        ("a.obj", bytes(range(256)), "no surface|no readable mesh"),
        ("a.bin", b"", "no format is known"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cloud(tmp_path / name)


def test_text_with_a_heading_comments_and_other_separators(tmp_path):
    for content in (b"# a scan\n1.5 2 3\n\n// more\n4 5 6.5\n", b"x;y;z\n1,5;2;3\n4;5;6,5\n", b"2\n1.5 2 3\n4 5 6.5\n"):
        (tmp_path / "a.txt").write_bytes(content)
        assert read_cloud(tmp_path / "a.txt").points.tolist() == [[1.5, 2, 3], [4, 5, 6.5]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.array([["a", "b", "c"]]), "has dtype <U1; expected one array of real numbers"),
        (np.ones((5, 3), complex), "complex128; expected one array of real"),
        (np.ones((1, 5, 3)), "shape .1, 5, 3.; expected one row a point"),
        ([[1.0, 2.0, 3.0]], "a list is no point cloud; expected a file"),
    ],
)
def test_what_is_no_cloud(source, message):
    with pytest.raises(ValueError, match=message):
        read_cloud(source)


def test_a_cloud_holds_together(points):
    with pytest.raises(ValueError, match=r"colors have shape .5, 3.; expected .300, 3."):
        Cloud(points, points[:5])
    with pytest.raises(ValueError, match=r"points have shape .300, 2."):
        Cloud(points[:, :2])


def test_a_cloud_in_double_precision_keeps_its_digits(points):
    world = points.astype(np.float64) + np.array([451234.5, 5412345.25, 310.0])
    cloud = read_cloud(Cloud(world))
    assert cloud.points.dtype == np.float32
    assert np.abs(cloud.world() - world).max() < 1e-5


def test_colors_that_are_no_numbers(points):
    """One of them would make every point's answer NaN."""
    colors = np.full((300, 3), 0.5, np.float32)
    colors[7, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 300 points have NaN or infinite colours"):
        read_cloud(Cloud(points, colors))
    assert len(read_cloud(Cloud(points, colors), invalid="drop")) == 299


def test_classification(tmp_path, points, classifier):
    np.save(tmp_path / "a.npy", points)
    result = zoo.pipeline(classifier, top_k=3)(str(tmp_path / "a.npy"))
    assert len(result.labels) == 3
    assert 0 < result.confidence <= 1
    assert result.to_dict()["points"] == 300
    picture = result.save_picture(tmp_path / "a.png")
    assert picture.stat().st_size > 1000


def test_order_of_points_and_duplicates(points, classifier):
    answer = zoo.pipeline(classifier)
    again = answer(np.concatenate([points, points[:50]]))
    assert np.isfinite(again.probabilities).all()
    many = np.random.default_rng(1).normal(size=(3000, 3))
    assert answer(many).points == 3000  # thinned to 1024 for the model


def test_too_few_points(points, classifier):
    with pytest.raises(ValueError, match="20 points; pointmamba_modelnet needs at least 64"):
        zoo.pipeline(classifier)(points[:20])


def test_all_points_equal(classifier):
    result = zoo.pipeline(classifier)(np.ones((100, 3), np.float32))
    assert np.isfinite(result.probabilities).all()


def test_room_segmentation(tmp_path):
    torch.manual_seed(0)
    r = np.random.default_rng(2)
    room = Cloud(r.uniform(0, 1.2, (4000, 3)).astype(np.float32), r.uniform(0, 1, (4000, 3)).astype(np.float32))
    model = zoo.create("pcm_s3dis", embed_dim=8, decoder_channels=[8, 8, 8, 8], context_dim=8)
    result = zoo.pipeline(model)(room)
    assert len(result.labels) == 4000
    assert sum(result.counts.values()) == 4000
    written = read_cloud(result.save_labels(tmp_path / "room.ply"))
    assert np.array_equal(written.points, room.points)
    assert result.picture().size[0] == 960
    with pytest.raises(ValueError, match="reads a color"):
        zoo.pipeline(model)(room.points)


def test_a_room_with_a_corner_that_holds_few_points():
    """A tile of the authors' evaluation that the model cannot group: the room goes through in blocks."""
    torch.manual_seed(0)
    r = np.random.default_rng(2)
    sides = r.uniform(0, 1, (3000, 3)) * [4, 0.6, 1], r.uniform(0, 1, (600, 3)) * [0.3, 4, 1]
    room = np.concatenate(sides).astype(np.float32)
    model = zoo.create("pcm_s3dis", embed_dim=8, decoder_channels=[8, 8, 8, 8], context_dim=8, test_crop=1000)
    result = zoo.pipeline(model)(Cloud(room, np.full_like(room, 0.5)))
    assert len(result.labels) == 3600


def test_the_middle_of_many_points(points):
    """In float32 a million numbers add up to something 60 m off."""
    room = np.random.default_rng(0).uniform(0, 10, (1_000_000, 3)).astype(np.float32) + np.float32(5000)
    found = prepare_cloud(Cloud(room), {"normalize": "floor"})[0]
    assert found[:, :2].double().mean(dim=0).abs().max() < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_unit_does_not_matter(points, size):
    """Squares of such coordinates are beyond float32: the cloud would be one point."""
    settings = {"normalize": "unit_sphere"}
    expected = prepare_cloud(Cloud(points), settings)[0]
    torch.testing.assert_close(prepare_cloud(Cloud(points * np.float32(size)), settings)[0], expected)


@pytest.mark.parametrize("name", ["pcm_tiny_scanobjectnn", "pointmamba_scan_hardest"])
def test_an_answer_does_not_depend_on_the_batch(points, name):
    """The models as published share their curves' bits among a batch; files of one folder have nothing in common."""
    torch.manual_seed(0)
    small = {"depth": 1} if name.startswith("pointmamba") else {}
    pipe = zoo.pipeline(zoo.create(name, embed_dim=24, **small), top_k=40)
    clouds = [points, points * [1, 0.1, 0.1], points * 3 + 1]
    assert pipe.model.mixes_batch
    for one, other in zip(pipe(clouds, batch_size=3), map(pipe, clouds), strict=True):
        assert one.labels == other.labels
        assert np.allclose(one.probabilities, other.probabilities, rtol=1e-6)


def test_block_points_of_a_model_that_has_none():
    model = zoo.create("pointmamba_shapenetpart", depth=3, embed_dim=24)
    with pytest.raises(zoo.errors.BadArgument, match=r"block_points is 500; .* leave it out"):
        zoo.pipeline(model, shape="chair", block_points=500)


def test_part_segmentation_needs_the_kind_of_object(points):
    model = zoo.create("pcm_tiny_shapenetpart", embed_dim=8, decoder_channels=[8, 8, 8, 8], context_dim=8)
    with pytest.raises(zoo.errors.BadArgument, match="airplane, bag"):
        zoo.pipeline(model)
    with pytest.raises(zoo.errors.BadArgument, match="shape is 'chair'; pcm_micro_parts labels every kind"):
        zoo.pipeline(zoo.create("pcm_micro_parts"), shape="chair")
    result = zoo.pipeline(model, shape="chair")(np.concatenate([points, np.full((300, 3), 0.5), points], axis=1))
    assert len(result.labels) == 300


def test_labels_belong_to_the_cards():
    from zoo_registry import query, read_labels

    sizes = {}
    for entry in query("*", domain="point_cloud"):
        for weights in entry.card.weights.values():
            if weights.labels:
                sizes[weights.labels] = len(read_labels(entry.card, weights))
    published = {"modelnet40": 40, "scanobjectnn": 15, "shapenetpart": 50, "s3dis": 13}
    assert sizes == {**published, "demo/shapes.txt": 12, "demo/parts.txt": 14}
