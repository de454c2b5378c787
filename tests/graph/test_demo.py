"""The demo answers from files, on the command line too; training from a folder; the card's figures."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from recipes import recipe

import zoo
import zoo.testing
import zoo_graph
from zoo.cli.predict import predict as predict_command
from zoo_graph.commands import predict_graphs, train_graphs
from zoo_graph.files import read_graphs
from zoo_graph.models import GraphMamba
from zoo_graph.pipelines import GraphPredictions
from zoo_graph.training import fit, loss_of, score
from zoo_graph.validation import numbered

SAMPLE = Path(zoo_graph.__file__).parent / "demo" / "sample"
MODEL = "graphmamba_micro.broadcast"


@pytest.fixture(scope="module")
def broadcast():
    return recipe("graph", "broadcast")


def truth():
    """The colour of each graph's marked node."""
    found = {}
    for row in csv.DictReader((SAMPLE / "nodes.csv").open()):
        if row["marked"] == "1":
            found[row["graph"]] = next(c for c in ("red", "green", "blue", "yellow") if row[c] == "1")
    return found


def test_sample():
    """Every node, however far, names the colour of the marked leaf of its graph."""
    answer = zoo.pipeline(MODEL)(SAMPLE)
    colour = truth()
    assert len(set(colour.values())) == 3
    assert len(answer.rows) == sum(len(g.nodes) for g in read_graphs(SAMPLE))
    right = [row["label"] == colour[row["graph"]] for row in answer.rows]
    assert sum(right) / len(right) > 0.95
    assert 0.9 < answer.confidence <= 1
    assert answer.rows == zoo.pipeline(MODEL)(SAMPLE).rows  # the orders drawn follow a seed


def test_predict_and_csv(tmp_path):
    run = CliRunner().invoke(predict_command, [MODEL, str(SAMPLE), "--json"], catch_exceptions=False)
    (said,) = json.loads(run.stdout)
    out = tmp_path / "answers.csv"
    run = CliRunner().invoke(predict_graphs, [MODEL, str(SAMPLE), "--out", str(out)], catch_exceptions=False)
    assert run.exit_code == 0
    rows = list(csv.DictReader(out.open()))
    assert [(r["node"], r["label"]) for r in rows] == [(r["node"], r["label"]) for r in said["rows"]]


def test_graphs_of_a_file_are_answered_as_alone():
    graphs = read_graphs(SAMPLE)
    pipe = zoo.pipeline(MODEL)
    together = {r["node"]: r["label"] for r in pipe(SAMPLE).rows}
    alone = {r["node"]: r["label"] for g in graphs for r in pipe(g).rows}
    assert sum(together[n] == alone[n] for n in together) / len(together) > 0.95  # another draw of the orders


def test_bad_input(tmp_path):
    (tmp_path / "edges.csv").write_text("source,target\n0,1\n")
    (tmp_path / "nodes.csv").write_text("node,a\n0,1\n1,2\n")
    with pytest.raises(ValueError, match="the file has 1 numbers for every node"):
        zoo.pipeline(MODEL)(tmp_path)
    with pytest.raises(ValueError, match="there are 2 labels, and the model has 4 outputs"):
        zoo.pipeline(MODEL, labels=["a", "b"])
    with pytest.raises(ValueError, match="give links="):
        GraphPredictions(GraphMamba(node_dim=1, level="link"))


@pytest.mark.parametrize("kind", ["classification", "multilabel", "regression"])
@pytest.mark.parametrize("level", ["node", "graph", "link"])
def test_every_level_and_kind(level, kind, tmp_path):
    torch.manual_seed(0)
    model = GraphMamba(node_dim=5, out_dim=2, dim_h=8, layers=1, level=level, kind=kind, pe_dim=3)
    (tmp_path / "pairs.csv").write_text("source,target\n0,3\n2,1\n")
    np.savez(tmp_path / "g.npz", x=np.random.randn(4, 5), edge_index=[[0, 1, 2], [1, 2, 3]])
    links = tmp_path / "pairs.csv" if level == "link" else None
    answer = GraphPredictions(model, links=links, encoding="random-walk")(tmp_path / "g.npz")
    assert len(answer.rows) == {"node": 4, "graph": 1, "link": 2}[level]
    row = answer.rows[0]
    assert ("label" in row) == (kind == "classification")
    if kind == "multilabel":
        assert 0 < row["output 0"] < 1
    if level == "link":
        assert (row["source"], row["target"]) == ("0", "3")
    assert answer.save_csv(tmp_path / "out.csv").read_text().count("\n") == len(answer.rows) + 1


