"""Point clouds from files people have, and back: ply, pcd, text, npy; las/laz and meshes with their libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EXTENSIONS = (".ply", ".pcd", ".xyz", ".txt", ".pts", ".csv", ".npy", ".las", ".laz", ".obj", ".stl", ".off")
#: Points drawn on the surface of a mesh.
MESH_POINTS = 8192


@dataclass
class Cloud:
    """``points`` (N, 3) float32; ``colors`` (N, 3) in [0, 1] and ``normals`` (N, 3), where the file has them."""

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.points)

    def take(self, index: np.ndarray) -> Cloud:
        """The points of an index or mask."""
        parts = (None if a is None else a[index] for a in (self.colors, self.normals))
        return Cloud(self.points[index], *parts)


def read_cloud(source: str | Path | np.ndarray | Cloud) -> Cloud:
    """A cloud from a file, by its ending, or from an array (N, 3), (N, 6: with colours) or (N, 9: and normals).

    Raises ValueError for an empty cloud, coordinates that are not finite, an unknown format and a broken file.
    """
    if isinstance(source, Cloud):
        return _checked(source, "the given cloud")
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        return _checked(_from_columns(np.asarray(source), "the given array"), "the given array")
    path = Path(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path}: no format is known by the ending {path.suffix!r}; expected {', '.join(EXTENSIONS)}")
    return _checked(reader(path), str(path))


def _checked(cloud: Cloud, where: str) -> Cloud:
    if len(cloud) == 0:
        raise ValueError(f"{where}: the cloud is empty; a model needs points")
    bad = int((~np.isfinite(cloud.points)).any(axis=1).sum())
    if bad:
        raise ValueError(
            f"{where}: {bad} of {len(cloud)} points have NaN or infinite coordinates; remove them first "
            "(depth cameras mark missing measurements so)"
        )
    return cloud


def _from_columns(table: np.ndarray, where: str) -> Cloud:
    if table.ndim != 2 or table.shape[1] not in (3, 4, 6, 7, 9):
        raise ValueError(
            f"{where} has shape {table.shape}; expected one row a point: x y z, then r g b (0-255 or 0-1), then normals"
        )
    table = table.astype(np.float32)
    colors = table[:, 3:6] if table.shape[1] >= 6 else None
    return Cloud(
        table[:, :3], None if colors is None else _unit_colors(colors), table[:, 6:9] if table.shape[1] == 9 else None
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
        return np.stack([fields[n] for n in names], axis=1).astype(np.float32) if set(names) <= set(fields) else None

    points = stacked("x", "y", "z")
    assert points is not None
    colors = stacked("red", "green", "blue")
    normals = stacked("nx", "ny", "nz")
    normals = stacked("normal_x", "normal_y", "normal_z") if normals is None else normals
    return Cloud(points, None if colors is None else _unit_colors(colors), normals)


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
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = [line for line in file.read().replace(",", " ").replace(";", " ").splitlines() if line.strip()]
    if lines and not _numbers(lines[0]):
        lines = lines[1:]  # a heading
    if lines and len(lines[0].split()) == 1:
        lines = lines[1:]  # the number of points (pts)
    rows = [_numbers(line) for line in lines if not line.lstrip().startswith(("#", "//"))]
    widths = {len(row) for row in rows}
    if len(widths) > 1 or 0 in widths:
        bad = next(i for i, row in enumerate(rows, 1) if len(row) != len(rows[0]) or not row)
        raise ValueError(f"{path}: row {bad} is no list of {len(rows[0])} numbers as the first is")
    return _from_columns(np.array(rows, dtype=np.float32).reshape(len(rows), -1 if rows else 3), str(path))


def _numbers(line: str) -> list[float]:
    try:
        return [float(word) for word in line.split()]
    except ValueError:
        return []


def _read_npy(path: Path) -> Cloud:
    return _from_columns(np.load(path, allow_pickle=False), str(path))


def _read_pcd(path: Path) -> Cloud:
    """The Point Cloud Library's format, version 0.7, ascii or binary."""
    content = path.read_bytes()
    header: dict[str, list[str]] = {}
    position = 0
    while "DATA" not in header:
        end = content.find(b"\n", position)
        if end < 0:
            raise ValueError(f"{path}: no readable pcd file: the header has no DATA line")
        words = content[position:end].decode("ascii", "replace").split()
        position = end + 1
        if words and not words[0].startswith("#"):
            header[words[0].upper()] = words[1:]
    kinds = {"F": "f", "I": "i", "U": "u"}
    try:
        names, count = header["FIELDS"], int(header["POINTS"][0])
        formats = [f"<{kinds[k]}{s}" for k, s in zip(header["TYPE"], header["SIZE"], strict=True)]
        repeats = [int(n) for n in header.get("COUNT", ["1"] * len(names))]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: no readable pcd file: its header lacks or misstates {error}") from error
    if header["DATA"] == ["ascii"]:
        rows = [line.split() for line in content[position:].decode("ascii", "replace").splitlines() if line.strip()]
        columns = np.cumsum([0, *repeats])
        table = np.array(rows, dtype=np.float64).reshape(len(rows), int(columns[-1]))
        fields: dict[str, Any] = {n: table[:, c] for n, c in zip(names, columns, strict=False)}
    elif header["DATA"] == ["binary"]:
        kind = np.dtype(
            [(f"{n}_{i}", f, (r,)) for i, (n, f, r) in enumerate(zip(names, formats, repeats, strict=True))]
        )
        if len(content) - position < kind.itemsize * count:
            raise ValueError(
                f"{path}: the file ends after {(len(content) - position) // kind.itemsize} of {count} points"
            )
        records = np.frombuffer(content, dtype=kind, count=count, offset=position)
        fields = {n: records[f"{n}_{i}"][:, 0] for i, n in enumerate(names)}
    else:
        raise ValueError(f"{path}: DATA {' '.join(header['DATA'])} is not read; save the cloud as ascii or binary")
    if "rgb" in fields:  # three bytes in the bits of a float, or of an integer
        if header["TYPE"][names.index("rgb")] == "F":
            packed = np.ascontiguousarray(fields["rgb"].astype(np.float32)).view(np.uint32)
        else:
            packed = fields["rgb"].astype(np.uint32)
        colors = {name: (packed >> shift) & 255 for name, shift in (("red", 16), ("green", 8), ("blue", 0))}
        fields = {**fields, **colors}
    return _from_fields(fields, str(path))


