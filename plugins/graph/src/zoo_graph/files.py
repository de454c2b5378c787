"""Graphs from files people have: CSV tables, npz, JSON (node-link), GraphML; checked, with names.

==================  =================================================================================================
a folder            ``edges.csv`` (source, target, numbers ...) beside ``nodes.csv`` (node, [graph], [label], numbers
                    ...), or ``nodes.npz`` (x, [node])
``*.npz``           x (nodes, features), edge_index (2, edges), [edge_attr], [sizes], [y]
``*.json``          networkx's node-link form: nodes with id and x (a list) or numbers, links or edges with source and
                    target; {"graphs": [...]} or a list for several
``*.graphml``       node and edge attributes that are numbers, by name; needs networkx
==================  =================================================================================================

Tables have a row of names; their cells are parted by commas, semicolons or tabs; rows that begin with # are comments.
Edges are undirected (both directions are used; an edge that is listed in both counts once) unless ``directed``.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.files import existing, read_arrays, read_json, read_text, refused

EXTENSIONS = (".npz", ".json", ".graphml")
_NODE, _GRAPH = ("node", "id", "name"), ("graph",)
_LABEL = ("label", "y", "target")


@dataclass
class Graph:
    """One graph. Arrays are float32 and int64; ``edge_index`` holds both directions of an undirected edge."""

    nodes: list[str]
    x: np.ndarray | None  #: (nodes, features)
    edge_index: np.ndarray  #: (2, edges)
    edge_attr: np.ndarray | None = None  #: (edges, features)
    y: Any = None  #: (nodes,) labels, or one label of the graph; None: unknown
    name: str = ""


def read_graphs(source: str | Path, *, directed: bool = False) -> list[Graph]:
    """The graphs of a file or folder (see the module's text).

    Raises BadFile (a ValueError) for another format, a table without the needed columns, an edge to a node that is not
    there, values that are not numbers, and features of unequal widths; the message names file, row and value.
    LocalFileMissing for no file.
    """
    path = Path(source)
    readers = {".npz": _from_npz, ".json": _from_json, ".graphml": _from_graphml}
    with refused(path):
        if path.is_dir():
            return _from_folder(path, directed)
        if path.name in ("edges.csv", "nodes.csv"):
            return _from_folder(path.parent, directed)
        if path.suffix.lower() not in readers:
            raise ValueError(f"{path}: expected a folder with edges.csv and nodes.csv, or one of {', '.join(readers)}")
        return readers[path.suffix.lower()](existing(path, "a file with graphs"), directed)


def make_graph(
    nodes: Sequence[str],
    x: Sequence[Sequence[float]] | np.ndarray | None,
    edges: Iterable[tuple[str, str]],
    edge_features: Sequence[Sequence[float]] | np.ndarray | None,
    *,
    where: str,
    directed: bool,
    y: Any = None,
    name: str = "",
) -> Graph:
    """A graph from names; ``where`` is what errors say."""
    names = [str(n) for n in nodes]
    number = {n: i for i, n in enumerate(names)}
    if len(number) != len(names):
        twice = next(n for n, count in Counter(names).items() if count > 1)
        raise ValueError(f"{where}: the node {twice!r} is there twice")
    if not names:
        raise ValueError(f"{where}: no nodes; expected one or more")
    pairs = []
    for row, (source, target) in enumerate(edges, start=1):
        for end in (str(source), str(target)):
            if end not in number:
                raise ValueError(
                    f"{where}: edge {row} names the node {end!r}, which is not among the {len(names)} nodes"
                )
        pairs.append((number[str(source)], number[str(target)]))
    index = np.array(pairs, np.int64).reshape(-1, 2).T
    attributes = None if edge_features is None else _matrix(edge_features, len(pairs), where, "edge")
    if not directed:
        back = _without_reverse(index, attributes)
        if attributes is not None:
            attributes = np.concatenate([attributes, attributes[back]])
        index = np.concatenate([index, index[::-1, back]], axis=1)
    features = None if x is None else _matrix(x, len(names), where, "node")
    return Graph(names, features, index, attributes, y, name)


def _without_reverse(index: np.ndarray, attributes: np.ndarray | None) -> np.ndarray:
    """The numbers of the edges, loops aside, whose other direction is not listed with the same features."""
    features = [b""] * index.shape[1] if attributes is None else [row.tobytes() for row in attributes]
    keys = list(zip(*index.tolist(), features, strict=True))
    listed, seen, found = Counter(keys), Counter[tuple[Any, ...]](), []
    for i, (a, b, own) in enumerate(keys):
        seen[a, b, own] += 1
        if a != b and seen[a, b, own] > listed[b, a, own]:
            found.append(i)
    return np.array(found, np.int64)


def _matrix(rows: Any, count: int, where: str, what: str) -> np.ndarray | None:
    if len(rows) != count:
        raise ValueError(f"{where}: {len(rows)} rows of {what} features for {count} {what}s")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"{where}: {what} features have {sorted(widths)} values; expected as many for every {what}")
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is told below
            found = np.array(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a {what} feature is not a number ({error})") from error
    if found.ndim > 2:
        raise ValueError(f"{where}: {what} features have shape {found.shape}; expected ({what}s, features)")
    found = found.reshape(count, -1) if count else np.zeros((0, next(iter(widths), 0)), np.float32)
    if not np.isfinite(found).all():
        raise ValueError(
            f"{where}: {what} {int(np.argwhere(~np.isfinite(found))[0][0]) + 1} has a feature that is not finite"
        )
    return found if found.shape[1] else None


# -- tables


@dataclass
class _Table:
    """A table with a row of names. ``rows`` by these names, ``lines``: where each one stands in the file."""

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]


def _table(path: Path) -> _Table:
    """Raises BadFile for what is no text, and ValueError for names that are there twice and rows of other widths."""
    text = read_text(path)
    comment = any(line.startswith("#") for line in text.splitlines()[:1])
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("#")), "")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), skipinitialspace=True, strict=True
    )
    found: _Table | None = None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if found is None and comment and cells[0].lstrip("# ").lower() in ("source", "from", *_NODE):
                cells[0] = cells[0].lstrip("# ")  # the row of names behind a mark
            if cells[0].startswith("#"):
                continue
            if found is None:
                if twice := [name for name, count in Counter(cells).items() if count > 1]:
                    raise ValueError(f"{path}: the column {twice[0]!r} is there twice")
                found = _Table(cells, [], [])
                continue
            if len(cells) != len(found.columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells; expected {len(found.columns)}, "
                    f"{', '.join(found.columns)}"
                )
            found.rows.append(dict(zip(found.columns, cells, strict=True)))
            found.lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no table ({error})") from error
    return found or _Table([], [], [])


def _numbers(row: Mapping[str, str], columns: Sequence[str], path: Path, line: int) -> list[float]:
    found = []
    for column in columns:
        try:
            found.append(float(row[column]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line}: {column} is {row[column]!r}; expected a number") from error
    return found


def _column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((c for c in columns if c.strip().lower() in names), None)


def _from_folder(folder: Path, directed: bool) -> list[Graph]:
    edge_file, node_file, node_array = folder / "edges.csv", folder / "nodes.csv", folder / "nodes.npz"
    if not edge_file.is_file() or not (node_file.is_file() or node_array.is_file()):
        raise ValueError(f"{folder}: expected edges.csv beside nodes.csv or nodes.npz")
    edges = _table(edge_file)
    source, target = _column(edges.columns, ("source", "from")), _column(edges.columns, ("target", "to"))
    if source is None or target is None:
        raise ValueError(f"{edge_file}: columns {', '.join(edges.columns)}; expected source and target, then numbers")
    own = [c for c in edges.columns if c not in (source, target) and c.strip().lower() not in _GRAPH]
    pairs = [(row[source], row[target]) for row in edges.rows]
    values = [_numbers(row, own, edge_file, i) for row, i in zip(edges.rows, edges.lines, strict=True)] if own else None
    if not node_file.is_file():
        arrays = read_arrays(node_array)
        if "x" not in arrays:
            raise ValueError(f"{node_array}: arrays {', '.join(arrays)}; expected x (nodes, features)")
        x = _rows(arrays["x"])
        nodes = [str(n) for n in arrays["node"]] if "node" in arrays else [str(i) for i in range(len(x))]
        return [make_graph(nodes, x, pairs, values, where=str(folder), directed=directed, name=folder.name)]
    return _with_node_table(folder, node_file, pairs, values, edges.lines, directed)


def _rows(x: np.ndarray) -> np.ndarray:
    """Features as (rows, features); one number each may come as (rows,)."""
    return x[:, None] if x.ndim == 1 else x


def _with_node_table(
    folder: Path,
    path: Path,
    pairs: list[tuple[str, str]],
    values: list[list[float]] | None,
    lines: list[int],
    directed: bool,
) -> list[Graph]:
    table = _table(path)
    columns, rows = table.columns, table.rows
    node, graph, label = _column(columns, _NODE), _column(columns, _GRAPH), _column(columns, _LABEL)
    if node is None:
        raise ValueError(f"{path}: columns {', '.join(columns)}; expected node, [graph], [label], then numbers")
    own = [c for c in columns if c not in (node, graph, label)]
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row[graph] if graph else folder.name, []).append(i)
    home = {rows[i][node]: name for name, members in groups.items() for i in members}
    if len(home) != len(rows):
        raise ValueError(f"{path}: node names are not unique; expected a name of its own for every node, in all graphs")
    edges: dict[str, list[int]] = {}
    for i, (first, second) in enumerate(pairs):
        for end in (first, second):
            if end not in home:
                raise ValueError(f"{folder / 'edges.csv'}, line {lines[i]}: the node {end!r} is not in {path.name}")
        if home[first] != home[second]:
            raise ValueError(
                f"{folder / 'edges.csv'}, line {lines[i]}: {first!r} and {second!r} are in different graphs"
            )
        edges.setdefault(home[first], []).append(i)
    found = []
    for name, members in groups.items():
        chosen = edges.get(name, [])
        labels = [rows[i][label] for i in members] if label and all(rows[i][label] for i in members) else None
        found.append(
            make_graph(
                [rows[i][node] for i in members],
                [_numbers(rows[i], own, path, table.lines[i]) for i in members] if own else None,
                [pairs[i] for i in chosen],
                None if values is None else [values[i] for i in chosen],
                where=f"{folder}, graph {name}" if graph else str(folder),
                directed=directed,
                y=labels,
                name=name,
            )
        )
    if not found:
        raise ValueError(f"{path}: no nodes; expected a row for every node")
    return found


# -- files that hold a graph, or several


def _from_npz(path: Path, directed: bool) -> list[Graph]:
    arrays = read_arrays(path)
    if "x" not in arrays or "edge_index" not in arrays:
        raise ValueError(f"{path}: arrays {', '.join(arrays)}; expected x (nodes, features) and edge_index (2, edges)")
    x, index = _rows(arrays["x"]), arrays["edge_index"]
    if x.ndim != 2:
        raise ValueError(f"{path}: x has shape {x.shape}; expected (nodes, features)")
    if index.ndim != 2 or index.shape[0] != 2 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"{path}: edge_index is {index.dtype} of shape {index.shape}; expected integers (2, edges)")
    if index.size and (index.min() < 0 or index.max() >= len(x)):
        raise ValueError(f"{path}: edge_index names nodes from {index.min()} to {index.max()}, and there are {len(x)}")
    sizes = arrays.get("sizes", np.array([len(x)]))
    if sizes.ndim != 1 or not np.issubdtype(sizes.dtype, np.integer) or (sizes < 1).any():
        raise ValueError(f"{path}: sizes are {sizes.tolist()}; expected the number of nodes of each graph, 1 or more")
    if int(sizes.sum()) != len(x):
        raise ValueError(f"{path}: sizes add up to {int(sizes.sum())}, and there are {len(x)} nodes")
    bounds = np.r_[0, np.cumsum(sizes)]
    home = np.searchsorted(bounds, index, side="right") - 1
    if (home[0] != home[1]).any():
        raise ValueError(f"{path}: {int((home[0] != home[1]).sum())} edges join nodes of different graphs")
    y, attributes = arrays.get("y"), arrays.get("edge_attr")
    if attributes is not None:
        attributes = _rows(attributes)
        if len(attributes) != index.shape[1]:
            raise ValueError(f"{path}: edge_attr has shape {attributes.shape}; expected {index.shape[1]} rows")
    if y is not None:
        y = np.atleast_1d(y)
        if len(y) not in (len(x), len(sizes)):
            raise ValueError(
                f"{path}: y has shape {y.shape}; expected one for each of {len(x)} nodes or {len(sizes)} graphs"
            )
    found = []
    for i, size in enumerate(sizes.tolist()):
        start, chosen = bounds[i], home[0] == i
        labels = None if y is None else (y[i] if len(y) == len(sizes) and len(sizes) > 1 else y[start : start + size])
        found.append(
            make_graph(
                [str(n) for n in range(size)],
                x[start : start + size],
                [(str(a), str(b)) for a, b in (index[:, chosen] - start).T],
                None if attributes is None else attributes[chosen],
                where=str(path),
                directed=directed,
                y=labels,
                name=f"{path.stem}_{i}" if len(sizes) > 1 else path.stem,
            )
        )
    return found


def _from_json(path: Path, directed: bool) -> list[Graph]:
    document = read_json(path)
    several = document.get("graphs") if isinstance(document, dict) else document
    graphs = [document] if several is None else several
    if not isinstance(graphs, list) or not graphs:
        raise ValueError(f"{path}: expected a graph with nodes and links, or a list of these")
    return [
        _from_node_link(g, f"{path.stem}_{i}" if len(graphs) > 1 else path.stem, path, directed)
        for i, g in enumerate(graphs)
    ]


def _from_node_link(graph: Any, name: str, path: Path, directed: bool) -> Graph:
    links = graph.get("links", graph.get("edges")) if isinstance(graph, dict) else None
    if not isinstance(links, list) or not isinstance(graph.get("nodes"), list):
        raise ValueError(f"{path}: a graph has no lists nodes and links (or edges); expected networkx's node-link form")
    try:
        nodes = [str(node["id"]) for node in graph["nodes"]]
        edges = [(str(edge["source"]), str(edge["target"])) for edge in links]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: a node without id, or an edge without source and target ({error})") from error
    x = _features(graph["nodes"], ("id", *_LABEL), f"{path}: node")
    values = _features(links, ("source", "target", "key"), f"{path}: edge")
    labels = [next((node[k] for k in _LABEL if k in node), None) for node in graph["nodes"]]
    own = next((graph[k] for k in _LABEL if k in graph), None)
    known = own if own is not None else labels if all(v is not None for v in labels) else None
    return make_graph(
        nodes,
        x if any(x) else None,
        edges,
        values if any(values) else None,
        where=str(path),
        directed=bool(graph.get("directed", False)) or directed,
        y=known,
        name=str(graph.get("name", name)),
    )


def _features(entries: Sequence[Mapping[str, Any]], without: Sequence[str], what: str) -> list[list[float]]:
    """``x`` of each node or edge, or its numbers, sorted by their names. Raises ValueError where the names differ."""
    found: list[list[float]] = []
    names: list[str] | None = None
    for i, entry in enumerate(entries, start=1):
        if isinstance(entry.get("x"), list):
            own, row = ["x"], entry["x"]
        else:
            own = sorted(k for k, v in entry.items() if k not in without and isinstance(v, (int, float)))
            row = [float(entry[k]) for k in own]
        if names is not None and own != names:
            missing, more = sorted({*names} - {*own}), sorted({*own} - {*names})
            said = f"lacks the number {missing[0]!r}" if missing else f"also has the number {more[0]!r}"
            raise ValueError(f"{what} {i} {said}, unlike those before it; expected the same numbers in all")
        names = own
        found.append(row)
    return found


def _from_graphml(path: Path, directed: bool) -> list[Graph]:
    from zoo_registry import optional

    networkx = optional("networkx", "a GraphML file", "ssm-zoo-graph[graphml]")
    try:
        graph = networkx.read_graphml(path)
    except Exception as error:  # the parser's own errors are of many classes
        raise ValueError(f"{path} is no GraphML file ({error})") from error
    document = {
        "nodes": [{"id": n, **data} for n, data in graph.nodes(data=True)],
        "links": [{"source": a, "target": b, **data} for a, b, data in graph.edges(data=True)],
        "directed": graph.is_directed(),
        **{k: v for k, v in graph.graph.items() if k in _LABEL},
    }
    return [_from_node_link(document, path.stem, path, directed)]


def read_links(path: str | Path, graph: Graph) -> np.ndarray:
    """Pairs of nodes to score, (2, links), from a table with the columns source and target. Raises BadFile."""
    with refused(path):
        table = _table(Path(path))
        source, target = _column(table.columns, ("source", "from")), _column(table.columns, ("target", "to"))
        if source is None or target is None:
            raise ValueError(f"{path}: columns {', '.join(table.columns)}; expected source and target")
        number = {n: i for i, n in enumerate(graph.nodes)}
        for row, line in zip(table.rows, table.lines, strict=True):
            for end in (row[source], row[target]):
                if end not in number:
                    raise ValueError(f"{path}, line {line}: the node {end!r} is not in the graph {graph.name!r}")
        pairs = [[number[row[source]], number[row[target]]] for row in table.rows]
    return np.array(pairs, np.int64).reshape(-1, 2).T
