"""Point clouds from files people have, and back: ply, pcd, text, npy; las/laz and meshes with their libraries.

Coordinates are held in float32. A cloud that lies far from the origin (survey coordinates of a map projection) is moved
near to it first, and ``Cloud.origin`` says by how much, so that what is written lies where the input lay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import read_arrays
from zoo_registry import errors, optional

from .pcd import read_fields as read_pcd_fields

EXTENSIONS = (".ply", ".pcd", ".xyz", ".txt", ".pts", ".csv", ".npy", ".las", ".laz", ".obj", ".stl", ".off")
#: What the columns of text and arrays are, by their number. Six are normals where there are negative values.
COLUMNS = "x y z; x y z intensity; x y z r g b (0-255 or 0-1) or normals; x y z intensity r g b; x y z r g b nx ny nz"
#: Points drawn on the surface of a mesh.
MESH_POINTS = 8192
#: Beyond this distance from the origin float32 resolves less than a millimetre in metres.
FAR = 1e4


@dataclass
class Cloud:
    """``points`` (N, 3) float32; ``colors`` (N, 3) in [0, 1] and ``normals`` (N, 3), where the file has them. The
    file's coordinates are ``points + origin`` (3,) float64; None: the points themselves.

    Raises ValueError for other shapes.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None
    origin: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("points", "colors", "normals"):
            rows = getattr(self, name)
            if rows is not None and np.shape(rows) != (len(self.points), 3):
                raise ValueError(f"{name} have shape {np.shape(rows)}; expected ({len(self.points)}, 3), a row a point")

    def __len__(self) -> int:
        return len(self.points)

    def take(self, index: np.ndarray) -> Cloud:
        """The points of an index or mask."""
        colors, normals = (None if a is None else a[index] for a in (self.colors, self.normals))
        return Cloud(self.points[index], colors, normals, self.origin)

    def world(self) -> np.ndarray:
        """Coordinates as in the file: (N, 3), float64 where there is an origin."""
        return self.points if self.origin is None else self.points.astype(np.float64) + self.origin


