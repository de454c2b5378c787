"""The graph plugin's verbs of the command line: ``zoo predict-graphs``, ``zoo train-graphs``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


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
    to measure.

    Widths of features and the number of classes follow from the data. DATA is what `zoo predict-graphs` reads, with
    labels (nodes.csv: a column label; npz and JSON: y).

    \b
        zoo train-graphs gmn_graph molecules.json --out trained --epochs 50
    """
    import numpy as np
    import torch

    import zoo
    from zoo.files import refused
    from zoo_registry import WeightsCard

    from .encodings import checked_encoding
    from .files import read_graphs
    from .training import fit, score
    from .validation import numbered

    arguments = output.pairs(choices, "--set")
    shape = zoo.create(name, device="meta", **arguments)
    if getattr(shape, "level", None) not in ("node", "graph"):
        kind = "scores pairs of nodes" if hasattr(shape, "level") else "reads no graphs"
        raise click.UsageError(f"{name} {kind}; expected a model of nodes or graphs")
    encoding = checked_encoding(shape.pe_dim, encoding)
    graphs = read_graphs(data, directed=directed)
    if len(graphs) < 10:
        raise click.UsageError(f"{data} holds {len(graphs)} graphs; at least 10 are needed")
    own = {"node_dim": 0 if graphs[0].x is None else graphs[0].x.shape[1]}
    if graphs[0].edge_attr is not None:
        own["edge_dim"] = graphs[0].edge_attr.shape[1]
    names = None
    if shape.kind == "classification":
        with refused(data):
            names = numbered(graphs, None)
        own["out_dim"] = len(names)
    torch.manual_seed(seed)
    model = zoo.create(name, **{**own, **arguments}).to(device)
    order = np.random.default_rng(seed).permutation(len(graphs))
    first, second = int(0.8 * len(order)), int(0.9 * len(order))
    parts = [[graphs[i] for i in order[a:b]] for a, b in ((0, first), (first, second), (second, len(order)))]

    def report(epoch: Any) -> None:
        if not as_json:
            click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation {epoch.score:.4f}")

    settings = {"epochs": epochs, "batch_size": batch_size, "rate": rate, "warmup_epochs": warmup}
    more: dict[str, Any] = {"encoding": encoding, "seed": seed, "report": report, **settings}
    with training.run(out, resume, unit="epoch", quiet=as_json, graphs=len(graphs)) as run:
        fit(model, parts[0], parts[1], run=run, **more)
        found = score(model, parts[2], batch_size=batch_size, encoding=encoding)
        what = "mean absolute error" if model.kind == "regression" else "accuracy"
        value = -found if model.kind == "regression" else found
        split = f"{len(parts[2])} graphs"
        metrics = training.measured({what: value}, dataset=data.name, split=split, command="train-graphs")
        # What a pipeline must know to read graphs as training did.
        facts = {"directed": directed} | ({"encoding": encoding} if encoding is not None else {})
        model.zoo_info.weights = WeightsCard(tag="own", where=f"trained on {data.name}", preprocess=facts)
        model.zoo_info.tag = None
        zoo.save(model.cpu(), out, labels=names, metrics=metrics)
    if as_json:
        output.emit({what: value, "graphs": [len(p) for p in parts], "folder": str(out)})
        return
    click.echo(f"{len(parts[2])} test graphs: {what} {value:.4f}")
    click.echo(f"saved to {out}; try: zoo predict-graphs {training.source(out)} FILE --out answers.csv")
