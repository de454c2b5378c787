"""Predicting links: what is hidden, what it is measured by, `zoo train-graphs` and `zoo validate` of link models."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import zoo
import zoo.testing
from zoo.training import Settings
from zoo_graph.commands import train_graphs
from zoo_graph.files import Graph, make_graph
from zoo_graph.links import Case, edges_of, fit_links, held_out, hide, measure, usable
from zoo_graph.models import GraphMamba


def circles(nodes: int = 40, seed: int = 0, *, attributes: bool = False) -> Graph:
    """Nodes on a circle, each joined with the next four: neighbours are told by their places."""
    turn = np.random.default_rng(seed).permutation(nodes)
    angle = 2 * np.pi * turn / nodes
    place = {int(t): i for i, t in enumerate(turn)}
    edges = [(str(place[a]), str(place[(a + k) % nodes])) for a in range(nodes) for k in range(1, 5)]
    numbers = np.arange(float(len(edges)))[:, None] if attributes else None
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return make_graph([str(i) for i in range(nodes)], x, edges, numbers, where="", directed=False, name=f"g{seed}")


def small(**more):
    torch.manual_seed(0)
    return GraphMamba(**({"node_dim": 2, "out_dim": 1, "dim_h": 8, "layers": 1, "level": "link"} | more))


def test_hidden_edges_are_gone_in_both_directions():
    graph = circles(attributes=True)
    case = hide(graph, 0.25, np.random.default_rng(0))
    assert case.links.shape == (2, 80)
    assert case.target.tolist() == [1.0] * 40 + [0.0] * 40
    edges, others = ({(min(p), max(p)) for p in part.T.tolist()} for part in np.split(case.links, 2, axis=1))
    whole, seen = ({(min(p), max(p)) for p in g.edge_index.T.tolist()} for g in (graph, case.graph))
    assert edges | seen == whole
    assert not edges & seen
    assert len(edges) == len(others) == 40
    assert not others & whole
    assert all(a != b for a, b in others)
    assert case.graph.edge_index.shape[1] == 2 * len(seen) == len(case.graph.edge_attr)
    number = {tuple(p): v for p, v in zip(graph.edge_index.T.tolist(), graph.edge_attr[:, 0], strict=True)}
    kept = zip(case.graph.edge_index.T.tolist(), case.graph.edge_attr[:, 0], strict=True)
    assert all(number[tuple(p)] == v for p, v in kept)
    # pairs of a part have no edge in the whole either
    again = hide(case.graph, 0.2, np.random.default_rng(1), graph)
    assert not set(edges_of(Graph(graph.nodes, None, again.links[:, 24:]))) & set(edges_of(graph))


def test_graphs_that_have_no_edge_to_spare():
    few = make_graph(list("abcd"), None, [("a", "b"), ("b", "c"), ("a", "a")], None, where="", directed=False)
    assert usable([few, circles()])[0].name == "g0"
    with pytest.raises(ValueError, match="no graph has 6 edges or more"):
        usable([few])
    every = [(a, b) for a in "abcde" for b in "abcde" if a < b]
    with pytest.raises(ValueError, match="nearly all pairs of its 5 nodes have an edge"):
        hide(make_graph(list("abcde"), None, every, None, where="", directed=False), 0.2, np.random.default_rng(0))


def test_figures_by_hand():
    class Given(torch.nn.Module):
        """Scores as they are given, of two graphs."""

        level, out_dim, pe_dim = "link", 1, 0

        def __init__(self, scores):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.tensor(scores)[:, None])
            self.node_encoder = small().node_encoder

        def forward(self, **inputs):
            assert inputs["links"].tolist() == [[0, 1, 0, 1, 3, 3], [1, 2, 2, 0, 4, 5]]
            return self.scores

    graph = Graph(list("abc"), np.zeros((3, 2), np.float32), np.zeros((2, 0), np.int64))
    cases = [Case(graph, np.array([[0, 1, 0, 1], [1, 2, 2, 0]])), Case(graph, np.array([[0, 0], [1, 2]]))]
    found = measure(Given([3.0, 1.0, 2.0, 1.0, 0.0, -1.0]), cases)
    # edges 3, 1, 0; other pairs 2, 1, -1
    assert found["AUC"] == pytest.approx((3 + 1.5 + 1) / 9)
    assert found["average precision"] == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    assert found["MRR"] == pytest.approx((1 + 1 / 2.5 + 1) / 3)
    with pytest.raises(ValueError, match="not finite"):
        measure(Given([float("nan"), 1.0, 2.0, 1.0, 0.0, -1.0]), cases)


def test_a_run_goes_on(tmp_path):
    graphs = [circles(12, seed) for seed in range(3)]
    test = held_out(graphs, 0)

    def trained(run, report):
        model = small()
        settings = Settings(steps=4, rate=1e-2)
        fit_links(model, graphs, test, settings, batch_size=2, report=report, score_every=2, run=run)
        return model

    zoo.testing.check_resume(trained, tmp_path)
    with pytest.raises(ValueError, match="level 'link' and out_dim 1"):
        fit_links(small(level="node"), graphs, test, Settings(steps=1))


def test_links_are_learnt_and_measured_as_zoo_validate_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    graph = circles(60)
    np.savez("ring.npz", x=graph.x, edge_index=graph.edge_index)
    command = ["graphmamba_pcqm_contact", "ring.npz", "--out=links", "--epochs=60", "--rate=2e-2", "--warmup=3"]
    command += ["--set", "dim_h=16", "--set", "layers=1", "--seed", "3", "--json"]
    found = CliRunner().invoke(train_graphs, command)
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert said["AUC"] > 0.85
    assert said["average precision"] > 0.8
    measured = zoo.validate("./links", "ring.npz", seed=3)
    assert measured.samples == 48
    assert dict(measured.metrics) == pytest.approx({k: said[k] for k in measured.metrics}, rel=1e-5)
    (tmp_path / "pairs.csv").write_text("source,target\n0,1\n2,3\n")
    rows = zoo.pipeline("./links", links="pairs.csv")("ring.npz").rows
    assert [0 <= row["output 0"] <= 1 for row in rows] == [True, True]