def read_cloud(source: str | Path | np.ndarray | Cloud, invalid: str = "error") -> Cloud:
    """A cloud from a file, by its ending, or from an array with the columns of :data:`COLUMNS`.

    ``invalid``: what becomes of points with NaN or infinite coordinates, colours or normals, "error" or "drop". Raises
    ValueError for an empty cloud, such points (with "error"), an unknown format and a broken file.
    """
    if invalid not in ("error", "drop"):
        raise ValueError(f"invalid is {invalid!r}; expected 'error' or 'drop'")
    if isinstance(source, Cloud):
        cloud = source
        if cloud.origin is None and cloud.points.dtype != np.float32:
            points, origin = _near(np.asarray(cloud.points))
            cloud = Cloud(points, cloud.colors, cloud.normals, origin)
        return _checked(cloud, "the given cloud", invalid)
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        table = _real(np.asarray(source), "the given array")
        return _checked(_from_columns(table, "the given array"), "the given array", invalid)
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"a {type(source).__name__} is no point cloud; expected a file, an array of one row a point ({COLUMNS}) or "
            "a zoo_point_cloud.files.Cloud"
        )
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: no format is known by the ending {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    return _checked(reader(path), str(path), invalid)


def _checked(cloud: Cloud, where: str, invalid: str) -> Cloud:
    if len(cloud) == 0:
        raise ValueError(f"{where}: the cloud is empty; a model needs points")
    fine = np.ones(len(cloud), dtype=bool)
    wrong = []
    for what, rows in (("coordinates", cloud.points), ("colours", cloud.colors), ("normals", cloud.normals)):
        if rows is not None and not (these := np.isfinite(rows).all(axis=1)).all():
            fine &= these
            wrong.append(what)
    if not wrong:
        return cloud
    what = f"NaN or infinite {' and '.join(wrong)}"
    if not fine.any():
        raise ValueError(f"{where}: all {len(cloud)} points have {what}")
    if invalid == "error":
        raise ValueError(
            f"{where}: {int((~fine).sum())} of {len(cloud)} points have {what} (depth cameras mark missing "
            "measurements so); remove them, or let them be left out: invalid='drop' (-o invalid=drop)"
        )
    return cloud.take(fine)


def _near(points: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Coordinates in float32, and the origin that was taken off where they are too large for that."""
    fine = np.isfinite(points).all(axis=1)
    if points.dtype == np.float32 or not fine.any() or np.abs(points[fine]).max() <= FAR:
        return points.astype(np.float32), None
    origin = np.floor(points[fine].min(axis=0)).astype(np.float64)
    return (points - origin).astype(np.float32), origin


def _from_columns(table: np.ndarray, where: str) -> Cloud:
    """By the number of columns, see :data:`COLUMNS`; an intensity is not kept."""
    if table.ndim != 2 or table.shape[1] not in (3, 4, 6, 7, 9):
        raise ValueError(f"{where} has shape {table.shape}; expected one row a point: {COLUMNS}")
    points, origin = _near(table[:, :3])
    width = table.shape[1]
    rest = table[:, 3:].astype(np.float32)
    if width == 6 and (rest < 0).any():
        return Cloud(points, None, rest, origin)
    return Cloud(
        points,
        _unit_colors(rest[:, 1:4] if width == 7 else rest[:, :3]) if width >= 6 else None,
        rest[:, 3:6] if width == 9 else None,
        origin,
    )


def _unit_colors(colors: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] from 8 bits, 16 bits or [0, 1]."""
    largest = float(colors.max()) if colors.size else 0.0
    scale = 1.0 if largest <= 1 else 255.0 if largest <= 255 else 65535.0
    return (colors / scale).astype(np.float32)


def _from_fields(fields: dict[str, np.ndarray], where: str) -> Cloud:
    missing = [k for k in "xyz" if k not in fields]
    if missing:
        raise ValueError(f"{where}: no field {', '.join(missing)}; found {sorted(fields)}")

    def stacked(*names: str) -> np.ndarray | None:
        return np.stack([fields[n] for n in names], axis=1) if set(names) <= set(fields) else None

    given = stacked("x", "y", "z")
    assert given is not None
    points, origin = _near(given)
    colors = stacked("red", "green", "blue")
    normals = stacked("nx", "ny", "nz")
    normals = stacked("normal_x", "normal_y", "normal_z") if normals is None else normals
    return Cloud(
        points,
        None if colors is None else _unit_colors(colors.astype(np.float32)),
        None if normals is None else normals.astype(np.float32),
        origin,
    )


def _read_ply(path: Path) -> Cloud:
    from plyfile import PlyData, PlyParseError

    try:
        data = PlyData.read(str(path))
    except (PlyParseError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: no readable ply file: {error}") from error
    names = [element.name for element in data.elements]
    if "vertex" not in names:
        raise ValueError(f"{path}: no element 'vertex'; found {names}")
    vertex = data["vertex"]
    return _from_fields({p.name: np.asarray(vertex[p.name]) for p in vertex.properties}, str(path))


def _read_text(path: Path) -> Cloud:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [line.strip() for line in file]
    rows = [(i, line) for i, line in enumerate(lines, 1) if line and not line.startswith(("#", "//"))]
    if rows and not _numbers(rows[0][1]):
        rows = rows[1:]  # a heading
    if rows and len(rows[0][1].split()) == 1 and rows[0][1].isdigit():
        rows = rows[1:]  # the number of points (pts)
    table = [_numbers(line) for _, line in rows]
    for (i, line), row in zip(rows, table, strict=True):
        if not row or len(row) != len(table[0]):
            expected = f"{len(table[0])} numbers as in the first row" if table[0] else "numbers"
            raise ValueError(f"{path}: line {i} is {line[:60]!r}; expected {expected} ({COLUMNS})")
    return _from_columns(np.array(table, dtype=np.float64).reshape(len(table), -1 if table else 3), str(path))


def _numbers(line: str) -> list[float]:
    """The numbers of a line, which spaces, commas or semicolons part; beside semicolons a comma is a decimal point.
    Empty where anything else stands there."""
    line = line.replace(",", ".").replace(";", " ") if ";" in line else line.replace(",", " ")
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return []


def load_array(path: Path) -> np.ndarray:
    """The real numbers of a npy file. Raises ValueError for anything else."""
    arrays = read_arrays(path)
    if "" not in arrays:
        raise ValueError(f"{path} is an archive with the arrays {', '.join(arrays)}; expected a .npy file of one")
    return _real(arrays[""], str(path))


def _real(table: np.ndarray, where: str) -> np.ndarray:
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiub":
        raise ValueError(f"{where} has dtype {getattr(table, 'dtype', None)}; expected one array of real numbers")
    return table


def _read_npy(path: Path) -> Cloud:
    return _from_columns(load_array(path), str(path))


def _read_pcd(path: Path) -> Cloud:
    return _from_fields(read_pcd_fields(path), str(path))


def _laspy(path: Path) -> Any:
    return optional("laspy", f"{path}: a las file", "ssm-zoo-point-cloud[las]")


def _laz_errors() -> tuple[type[Exception], ...]:
    """What the library below laspy that unpacks laz raises for a damaged file."""
    try:
        return (optional("lazrs", "a laz file", "ssm-zoo-point-cloud[las]").LazrsError,)
    except errors.MissingExtra:
        return ()


def _read_las(path: Path) -> Cloud:
    laspy = _laspy(path)
    try:
        data = laspy.read(path)
    except (laspy.LaspyException, *_laz_errors(), ValueError, EOFError) as error:
        raise ValueError(f"{path}: no readable las file: {error}") from error
    fields = {name: np.asarray(getattr(data, name)) for name in "xyz"}
    names = set(data.point_format.dimension_names)
    if {"red", "green", "blue"} <= names and np.asarray(data.red).any():  # many writers leave the fields at zero
        fields |= {name: np.asarray(getattr(data, name)) for name in ("red", "green", "blue")}
    return _from_fields(fields, str(path))


def _read_mesh(path: Path) -> Cloud:
    """Points drawn evenly on the surface, always the same ones."""
    trimesh: Any = optional("trimesh", f"{path}: a mesh", "ssm-zoo-point-cloud[mesh]")
    try:
        mesh: Any = trimesh.load(path, force="mesh")
    except (ValueError, IndexError, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path}: no readable mesh: {error}") from error
    except ModuleNotFoundError as error:  # trimesh asks another library what the encoding of a text might be
        raise ValueError(f"{path}: no readable mesh: it is no text in UTF-8 and no binary file known") from error
    if len(mesh.faces) == 0 or not mesh.area > 0:
        raise ValueError(f"{path}: the mesh has no surface to draw points on; give bare points as ply or xyz")
    given, faces = trimesh.sample.sample_surface(mesh, MESH_POINTS, seed=0)
    points, origin = _near(np.asarray(given))
    return Cloud(points, None, np.asarray(mesh.face_normals[faces], dtype=np.float32), origin)


_READERS: dict[str, Callable[[Path], Cloud]] = {
    ".ply": _read_ply, ".pcd": _read_pcd, ".npy": _read_npy, ".las": _read_las, ".laz": _read_las,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv"), _read_text),
    **dict.fromkeys((".obj", ".stl", ".off"), _read_mesh),
}  # fmt: skip


# -- back to files ----------------------------------------------------------------------------------------------------


def write_labels(
    path: str | Path, cloud: Cloud, labels: np.ndarray, colors: np.ndarray, names: Sequence[str] = ()
) -> Path:
    """The cloud with a label (N,) and a colour (N, 3) uint8 for every point, as ``.ply``, ``.las`` or ``.laz``; where
    the input lay. ``names`` of the labels go into comments of a ply, a text area of a las. Raises ValueError for
    another ending."""
    path = Path(path)
    writer = {".ply": _write_ply, ".las": _write_las, ".laz": _write_las}.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"{path}: labels are written as .ply, .las or .laz, not as {path.suffix!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer(path, cloud.world(), labels, colors, names)
    return path


def _write_ply(path: Path, points: np.ndarray, labels: np.ndarray, colors: np.ndarray, names: Sequence[str]) -> None:
    from plyfile import PlyData, PlyElement

    real = "f8" if points.dtype == np.float64 else "f4"
    kinds = [("x", real), ("y", real), ("z", real), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "i4")]
    vertex = np.empty(len(points), dtype=kinds)
    for (name, _), column in zip(kinds, [*points.T, *colors.T, labels], strict=True):
        vertex[name] = column
    comments = [f"label {i} {name}" for i, name in enumerate(names)]
    PlyData([PlyElement.describe(vertex, "vertex")], comments=comments).write(str(path))


def _write_las(path: Path, points: np.ndarray, labels: np.ndarray, colors: np.ndarray, names: Sequence[str]) -> None:
    """LAS 1.4, point format 7: 16-bit colours, and the labels as the extra dimension ``label`` (the format's own
    classification has a fixed list of meanings), their names in a text area descriptor."""
    laspy = _laspy(path)
    header = laspy.LasHeader(version="1.4", point_format=7)
    header.add_extra_dim(laspy.ExtraBytesParams(name="label", type=np.int32, description="class of the point"))
    if names:
        text = "\n".join(f"label {i} {name}" for i, name in enumerate(names))
        header.vlrs.append(laspy.VLR("LASF_Spec", 3, "names of the labels", text.encode()))
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    # Coordinates are 32-bit integers: the finest power of ten with room for the whole cloud.
    step = 10.0 ** np.ceil(np.log10(max(float((high - low).max()), 1e-6) / (2**31 - 1)))
    header.offsets, header.scales = low, np.full(3, step)
    data = laspy.LasData(header)
    data.x, data.y, data.z = points.astype(np.float64).T
    data.red, data.green, data.blue = colors.astype(np.uint16).T * 257
    data.label = labels.astype(np.int32)
    data.write(path)
