"""The medical plugin's verb of the command line: ``zoo segment-volume``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from zoo.cli import output


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the label maps.")
@click.option("--pictures", is_flag=True, help="Draw a montage beside each label map.")
@click.option("--channels-together", is_flag=True, help="INPUTS are the channels of one patient, in the model's order.")
@click.option("--mirror/--no-mirror", default=None, help="Mean over all flips; default: as the weights' card says.")
@click.option("--overlap", default=0.5, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option(
    "--spacing", nargs=3, type=float, help="Millimetres of a voxel that the network reads; default: the card's."
)
@click.option("--anisotropy", default=8.0, show_default=True, help="Largest ratio of voxel sides without --spacing.")
@click.option("--normalisation", help='"z-score", "none", "min-max", or LOW,HIGH mapped to 0..1; default: the card\'s.')
@click.option("--fit/--no-fit", default=None, help="Resize slices and pictures to the window of a 2D network.")
@click.option("--series", help="Which series of a DICOM folder that holds several: UID or description.")
@click.option("--keep-going", is_flag=True, help="Go on after an input that cannot be read.")
@output.loading_options
@output.as_json
def segment_volume(
    name: str,
    inputs: tuple[str, ...],
    out: str,
    pictures: bool,
    channels_together: bool,
    mirror: bool | None,
    overlap: float,
    spacing: tuple[float, float, float] | None,
    anisotropy: float,
    normalisation: str | None,
    fit: bool | None,
    series: str | None,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Label every voxel of INPUTS (NIfTI files, folders of them, DICOM series; for two-dimensional networks pictures)
    with the model NAME.

    For research; not for clinical use.

    \b
        zoo segment-volume umamba_micro.phantoms scan.nii.gz --out labels --pictures
        zoo segment-volume segmamba_brats.brats2023 t2w.nii.gz t2f.nii.gz t1n.nii.gz t1c.nii.gz \\
            --channels-together --checkpoint final_model_0.9038.pt --out labels
    """
    import zoo
    from zoo.files import check_place
    from zoo.loading import card_of
    from zoo.results import Failure

    from .pipelines import Segmentation

    check_place(Path(out))
    task = card_of(name).task
    if task != "medical-segmentation":
        raise click.UsageError(f"{name} is for {task}; expected a model for medical-segmentation")
    arguments = output.loading(options) | {"mirror": mirror, "overlap": overlap, "series": series}
    arguments |= {"spacing": spacing, "anisotropy": anisotropy, "fit": fit}
    arguments["normalisation"] = normalisation if normalisation is None else intensities(normalisation)
    pipe = zoo.pipeline(name, "medical-segmentation", **arguments)
    given: Any = [tuple(inputs)] if channels_together else list(inputs)
    rows, failed = [], False
    for number, result in enumerate(pipe.stream(given, keep_going=keep_going)):
        row = result.to_dict()
        failed = failed or isinstance(result, Failure)
        if isinstance(result, Segmentation):
            stem = Path(out) / label_name(result.source, number)
            row["label_map"] = str(result.save(f"{stem}{result.ending}"))
            if pictures:
                row["picture"] = str(result.save_picture(f"{stem}.png"))
        rows.append(row)
        if not as_json:
            click.echo(str(result) + (f"  -> {row['label_map']}" if "label_map" in row else ""))
    if as_json:
        output.emit(rows)
    else:
        click.echo("not for clinical use", err=True)
    return 1 if failed else 0


def _sides(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(side) for side in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{value!r}; expected the sides of a window, as 96,96,96", ctx, parameter) from error


def grid_options(command: Any) -> Any:
    """How scans come to the network; what is not given is as the weights have it, or follows from the data."""
    for option in (
        click.option("--crop/--no-crop", default=None, help="Read only the box around what is not zero."),
        click.option("--normalisation", help='"z-score", "none", "min-max", or LOW,HIGH mapped to 0..1.'),
        click.option("--spacing", nargs=3, type=float, help="Millimetres of a voxel (default: the median)."),
        click.option("--patch", callback=_sides, help="Sides of a window, as 96,96,96 (default: the model's)."),
    ):
        command = option(command)
    return command


def intensities(text: str) -> str | tuple[float, ...]:
    """ "-175,250" as numbers; names as they are."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return text


def label_name(source: str, number: int) -> str:
    """The input's name without its ending; the number keeps inputs of equal names apart."""
    from .scans import is_picture

    name = Path(source.partition(" + ")[0]).name
    stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    return f"{number:03d}_{Path(stem).stem if is_picture(Path(stem)) else stem or 'scan'}"
