"""Graphs on which message passing of a few layers must fail: every node is asked for the colour of one far away.

A graph is a long random tree: a path of 20 to 60 nodes with half as many leaves attached. Every node has one of four
colours. One leaf is marked; the label of every node is the colour of that leaf. After L layers of message passing a
node has seen L hops, so nodes further away can only guess: a quarter of them is right.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from zoo_graph.files import Graph, make_graph

COLOURS = ("red", "green", "blue", "yellow")


def tree(r: np.random.Generator, name: str = "") -> tuple[Graph, np.ndarray]:
    """One graph and each node's distance from the marked leaf."""
    spine = int(r.integers(20, 61))
    edges = [(i, i + 1) for i in range(spine - 1)]
    edges += [(int(r.integers(0, spine)), spine + i) for i in range(spine // 2)]
    nodes = spine + spine // 2
    shuffled = r.permutation(nodes)  # a node's number says nothing
    edges = [(int(shuffled[a]), int(shuffled[b])) for a, b in edges]
    degree = np.bincount(np.array(edges).flatten(), minlength=nodes)
    marked = int(r.choice(np.flatnonzero(degree == 1)))
    colour = r.integers(0, len(COLOURS), nodes)
    x = np.zeros((nodes, 1 + len(COLOURS)), np.float32)
    x[marked, 0] = 1
    x[np.arange(nodes), 1 + colour] = 1
    graph = make_graph(
        [f"{name}n{i}" for i in range(nodes)],
        x,
        [(f"{name}n{a}", f"{name}n{b}") for a, b in edges],
        None,
        where="generated",
        directed=False,
        y=np.full(nodes, colour[marked]),
        name=name or "tree",
    )
    return graph, distances(graph.edge_index, nodes, marked)


def distances(edge_index: np.ndarray, nodes: int, start: int) -> np.ndarray:
    found = np.full(nodes, -1)
    found[start] = 0
    edge, reached = edge_index, np.array([start])
    while len(reached):
        after = np.unique(edge[1][np.isin(edge[0], reached)])
        after = after[found[after] < 0]
        found[after] = found[reached[0]] + 1
        reached = after
    return found


def trees(count: int, seed: int) -> tuple[list[Graph], np.ndarray]:
    """Graphs, and the distances of all their nodes, one after another."""
    r = np.random.default_rng(seed)
    made = [tree(r, f"t{i}_") for i in range(count)]
    return [g for g, _ in made], np.concatenate([d for _, d in made])


def write_folder(folder: str | Path, count: int, seed: int, labels: bool = True) -> Path:
    """``edges.csv`` and ``nodes.csv`` of ``count`` graphs."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graphs, _ = trees(count, seed)
    with (folder / "nodes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["node", "graph", *(["label"] if labels else []), "marked", *COLOURS])
        for g in graphs:
            for name, row, y in zip(g.nodes, g.x.astype(int), g.y, strict=True):
                writer.writerow([name, g.name.rstrip("_"), *([COLOURS[y]] if labels else []), *row])
    with (folder / "edges.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "target"])
        for g in graphs:
            writer.writerows((g.nodes[a], g.nodes[b]) for a, b in g.edge_index.T[: g.edge_index.shape[1] // 2])
    return folder


def main() -> None:
    """``python broadcast.py folder --graphs 60``: a folder of graphs to try ``zoo train-graphs`` on."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    parser.add_argument("--graphs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    write_folder(arguments.out, arguments.graphs, arguments.seed)


if __name__ == "__main__":
    main()
