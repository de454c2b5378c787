"""EEGDM's verbs of the command line: ``classify-eeg``, ``generate-eeg``, ``pretrain-eeg``, ``train-eeg``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="A CSV file; a folder of them for several recordings.")
@click.option("--step", type=float, help="Seconds between windows; their length unless given.")
@click.option("--missing-zeros", is_flag=True, help="Zeros where a recording lacks channels of the montage.")
@click.option("--option", "-o", "choices", multiple=True, metavar="NAME=VALUE", help="Pipeline option, as top_k=3.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@output.loading_options
@output.as_json
def classify_eeg(
    name: str,
    inputs: tuple[str, ...],
    out: Path | None,
    step: float | None,
    missing_zeros: bool,
    choices: tuple[str, ...],
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Say what every window of the recordings INPUTS (EDF, BDF, npz, folders) is, with the model NAME.

    \b
        zoo classify-eeg eegdm_micro.generated recording.edf --out windows.csv
    """
    import zoo

    own: dict[str, Any] = {"step": step} if step is not None else {}
    own |= {"missing": "zeros"} if missing_zeros else {}
    arguments = output.loading(options) | own | output.pairs(choices, "--option")
    pipe = zoo.pipeline(name, "eeg-classification", **arguments)
    return output.answers(pipe, inputs, out, keep_going=keep_going, as_json=as_json, between="\n  ")


