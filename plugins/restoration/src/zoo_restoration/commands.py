"""The restoration plugin's verbs of the command line: ``restore``, ``upscale``, ``train-restorer``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


def _image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What ``restore`` and ``upscale`` have in common."""
    for option in reversed(
        (
            click.argument("name"),
            click.argument("inputs", nargs=-1, required=True),
            click.option(
                "--out", required=True, type=click.Path(path_type=Path), help="An image file; a folder for several."
            ),
            click.option(
                "--tile",
                type=click.IntRange(min=0),
                help="Side of tiles; 0: whole images. Default: 512 above 1 megapixel.",
            ),
            click.option("--overlap", type=click.IntRange(min=1), help="Of tiles. Default: an eighth of their side."),
            click.option("--ensemble", is_flag=True, help="Mean over all flips and turns: eight times the time."),
            click.option(
                "--quality", default=95, show_default=True, type=click.IntRange(1, 100), help="Of JPEG, WebP."
            ),
            click.option("--pictures", is_flag=True, help="Before and after, side by side, beside each image."),
            click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be read."),
            output.loading_options,
            output.as_json,
        )
    ):
        command = option(command)
    return command


@click.command()
@_image_options
def restore(**arguments: Any) -> int:
    """Restore the images INPUTS (PNG, JPEG, TIFF, WebP, BMP, folders of them) with the model NAME.

    \b
        zoo restore serpent_micro.drawings noisy.png --out clean.png
        zoo restore ./trained photos/ --out restored --tile 0
    """
    return _answer("image-restoration", **arguments)


@click.command()
@_image_options
def upscale(**arguments: Any) -> int:
    """Enlarge the images INPUTS (PNG, JPEG, TIFF, WebP, BMP, folders of them) with the model NAME.

    \b
        zoo upscale contrast_micro.drawings small.png --out large.png
    """
    return _answer("super-resolution", **arguments)


