"""``zoo forecast`` and ``zoo train-forecaster``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output
from zoo.cli import training as shared

from .tables import IRREGULAR, MISSING


@click.command()
@click.argument("name")
@click.argument("table", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--horizon", type=click.IntRange(min=1), help="Steps to forecast (default: the model's).")
@click.option("--column", "columns", multiple=True, help="A column to forecast; repeatable (default: all).")
@click.option("--date", help="The date column (default: found by name or type).")
@click.option("--history", type=int, help="Rows of history to read (default: as many as the model was made for).")
@click.option("--missing", type=click.Choice(MISSING), default="interpolate", show_default=True)
@click.option("--irregular", type=click.Choice(IRREGULAR), default="error", show_default=True, help="Uneven dates.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Default: TABLE_forecast.csv.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Default: OUT with the ending .png.")
@output.loading_options
@output.as_json
def forecast(
    name: str,
    table: Path,
    horizon: int | None,
    columns: tuple[str, ...],
    date: str | None,
    history: int | None,
    missing: str,
    irregular: str,
    out: Path | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Forecast the columns of TABLE (CSV, TSV or parquet with a date column) with the model NAME.

    \b
        zoo forecast tsm2_micro.series demand.csv --horizon 48
        zoo forecast ./run/model demand.csv --column load --out next_week.csv

    Writes the forecast as a CSV file and a picture of it. NAME may be a folder of `zoo train-forecaster` (its model/).
    """
    import zoo
    from zoo.files import check_ending

    out = out or Path(f"{table.stem}_forecast.csv")
    picture = picture or out.with_suffix(".png")
    for option, place, other in (("--out", out, table), ("--picture", picture, table), ("--picture", picture, out)):
        if place.absolute() == other.absolute():
            raise click.UsageError(f"{option} would take the place of {other}; give another name")
    check_ending(picture)
    pipe = zoo.pipeline(
        name, "forecasting", horizon=horizon, columns=list(columns) or None, date=date, history=history,
        missing=missing, irregular=irregular, **output.loading(options),
    )  # fmt: skip
    result = pipe(table)
    written, drawn = result.to_csv(out), result.save_picture(picture)
    if as_json:
        output.emit(result.to_dict() | {"file": str(written), "picture": str(drawn)})
        return
    click.echo(str(result))
    click.echo(f"-> {written}, {drawn}")


#: What a system's name stands for: its published configuration.
SYSTEMS = {"spacetime": "spacetime_ett_720", "tsm2": "tsm2_96"}