@click.command()
@click.argument("name")
@click.option("--channels", default="all", show_default=True, help="Names, as FP1-F7,T3-T5.")
@click.option("--samples", type=click.IntRange(min=2), help="Of each channel; as trained on unless given.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A .edf, .bdf, .fif, .npz or .png file.")
@output.loading_options
@output.as_json
def generate_eeg(
    name: str, channels: str, samples: int | None, seed: int, out: Path, as_json: bool, **options: Any
) -> None:
    """Draw EEG, channel by channel, from the diffusion model NAME.

    \b
        zoo generate-eeg eegdm_micro_backbone.generated --channels FP1-F7,T3-T5 --seed 1 --out drawn.edf
    """
    import zoo
    from zoo.files import check_ending, check_place

    from .recordings import WRITTEN

    check_ending(out, (*WRITTEN, ".png"))
    check_place(out)
    pipe = zoo.pipeline(name, "eeg-generation", samples=samples, seed=seed, **output.loading(options))
    result = pipe(channels)
    place = result.save_picture(out) if out.suffix.lower() == ".png" else result.save(out)
    if as_json:
        output.emit(result.to_dict() | {"file": str(place)})
        return
    click.echo(f"{result.summary()} -> {place}")


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@training.out
@training.steps(100_000)
@training.batch_size(108, "Channels of windows.")
@training.rate(1e-4)
@click.option("--missing-zeros", is_flag=True, help="Zeros where a recording lacks channels of the montage.")
@training.run_options("d_model=64")
@training.resume
@output.as_json
def pretrain_eeg(
    name: str,
    inputs: tuple[str, ...],
    out: Path,
    steps: int,
    batch_size: int,
    rate: float,
    missing_zeros: bool,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Teach the backbone NAME to denoise the recordings INPUTS (files and folders; no labels needed).

    \b
        zoo pretrain-eeg eegdm_backbone_base recordings/ --out pretrained --device cuda
    """
    import numpy as np
    import torch

    import zoo

    from .backbone import DiffusionBackbone
    from .data import files_in, windows
    from .recordings import read_recording
    from .training import pretrain

    torch.manual_seed(seed)
    model = zoo.create(name, **output.pairs(choices, "--set"))
    if not isinstance(model, DiffusionBackbone):
        raise click.UsageError(f"{name} is a {type(model).__name__}; expected a backbone (eegdm_backbone_base)")
    files = [file for text in inputs for file in files_in(text)]
    if not files:
        raise click.UsageError(f"no recordings in {', '.join(inputs)}")
    missing = "zeros" if missing_zeros else "error"
    x = np.concatenate([windows(read_recording(file), model.preparation, missing=missing)[0] for file in files])
    report = training.reporter(steps, quiet=as_json)
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "rate": rate, "seed": seed}
    with training.run(out, resume, quiet=as_json, windows=len(x)) as run:
        losses = pretrain(model.to(device), x, report=report, run=run, **given)
        zoo.save(model.cpu(), out)
    if as_json:
        output.emit({"steps": steps, "channels": len(x), "loss": losses[-1], "folder": str(out)})
        return
    next_step = f"zoo train-eeg eegdm_classifier_tuev FOLDER --pretrained {training.source(out)} --out tuned"
    click.echo(f"saved to {out}; try: {next_step}")


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@training.out
@click.option("--pretrained", help="A backbone to read: eegdm_backbone_base.tuev, or a saved folder.")
@click.option("--test", "test_folder", type=click.Path(path_type=Path), help="Labelled recordings to measure on.")
@training.epochs(50)
@training.batch_size(32)
@training.rate(5e-4, "The highest of the cycle.")
@click.option("--smoothing", default=0.1, show_default=True, type=float)
@click.option("--pos-weight", type=float, help="Weight of a yes, for one logit (CHB-MIT: 150.51).")
@click.option("--patience", default=3, show_default=True, type=click.IntRange(min=0), help="Epochs after the best.")
@click.option(
    "--warmup", default=20, show_default=True, type=click.IntRange(min=0), help="Epochs that are trained anyway."
)
@click.option("--step", type=float, help="Seconds between windows; their length unless given.")
@click.option("--missing-zeros", is_flag=True, help="Zeros where a recording lacks channels of the montage.")
@training.run_options("n_clst=8")
@training.resume
@output.as_json
def train_eeg(
    name: str,
    folder: Path,
    out: Path,
    pretrained: str | None,
    test_folder: Path | None,
    epochs: int,
    batch_size: int,
    rate: float,
    smoothing: float,
    pos_weight: float | None,
    patience: int,
    warmup: int,
    step: float | None,
    missing_zeros: bool,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Fine-tune the classifier NAME on FOLDER/CLASS/recordings, or on recordings with .rec annotations beside them.

    A fifth of the subjects (file names up to the first underscore) is set aside to choose the epoch. The backbone stays
    as it is. The number of classes follows from the folder, unless the model has one logit.

    \b
        zoo train-eeg eegdm_classifier_tuev edf/train --test edf/eval --pretrained eegdm_backbone_base.tuev --out tuned
    """
    import torch

    import zoo

    from .backbone import DiffusionBackbone
    from .data import read_labelled, split_subjects
    from .fusion import EEGClassifier
    from .training import finetune, measures, predict

    arguments = output.pairs(choices, "--set")
    source = None if pretrained is None else zoo.load(pretrained)
    if source is not None:
        if not isinstance(source, DiffusionBackbone):
            raise click.UsageError(f"{pretrained} is a {type(source).__name__}; expected a pre-trained backbone")
        arguments["backbone"] = source.zoo_info.config  # type: ignore[union-attr]
    torch.manual_seed(seed)
    probe = zoo.create(name, **arguments)
    if not isinstance(probe, EEGClassifier):
        raise click.UsageError(f"{name} is a {type(probe).__name__}; expected a classifier (eegdm_classifier_tuev)")
    known = probe.extractor.cond.flatten().tolist()
    cut: dict[str, Any] = {"step": step, "missing": "zeros" if missing_zeros else "error"}
    whole = read_labelled(folder, probe.preparation, known, **cut)
    train, valid = split_subjects(whole)
    binary = probe.num_classes == 1
    model = probe if binary else zoo.create(name, **{**arguments, "n_class": len(whole.classes)})
    assert isinstance(model, EEGClassifier)
    if source is not None:
        model.extractor.model.load_state_dict(source.float().state_dict())
    model.to(device)

    def report(epoch: Any) -> None:
        if not as_json:
            click.echo(f"epoch {epoch.number:3} loss {epoch.loss:.4f} validation: {training.said(epoch.measures)}")

    with training.run(out, resume, unit="epoch", quiet=as_json, windows=len(train), classes=whole.classes) as run:
        finetune(
            model, train, valid, epochs=epochs, batch_size=batch_size, top_rate=rate, smoothing=smoothing,
            pos_weight=pos_weight, patience=patience, warmup=warmup, seed=seed, report=report, run=run,
        )  # fmt: skip
        test, split = valid, "validation"
        if test_folder is not None:
            test, split = read_labelled(test_folder, model.preparation, known, classes=whole.classes, **cut), "test"
        found = measures(predict(model, test.x), test.labels)
        metrics = training.measured(found, dataset=(test_folder or folder).name, split=split, command="train-eeg")
        zoo.save(model.cpu(), out, labels=whole.classes, metrics=metrics)
    if as_json:
        output.emit({split: found, "windows": [len(train), len(valid), len(test)]})
        return
    click.echo(f"{len(test)} {split} windows: {training.said(found)}")
    click.echo(f"saved to {out}; try: zoo classify-eeg {training.source(out)} recording.edf")