def _answer(
    task: str,
    *,
    name: str,
    inputs: tuple[str, ...],
    out: Path,
    tile: int | None,
    overlap: int | None,
    ensemble: bool,
    quality: int,
    pictures: bool,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    from PIL import Image

    import zoo
    from zoo.files import check_ending, check_place
    from zoo.pipelines import Failure

    from .images import EXTENSIONS
    from .pipelines import Restored

    one_file = out.suffix.lower() in EXTENSIONS
    if out.suffix.lower() in Image.registered_extensions() and not out.is_dir():
        check_ending(out, EXTENSIONS)  # the name of a picture is not a folder's
    check_place(out if one_file else out / "image")
    arguments = output.loading(options) | {"tile": tile, "overlap": overlap, "ensemble": ensemble}
    pipe = zoo.pipeline(name, task, **arguments)
    sources, _ = pipe.expand(list(inputs))
    if one_file and len(sources) > 1:
        raise click.UsageError(f"--out is {out}, and there are {len(sources)} inputs; give a folder")
    rows, failed = [], False
    for number, result in enumerate(pipe.stream(sources, keep_going=keep_going)):
        row = result.to_dict()
        failed = failed or isinstance(result, Failure)
        if isinstance(result, Restored):
            place = out if one_file else out / f"{number:03d}_{Path(result.source).stem}{_ending(result.source)}"
            row["file"] = str(result.save(place, quality=quality))
            if pictures:
                row["picture"] = str(result.save_picture(place.with_name(f"{place.stem}_before_after.png")))
        rows.append(row)
        if not as_json:
            click.echo(str(result) + (f"  -> {row['file']}" if "file" in row else ""))
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


def _ending(source: str) -> str:
    """Of what is written where only a folder is given: TIFF stays TIFF, all else becomes PNG, which loses nothing."""
    own = Path(source).suffix.lower()
    return own if own in (".tif", ".tiff") else ".png"


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@training.out_folder("Folder of the run and of the model.")
@click.option(
    "--degradation", help="What to take off: blur:sigma=2,noise=0.05, noise:std=0.1, down:factor=8, box:share=0.25, "
    "pixels:share=0.5; for a model that enlarges bicubic:scale=... (its default)."
)  # fmt: skip
@training.steps(10_000)
@training.batch_size(16)
@click.option("--patch", default=96, show_default=True, type=click.IntRange(min=8), help="Side of the clean crops.")
@training.rate(2e-4)
@click.option("--ema", default=0.999, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--held-out", default=0.1, show_default=True, type=click.FloatRange(0, 0.9), help="Share to measure on.")
@click.option("--save-every", default=500, show_default=True, type=click.IntRange(min=1), help="Steps.")
@training.seed
@training.device
@click.option("--start", help="Weights to begin with: a name with a tag, or a saved folder.")
@training.model_arguments("dim=60")
@output.as_json
def train_restorer(
    name: str,
    folder: Path,
    out: Path,
    degradation: str | None,
    steps: int,
    batch_size: int,
    patch: int,
    rate: float,
    ema: float,
    held_out: float,
    save_every: int,
    seed: int,
    device: str,
    start: str | None,
    choices: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the restorer NAME on the clean images in FOLDER: crops, flips, a degradation, L1, averaged weights.

    A run that was interrupted goes on when the same command is given again. In the end PSNR and SSIM on held-out images
    are printed beside those of the degraded ones, and OUT/model holds what `zoo restore`, `zoo upscale`, `zoo validate`
    and `zoo.load` read.

    \b
        zoo train-restorer serpent photos/ --degradation blur:sigma=2,noise=0.02 --out deblur --device cuda
        zoo train-restorer contrast_x2 DIV2K_train_HR/ --out x2 --set dim=60 --device cuda
    """
    import torch

    import zoo

    from .folders import ImageFolder
    from .training import Settings, Trainer, measure
    from .validation import degradation_for, plain_for

    torch.manual_seed(seed)
    if start is None:
        model = zoo.create(name, **output.pairs(choices, "--set"))
    else:
        model = zoo.load(start, **output.pairs(choices, "--set")).float()
    spoil = degradation_for(model, degradation)
    every = ImageFolder(folder, channels=int(getattr(model, "in_chans", 3)))
    train, held = every.split(held_out, seed)
    settings = Settings(
        steps=steps, batch_size=batch_size, patch=patch, learning_rate=rate, ema=ema, save_every=save_every, seed=seed
    )
    trainer = Trainer(model.to(device), train, spoil, settings, folder=out)
    if trainer.step and not as_json:
        click.echo(f"going on after step {trainer.step}")

    def report(step: int, loss: float) -> None:
        if not as_json and (step % 100 == 0 or step == steps):
            click.echo(f"step {step:6} loss {loss:.5f}")

    try:
        best = trainer.train(report)
    except KeyboardInterrupt:
        click.echo(f"stopped; {out} holds the run up to step {trainer.saved}: the same command goes on there", err=True)
        raise
    found: dict[str, Any] = {
        "steps": trainer.step,
        "images": len(train),
        "held_out": len(held),
        "degradation": str(spoil),
    }
    measured: list[dict[str, Any]] = []
    if len(held):
        scores = measure(lambda x: best(x.to(device)).float().cpu(), held, spoil)
        found |= {"restored": scores, "given": measure(plain_for(spoil), held, spoil)}
        measured = training.measured(scores, dataset=folder.name, split="held out", command="train-restorer")
    saved = save_trained(best.cpu(), out / "model", spoil, measured)
    if as_json:
        output.emit(found | {"model": str(saved)})
        return
    if len(held):
        a, b = found["restored"], found["given"]
        click.echo(
            f"{len(held)} held-out images: PSNR {a['psnr']:.2f} dB (given {b['psnr']:.2f}), SSIM {a['ssim']:.4f}"
        )
    verb = "upscale" if spoil.scale > 1 else "restore"
    click.echo(f"saved to {saved}; try: zoo {verb} {training.source(saved)} image.png --out better.png")


def save_trained(model: Any, folder: Path, degradation: Any, measured: list[dict[str, Any]]) -> Path:
    """``zoo.save`` with the degradation on the card, where ``zoo validate`` finds it."""
    import dataclasses

    import zoo
    from zoo.building import describe
    from zoo_registry import WeightsCard

    card = WeightsCard(tag="trained", where="this folder", preprocess={"degradation": str(degradation)})
    describe(model, dataclasses.replace(model.zoo_info, tag=None, weights=card))
    return zoo.save(model, folder, metrics=measured)
