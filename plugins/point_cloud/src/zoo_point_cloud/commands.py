"""The point-cloud plugin's verb of the command line: ``zoo label-points``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder for the labelled clouds.")
@click.option("--format", "ending", default="ply", show_default=True, type=click.Choice(["ply", "las", "laz"]))
@click.option("--pictures", is_flag=True, help="Draw every answer from three sides as well.")
@click.option("--shape", help="Kind of object, for models of object parts (chair, lamp ...).")
@click.option("--block-points", type=click.IntRange(min=1), help="Cut scenes into overlapping blocks of this size.")
@click.option("--invalid", default="error", show_default=True, type=click.Choice(["error", "drop"]), help="NaN points.")
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

    own = {"shape": shape, "block_points": block_points, "invalid": invalid}
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
