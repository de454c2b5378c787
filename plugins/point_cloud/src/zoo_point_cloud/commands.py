"""The point-cloud plugin's verbs of the command line: ``zoo label-points``, ``zoo pretrain-points``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training
from zoo_registry import optional


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@training.out_folder("Folder for the labelled clouds.", file_okay=False)
@click.option("--format", "ending", default="ply", show_default=True, type=click.Choice(["ply", "las", "laz"]))
@click.option("--pictures", is_flag=True, help="Draw every answer from three sides as well.")
@click.option("--shape", help="Kind of object, for models of object parts (chair, lamp ...).")
@click.option("--block-points", type=click.IntRange(min=1), help="Cut scenes into overlapping blocks of this size.")
@click.option("--overlap", type=float, help="Share of a block that neighbours have too, on each side (0 to 1).")
@click.option(
    "--invalid",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop"]),
    help="Points with NaN or infinite coordinates: refuse the file, or leave them out.",
)
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@output.loading_options
@output.as_json
def label_points(
    name: str,
    inputs: tuple[str, ...],
    out: Path,
    ending: str,
    pictures: bool,
    shape: str | None,
    block_points: int | None,
    overlap: float | None,
    invalid: str,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Label every point of INPUTS (clouds, folders, patterns) with the model NAME; write the clouds with their labels.

    \b
        zoo label-points pcm_micro_parts.shapes chair.ply --out labelled
        zoo label-points pcm_s3dis.s3dis office.las --out labelled --format laz --pictures
    """
    import zoo
    from zoo.pipelines import Failure

    if ending != "ply":
        optional("laspy", f"--format {ending}", "ssm-zoo-point-cloud[las]")
    own = {"shape": shape, "block_points": block_points, "overlap": overlap, "invalid": invalid}
    arguments = output.loading(options) | {k: v for k, v in own.items() if v is not None}
    pipe = zoo.pipeline(name, "point-cloud-segmentation", **arguments)
    sources, _ = pipe.expand(list(inputs))
    places = _places(sources, out, ending)
    rows, failed = [], 0
    for place, result in zip(places, pipe.stream(sources, keep_going=keep_going), strict=True):
        row = result.to_dict()
        if isinstance(result, Failure):
            failed += 1
        else:
            row["labels"] = str(result.save_labels(place))  # type: ignore[attr-defined]
            if pictures:
                row["picture"] = str(result.save_picture(place.with_suffix(".png")))
        rows.append(row)
        if not as_json:
            click.echo(str(result) + (f"  -> {row['labels']}" if "labels" in row else ""))
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


def _places(sources: Sequence[Path], out: Path, ending: str) -> list[Path]:
    """Where each labelled cloud goes. A number keeps files of equal names in several folders apart. Raises UsageError
    where that is one of the sources, whose colours would be lost."""
    from zoo.cli.predict import picture_name

    stems = [Path(picture_name(str(source), i)).stem for i, source in enumerate(sources)]
    places = [out / f"{stem}.{ending}" for stem in ([sources[0].stem] if len(sources) == 1 else stems)]
    given = {source.resolve() for source in sources}
    for place in places:
        if place.resolve() in given:
            raise click.UsageError(f"the labelled cloud would take the place of {place}; give another folder as --out")
    return places


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@training.out_folder(file_okay=False)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Clouds of each step.")
@click.option("--points", default=1024, show_default=True, type=click.IntRange(min=1), help="Points of each cloud.")
@training.rate(1e-3, "AdamW's.")
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of weights, clouds, masks and orders."
)
@click.option(
    "--invalid",
    default="error",
    show_default=True,
    type=click.Choice(["error", "drop"]),
    help="Points with NaN or infinite coordinates: refuse the file, or leave them out.",
)
@click.option("--set", "choices", multiple=True, metavar="NAME=VALUE", help="Model argument, as embed_dim=96.")
@training.device
@training.resume
@output.as_json
def pretrain_points(
    name: str,
    inputs: tuple[str, ...],
    out: Path,
    steps: int,
    batch_size: int,
    points: int,
    rate: float,
    seed: int,
    invalid: str,
    choices: tuple[str, ...],
    device: str,
    resume: bool,
    as_json: bool,
) -> int:
    """Pre-train NAME, a masked autoencoder, on INPUTS (clouds and folders without labels).

    \b
        zoo pretrain-points pointmamba_pretrain clouds/ --out pretrained --steps 5000 --device cuda
    """
    import torch

    import zoo

    from .pretraining import cloud_batches, pretrain
    from .rebuilding import CloudRebuilding

    torch.manual_seed(seed)
    model = zoo.create(name, **output.pairs(choices, "--set"))
    files, _ = CloudRebuilding(model).expand(list(inputs))
    recent: list[float] = []

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if not as_json and (step % 100 == 0 or step == steps):
            click.echo(f"step {step}: loss {sum(recent) / len(recent):.5f}")
            recent.clear()

    batches = cloud_batches(files, points, batch_size, seed, invalid=invalid)
    with training.run(out, resume, quiet=as_json, clouds=len(files)) as run:
        losses = pretrain(model.to(device), batches, steps, rate=rate, report=report, run=run)
        saved = zoo.save(model.cpu().eval(), out)
    if as_json:
        output.emit({"steps": steps, "clouds": len(files), "loss": losses[-1], "folder": str(saved)})
        return 0
    click.echo(f"{len(files)} clouds; weights in {saved}")
    return 0
