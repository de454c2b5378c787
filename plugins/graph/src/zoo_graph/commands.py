"""The graph plugin's verbs of the command line: ``zoo predict-graphs``, ``zoo train-graphs``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training

if TYPE_CHECKING:
    from zoo.runs import Run

    from .files import Graph


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="A CSV file; a folder of them for several inputs.")
@click.option("--links", type=click.Path(path_type=Path), help="Pairs to score (columns source, target).")
@click.option("--directed", is_flag=True, help="Edges count in their own direction only.")
@click.option("--seed", default=0, show_default=True, help="Of orders and walks drawn at random.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@output.loading_options
@output.as_json
def predict_graphs(
    name: str,
    inputs: tuple[str, ...],
    out: Path | None,
    links: Path | None,
    directed: bool,
    seed: int,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Answer for the nodes, graphs or pairs of nodes of INPUTS with the model NAME; write them as CSV.

    INPUTS are folders with edges.csv and nodes.csv (or nodes.npz), .npz, .json (node-link) and .graphml files.

    \b
        zoo predict-graphs graphmamba_micro.broadcast sample/ --out answers.csv
    """
    import zoo

    own = {"links": links, "directed": directed, "seed": seed}
    pipe = zoo.pipeline(name, **(output.loading(options) | {k: v for k, v in own.items() if v}))
    return output.answers(pipe, inputs, out, keep_going=keep_going, as_json=as_json)