@click.command("train-forecaster")
@click.argument("model")
@click.argument("table", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--lag", type=click.IntRange(min=2), help="Rows of history (default: the model's).")
@click.option("--horizon", type=click.IntRange(min=1), help="Steps of the forecast (default: the model's).")
@click.option("--column", "columns", multiple=True, help="A column to learn; repeatable (default: all).")
@click.option("--date", help="The date column (default: found by name or type).")
@click.option("--split", default="auto", show_default=True, help="auto, ratio (70/10/20), ett-hour or ett-minute.")
@click.option("--missing", type=click.Choice(MISSING), default="interpolate", show_default=True)
@click.option("--irregular", type=click.Choice(IRREGULAR), default="error", show_default=True, help="Uneven dates.")
@click.option("--epochs", default=500, show_default=True, help="At most so many.")
@click.option("--patience", default=20, show_default=True, help="Epochs without a better validation error.")
@click.option("--batch-size", default=50, show_default=True)
@click.option("--steps", type=int, help="Batches of an epoch (default: all windows).")
@click.option("--lr", default=1e-3, show_default=True, help="AdamW's learning rate.")
@click.option("--weight-decay", default=1e-4, show_default=True)
@click.option("--open-loop-epochs", type=int, default=1, show_default=True,
              help="Epochs in which SpaceTime's open-loop terms count; -1: all.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another model argument; repeatable.")
@shared.device
@shared.out_folder("Folder (default: MODEL-TABLE).", required=False, file_okay=False)
@shared.resume
@output.as_json
def train_forecaster(
    model: str,
    table: Path,
    lag: int | None,
    horizon: int | None,
    columns: tuple[str, ...],
    date: str | None,
    split: str,
    missing: str,
    irregular: str,
    epochs: int,
    patience: int,
    batch_size: int,
    steps: int | None,
    lr: float,
    weight_decay: float,
    open_loop_epochs: int,
    seed: int,
    settings: tuple[str, ...],
    device: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train MODEL on TABLE: spacetime, tsm2, or a name of `zoo list --domain time_series`.

    TABLE is a CSV, TSV or parquet file with a date column and columns of numbers. The protocol is the Informer
    benchmark's: the first 70 % of the rows train, the last 20 % test (ETT files: 12, 4 and 4 months), columns
    standardised by the training rows, every window of --lag and --horizon rows. Ctrl-C keeps the best epoch so
    far; the same command goes on from there.
    """
    import torch
    from rich.console import Console

    from zoo.files import check_place, refused

    from . import protocol, training
    from .artifact import save
    from .reading import read_table

    out = out or Path(f"{model}-{table.stem}")
    if out.is_file():
        raise click.UsageError(f"{str(out)!r} is a file; expected a folder, new or not: give --out")
    check_place(out)
    console = Console(stderr=True)
    name = SYSTEMS.get(model, model)
    wanted = training.Settings(
        epochs, batch_size, lr, weight_decay, patience, steps, None if open_loop_epochs < 0 else open_loop_epochs, seed
    )
    with refused(table):
        read = read_table(table, date)
        chosen = (read.choose(columns) if columns else read).regular(missing, irregular)
    torch.manual_seed(seed)
    network = create(name, lag, horizon, len(chosen.columns), output.pairs(settings, "--set"))
    with refused(table):
        parts, scaler = protocol.prepare(chosen, network.lag, network.horizon, split=split, apart=network.columns == 1)
    unread = (network.lag - network.patch_len) % network.stride if hasattr(network, "patch_len") else 0
    if unread:
        console.print(
            f"the newest {unread} of {network.lag} rows lie in no patch (of {network.patch_len} rows, every "
            f"{network.stride}) and are not read: a --lag of {network.lag - unread} is as good",
            soft_wrap=True,
        )
    for note in chosen.notes:
        console.print(note, markup=False, soft_wrap=True)
    counts = ", ".join(f"{len(parts[part])} {part}" for part in protocol.PARTS)
    console.print(f"{len(chosen)} rows, {len(chosen.columns)} columns; windows: {counts}", soft_wrap=True)

    def on_epoch(row: dict[str, float]) -> None:
        console.print(
            f"epoch {row['epoch']:.0f}: loss {row['loss']:.4f}, validation MSE {row['val_mse']:.4f}, "
            f"MAE {row['val_mae']:.4f} ({row['seconds']:.1f} s)",
            soft_wrap=True,
        )

    with shared.run(out, resume, unit="epoch", quiet=as_json, rows=len(chosen), windows=len(parts["train"])) as run:
        history = training.fit(network.to(device), parts["train"], parts["val"], wanted, on_epoch=on_epoch, run=run)
        scores = {"model": training.evaluate(network, parts["test"]), **training.baselines(parts["test"])}
        folder = save(out, network.cpu(), scaler, history, scores, table.name)
        if as_json:
            output.emit({"test": scores, "best_epoch": history.best_epoch, "folder": str(folder)})
        else:
            click.echo(f"best epoch {history.best_epoch} of {len(history.epochs)}; on the test rows, standardised:")
            for who, found in scores.items():
                click.echo(f"  {who:12} MSE {found['mse']:.4f}  MAE {found['mae']:.4f}")
            click.echo(f"saved to {folder}; try: zoo forecast {shared.source(folder / 'model')} {table}")
        if history.interrupted and run.kept:
            raise KeyboardInterrupt


def create(name: str, lag: int | None, horizon: int | None, columns: int, arguments: dict[str, Any]) -> Any:
    """A forecaster with random weights; ``lag`` and ``horizon`` under the names that its builder has for them.

    Raises BadArgument for a model of another task.
    """
    import inspect

    import zoo
    from zoo import errors
    from zoo.catalog import find, import_object

    card, _ = find(name)
    if card.task != "forecasting":
        raise errors.BadArgument(f"{name} is for {card.task}; expected a forecaster", argument="model", accepted=[])
    accepted = inspect.signature(import_object(card.builder)).parameters
    for value, names in ((lag, ("lag", "seq_len")), (horizon, ("horizon", "pred_len"))):
        if value is not None:
            arguments[next(n for n in names if n in accepted)] = value
    if "num_variates" in accepted:
        arguments.setdefault("num_variates", columns)
    if card.config.get("input_dim", 1) > 1:
        arguments.setdefault("input_dim", columns)
    return zoo.create(name, **arguments)