@pytest.mark.parametrize("name", ["graphmamba_pattern", "gmn_sequence", "gmn_node"])
def test_training_from_a_folder(name, tmp_path, broadcast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broadcast.write_folder("trees", 12, 1)
    small = ["--set", "dim_h=8", "--set", "layers=1"]
    run = CliRunner().invoke(
        train_graphs,
        [name, "trees", "--out", "trained", "--epochs", "2", "--batch-size", "5", "--json", *small],
        catch_exceptions=False,
    )
    found = json.loads(run.output)
    assert found["graphs"] == [9, 1, 2]
    assert 0 <= found["accuracy"] <= 1
    measured = zoo.validate("./trained", "trees")
    assert set(measured.per_class) <= set(broadcast.COLOURS)
    answer = zoo.pipeline("./trained")("trees")
    assert {row["label"] for row in answer.rows} <= set(broadcast.COLOURS)


def test_fit_learns_graphs_and_numbers():
    """A graph's size class (classification) and the mean of its features (regression)."""
    r = np.random.default_rng(0)
    from zoo_graph.files import make_graph

    def one(i):
        n = int(r.integers(3, 9))
        x = r.normal(size=(n, 2))
        edges = [(str(a), str(a + 1)) for a in range(n - 1)]
        kind = i % 2
        x[:, 1] += 2 * kind
        return make_graph([str(a) for a in range(n)], x, edges, None, where="", directed=False, y=np.array(kind))

    graphs = [one(i) for i in range(60)]
    torch.manual_seed(0)
    model = GraphMamba(node_dim=2, out_dim=2, dim_h=8, layers=1)
    history = fit(model, graphs[:48], graphs[48:], epochs=6, batch_size=8, rate=1e-2, warmup_epochs=1)
    assert max(e.score for e in history) > 0.9
    assert score(model, graphs[48:]) == pytest.approx(max(e.score for e in history), abs=0.1)  # orders are drawn
    for g in graphs:
        g.y = np.array(g.x[:, 1].mean(), np.float32)
    model = GraphMamba(node_dim=2, out_dim=1, dim_h=8, layers=1, kind="regression")
    history = fit(model, graphs[:48], graphs[48:], epochs=8, batch_size=8, rate=1e-2, warmup_epochs=1)
    assert history[-1].loss < 0.6 * history[0].loss
    graphs[0].y = None
    with pytest.raises(ValueError, match="not all graphs have targets"):
        fit(model, graphs[:8], graphs[48:], epochs=1, batch_size=8)


def test_training_goes_on_after_an_interruption(tmp_path):
    from zoo_graph.files import make_graph

    r = np.random.default_rng(0)
    edges = [("a", "b"), ("c", "d")]
    graphs = [
        make_graph(list("abcd"), r.normal(size=(4, 2)), edges, None, where="", directed=False, y=np.array(i % 2))
        for i in range(8)
    ]

    def trained(run, report):
        torch.manual_seed(0)
        model = GraphMamba(node_dim=2, out_dim=2, dim_h=8, layers=1)
        fit(model, graphs[:6], graphs[6:], epochs=4, batch_size=4, rate=1e-2, run=run, report=report)
        return model

    zoo.testing.check_resume(trained, tmp_path)


def test_losses():
    output = torch.tensor([[1.0, -1.0], [0.5, 2.0]])
    target = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    known = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, 0.0, 1.0])
    )
    torch.testing.assert_close(loss_of("multilabel", output, target), known)
    assert float(loss_of("regression", output, torch.zeros(2, 2))) == pytest.approx(4.5 / 4)


def test_targets_of_another_level(broadcast):
    """A graph model and labels of nodes: an error that says so."""
    graphs, _ = broadcast.trees(4, 1)
    with pytest.raises(ValueError, match="the model gives 2 answers; expected labels of nodes for a node model"):
        fit(GraphMamba(node_dim=5, out_dim=4, dim_h=8, layers=1), graphs, graphs, epochs=1, batch_size=2)


