"""Graphs from files people have: CSV tables, npz, JSON (node-link), GraphML; checked, with names.

==================  =================================================================================================
a folder            ``edges.csv`` (source, target, numbers ...) beside ``nodes.csv`` (node, [graph], [label], numbers
                    ...), or ``nodes.npz`` (x, [node])
``*.npz``           x (nodes, features), edge_index (2, edges), [edge_attr], [sizes], [y]
``*.json``          networkx's node-link form: nodes with id and x (a list) or numbers, links or edges with source and
                    target; {"graphs": [...]} or a list for several
``*.graphml``       node and edge attributes that are numbers, by name; needs networkx
==================  =================================================================================================

Edges are undirected (both directions are used) unless ``directed``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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

    Raises ValueError for another format, a table without the needed columns, an edge to a node that is not there,
    values that are not numbers, and features of unequal widths; the message names file, row and value.
    """
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, directed)
    if path.name in ("edges.csv", "nodes.csv"):
        return _from_folder(path.parent, directed)
    readers = {".npz": _from_npz, ".json": _from_json, ".graphml": _from_graphml}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: expected a folder with edges.csv and nodes.csv, or one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return readers[path.suffix.lower()](path, directed)


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
        twice = next(n for n in names if names.count(n) > 1)
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
        back = index[:, index[0] != index[1]][::-1]
        if attributes is not None:
            attributes = np.concatenate([attributes, attributes[index[0] != index[1]]])
        index = np.concatenate([index, back], axis=1)
    features = None if x is None else _matrix(x, len(names), where, "node")
    return Graph(names, features, index, attributes, y, name)


def _matrix(rows: Any, count: int, where: str, what: str) -> np.ndarray | None:
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"{where}: {what} features have {sorted(widths)} values; expected as many for every {what}")
    if len(rows) != count:
        raise ValueError(f"{where}: {len(rows)} rows of {what} features for {count} {what}s")
    try:
        found = np.array(rows, np.float32).reshape(count, -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a {what} feature is not a number ({error})") from error
    if not np.isfinite(found).all():
        raise ValueError(
            f"{where}: {what} {int(np.argwhere(~np.isfinite(found))[0][0]) + 1} has a feature that is not finite"
        )
    return found if found.shape[1] else None


# -- tables


def _table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file ({error})") from error
    first = text.partition("\n")[0]
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t" if "\t" in first else ","))
    columns = list(rows[0]) if rows else [c.strip() for c in first.split(",")]
    return columns, rows


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
    columns, rows = _table(edge_file)
    source, target = _column(columns, ("source", "from")), _column(columns, ("target", "to"))
    if source is None or target is None:
        raise ValueError(f"{edge_file}: columns {', '.join(columns)}; expected source and target, then numbers")
    own = [c for c in columns if c not in (source, target) and c.strip().lower() not in _GRAPH]
    pairs = [(row[source], row[target]) for row in rows]
    values = [_numbers(row, own, edge_file, i) for i, row in enumerate(rows, start=2)] if own else None
    if not node_file.is_file():
        with np.load(node_array) as arrays:
            if "x" not in arrays:
                raise ValueError(f"{node_array}: arrays {', '.join(arrays)}; expected x (nodes, features)")
            x = arrays["x"]
            nodes = [str(n) for n in arrays["node"]] if "node" in arrays else [str(i) for i in range(len(x))]
        return [make_graph(nodes, x, pairs, values, where=str(folder), directed=directed, name=folder.name)]
    return _with_node_table(folder, node_file, pairs, values, directed)


def _with_node_table(
    folder: Path, path: Path, pairs: list[tuple[str, str]], values: list[list[float]] | None, directed: bool
) -> list[Graph]:
    columns, rows = _table(path)
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
                raise ValueError(f"{folder / 'edges.csv'}, line {i + 2}: the node {end!r} is not in {path.name}")
        if home[first] != home[second]:
            raise ValueError(f"{folder / 'edges.csv'}, line {i + 2}: {first!r} and {second!r} are in different graphs")
        edges.setdefault(home[first], []).append(i)
    found = []
    for name, members in groups.items():
        chosen = edges.get(name, [])
        labels = [rows[i][label] for i in members] if label else None
        found.append(
            make_graph(
                [rows[i][node] for i in members],
                [_numbers(rows[i], own, path, i + 2) for i in members] if own else None,
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
    try:
        with np.load(path) as file:
            arrays = {k: file[k] for k in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no npz file of plain arrays ({error})") from error
    if "x" not in arrays or "edge_index" not in arrays:
        raise ValueError(f"{path}: arrays {', '.join(arrays)}; expected x (nodes, features) and edge_index (2, edges)")
    x, index = np.atleast_2d(arrays["x"]), arrays["edge_index"]
    if index.ndim != 2 or index.shape[0] != 2 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"{path}: edge_index is {index.dtype} of shape {index.shape}; expected integers (2, edges)")
    if index.size and (index.min() < 0 or index.max() >= len(x)):
        raise ValueError(f"{path}: edge_index names nodes from {index.min()} to {index.max()}, and there are {len(x)}")
    sizes = arrays.get("sizes", np.array([len(x)]))
    if int(sizes.sum()) != len(x):
        raise ValueError(f"{path}: sizes add up to {int(sizes.sum())}, and there are {len(x)} nodes")
    bounds = np.r_[0, np.cumsum(sizes)]
    home = np.searchsorted(bounds, index, side="right") - 1
    if (home[0] != home[1]).any():
        raise ValueError(f"{path}: {int((home[0] != home[1]).sum())} edges join nodes of different graphs")
    y, attributes = arrays.get("y"), arrays.get("edge_attr")
    found = []
    for i, size in enumerate(sizes.tolist()):
        start, chosen = bounds[i], home[0] == i
        labels = None if y is None else (y[i] if len(y) == len(sizes) and len(sizes) > 1 else y[start : start + size])
        found.append(
            make_graph(
                [str(n) for n in range(size)],
                x[start : start + size],
                [(str(a), str(b)) for a, b in (index[:, chosen] - start).T],
                None if attributes is None else np.atleast_2d(attributes[chosen].T).T,
                where=str(path),
                directed=directed,
                y=labels,
                name=f"{path.stem}_{i}" if len(sizes) > 1 else path.stem,
            )
        )
    return found


def _from_json(path: Path, directed: bool) -> list[Graph]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
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
    x = [_features(node, ("id", *_LABEL)) for node in graph["nodes"]]
    values = [_features(edge, ("source", "target", "key")) for edge in links]
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


def _features(entry: Mapping[str, Any], without: Sequence[str]) -> list[float]:
    """``x`` of a node or an edge, or its numbers, sorted by their names."""
    if "x" in entry and isinstance(entry["x"], list):
        return entry["x"]
    numbers = {k: v for k, v in entry.items() if k not in without and isinstance(v, (int, float))}
    return [float(numbers[k]) for k in sorted(numbers)]


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
    """Pairs of nodes to score, (2, links), from a table with the columns source and target."""
    columns, rows = _table(Path(path))
    source, target = _column(columns, ("source", "from")), _column(columns, ("target", "to"))
    if source is None or target is None:
        raise ValueError(f"{path}: columns {', '.join(columns)}; expected source and target")
    number = {n: i for i, n in enumerate(graph.nodes)}
    for line, row in enumerate(rows, start=2):
        for end in (row[source], row[target]):
            if end not in number:
                raise ValueError(f"{path}, line {line}: the node {end!r} is not in the graph {graph.name!r}")
    return np.array([[number[row[source]], number[row[target]]] for row in rows], np.int64).reshape(-1, 2).T
