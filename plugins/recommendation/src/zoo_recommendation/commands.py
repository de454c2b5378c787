"""``zoo train`` and ``zoo recommend``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training

AT_LEAST_ONE = click.IntRange(min=1)


@click.command()
@click.argument("model")
@click.argument("interactions", type=click.Path(dir_okay=False, path_type=Path))
@training.out_folder("Folder of the run (default: MODEL-INTERACTIONS).", required=False)
@click.option("--epochs", default=300, show_default=True, type=AT_LEAST_ONE, help="At most so many epochs.")
@training.batch_size(2048)
@click.option("--lr", default=1e-3, show_default=True, callback=training.positive, help="Adam's learning rate.")
@click.option(
    "--patience",
    default=10,
    show_default=True,
    type=AT_LEAST_ONE,
    help="Epochs without a better validation NDCG@10.",
)
@click.option(
    "--core",
    default=5,
    show_default=True,
    type=click.IntRange(min=0),
    help="Users and items need so many interactions.",
)
@click.option("--max-length", type=AT_LEAST_ONE, help="Items of history in a training sample (default: the model's).")
@click.option(
    "--scale-time/--raw-time",
    default=None,
    help="Scale timestamps to [0, 1] over the data, or leave them (default: as RecBole, scaled for ml-100k alone).",
)
@click.option("--seed", default=2020, show_default=True, type=click.IntRange(-(2**40), 2**40))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another model argument; repeatable.")
@output.as_json
def train(
    model: str,
    interactions: Path,
    out: Path | None,
    epochs: int,
    batch_size: int,
    lr: float,
    patience: int,
    core: int,
    max_length: int | None,
    scale_time: bool | None,
    seed: int,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train MODEL on INTERACTIONS: tim4rec, mamba4rec, ssd4rec, a name of `zoo list --domain recommendation`, or, to
    compare with, sasrec and gru4rec.

    INTERACTIONS is a CSV, TSV, parquet or RecBole .inter file with the columns user, item and timestamp. The protocol
    is RecBole's: 5-core filter, the last interaction of each user for the test, the one before for validation, full
    ranking. A run that was stopped goes on when the same command is given again. Training begins with random weights.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from zoo.files import check_place, read_json, whole
    from zoo.loading import card_of

    from . import artifact
    from .baselines import BASELINES
    from .protocol import prepare, split
    from .tables import read_table
    from .training import Settings, evaluate, fit, plot

    console = Console(stderr=True)
    arguments = output.pairs(settings, "--set")
    if taken := {"n_items", "time_scale"} & arguments.keys():
        raise click.UsageError(f"--set {taken.pop()}: it follows from the data; leave it out")
    if model not in SYSTEMS | BASELINES and (purpose := card_of(model).task) != "next-item":
        raise click.UsageError(f"{model} is for {purpose}; `zoo list --domain recommendation` shows the recommenders")
    if out is None:
        out = Path(f"{model}-{interactions.stem}")
    check_place(out)
    if scale_time is None:
        scale_time = interactions.stem == "ml-100k"
    table = prepare(*read_table(interactions), core=core, scale_time=scale_time)
    if max_length is not None:
        arguments["max_length"] = max_length
    torch.manual_seed(seed)
    network = create(model, n_items=table.n_items, **arguments)
    if table.time_scale is not None and network.reads_times:  # so that its folder knows how to read seconds
        torch.manual_seed(seed)
        network = create(model, n_items=table.n_items, time_scale=table.time_scale, **arguments)
    if network.built_from is not None and network.built_from["implementation"] == "torch":
        from .recbole_models import INSTALL, installed

        why = "as asked for" if installed() else f"RecBole is not installed; for its own: {INSTALL}"
        console.print(f"{model}: this project's, on torch's layers ({why})", markup=False, soft_wrap=True)
    parts = split(table, network.max_length)
    console.print(
        f"{len(table.user)} interactions of {table.n_users - 1} users with {table.n_items - 1} items after the "
        f"{core}-core filter; {len(parts[0])} training samples",
        soft_wrap=True,
    )
    if not len(parts[1]) or not len(parts[2]):
        raise click.ClickException("no validation or test samples: users need at least three interactions")
    chosen = Settings(epochs, batch_size, lr, patience, seed=seed)
    if (out / "history.json").exists():
        done = read_json(out / "history.json")["epochs"]
        console.print(f"{out} holds a run of {len(done)} epochs: going on after them", markup=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json) as bar:
        task = bar.add_task("training", total=len(parts[0]), note="")

        def on_epoch(row: dict[str, float]) -> None:
            bar.update(task, note=f"epoch {row['epoch']:.0f}  loss {row['loss']:.1f}  NDCG@10 {row['ndcg@10']:.4f}")

        try:
            history = fit(
                network, parts[0], parts[1], out, chosen,
                progress=lambda done, _: bar.update(task, completed=done), on_epoch=on_epoch,
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            console.print(
                f"stopped; the finished epochs are in {out}: the same command goes on after them", soft_wrap=True
            )
            raise
    scores = evaluate(network, parts[2])
    plot(history, out / "curve.png")
    with whole(out / "results.json") as work:
        work.write_text(json.dumps({"test": scores, "best_epoch": history.best_epoch}, indent=1))
    source = "measured by zoo train"
    rows = [{"name": k, "value": v, "dataset": interactions.name, "source": source} for k, v in scores.items()]
    artifact.save(out, network, table, rows)
    if as_json:
        click.echo(json.dumps({"test": scores, "best_epoch": history.best_epoch, "folder": str(out)}))
        return
    click.echo(f"best epoch {history.best_epoch} of {len(history.epochs)}; on the test interactions:")
    for name, value in scores.items():
        click.echo(f"  {name:8} {value:.4f}")
    click.echo(
        f"saved to {out} ({len(table.user_tokens) - 1} users); try: zoo recommend {shlex.quote(str(out))} --user NAME"
    )


#: What a system's name stands for: its published configuration, at RecBole's usual length of history.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "tim4rec": ("tim4rec_ml1m_64", {"max_length": 50}),
    "mamba4rec": ("mamba4rec_ml1m", {"max_length": 50}),
    "ssd4rec": ("ssd4rec_64", {"max_length": 50}),
}


def create(name: str, **arguments: Any) -> Any:
    """A recommender with random weights by the name of a card, a system or a baseline (sasrec, gru4rec)."""
    import zoo

    from .baselines import BASELINES, build

    if name in BASELINES:
        return build(name, **arguments)
    model, defaults = SYSTEMS.get(name, (name, {}))
    return zoo.create(model, **{**defaults, **arguments})


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--user", "users", multiple=True, help="A user's name in the interaction file; repeatable.")
@click.option("-k", default=10, show_default=True, type=AT_LEAST_ONE, help="How many items.")
@click.option("--all", "everyone", is_flag=True, help="Every user; with --out to a parquet file.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write a parquet file instead.")
@click.option("--seen/--no-seen", default=False, help="Also recommend what the user already took.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one user a line.")
def recommend(
    folder: Path, users: tuple[str, ...], k: int, everyone: bool, out: Path | None, seen: bool, as_json: bool
) -> None:
    """Answer from the trained recommender in FOLDER (made by `zoo train`)."""
    from zoo.files import check_place

    from . import artifact
    from .serving import write_parquet

    if bool(users) == everyone:
        raise click.UsageError("say whom to answer: --user NAME (once or more), or --all")
    if out is not None and out.suffix != ".parquet":
        raise click.UsageError(f"--out is {out}; expected a name that ends in .parquet")
    if out is not None:
        check_place(out)
    recommender = artifact.load(folder)
    answers = (
        recommender.recommend_all(k, exclude_seen=not seen)
        if everyone
        else (recommender.recommend(user, k, exclude_seen=not seen) for user in users)
    )
    if out is not None:
        rows = write_parquet(answers, out)
        click.echo(json.dumps({"rows": rows, "file": str(out)}) if as_json else f"{rows} rows in {out}")
        return
    for answer in answers:
        if as_json:
            items = [{"item": r.item, "score": r.score} for r in answer.items]
            click.echo(json.dumps({"user": answer.user, "cold": answer.cold, "items": items}))
            continue
        note = "  (no history: the most popular items)" if answer.cold else ""
        click.echo(f"{answer.user}{note}")
        for rank, found in enumerate(answer.items, start=1):
            click.echo(f"  {rank:3}  {found.item:20} {found.score:.3f}")