def test_labels_become_numbers():
    graphs = read_graphs(SAMPLE)
    with pytest.raises(ValueError, match="has no labels"):
        numbered(graphs, None)
    for g in graphs:
        g.y = ["10", "9"] * (len(g.nodes) // 2) + ["9"] * (len(g.nodes) % 2)
    assert numbered(graphs, None) == ["9", "10"]
    with pytest.raises(ValueError, match="there is a label"):
        numbered(graphs, ["x"])


@pytest.mark.slow
def test_the_cards_figures_hold():
    """The recipe's test graphs are generated from a seed, so its figures can be taken again."""
    found = recipe("graph", "train_demo").figures(zoo.load(MODEL))
    for metric in zoo.info(MODEL).weights.metrics:
        assert found[metric.name] == pytest.approx(metric.value, abs=0.002)


def test_folders_of_folders(tmp_path):
    """Each folder with tables is one sample, beside the files; what a sample's folder holds is none of its own."""
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "edges.csv").write_text("source,target\n0,1\n")
        np.savez(tmp_path / name / "nodes.npz", x=np.ones((2, 5)))
    np.savez(tmp_path / "c.npz", x=np.ones((3, 5)), edge_index=[[0], [1]])
    pipe = GraphPredictions(GraphMamba(node_dim=5, dim_h=8, layers=1, level="node"))
    assert [(r.source, len(r.rows)) for r in pipe(tmp_path)] == [
        (str(tmp_path / "a"), 2), (str(tmp_path / "b"), 2), (str(tmp_path / "c.npz"), 3),
    ]  # fmt: skip


def test_options_that_do_not_fit(tmp_path):
    node = GraphMamba(node_dim=5, dim_h=8, layers=1, level="node")
    for options, match in (
        ({"links": "pairs.csv"}, "answers for each node"),
        ({"labels": ["a", "a"]}, "a name of its own"),
        ({"encoding": "laplacian"}, "reads none"),
    ):
        with pytest.raises(ValueError, match=match):
            GraphPredictions(node, **options)
    with pytest.raises(zoo.errors.BadArgument, match="encoding is 'sine'"):
        GraphPredictions(GraphMamba(node_dim=5, dim_h=8, layers=1, pe_dim=2), encoding="sine")
    with pytest.raises(zoo.errors.BadArgument, match="reads no graphs"):
        GraphPredictions(torch.nn.Linear(1, 1))


def test_what_was_trained_is_read_alike(tmp_path, broadcast, monkeypatch):
    """The encoding and the direction of edges are part of what was trained."""
    monkeypatch.chdir(tmp_path)
    broadcast.write_folder("trees", 10, 1)
    small = ["--set", "dim_h=8", "--set", "layers=1", "--set", "pe_dim=3", "--epochs", "1", "--json", "--directed"]
    options = ["graphmamba_pattern", "trees", "--out", "trained", "--encoding", "random-walk", *small]
    assert CliRunner().invoke(train_graphs, options, catch_exceptions=False).exit_code == 0
    pipe = zoo.pipeline("./trained")
    assert (pipe.encoding, pipe.directed) == ("random-walk", True)
    asked = zoo.pipeline("./trained", encoding="laplacian", directed=False)
    assert (asked.encoding, asked.directed) == ("laplacian", False)
    same = zoo.pipeline("./trained", encoding="random-walk", directed=True)
    assert pipe("trees").rows == same("trees").rows
    assert pipe("trees").rows != asked("trees").rows


def test_training_says_what_it_cannot_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.json").write_text("{}")
    done = CliRunner().invoke(train_graphs, ["vim_tiny", "g.json", "--out", "out"])
    assert done.exit_code == 2
    assert "reads no graphs" in done.output
    assert not (tmp_path / "out").exists()


def test_answers_are_written_whole_or_not(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(predict_graphs, [MODEL, str(SAMPLE), "--out", str(tmp_path / "file" / "a.csv")])
    assert isinstance(done.exception, zoo.errors.StoreError)
    assert "Traceback" not in done.output


def test_a_last_batch_of_one_node():
    """Single atoms among molecules: a batch of one row cannot be normalised, and ends no training."""
    from zoo_graph.files import make_graph

    r = np.random.default_rng(0)
    graphs = [
        make_graph(
            ["a"], r.normal(size=(1, 2)), [("a", "a")] * loops, None, where="", directed=False, y=np.array(i % 2)
        )
        for i, loops in enumerate([0, 0, 1, 0, 0, 0])
    ]
    torch.manual_seed(0)
    model = GraphMamba(node_dim=2, out_dim=2, dim_h=8, layers=1)
    assert len(fit(model, graphs[:5], graphs[5:], epochs=6, batch_size=4)) == 6
    with pytest.raises(ValueError, match="cannot be normalised"):
        fit(model, graphs[:1], graphs[5:], epochs=1)
    with pytest.raises(ValueError, match="0 to choose the epoch by"):
        fit(model, graphs, [], epochs=1)
    with pytest.raises(ValueError, match="no graphs were given"):
        score(model, [])


@pytest.mark.parametrize(
    ("name", "argument", "value"), [("graphmamba_pattern", "dim_h", 0), ("gmn_node", "samples", 0)]
)
def test_sizes_that_are_none(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}"):
        zoo.create(name, device="meta", **{argument: value})
