"""Point clouds from files people have, and back: ply, pcd, text, npy and npz; las/laz and meshes with their libraries.

Coordinates are held in float32. A cloud that lies far from the origin (survey coordinates of a map projection) is moved
near to it first, and ``Cloud.origin`` says by how much, so that what is written lies where the input lay.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import existing, read_arrays, refused, whole
from zoo_registry import errors, optional

from .pcd import read_fields as read_pcd_fields
from .text import by_usual_names, read_rows

EXTENSIONS = (".ply", ".pcd", ".xyz", ".txt", ".pts", ".csv", ".npy", ".npz", ".las", ".laz", ".obj", ".stl", ".off")
TEXTS = (".xyz", ".txt", ".pts", ".csv")
#: What a field of labels is called (any case), also with CloudCompare's "scalar_" before it; the first that is there.
LABELS = ("label", "class", "classification", "semantic")
#: What the columns of text and arrays are, by their number, where nothing names them. Three with negative values are no
#: colours.
COLUMNS = (
    "x y z; x y z intensity; x y z r g b (0-255 or 0-1) or nx ny nz; x y z intensity r g b; x y z r g b nx ny nz or "
    "nx ny nz r g b"
)
#: Points drawn on the surface of a mesh.
MESH_POINTS = 8192
#: Beyond this distance from the origin float32 resolves less than a millimetre in metres ...
FAR = 1e4
#: ... and at so many times a cloud's own size less than a ten-thousandth of it.
FAR_SIZES = 1e3


@dataclass
class Cloud:
    """``points`` (N, 3) float32; ``colors`` (N, 3) in [0, 1] and ``normals`` (N, 3), where the file has them;
    ``labels`` (N,) int64, where they were asked for. The file's coordinates are ``points + origin`` (3,) float64; None:
    the points themselves. Lists and tensors are taken as arrays.

    Raises ValueError for other shapes.
    """

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None
    origin: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("points", "colors", "normals"):
            if name != "points" and getattr(self, name) is None:
                continue
            rows = real_array(getattr(self, name), name)
            setattr(self, name, rows)
            count = len(self.points) if self.points.ndim else 0
            if rows.shape != (count, 3):
                raise ValueError(f"{name} have shape {rows.shape}; expected ({count or 'N'}, 3), a row a point")
        if self.origin is not None and np.shape(self.origin) != (3,):
            raise ValueError(f"origin has shape {np.shape(self.origin)}; expected (3,): x, y, z")
        if self.labels is not None and np.shape(self.labels) != (len(self.points),):
            raise ValueError(f"labels have shape {np.shape(self.labels)}; expected ({len(self.points)},), one a point")

    def __len__(self) -> int:
        return len(self.points)

    def take(self, index: np.ndarray) -> Cloud:
        """The points of an index or mask."""
        colors, normals, labels = (None if a is None else a[index] for a in (self.colors, self.normals, self.labels))
        return Cloud(self.points[index], colors, normals, self.origin, labels)

    def world(self) -> np.ndarray:
        """Coordinates as in the file: (N, 3), float64 where there is an origin."""
        return self.points if self.origin is None else self.points.astype(np.float64) + self.origin


def read_cloud(source: str | Path | np.ndarray | Cloud, invalid: str = "error") -> Cloud:
    """A cloud from a file, by its ending, or from an array or tensor with the columns of :data:`COLUMNS` (or with named
    fields).

    ``invalid``: what becomes of points with NaN or infinite coordinates, colours or normals, "error" or "drop". Raises
    ValueError for an empty cloud, such points (with "error"), colours of no known scale and an unknown format; where a
    file is at fault, BadFile, and LocalFileMissing where there is none.
    """
    if invalid not in ("error", "drop"):
        raise ValueError(f"invalid is {invalid!r}; expected 'error' or 'drop'")
    if isinstance(source, Cloud):
        near = source.origin is not None and source.points.dtype == np.float32
        cloud = source if near else _cloud(source.world(), source.colors, source.normals)
        return _checked(cloud, "the given cloud", invalid)
    if hasattr(source, "__array__"):
        return _checked(
            _from_table(real_array(source, "the given array"), "the given array"), "the given array", invalid
        )
    if not isinstance(source, (str, Path)):
        raise ValueError(
            f"a {type(source).__name__} is no point cloud; expected a file, an array of one row a point ({COLUMNS}) or "
            "a zoo_point_cloud.files.Cloud"
        )
    return _read(source, invalid, labelled=False)


def read_labelled(path: str | Path, invalid: str = "error") -> Cloud:
    """A cloud with ``labels``, whole numbers, from a file that has one for each point: a field of one of :data:`LABELS`
    (ply, pcd, las, text with a heading, records), the last column (text and npy without names), ``labels`` (npz).

    Otherwise as :func:`read_cloud`. Raises BadFile where there are no labels, and for meshes.
    """
    return _read(path, invalid, labelled=True)


def _read(source: str | Path, invalid: str, *, labelled: bool) -> Cloud:
    path = existing(source, "a point cloud")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: no format is known by the ending {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    with refused(path):
        return _checked(reader(path, labelled), str(path), invalid)


def real_array(rows: Any, where: str) -> np.ndarray:
    """An array of real numbers, or of records of them, out of an array, a list or a tensor on any device."""
    found = np.asarray(rows.detach().cpu().double() if hasattr(rows, "detach") else rows)
    kinds = [found.dtype] if found.dtype.names is None else [found.dtype[name] for name in found.dtype.names]
    if any(kind.kind not in "fiub" for kind in kinds):
        raise ValueError(f"{where} has dtype {found.dtype}; expected one array of real numbers")
    return found


def _checked(cloud: Cloud, where: str, invalid: str) -> Cloud:
    if len(cloud) == 0:
        raise ValueError(f"{where}: the cloud is empty; a model needs points")
    fine = np.ones(len(cloud), dtype=bool)
    wrong = []
    for what, rows in (("coordinates", cloud.points), ("colours", cloud.colors), ("normals", cloud.normals)):
        if rows is not None and not (these := np.isfinite(rows).all(axis=1)).all():
            fine &= these
            wrong.append(what)
    if cloud.colors is not None and fine.any():
        low, high = float(cloud.colors[fine].min()), float(cloud.colors[fine].max())
        if low < 0 or high > 1:
            raise ValueError(
                f"{where}: colours reach from {low:.6g} to {high:.6g}; expected 0 to 1, in files and arrays of columns "
                "also 0 to 255 or 0 to 65535"
            )
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


def _cloud(
    points: np.ndarray, colors: np.ndarray | None, normals: np.ndarray | None, labels: np.ndarray | None = None
) -> Cloud:
    """Coordinates in float32, moved near the origin where they are too large for that. The middle point decides how
    far: a stray one, as the zeros that some scanners write, would leave the others where they are."""
    finite = points[np.isfinite(points).all(axis=1)].astype(np.float64)
    origin = None
    if len(finite):
        away, size = np.abs(finite).max(), np.ptp(finite, axis=0).max()
        if away > FAR or 0 < size < away / FAR_SIZES:
            origin = np.floor(np.median(finite, axis=0))
            points = points - origin
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and told as such
        normals = None if normals is None else normals.astype(np.float32)
        return Cloud(points.astype(np.float32), colors, normals, origin, labels)


def _from_table(table: np.ndarray, where: str, labelled: bool = False) -> Cloud:
    """Records by their names; columns by their number, see :data:`COLUMNS`, an intensity is not kept."""
    if table.dtype.names is not None:
        return _from_fields({name: table[name].reshape(-1) for name in table.dtype.names}, where, labelled)
    if table.ndim != 2 or table.shape[1] - labelled not in (3, 4, 6, 7, 9):
        last = " and a last column of labels" if labelled else ""
        raise ValueError(f"{where} has shape {table.shape}; expected one row a point: {COLUMNS}{last}")
    labels = _whole_numbers(table[:, -1], where) if labelled else None
    table = table[:, :-1] if labelled else table
    width = table.shape[1]
    rest = table[:, 4:] if width in (4, 7) else table[:, 3:]
    colors, normals = rest[:, :3] if width > 4 else None, rest[:, 3:] if width == 9 else None
    if width in (6, 9) and (rest[:, :3] < 0).any():
        colors, normals = normals, colors
    return _cloud(table[:, :3], _unit_colors(colors), normals, labels)


def _unit_colors(colors: np.ndarray | None) -> np.ndarray | None:
    """Colours in [0, 1] from 8 bits, 16 bits or [0, 1], by their type and the largest."""
    if colors is None:
        return None
    largest = float(colors.max()) if colors.size else 0.0
    if colors.dtype.kind == "f" and largest <= 1.001:  # rounded in another program
        return np.minimum(colors, 1).astype(np.float32)
    return (colors / (255.0 if largest <= 255 else 65535.0)).astype(np.float32)


def _whole_numbers(labels: np.ndarray, where: str) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "fiub" or not (labels == np.round(labels)).all():
        raise ValueError(f"{where}: the labels are no whole numbers; expected one for each point")
    return labels.astype(np.int64)


def _from_fields(given: Mapping[str, np.ndarray], where: str, labelled: bool = False) -> Cloud:
    fields = by_usual_names(given)
    said = ", ".join(given) or "none"
    if missing := [k for k in "xyz" if k not in fields]:
        raise ValueError(f"{where}: no field {', '.join(missing)}; found {said}")
    kind = next((name for name in LABELS if name in fields), None)
    if labelled and kind is None:
        raise ValueError(f"{where}: no labels; expected a field {', '.join(LABELS[:-1])} or {LABELS[-1]}, found {said}")

    def stacked(*names: str) -> np.ndarray | None:
        if not set(names) <= set(fields):
            return None
        for name in names:
            if fields[name].ndim != 1 or fields[name].dtype.kind not in "fiub":
                raise ValueError(f"{where}: the field {name} holds no single number for each point")
        return np.stack([fields[name] for name in names], axis=1)

    points = stacked("x", "y", "z")
    assert points is not None
    labels = _whole_numbers(fields[kind], where) if labelled and kind is not None else None
    return _cloud(points, _unit_colors(stacked("red", "green", "blue")), stacked("nx", "ny", "nz"), labels)


def _read_ply(path: Path, labelled: bool) -> Cloud:
    from plyfile import PlyData, PlyParseError

    try:
        try:
            data = PlyData.read(str(path))
        except UnicodeDecodeError:  # comments in other letters than ASCII, of which the format knows none
            head, end, rest = path.read_bytes().partition(b"end_header")
            data = PlyData.read(io.BytesIO(re.sub(rb"[\x80-\xff]", b"?", head) + end + rest))
    except (PlyParseError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: no readable ply file: {error}") from error
    except (MemoryError, OverflowError) as error:
        raise ValueError(f"{path}: no readable ply file: its header asks for more points than memory holds") from error
    names = [element.name for element in data.elements]
    if "vertex" not in names:
        raise ValueError(f"{path}: no element 'vertex'; found {names}")
    vertex = data["vertex"]
    return _from_fields({p.name: np.asarray(vertex[p.name]) for p in vertex.properties}, str(path), labelled)


def _read_text(path: Path, labelled: bool) -> Cloud:
    names, table = read_rows(path)
    if names:
        return _from_fields(dict(zip(names, table.T, strict=True)), str(path), labelled)
    return _from_table(table, str(path), labelled)


def load_array(path: Path) -> np.ndarray:
    """The real numbers of a npy file. Raises ValueError for anything else."""
    arrays = read_arrays(path)
    if "" not in arrays:
        raise ValueError(f"{path} is an archive with the arrays {', '.join(arrays)}; expected a .npy file of one")
    return real_array(arrays[""], str(path))


def _read_npy(path: Path, labelled: bool) -> Cloud:
    return _from_table(load_array(path), str(path), labelled)


def _read_npz(path: Path, labelled: bool) -> Cloud:
    """``points``, and ``colors``, ``normals`` and ``labels`` where there are such arrays; others are not read."""
    wanted = ("points", "colors", "normals") + (("labels",) if labelled else ())
    arrays = {name: real_array(a, f"{path}: {name}") for name, a in read_arrays(path).items() if name in wanted}
    if missing := [name for name in ("points", "labels") if name in wanted and name not in arrays]:
        raise ValueError(f"{path} holds no array {missing[0]}; expected points (N, 3), labels (N,), colors and normals")
    labels = _whole_numbers(arrays["labels"], str(path)) if labelled else None
    return _cloud(arrays["points"], _unit_colors(arrays.get("colors")), arrays.get("normals"), labels)


def _read_pcd(path: Path, labelled: bool) -> Cloud:
    return _from_fields(read_pcd_fields(path), str(path), labelled)


def _laspy(path: Path) -> Any:
    return optional("laspy", f"{path}: a las file", "ssm-zoo-point-cloud[las]")


def _laz_errors() -> tuple[type[Exception], ...]:
    """What the library below laspy that unpacks laz raises for a damaged file."""
    try:
        return (optional("lazrs", "a laz file", "ssm-zoo-point-cloud[las]").LazrsError,)
    except errors.MissingExtra:
        return ()


def _read_las(path: Path, labelled: bool) -> Cloud:
    laspy = _laspy(path)
    try:
        data = laspy.read(path)
    except (laspy.LaspyException, *_laz_errors(), ValueError, EOFError) as error:
        raise ValueError(f"{path}: no readable las file: {error}") from error
    if len(data.points) != data.header.point_count:
        raise ValueError(f"{path}: the file ends after {len(data.points)} of {data.header.point_count} points")
    fields = {name: np.asarray(getattr(data, name)) for name in "xyz"}
    names = set(data.point_format.dimension_names)
    if {"red", "green", "blue"} <= names and np.asarray(data.red).any():  # many writers leave the fields at zero
        fields |= {name: np.asarray(getattr(data, name)) for name in ("red", "green", "blue")}
    fields |= {name: np.asarray(getattr(data, name)) for name in names if name.lower() in LABELS}
    return _from_fields(fields, str(path), labelled)


def _read_mesh(path: Path, labelled: bool) -> Cloud:
    """Points drawn evenly on the surface, always the same ones."""
    if labelled:
        raise ValueError(f"{path}: a mesh has no labels of points; expected ply, pcd, las, laz, npy, npz or text")
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
    return _cloud(np.asarray(given), None, np.asarray(mesh.face_normals[faces]))


_READERS: dict[str, Callable[[Path, bool], Cloud]] = {
    ".ply": _read_ply, ".pcd": _read_pcd, ".npy": _read_npy, ".npz": _read_npz, ".las": _read_las, ".laz": _read_las,
    **dict.fromkeys(TEXTS, _read_text),
    **dict.fromkeys((".obj", ".stl", ".off"), _read_mesh),
}  # fmt: skip


# -- back to files ----------------------------------------------------------------------------------------------------


def write_labels(
    path: str | Path,
    cloud: Cloud,
    labels: np.ndarray,
    colors: np.ndarray,
    names: Sequence[str] | Mapping[int, str] = (),
) -> Path:
    """The cloud with a label (N,) and a colour (N, 3) uint8 for every point, as ``.ply``, ``.las`` or ``.laz``; where
    the input lay. ``names`` of labels 0, 1 ..., or by label, go into comments of a ply (what is not ASCII escaped, as
    Python writes it), a text area of a las. Raises ValueError for another ending, StoreError where nothing can be
    written."""
    path = Path(path)
    writer = {".ply": _write_ply, ".las": _write_las, ".laz": _write_las}.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"{path}: labels are written as .ply, .las or .laz, not as {path.suffix!r}")
    named = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    with whole(path) as work:
        writer(work, cloud.world(), labels, colors, named)
    return path


def _write_ply(
    path: Path, points: np.ndarray, labels: np.ndarray, colors: np.ndarray, names: Mapping[int, str]
) -> None:
    from plyfile import PlyData, PlyElement

    real = "f8" if points.dtype == np.float64 else "f4"
    kinds = [("x", real), ("y", real), ("z", real), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "i4")]
    vertex = np.empty(len(points), dtype=kinds)
    for (name, _), column in zip(kinds, [*points.T, *colors.T, labels], strict=True):
        vertex[name] = column
    comments = [f"label {i} {name}".encode("ascii", "backslashreplace").decode() for i, name in names.items()]
    PlyData([PlyElement.describe(vertex, "vertex")], comments=comments).write(str(path))


def _write_las(
    path: Path, points: np.ndarray, labels: np.ndarray, colors: np.ndarray, names: Mapping[int, str]
) -> None:
    """LAS 1.4, point format 7: 16-bit colours, and the labels as the extra dimension ``label`` (the format's own
    classification has a fixed list of meanings), their names in a text area descriptor."""
    laspy = _laspy(path)
    header = laspy.LasHeader(version="1.4", point_format=7)
    header.add_extra_dim(laspy.ExtraBytesParams(name="label", type=np.int32, description="class of the point"))
    if names:
        text = "\n".join(f"label {i} {name}" for i, name in names.items())
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
