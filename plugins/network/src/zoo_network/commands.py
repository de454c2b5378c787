"""The network plugin's verbs of the command line: ``classify-flows``, ``train-flows``, ``pretrain-flows``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="A CSV file; a folder of them for several captures.")
@click.option("--bidirectional", is_flag=True, help="Both directions of a connection are one flow.")
@click.option("--timeout", type=float, help="Seconds of silence after which a five-tuple is a new flow.")
@click.option("--labels", help="Class names: a published set (iscxvpn2016 ...) or a text file, a name a line.")
@click.option("--option", "-o", "choices", multiple=True, metavar="NAME=VALUE", help="Pipeline option, as top_k=3.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@output.loading_options
@output.as_json
def classify_flows(
    name: str,
    inputs: tuple[str, ...],
    out: Path | None,
    bidirectional: bool,
    timeout: float | None,
    labels: str | None,
    choices: tuple[str, ...],
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Say what every flow of the captures INPUTS (pcap, pcapng, folders) is, with the model NAME.

    \b
        zoo classify-flows netmamba_micro.generated capture.pcap --out flows.csv
        zoo classify-flows netmamba_iscxvpn2016 day/ --checkpoint tuned.safetensors --labels iscxvpn2016 --json
    """
    import zoo

    own = {"bidirectional": bidirectional or None, "timeout": timeout, "labels": labels}
    arguments = (
        output.loading(options) | {k: v for k, v in own.items() if v is not None} | output.pairs(choices, "--option")
    )
    pipe = zoo.pipeline(name, "traffic-classification", **arguments)
    return output.answers(pipe, inputs, out, keep_going=keep_going, as_json=as_json, between="\n  ")


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@training.out
@click.option("--pretrained", help="A pre-trained model to start from: netmamba_pretrain.six, or a saved folder.")
@training.epochs(120)
@training.batch_size(64)
@training.rate(2e-3, "For a batch of 256; scaled to the batch.")
@click.option("--warmup", default=20, show_default=True, type=click.IntRange(min=0), help="Epochs.")
@click.option("--layer-decay", default=0.75, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--loss", default="cross-entropy", show_default=True, help="Or class-balanced, ldam.")
@click.option("--smoothing", default=0.1, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--augment", is_flag=True, help="Every run of five packets of a flow is a sample.")
@click.option("--bidirectional", is_flag=True, help="Both directions of a connection are one flow.")
@training.run_options("embed_dim=96")
@training.resume
@output.as_json
def train_flows(
    name: str,
    folder: Path,
    out: Path,
    pretrained: str | None,
    epochs: int,
    batch_size: int,
    rate: float,
    warmup: int,
    layer_decay: float,
    loss: str,
    smoothing: float,
    augment: bool,
    bidirectional: bool,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Fine-tune the classifier NAME on FOLDER/CLASS/captures (or train, valid, test folders of these).

    The number of classes follows from the folder. Prints the accuracy and the weighted F1 on the test flows, and saves
    what `zoo classify-flows`, `zoo validate` and `zoo.load` read.

    \b
        zoo train-flows netmamba_classifier captures/ --out tuned --pretrained netmamba_pretrain.six --device cuda
    """
    import torch

    import zoo
    from zoo.files import refused
    from zoo_registry import WeightsCard

    from .data import read_splits, representation_for
    from .netmamba import NetMamba, NetMambaPretrain
    from .training import LOSSES, finetune, predict, scores, start_from

    if loss not in LOSSES:
        raise click.UsageError(f"--loss is {loss!r}; expected {', '.join(LOSSES)}")
    arguments = output.pairs(choices, "--set")
    shape = zoo.create(name, device="meta", **arguments)
    if not isinstance(shape, NetMamba):
        raise click.UsageError(f"{name} is a {type(shape).__name__}; expected a classifier (netmamba_classifier)")
    representation = representation_for(shape.byte_length, {})
    with refused(folder):
        train, valid, test = read_splits(
            folder, representation, seed=seed, augment=augment, bidirectional=bidirectional
        )
    torch.manual_seed(seed)
    model = zoo.create(name, **{**arguments, "num_classes": len(train.classes)})
    assert isinstance(model, NetMamba)
    if pretrained is not None:
        source = zoo.load(pretrained)
        if not isinstance(source, NetMambaPretrain):
            raise click.UsageError(f"{pretrained} is a {type(source).__name__}; expected a pre-trained NetMamba")
        start_from(model, source)
    model.to(device)

    def report(epoch: Any) -> None:
        if not as_json:
            click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation accuracy {epoch.accuracy:.4f}")

    with training.run(out, resume, unit="epoch", quiet=as_json, flows=len(train), classes=train.classes) as run:
        finetune(
            model,
            train,
            valid,
            epochs=epochs,
            batch_size=batch_size,
            base_rate=rate,
            warmup_epochs=warmup,
            layer_decay=layer_decay,
            loss=loss,
            smoothing=smoothing,
            seed=seed,
            report=report,
            run=run,
        )
        found, per_class = scores(predict(model, test.flows), test.labels, test.classes)
        metrics = training.measured(found, dataset=folder.name, split="test", command="train-flows")
        # How captures were split is part of what was trained.
        facts = {"bidirectional": bidirectional}
        model.zoo_info.weights = WeightsCard(tag="own", where=f"trained on {folder.name}", preprocess=facts)
        model.zoo_info.tag = None
        zoo.save(model.cpu(), out, labels=train.classes, metrics=metrics)
    if as_json:
        output.emit({"test": found, "per_class": per_class, "flows": [len(train), len(valid), len(test)]})
        return
    click.echo(f"{len(test)} test flows: accuracy {found['accuracy']:.4f}, weighted F1 {found['f1']:.4f}")
    click.echo(f"saved to {out}; try: zoo classify-flows {training.source(out)} capture.pcap")


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@training.out
@training.steps(150_000)
@training.batch_size(128)
@training.rate(1e-3, "For a batch of 256; scaled to the batch.")
@click.option("--mask-ratio", default=0.9, show_default=True, type=click.FloatRange(0, 1, True, True))
@click.option("--augment", is_flag=True, help="Every run of five packets of a flow is a sample.")
@training.run_options("embed_dim=96")
@training.resume
@output.as_json
def pretrain_flows(
    name: str,
    inputs: tuple[str, ...],
    out: Path,
    steps: int,
    batch_size: int,
    rate: float,
    mask_ratio: float,
    augment: bool,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Pre-train NAME, a masked autoencoder, on the flows of INPUTS (captures and folders; no labels needed).

    \b
        zoo pretrain-flows netmamba_pretrain captures/ --out pretrained --steps 20000 --device cuda
    """
    import numpy as np
    import torch

    import zoo

    from .data import files_in, read_flows, representation_for
    from .netmamba import NetMambaPretrain
    from .training import pretrain

    torch.manual_seed(seed)
    model = zoo.create(name, **output.pairs(choices, "--set"))
    if not isinstance(model, NetMambaPretrain):
        raise click.UsageError(f"{name} is a {type(model).__name__}; expected a masked autoencoder (netmamba_pretrain)")
    representation = representation_for(model.byte_length, {})
    files = [file for text in inputs for file in files_in(text)]
    if not files:
        raise click.UsageError(f"no captures or pictures of flows in {', '.join(inputs)}")
    flows = np.concatenate([read_flows(file, representation, augment=augment) for file in files])
    if not len(flows):
        raise click.UsageError(f"there are no flows of IPv4 in {', '.join(inputs)}")
    model.to(device)
    settings = {"steps": steps, "batch_size": batch_size, "base_rate": rate, "mask_ratio": mask_ratio, "seed": seed}
    report = training.reporter(steps, quiet=as_json)
    with training.run(out, resume, quiet=as_json, flows=len(flows)) as run:
        losses = pretrain(model, flows, report=report, run=run, **settings)  # type: ignore[arg-type]
        zoo.save(model.cpu(), out)
    if as_json:
        output.emit({"steps": steps, "flows": len(flows), "loss": losses[-1], "folder": str(out)})
        return
    next_step = f"zoo train-flows netmamba_classifier FOLDER --pretrained {training.source(out)} --out tuned"
    click.echo(f"saved to {out}; try: {next_step}")