def _read_las(path: Path) -> Cloud:
    try:
        import laspy
    except ImportError as error:
        raise ValueError(f"{path}: reading las files needs laspy: pip install 'ssm-zoo-point-cloud[las]'") from error
    data = laspy.read(path)
    points = np.stack([data.x, data.y, data.z], axis=1)
    points = points - points.min(axis=0)  # survey coordinates are too large for float32
    names = set(data.point_format.dimension_names)
    colors = np.stack([data.red, data.green, data.blue], axis=1) if {"red", "green", "blue"} <= names else None
    return Cloud(points.astype(np.float32), None if colors is None else _unit_colors(colors.astype(np.float32)))


def _read_mesh(path: Path) -> Cloud:
    """Points drawn evenly on the surface, always the same ones."""
    try:
        import trimesh
    except ImportError as error:
        raise ValueError(f"{path}: reading meshes needs trimesh: pip install 'ssm-zoo-point-cloud[mesh]'") from error
    mesh: Any = trimesh.load(path, force="mesh")
    points, faces = trimesh.sample.sample_surface(mesh, MESH_POINTS, seed=0)
    return Cloud(np.asarray(points, dtype=np.float32), None, np.asarray(mesh.face_normals[faces], dtype=np.float32))


_READERS: dict[str, Callable[[Path], Cloud]] = {
    ".ply": _read_ply, ".pcd": _read_pcd, ".npy": _read_npy, ".las": _read_las, ".laz": _read_las,
    **dict.fromkeys((".xyz", ".txt", ".pts", ".csv"), _read_text),
    **dict.fromkeys((".obj", ".stl", ".off"), _read_mesh),
}  # fmt: skip


def write_ply(path: str | Path, points: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> Path:
    """A binary ply with x, y, z, colours (N, 3) uint8 and the integer property ``label``."""
    from plyfile import PlyData, PlyElement

    kinds = [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("label", "i4")]
    vertex = np.empty(len(points), dtype=kinds)
    columns = [*points.T, *colors.T, labels]
    for (name, _), column in zip(kinds, columns, strict=True):
        vertex[name] = column
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    PlyData([PlyElement.describe(vertex, "vertex")]).write(str(path))
    return path
