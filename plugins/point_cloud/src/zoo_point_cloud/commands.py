"""The point-cloud plugin's verbs of the command line: ``zoo label-points``, ``zoo pretrain-points``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training
from zoo_registry import errors


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the labelled clouds.")
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
    out: str,
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
    from zoo.cli.predict import picture_name
    from zoo.pipelines import Failure

    own = {"shape": shape, "block_points": block_points, "overlap": overlap, "invalid": invalid}
    arguments = output.loading(options) | {k: v for k, v in own.items() if v is not None}
    pipe = zoo.pipeline(name, "point-cloud-segmentation", **arguments)
    rows, failed = [], 0
    sources, _ = pipe.expand(list(inputs))
    for i, result in enumerate(pipe.stream(list(inputs), keep_going=keep_going)):
        row = result.to_dict()
        if isinstance(result, Failure):
            failed += 1
        else:
            # The number keeps files of equal names in several folders apart.
            stem = Path(picture_name(result.source, i)).stem if len(sources) > 1 else Path(result.source).stem
            row["labels"] = str(result.save_labels(Path(out) / f"{stem}.{ending}"))  # type: ignore[attr-defined]
            if pictures:
                row["picture"] = str(result.save_picture(Path(out) / f"{stem}.png"))
        rows.append(row)
        if not as_json:
            click.echo(str(result) + (f"  -> {row['labels']}" if "labels" in row else ""))
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@training.out_folder(file_okay=False)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Clouds of each step.")
@click.option("--points", default=1024, show_default=True, type=click.IntRange(min=1), help="Points of each cloud.")
@click.option("--rate", default=1e-3, show_default=True, type=click.FloatRange(min=0, min_open=True), help="AdamW's.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of weights, clouds, masks and orders.")
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

    from .files import EXTENSIONS
    from .pointmamba import PointMambaMAE
    from .pretraining import cloud_batches, pretrain

    torch.manual_seed(seed)
    model = zoo.create(name, **output.pairs(choices, "--set"))
    if not isinstance(model, PointMambaMAE):
        raise click.UsageError(
            f"{name} is a {type(model).__name__}; expected a masked autoencoder (pointmamba_pretrain)"
        )
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        if not path.exists():
            raise errors.LocalFileMissing(f"there is no file or folder {text!r} (in {Path.cwd()})", path=text)
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [f for f in found if f.suffix.lower() in EXTENSIONS]
    if not files:
        raise click.UsageError(f"no point clouds in {', '.join(inputs)}; expected {', '.join(EXTENSIONS)}")
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
