"""Verbs of the command line for touch: ``touch-activity``, ``train-touch``, ``pretrain-touch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command()
@click.argument("name")
@click.argument("recording", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="An .npz or .h5 file.")
@click.option("--nodes", help="Only these, separated by commas (conv2,fc5,encoder).")
@click.option("--key", help="The array's name in an npz or h5 file.")
@output.loading_options
@output.as_json
def touch_activity(
    name: str, recording: Path, out: Path, nodes: str | None, key: str | None, as_json: bool, **options: Any
) -> None:
    """Write what every node of the network NAME does at every time step of RECORDING, for comparisons with neurons.

    \b
        zoo touch-activity tactile_micro.solids sweep.npz --out activity.npz
    """
    import zoo
    from zoo.files import check_ending, check_place

    from .pipelines import WRITTEN, TouchClassification, activity, save_activity

    check_ending(out, WRITTEN)
    check_place(out)
    pipe = zoo.pipeline(name, "touch-classification", key=key, **output.loading(options))
    assert isinstance(pipe, TouchClassification)
    windows = pipe.prepare(pipe.read(recording))
    arrays = activity(pipe.model, windows)  # type: ignore[arg-type]
    if nodes is not None:
        asked = [node.strip() for node in nodes.split(",")]
        unknown = [node for node in asked if node not in arrays]
        if unknown:
            raise click.UsageError(f"the network has no {unknown[0]!r}; expected some of {', '.join(sorted(arrays))}")
        arrays = {node: arrays[node] for node in asked}
    save_activity(out, arrays)
    shapes = {node: list(value.shape) for node, value in sorted(arrays.items())}
    if as_json:
        output.emit({"file": str(out), "windows": len(windows), "arrays": shapes})
        return
    for node, shape in shapes.items():
        click.echo(f"{node}: {tuple(shape)}")
    click.echo(f"saved to {out}, (windows, time, ...) each")


def _training_options(command: Any) -> Any:
    for option in reversed(
        (
            training.out,
            training.epochs(100),
            training.batch_size(256, least=2),
            training.rate(1e-3),
            click.option("--weight-decay", default=5e-4, show_default=True, type=float),
            click.option("--optimiser", default="sgd", show_default=True, type=click.Choice(["sgd", "adamw"])),
            click.option("--schedule", default="step", show_default=True, type=click.Choice(["step", "cosine"])),
            click.option("--step-size", default=30, show_default=True, type=click.IntRange(min=1), help="Epochs."),
            training.run_options(),
            training.resume,
            output.as_json,
        )
    ):
        command = option(command)
    return command


def _settings(given: dict[str, Any]) -> Any:
    from .training import Settings

    names = ("epochs", "batch_size", "rate", "weight_decay", "optimiser", "schedule", "step_size", "seed")
    return Settings(**{name: given[name] for name in names})


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--pretrained", help="A network of zoo pretrain-touch to start from.")
@click.option("--freeze", is_flag=True, help="Train the decoder alone (of a pre-trained network).")
@click.option("--augment", is_flag=True, help="Mirrored and turned arrays are further samples.")
@_training_options
def train_touch(
    name: str,
    folder: Path,
    pretrained: str | None,
    freeze: bool,
    augment: bool,
    out: Path,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train the network NAME on FOLDER/CATEGORY/recordings (or train, validate and test folders of these).

    The number of categories follows from the folder. Prints the accuracy on the test recordings and saves what
    `zoo predict`, `zoo validate` and `zoo.load` read. Defaults are the authors' settings.

    \b
        zoo train-touch tactile_zhuang_gpt sweeps/ --out trained --device cuda
    """
    import torch

    import zoo

    from .augmentation import TouchAugmentation
    from .model import TactileNetwork
    from .recordings import Layout, read_splits
    from .training import accuracy, start_from, train

    arguments = output.pairs(choices, "--set")
    shape = zoo.create(name, device="meta", **arguments)
    if not isinstance(shape, TactileNetwork):
        raise click.UsageError(f"{name} is a {type(shape).__name__}; expected a network of touch (tactile_...)")
    recordings, valid, test = read_splits(folder, Layout.of(shape), given["seed"])
    torch.manual_seed(given["seed"])
    model = zoo.create(name, **{**arguments, "num_classes": len(recordings.classes)})
    assert isinstance(model, TactileNetwork)
    if pretrained is not None:
        source = zoo.load(pretrained)
        if not isinstance(source, TactileNetwork):
            raise click.UsageError(f"{pretrained} is a {type(source).__name__}; expected a network of touch")
        start_from(model, source)
    if freeze:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key.startswith(("decoder.", "head.")))
    model.to(device)

    def report(epoch: Any) -> None:
        if not as_json:
            click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation accuracy {epoch.accuracy:.4f}")

    view = TouchAugmentation(temporal=False) if augment else None
    sizes: dict[str, Any] = {"recordings": len(recordings), "classes": recordings.classes}
    with training.run(out, resume, unit="epoch", quiet=as_json, **sizes) as run:
        train(model, recordings, valid, _settings(given), view=view, report=report, run=run)
        found = {"accuracy": accuracy(model, test), "top5": accuracy(model, test, min(5, len(test.classes)))}
        metrics = training.measured(found, dataset=folder.name, split="test", command="train-touch")
        zoo.save(model.cpu(), out, labels=recordings.classes, metrics=metrics)
    if as_json:
        output.emit({"test": found, "recordings": [len(recordings), len(valid), len(test)]})
        return
    click.echo(f"{len(test)} test recordings: accuracy {found['accuracy']:.4f}, top-5 {found['top5']:.4f}")
    click.echo(f"saved to {out}; try: zoo predict {training.source(out)} recording.npz")


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--objective", default="simclr", show_default=True, help="Or simsiam, autoencoder.")
@click.option("--no-reversal", is_flag=True, help="Reversed time is not a view.")
@_training_options
def pretrain_touch(
    name: str,
    folder: Path,
    objective: str,
    no_reversal: bool,
    out: Path,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train the encoder and attender of NAME on the recordings of FOLDER without their labels.

    \b
        zoo pretrain-touch tactile_zhuang_gpt sweeps/ --out pretrained --objective simclr --rate 1e-2 --device cuda
        zoo train-touch tactile_zhuang_gpt sweeps/ --pretrained ./pretrained --freeze --out linear
    """
    import torch

    import zoo

    from .model import TactileNetwork
    from .recordings import Layout, read_folder
    from .training import OBJECTIVES, pretrain

    if objective not in OBJECTIVES:
        raise click.UsageError(f"--objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    torch.manual_seed(given["seed"])
    # The whole recording's features, or the last step's for pairs of views; no linear layer behind them.
    decoder = {"widths": [], "steps": [-1]}
    model = zoo.create(name, **{"decoder": decoder, **output.pairs(choices, "--set"), "num_classes": 0})
    if not isinstance(model, TactileNetwork):
        raise click.UsageError(f"{name} is a {type(model).__name__}; expected a network of touch (tactile_...)")
    place = folder / "train" if (folder / "train").is_dir() else folder
    recordings = read_folder(place, Layout.of(model))
    every = max(given["epochs"] // 20, 1)

    def report(epoch: Any) -> None:
        if epoch.number % every == 0 and not as_json:
            click.echo(f"epoch {epoch.number} loss {epoch.loss:.4f}")

    settings = _settings(given)
    turned = not no_reversal
    with training.run(out, resume, unit="epoch", quiet=as_json, recordings=len(recordings)) as run:
        frames = recordings.frames
        history = pretrain(model.to(device), frames, objective, settings, temporal=turned, report=report, run=run)
        zoo.save(model.cpu(), out)
    if as_json:
        output.emit({"recordings": len(recordings), "loss": history[-1].loss, "folder": str(out)})
        return
    click.echo(f"saved to {out}; try: zoo train-touch {name} FOLDER --pretrained {training.source(out)} --out trained")
