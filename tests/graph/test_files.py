"""Graphs from files: every format gives the same graph; what is wrong is named."""

import json

import networkx
import numpy as np
import pytest
import torch

from zoo_graph.batching import from_pyg, join
from zoo_graph.encodings import laplacian_encoding, random_walk_encoding
from zoo_graph.files import Graph, read_graphs, read_links

EDGES = [("a", "b", 0.5), ("b", "c", 1.5), ("c", "c", 2.5)]
NODES = {"a": (1.0, 2.0), "b": (3.0, 4.0), "c": (5.0, 6.0)}


def write_tables(folder, edges="source,target,w\na,b,0.5\nb,c,1.5\nc,c,2.5\n", nodes=None):
    folder.mkdir(exist_ok=True)
    (folder / "edges.csv").write_text(edges)
    rows = "node,p,q\n" + "".join(f"{n},{p},{q}\n" for n, (p, q) in NODES.items())
    (folder / "nodes.csv").write_text(rows if nodes is None else nodes)
    return folder


def written(form, tmp_path):
    if form == "csv":
        return write_tables(tmp_path / "g")
    if form == "csv and npz":
        folder = write_tables(tmp_path / "g")
        (folder / "nodes.csv").unlink()
        np.savez(folder / "nodes.npz", x=np.array(list(NODES.values())), node=np.array(list(NODES)))
        return folder
    if form == "npz":
        index = np.array([[0, 1, 2], [1, 2, 2]])
        x, w = np.array(list(NODES.values())), np.array([e[2] for e in EDGES])
        np.savez(tmp_path / "g.npz", x=x, edge_index=index, edge_attr=w)
        return tmp_path / "g.npz"
    graph = networkx.Graph()
    for name, (p, q) in NODES.items():
        graph.add_node(name, p=p, q=q)
    for a, b, w in EDGES:
        graph.add_edge(a, b, w=w)
    if form == "graphml":
        networkx.write_graphml(graph, tmp_path / "g.graphml")
        return tmp_path / "g.graphml"
    (tmp_path / "g.json").write_text(json.dumps(networkx.node_link_data(graph, edges="links")))
    return tmp_path / "g.json"


@pytest.mark.parametrize("form", ["csv", "csv and npz", "npz", "graphml", "json"])
def test_formats(form, tmp_path):
    (graph,) = read_graphs(written(form, tmp_path))
    assert graph.nodes == (["0", "1", "2"] if form == "npz" else ["a", "b", "c"])
    assert graph.x.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert graph.edge_index.tolist() == [[0, 1, 2, 1, 2], [1, 2, 2, 0, 1]]  # a loop has one direction
    assert graph.edge_attr.flatten().tolist() == [0.5, 1.5, 2.5, 0.5, 1.5]
    (one_way,) = read_graphs(written(form, tmp_path), directed=True)
    assert one_way.edge_index.tolist() == [[0, 1, 2], [1, 2, 2]]


def test_several_graphs(tmp_path):
    nodes = "node,graph,label,p\na,first,red,1\nb,first,blue,2\nc,second,red,3\nd,second,red,4\n"
    folder = write_tables(tmp_path / "g", "source,target\na,b\nd,c\n", nodes)
    first, second = read_graphs(folder)
    assert (first.name, second.name) == ("first", "second")
    assert first.y == ["red", "blue"]
    assert second.edge_index.tolist() == [[1, 0], [0, 1]]
    assert first.edge_attr is None
    document = {"graphs": [{"nodes": [{"id": 0, "x": [1]}], "links": [], "y": 3, "name": "one"}] * 2}
    (tmp_path / "m.json").write_text(json.dumps(document))
    found = read_graphs(tmp_path / "m.json")
    assert [(g.name, g.y, g.x.tolist()) for g in found] == [("one", 3, [[1.0]])] * 2
    np.savez(tmp_path / "m.npz", x=np.ones((5, 2)), edge_index=[[0, 3], [1, 4]], sizes=[2, 3], y=[7, 8])
    assert [(len(g.nodes), int(g.y), g.edge_index.tolist()) for g in read_graphs(tmp_path / "m.npz")] == [
        (2, 7, [[0, 1], [1, 0]]),
        (3, 8, [[1, 2], [2, 1]]),
    ]


