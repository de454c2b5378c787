"""``zoo generate-images`` and ``zoo train-images``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command("generate-images")
@click.argument("model")
@click.argument("labels", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), default="generated.png", show_default=True,
              help="A picture of all images; or a folder, for one file each.")  # fmt: skip
@click.option("--count", default=1, show_default=True, help="Images of each label.")
@click.option("--seed", default=0, show_default=True)
@click.option("--method", type=click.Choice(["dopri5", "heun", "euler"]), default="dopri5", show_default=True)
@click.option("--steps", default=50, show_default=True, help="Of heun and euler; dopri5 takes those it needs.")
@click.option("--cfg", type=float, help="Strength of guidance, 1 for none (default: the weights' own).")
@click.option("--adaptive", is_flag=True, help="Guidance that fades towards the image.")
@click.option("--latents", is_flag=True, help="Do not decode: write latents.npy into the folder --out.")
@click.option("--autoencoder", help="Repository or folder of a diffusers AutoencoderKL (default: the weights' own).")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="Weights of your own for MODEL.")
@click.option("--device", default="cpu", show_default=True)
@output.as_json
def generate_images(
    model: str,
    labels: tuple[str, ...],
    out: Path,
    count: int,
    seed: int,
    method: str,
    steps: int,
    cfg: float | None,
    adaptive: bool,
    latents: bool,
    autoencoder: str | None,
    checkpoint: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Generate images of LABELS with MODEL: names or numbers of classes, "all", "none", or text files of labels.

    \b
        zoo generate-images dimsum_micro ring cross --count 8 --out shapes.png
        zoo generate-images dimsum_l2 207 360 --cfg 4 --out images/
        zoo generate-images dimsum_l2 207 --latents --out latents/
    """
    import zoo
    from zoo.files import check_ending, check_place

    from .pipeline import GeneratedImages, ImageGeneration

    if latents and out.suffix:
        if click.get_current_context().get_parameter_source("out") is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--out is {out}, a file; expected a folder for --latents")
        out = Path("latents")
    if out.suffix:
        check_ending(out)
    check_place(out if out.suffix else out / "image.png")
    pipe = ImageGeneration(
        zoo.load(model, device=device, checkpoint=checkpoint), seed=seed, count=count, method=method, steps=steps,
        cfg=cfg, adaptive=adaptive, decode=not latents, autoencoder=autoencoder,
    )  # fmt: skip
    asked = tuple(i for label in labels or ("none",) for i in _classes(pipe, label))
    pipe.count = 1  # they are counted already
    answer: Any = pipe(asked)
    assert isinstance(answer, GeneratedImages)
    if latents or not out.suffix:
        written = answer.save(out)
    else:
        written = [answer.save_picture(out)]
    if as_json:
        output.emit(
            {"labels": answer.labels, "seed": seed, "evaluations": answer.evaluations, "files": list(map(str, written))}
        )
        return
    click.echo(f"{answer.summary()} in {(answer.milliseconds or 0) / 1000:.1f} s")
    click.echo(f"-> {written[0] if len(written) == 1 else f'{len(written)} files in {out}'}")


def _classes(pipe: Any, label: str) -> list[int | str]:
    found = pipe.read(Path(label) if label.endswith(".txt") and Path(label).is_file() else label)
    return ["none" if one == pipe.network.y_embedder.null else one for one in found]


