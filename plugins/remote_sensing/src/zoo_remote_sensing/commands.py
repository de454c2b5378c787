"""The verbs of the remote sensing plugin: ``zoo change`` and ``zoo map-pixels``."""

from __future__ import annotations

from typing import Any

import click

from zoo.cli import output

CHANGE_TASKS = ("binary-change-detection", "semantic-change-detection", "damage-assessment")


@click.command()
@click.argument("name")
@click.argument("before", type=click.Path(exists=True, dir_okay=False))
@click.argument("after", type=click.Path(exists=True, dir_okay=False))
@click.option("--map", "path", type=click.Path(dir_okay=False), help="Write the map: .tif, or .png for pictures.")
@click.option("--picture", type=click.Path(dir_okay=False), help="Write the later date with the map over it: .png.")
@click.option("--summary", type=click.Path(dir_okay=False), help="Write the counts as JSON.")
@click.option("--tile", default=512, show_default=True, type=click.IntRange(min=32), help="Pixels a side.")
@click.option("--overlap", default=64, show_default=True, type=click.IntRange(min=0), help="Pixels that tiles share.")
@click.option("--bands", help="Bands that are red, green and blue, as 3,2,1; the first three otherwise.")
@click.option("--value-range", nargs=2, type=float, help="The values that become black and white, where not uint8.")
@click.option("--pixel-area", type=float, help="Square metres of a pixel, where the file does not say.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False), help="Names of the classes, one a line.")
@output.loading_options
@output.as_json
def change(
    name: str,
    before: str,
    after: str,
    path: str | None,
    picture: str | None,
    summary: str | None,
    tile: int,
    overlap: int,
    bands: str | None,
    value_range: tuple[float, float] | None,
    pixel_area: float | None,
    labels: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """What changed from BEFORE to AFTER, two images of one place, by the model NAME.

    GeoTIFFs may be larger than memory: they are read and written window by window, and the map lies where they lie.

    \b
        zoo change changemamba_micro.scenes before.tif after.tif --map change.tif --picture change.png
        zoo change changemamba_scd_tiny before.png after.png --checkpoint mine.pth --json
    """
    import zoo
    from zoo.files import read_text
    from zoo.loading import card_of

    arguments = output.loading(options) | {
        "tile": tile, "overlap": overlap, "pixel_area": pixel_area, "value_range": value_range,
        "bands": None if bands is None else numbers(bands),
        "class_names": None if labels is None else read_text(labels).splitlines(),
    }  # fmt: skip
    task = card_of(name).task
    if task not in CHANGE_TASKS:
        raise click.UsageError(f"{name} is for {task}; expected a model for {', '.join(CHANGE_TASKS)}")
    pipe: Any = zoo.pipeline(name, **arguments)
    found = pipe.write((before, after), path, picture=picture, summary=summary)
    if as_json:
        output.emit(found.to_dict())
        return 0
    click.echo(str(found))
    if found.rows():
        title = ("damage", "") if found.kind == "damage" else ("from", "to")
        output.table(
            (*title, "pixels", "hectares"),
            [(a, b, n, "" if area is None else f"{area:.2f}") for a, b, n, area in found.rows()],
            right=(2, 3),
        )
    if found.hectares is None:
        click.echo("areas: the files do not say how large a pixel is; --pixel-area says it", err=True)
    for what, where in found.files.items():
        click.echo(f"{what}: {where}")
    return 0


def numbers(text: str) -> tuple[int, ...]:
    """The bands that ``--bands`` names."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.UsageError(f"--bands is {text!r}; expected numbers of bands, as 3,2,1") from error


@click.command()
@click.argument("name")
@click.argument("cube", type=click.Path(exists=True, dir_okay=False))
@click.option("--map", "path", type=click.Path(dir_okay=False), help="Write the classes: .tif, .png or .npy.")
@click.option("--rows", default=16, show_default=True, type=click.IntRange(min=1), help="Image rows at a time.")
@output.loading_options
@output.as_json
def map_pixels(name: str, cube: str, path: str | None, rows: int, as_json: bool, **options: Any) -> int:
    """The class of every pixel of CUBE, a hyperspectral scene (.npy, .mat, ENVI), by the model NAME.

    \b
        zoo map-pixels morpmamba_houston scene.hdr --checkpoint mine.safetensors --map classes.tif
    """
    import zoo
    from zoo.files import check_ending, check_place
    from zoo.loading import card_of

    from .hyperspectral import MAPS

    if path is not None:
        check_ending(path, MAPS)
        check_place(path)
    task = card_of(name).task
    if task != "pixel-classification":
        raise click.UsageError(f"{name} is for {task}; expected a model for pixel-classification")
    found: Any = zoo.pipeline(name, "pixel-classification", rows=rows, **output.loading(options))(cube)
    written = None if path is None else str(found.save(path))
    if as_json:
        output.emit(found.to_dict() | ({} if written is None else {"map": written}))
        return 0
    output.table(("class", "pixels"), sorted(found.counts.items(), key=lambda item: -item[1]), right=(1,))
    if written is not None:
        click.echo(f"map: {written}")
    return 0
