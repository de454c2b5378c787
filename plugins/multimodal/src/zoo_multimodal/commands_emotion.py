"""Broad Mamba's verbs on the command line: ``zoo predict-emotions``, ``zoo train-emotions``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training
from zoo_registry import errors


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="A CSV file; a folder of them for several inputs.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@output.loading_options
@output.as_json
def predict_emotions(
    name: str, inputs: tuple[str, ...], out: Path | None, keep_going: bool, as_json: bool, **options: Any
) -> int:
    """The emotion of every utterance of the dialogues in INPUTS (.json, .npz) with the model NAME; write them as CSV.

    \b
        zoo predict-emotions broad_mamba_micro dialogues.json --out answers.csv
    """
    import zoo

    pipe = zoo.pipeline(name, **output.loading(options))
    return output.answers(pipe, inputs, out, keep_going=keep_going, as_json=as_json)


@click.command()
@click.argument("name")
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@training.out
@training.epochs(30)
@training.batch_size(16, "Dialogues.")
@training.rate(1e-3)
@click.option("--ridge", type=float, help="Solve the head by ridge regression with this penalty (head=broad).")
@training.run_options("dim=64")
@training.resume
@output.as_json
def train_emotions(
    name: str,
    data: Path,
    out: Path,
    epochs: int,
    batch_size: int,
    rate: float,
    ridge: float | None,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train the model NAME on the labelled dialogues in DATA: 80 % of them, 10 % to choose the epoch, 10 % to measure.

    Widths of features and emotions follow from the data, a .json or .npz file as `zoo predict-emotions` reads it, with
    label for every utterance. Emotions of IEMOCAP and of MELD come in those sets' customary order.

    \b
        zoo train-emotions broad_mamba_meld meld.npz --out trained --epochs 40
    """
    import torch

    import zoo

    from .broad_mamba import BroadMamba
    from .dialogues import class_names, read_dialogues, split
    from .emotion_training import Settings, fit, measure, solve_head

    arguments = output.pairs(choices, "--set")
    shape = zoo.create(name, device="meta", **arguments)
    if not isinstance(shape, BroadMamba):
        raise click.UsageError(f"{name} is a {type(shape).__name__}; expected a BroadMamba (broad_mamba_...)")
    try:
        dialogues = read_dialogues(data)
        parts = split(dialogues, seed)
        own: dict[str, Any] = {"dims": {m: a.shape[1] for d in dialogues for m, a in d.features.items()}}
        own["classes"] = class_names(dialogues)
        if ridge is not None:
            own["head"] = "broad"
        torch.manual_seed(seed)
        model = zoo.create(name, **{**own, **arguments}).to(device)

        def report(epoch: Any) -> None:
            if not as_json:
                click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation F1 {epoch.weighted_f1:.4f}")

        settings = Settings(epochs, batch_size, rate, seed=seed)
        with training.run(out, resume, unit="epoch", quiet=as_json, dialogues=len(dialogues)) as run:
            fit(model, parts.train, parts.valid, settings, report, run)
            if ridge is not None:
                solve_head(model, parts.train, ridge)
            found = measure(model, parts.test)
            figures = {"weighted F1": found.weighted_f1, "accuracy": found.accuracy}
            split_name = f"{len(parts.test)} dialogues"
            rows = training.measured(figures, dataset=data.name, split=split_name, command="train-emotions")
            zoo.save(model.cpu(), out, labels=list(model.classes), metrics=rows)
    except errors.ZooError:  # with a status of its own
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        sizes = [len(parts.train), len(parts.valid), len(parts.test)]
        output.emit(
            figures | {"f1": dict(zip(model.classes, found.f1, strict=True)), "dialogues": sizes, "folder": str(out)}
        )
        return
    click.echo(f"{len(parts.test)} test dialogues: {training.said(figures)}")
    click.echo(f"saved to {out}; try: zoo predict-emotions {training.source(out)} FILE --out answers.csv")