BAD_TABLES = {
    "source,target\na,x\n": "line 2: the node 'x' is not in nodes.csv",
    "first,second\na,b\n": "columns first, second; expected source and target",
    "source,target,w\na,b,heavy\n": "line 2: w is 'heavy'; expected a number",
    "source,target,w\na,b,nan\n": "edge 1 has a feature that is not finite",
}


@pytest.mark.parametrize("edges", BAD_TABLES)
def test_bad_edges(edges, tmp_path):
    with pytest.raises(ValueError, match=BAD_TABLES[edges]):
        read_graphs(write_tables(tmp_path / "g", edges))


BAD_NODES = {
    "node,p,p\na,1,2\nb,3,4\nc,5,6\n": "the column 'p' is there twice",
    "node,p\na,1\nb\nc,3\n": "line 3: 1 cells; expected 2, node, p",
    "# of a roof\nnode,p\na,1\n# b is new\nb,x\nc,3\n": "line 5: p is 'x'",
    "name,p\na,1\na,2\n": "node names are not unique",
    "thing,p\na,1\n": "expected node, \\[graph\\], \\[label\\]",
    "node,p\na,1\nb,\nc,3\n": "line 3: p is ''; expected a number",
    "node,p\n": "the node 'a' is not in nodes.csv",
    "node,graph\na,1\nb,2\nc,2\n": "'a' and 'b' are in different graphs",
}