@click.command("train-images")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@training.steps(10_000)
@training.batch_size(64)
@click.option("--lr", default=1e-4, show_default=True, callback=training.positive, help="AdamW's learning rate.")
@click.option("--cosine", is_flag=True, help="Let the rate fall to nothing.")
@click.option("--warmup", default=0, show_default=True, help="Steps in which the rate rises.")
@click.option("--decay", default=0.9999, show_default=True, help="Of the averaged weights, which are saved.")
@click.option("--clip", default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--flip", is_flag=True, help="Mirror half of the images.")
@click.option("--held-out", default=0.05, show_default=True, help="Share of the images that is only measured.")
@click.option("--report-every", default=500, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--start", type=click.Path(exists=True, path_type=Path), help="Weights of MODEL to begin with.")
@click.option("--autoencoder", help="Repository or folder of a diffusers AutoencoderKL, for models of latents.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Another model argument; repeatable.")
@training.device
@training.out_folder("Folder (default: MODEL-FOLDER).", required=False, file_okay=False)
@training.resume
@output.as_json
def train_images(
    model: str,
    folder: Path,
    steps: int,
    batch_size: int,
    lr: float,
    cosine: bool,
    warmup: int,
    decay: float,
    clip: float,
    flip: bool,
    held_out: float,
    report_every: int,
    seed: int,
    start: Path | None,
    autoencoder: str | None,
    settings: tuple[str, ...],
    device: str,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Train MODEL on pictures by flow matching: FOLDER/CLASS/PICTURES, or FOLDER/PICTURES without labels.

    Pictures are cut to their middle square and resized. Models of 4 channels learn the latents of Stable Diffusion's
    autoencoder (an extra). Defaults are the published settings; Ctrl-C keeps the average so far; the same
    command goes on from there.

    \b
        zoo train-images dimsum_micro pictures/ --set img_resolution=32 --set in_channels=3 --set hidden_size=64 --flip
        zoo train-images dimsum_l2 imagenet/train --batch-size 704 --flip --device cuda
    """
    import torch
    from rich.console import Console

    import zoo
    from zoo.catalog import find
    from zoo.files import check_place

    from . import training as flow_matching
    from .autoencoder import Autoencoder
    from .images import read_folder

    console = Console(stderr=True)
    arguments = output.pairs(settings, "--set")
    out = out or Path(f"{model}-{folder.name}")
    check_place(out)
    card, _ = find(model)
    if "img_resolution" not in card.config:
        raise click.UsageError(f"{model} generates no images from labels; expected a DiMSUM (dimsum_...)")
    wanted = {**card.config, **arguments}
    latent = wanted["in_channels"] == 4
    side = wanted["img_resolution"] * (8 if latent else 1)
    data = read_folder(folder, side, 3 if latent else wanted["in_channels"])
    arguments.setdefault("num_classes", max(1, len(data.classes)))
    if data.labels is None:
        arguments.setdefault("label_dropout", -1.0)
    torch.manual_seed(seed)
    network = zoo.load(model, checkpoint=start, **arguments) if start is not None else zoo.create(model, **arguments)
    encoder = None
    if latent:
        encoder = Autoencoder(autoencoder, device=device) if autoencoder else Autoencoder(device=device)
    data.images = flow_matching.to_model_space(data.images, encoder)
    train, rest = data.split(held_out, seed)
    console.print(f"{len(train)} images to train on, {len(rest)} to measure, {len(data.classes) or 'no'} classes")

    def report(row: dict[str, float]) -> None:
        console.print(
            f"step {row['step']}: loss {row['loss']:.4f}, held out {row['held_out']:.4f} ({row['seconds']:.0f} s)"
        )

    wanted_settings = flow_matching.Settings(
        steps=steps, batch_size=batch_size, learning_rate=lr, clip=clip, decay=decay, warmup=warmup, cosine=cosine,
        flip=flip, report_every=report_every, seed=seed,
    )  # fmt: skip
    with training.run(out, resume, quiet=as_json, images=len(train), classes=data.classes) as run:
        history = flow_matching.fit(
            network.to(device), train.images, train.labels, wanted_settings, held_out=(rest.images, rest.labels),
            on_report=report, run=run,
        )  # fmt: skip
        found = {"flow-matching loss": history.rows[-1]["held_out"]} if history.rows else {}
        metrics = training.measured(found, dataset=folder.name, split="held out", command="train-images")
        zoo.save(network.cpu(), out, labels=data.classes or None, metrics=metrics)
        if as_json:
            output.emit(found | {"images": [len(train), len(rest)], "classes": data.classes, "folder": str(out)})
        else:
            labels = "all" if data.classes else "none"
            click.echo(f"saved to {out}; try: zoo generate-images {training.source(out)} {labels}")
        if history.interrupted and run.kept:
            raise KeyboardInterrupt