@click.command()
@click.argument("name")
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@training.out
@training.epochs(200)
@training.batch_size(32, "Graphs.")
@training.rate(1e-3)
@click.option("--warmup", default=10, show_default=True, type=click.IntRange(min=0), help="Epochs.")
@click.option("--directed", is_flag=True, help="Edges count in their own direction only.")
@click.option("--encoding", type=click.Choice(["laplacian", "random-walk"]), help="For models with pe_dim.")
@training.run_options("layers=2")
@training.resume
@output.as_json
def train_graphs(
    name: str,
    data: Path,
    out: Path,
    epochs: int,
    batch_size: int,
    rate: float,
    warmup: int,
    directed: bool,
    encoding: str | None,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train the node or graph model NAME on the labelled graphs in DATA: 80 % of them, 10 % to choose the epoch, 10 %
    to measure. Models of links learn to tell the edges of each graph from other pairs, 10 and 10 % of the edges hidden.

    Widths of features and the number of classes follow from the data. DATA is what `zoo predict-graphs` reads, with
    labels (nodes.csv: a column label; npz and JSON: y), which links do without.

    \b
        zoo train-graphs gmn_graph molecules.json --out trained --epochs 50
        zoo train-graphs graphmamba_pcqm_contact network/ --out links --epochs 300
    """
    import numpy as np
    import torch

    import zoo
    from zoo.catalog import accepts
    from zoo.files import refused

    from .encodings import checked_encoding
    from .files import read_graphs
    from .training import fit, score
    from .validation import numbered

    arguments = output.pairs(choices, "--set")
    shape = zoo.create(name, device="meta", **arguments)
    if not hasattr(shape, "level"):
        raise click.UsageError(f"{name} reads no graphs; expected a model of nodes, graphs or links")
    encoding = checked_encoding(shape.pe_dim, encoding)
    graphs = read_graphs(data, directed=directed)
    links = shape.level == "link"
    if len(graphs) < 10 and not links:
        raise click.UsageError(f"{data} holds {len(graphs)} graphs; at least 10 are needed")
    own: dict[str, Any] = {"node_dim": 0 if graphs[0].x is None else graphs[0].x.shape[1]}
    if graphs[0].edge_attr is not None:
        own["edge_dim"] = graphs[0].edge_attr.shape[1]
    if links:  # an edge or none; features are the data's own
        own |= {"kind": "multilabel", "out_dim": 1}
        own |= {f"{what}_categories": None for what in ("node", "edge") if accepts(name, f"{what}_categories")}
    names = None
    if shape.kind == "classification" and not links:
        with refused(data):
            names = numbered(graphs, None)
        own["out_dim"] = len(names)
    torch.manual_seed(seed)
    model = zoo.create(name, **{**own, **arguments}).to(device)
    settings = {"epochs": epochs, "batch_size": batch_size, "rate": rate, "warmup_epochs": warmup}
    if links:
        with training.run(out, resume, quiet=as_json, graphs=len(graphs)) as run, refused(data):
            found = _fit_links(model, graphs, run, settings, encoding=encoding, seed=seed, quiet=as_json)
            _save(model, out, data, found, "hidden edges", directed, encoding)
        if as_json:
            output.emit(found | {"graphs": len(graphs), "folder": str(out)})
            return
        click.echo(f"hidden edges: {training.said(found)}")
        then = f"zoo predict-graphs {training.source(out)} FILE --links PAIRS.csv --out scores.csv"
        click.echo(f"saved to {out}; try: {then}")
        return
    order = np.random.default_rng(seed).permutation(len(graphs))
    first, second = int(0.8 * len(order)), int(0.9 * len(order))
    parts = [[graphs[i] for i in order[a:b]] for a, b in ((0, first), (first, second), (second, len(order)))]

    def report(epoch: Any) -> None:
        if not as_json:
            click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation {epoch.score:.4f}")

    more: dict[str, Any] = {"encoding": encoding, "seed": seed, "report": report, **settings}
    with training.run(out, resume, unit="epoch", quiet=as_json, graphs=len(graphs)) as run:
        fit(model, parts[0], parts[1], run=run, **more)
        value = score(model, parts[2], batch_size=batch_size, encoding=encoding)
        what = "mean absolute error" if model.kind == "regression" else "accuracy"
        value = -value if model.kind == "regression" else value
        _save(model, out, data, {what: value}, f"{len(parts[2])} graphs", directed, encoding, labels=names)
    if as_json:
        output.emit({what: value, "graphs": [len(p) for p in parts], "folder": str(out)})
        return
    click.echo(f"{len(parts[2])} test graphs: {what} {value:.4f}")
    click.echo(f"saved to {out}; try: zoo predict-graphs {training.source(out)} FILE --out answers.csv")


def _fit_links(
    model: Any, graphs: list[Graph], run: Run, settings: dict[str, Any], *, encoding: str | None, seed: int, quiet: bool
) -> dict[str, float]:
    """Train on what is left of the graphs' edges; the figures of those that were hidden."""
    import numpy as np

    from .links import SHARE, fit_links, held_out, hide, measure, settings_of, usable

    test = held_out(graphs, seed)
    draw = np.random.default_rng((seed % 2**63, len(test)))
    valid = [hide(case.graph, SHARE, draw, whole) for case, whole in zip(test, usable(graphs), strict=True)]
    wanted, a_pass = settings_of(len(valid), seed=seed, **settings)
    fit_links(
        model, [case.graph for case in valid], valid, wanted, batch_size=settings["batch_size"], encoding=encoding,
        report=training.reporter(wanted.steps, quiet=quiet), score_every=max(a_pass, wanted.steps // 50), run=run,
    )  # fmt: skip
    return measure(model, test, batch_size=settings["batch_size"], encoding=encoding)


def _save(
    model: Any, out: Path, data: Path, found: dict[str, float], split: str, directed: bool, encoding: str | None,
    labels: list[str] | None = None,
) -> None:  # fmt: skip
    """Write the model, with what a pipeline must know to read graphs as training did."""
    import zoo
    from zoo.building import trained

    trained(model, data.name, {"directed": directed} | ({"encoding": encoding} if encoding is not None else {}))
    metrics = training.measured(found, dataset=data.name, split=split, command="train-graphs")
    zoo.save(model.cpu(), out, labels=labels, metrics=metrics)