@pytest.mark.parametrize("nodes", BAD_NODES)
def test_bad_nodes(nodes, tmp_path):
    with pytest.raises(ValueError, match=BAD_NODES[nodes]):
        read_graphs(write_tables(tmp_path / "g", nodes=nodes))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match=r"expected edges\.csv beside nodes\.csv"):
        read_graphs(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_graphs(tmp_path / "missing.json")
    with pytest.raises(ValueError, match=r"expected a folder with edges\.csv"):
        read_graphs(tmp_path / "g.txt")
    for name, text, message in (
        ("a.json", "not json", "is no JSON"),
        ("b.json", "{}", "no lists nodes and links"),
        ("c.json", '{"nodes": [{"x": [1]}], "links": []}', "a node without id"),
        ("d.json", '{"nodes": [{"id": 1, "x": [1]}, {"id": 2, "x": [1, 2]}], "links": []}', r"have \[1, 2\] values"),
        ("e.json", '{"nodes": [], "links": []}', "no nodes"),
        (
            "n.json",
            '{"nodes": [{"id": 1, "a": 1, "b": 2}, {"id": 2, "b": 1}], "links": []}',
            "node 2 lacks the number 'a'",
        ),
        ("o.json", '{"nodes": [{"id": 1, "x": [[1, 2], [3, 4]]}], "links": []}', "have shape"),
        ("p.json", '{"nodes": [{"id": 1, "x": [1e300]}], "links": []}', "not finite"),
        ("f.graphml", "<x>", "is no GraphML file"),
        ("g.npz", "text", "is no .npz or .npy file"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_graphs(tmp_path / name)
    x = np.ones((3, 2))
    for arrays, message in (
        ({"x": x}, "expected x .* and edge_index"),
        ({"x": x, "edge_index": np.ones((2, 2))}, "expected integers"),
        ({"x": x, "edge_index": [[0], [3]]}, "names nodes from 0 to 3, and there are 3"),
        ({"x": x, "edge_index": [[0], [1]], "sizes": [1]}, "sizes add up to 1"),
        ({"x": x, "edge_index": [[0], [2]], "sizes": [1, 2]}, "1 edges join nodes of different graphs"),
        ({"x": x, "edge_index": [[0], [1]], "sizes": [4, -1]}, r"sizes are \[4, -1\]"),
        ({"x": x, "edge_index": [[0], [1]], "sizes": [3.0]}, r"sizes are \[3.0\]"),
        ({"x": x, "edge_index": [[0, 1], [1, 2]], "edge_attr": np.ones((1, 2))}, "edge_attr has shape .* 2 rows"),
        ({"x": x, "edge_index": [[0], [1]], "y": [1, 2]}, "y has shape .* 3 nodes or 1 graphs"),
        ({"x": x[..., None], "edge_index": [[0], [1]]}, "x has shape"),
    ):
        np.savez(tmp_path / "h.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read_graphs(tmp_path / "h.npz")


TABLES = [
    ("source,target\na,b\nb,c\n", "node,p\na,1\nb,2\nc,3\n", "utf-8-sig"),
    ("source;target\na;b\nb;c\n", "node;p\na;1\nb;2\nc;3\n", "utf-8"),
    ("source, target\na, b\nb, c\n", "node, p\na, 1\nb, 2\nc, 3\n", "utf-8"),
    ("# an edge list\nsource\ttarget\na\tb\n# more\nb\tc\n\n", "node,p\na,1\nb,2\nc,3\n", "utf-8"),
    ("#source,target\r\na,b\r\nb,c\r\n", "node,p\r\na,1\r\nb,2\r\nc,3\r\n", "utf-8"),
]


@pytest.mark.parametrize(("edges", "nodes", "encoding"), TABLES)
def test_dialects(tmp_path, edges, nodes, encoding):
    (tmp_path / "edges.csv").write_bytes(edges.encode(encoding))
    (tmp_path / "nodes.csv").write_bytes(nodes.encode(encoding))
    (graph,) = read_graphs(tmp_path)
    assert graph.nodes == ["a", "b", "c"]
    assert graph.x.tolist() == [[1], [2], [3]]
    assert graph.edge_index.tolist() == [[0, 1, 1, 2], [1, 2, 0, 1]]


def test_an_edge_in_both_directions_counts_once(tmp_path):
    """As torch_geometric and many lists hold undirected edges; twice the same edge stays two."""

    def read(pairs, weights=None, directed=False):
        arrays = {"x": np.ones((3, 1)), "edge_index": np.array(pairs).T}
        np.savez(tmp_path / "g.npz", **arrays, **({} if weights is None else {"edge_attr": weights}))
        (graph,) = read_graphs(tmp_path / "g.npz", directed=directed)
        attributes = [None] * graph.edge_index.shape[1] if graph.edge_attr is None else graph.edge_attr[:, 0].tolist()
        return sorted(zip(*graph.edge_index.tolist(), attributes, strict=True))

    both = [(0, 1, None), (1, 0, None), (1, 2, None), (2, 1, None)]
    assert read([(0, 1), (1, 2)]) == both
    assert read([(0, 1), (1, 0), (1, 2), (2, 1)]) == both
    assert read([(0, 1), (1, 0), (2, 1)]) == both
    assert read([(0, 1), (0, 1), (1, 0)]) == [(0, 1, None)] * 2 + [(1, 0, None)] * 2
    assert read([(0, 1), (1, 0)], directed=True) == both[:2]
    assert read([(0, 1), (1, 0)], np.array([5.0, 5.0])) == [(0, 1, 5.0), (1, 0, 5.0)]
    assert read([(0, 1), (1, 0)], np.array([5.0, 6.0])) == [(0, 1, 5.0), (0, 1, 6.0), (1, 0, 5.0), (1, 0, 6.0)]


def test_one_number_a_node(tmp_path):
    np.savez(tmp_path / "g.npz", x=np.arange(3.0), edge_index=[[0], [1]], y=np.array(1))
    (graph,) = read_graphs(tmp_path / "g.npz")
    assert graph.x.tolist() == [[0], [1], [2]]
    assert np.atleast_1d(graph.y).tolist() == [1]


def test_labels_of_some_nodes_are_none(tmp_path):
    (graph,) = read_graphs(write_tables(tmp_path / "g", nodes="node,label,p\na,x,1\nb,,2\nc,y,3\n"))
    assert graph.y is None


def test_links(tmp_path):
    (graph,) = read_graphs(write_tables(tmp_path / "g"))
    (tmp_path / "pairs.csv").write_text("source,target\nc,a\nb,b\n")
    assert read_links(tmp_path / "pairs.csv", graph).tolist() == [[2, 1], [0, 1]]
    (tmp_path / "pairs.csv").write_text("source,target\nc,z\n")
    with pytest.raises(ValueError, match="line 2: the node 'z' is not in the graph"):
        read_links(tmp_path / "pairs.csv", graph)


def test_join():
    one = Graph(["a", "b"], np.ones((2, 3), np.float32), np.array([[0, 1], [1, 0]]), y=1)
    two = Graph(["c"], np.zeros((1, 3), np.float32), np.zeros((2, 0), np.int64), y=0)
    batch = join([one, two, one])
    assert batch.sizes.tolist() == [2, 1, 2]
    assert batch.edge_index.tolist() == [[0, 1, 3, 4], [1, 0, 4, 3]]
    assert batch.y.tolist() == [1, 0, 1]
    assert join([one], integers=True).x.dtype == torch.int64
    narrow = Graph(["d"], np.zeros((1, 2), np.float32), np.zeros((2, 0), np.int64))
    with pytest.raises(ValueError, match=r"widths \[2, 3\]"):
        join([one, narrow])
    with pytest.raises(ValueError, match="graph 'bare' has none"):
        join([one, Graph(["d"], None, np.zeros((2, 0), np.int64), name="bare")])
    with pytest.raises(ValueError, match="not all of them are whole numbers"):
        join([Graph(["d"], np.full((1, 2), 0.5, np.float32), np.zeros((2, 0), np.int64))], integers=True)
    with pytest.raises(ValueError, match="no graphs"):
        join([])


class Data:
    """What a torch_geometric Batch has, as far as it is read."""

    def __init__(self, **values):
        self.__dict__.update(values)


def test_from_torch_geometric():
    x, index = torch.randn(5, 3), torch.tensor([[0, 3], [1, 4]])
    batch = from_pyg(Data(x=x, edge_index=index, edge_attr=None, ptr=torch.tensor([0, 2, 5]), y=None, num_nodes=5))
    assert batch.sizes.tolist() == [2, 3]
    assert from_pyg(Data(x=x, edge_index=index)).sizes.tolist() == [5]
    with pytest.raises(ValueError, match="Data has no edge_index"):
        from_pyg(Data(x=x))


def test_encodings_against_networkx():
    graph = networkx.path_graph(6)
    index = torch.tensor(list(graph.edges)).T
    index = torch.cat([index, index.flip(0)], 1)
    found = laplacian_encoding(index, 6, 3)
    laplacian = torch.tensor(networkx.laplacian_matrix(graph).toarray(), dtype=torch.float32)
    for i in range(3):
        v = found[:, i]
        torch.testing.assert_close(laplacian @ v, (v @ laplacian @ v) * v, rtol=1e-4, atol=1e-5)
        assert v.norm() == pytest.approx(1, abs=1e-5)
    assert laplacian_encoding(index, 6, 9)[:, 5:].abs().sum() == 0  # there are no more
    chances = random_walk_encoding(index, 6, 3)
    assert chances[0].tolist() == pytest.approx([0, 0.5, 0])
    assert chances[2].tolist() == pytest.approx([0, 0.5, 0])
    with pytest.raises(ValueError, match="5000 nodes"):
        random_walk_encoding(index, 5000, 2)
    with pytest.raises(ValueError, match="encoding is 'sine'"):
        join([Graph(["d"], None, np.zeros((2, 0), np.int64))], encoding="sine", encoding_size=2)
