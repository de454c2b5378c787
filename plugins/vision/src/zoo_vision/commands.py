"""The vision plugin's verbs of the command line: ``zoo classify``, ``zoo embed-images``, ``zoo segment-images``,
``zoo detect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from zoo.cli import output


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--top-k", default=5, show_default=True, type=click.IntRange(min=1), help="Classes to report.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--csv", "table", type=click.Path(dir_okay=False), help="Write one line an image to this file.")
@click.option("--save-picture", "pictures", type=click.Path(file_okay=False), help="Draw the answers into this folder.")
@click.option("--contributions", is_flag=True, help="Draw what each scan direction contributes, token by token.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be read.")
@output.loading_options
@output.as_json
def classify(
    name: str,
    inputs: tuple[str, ...],
    top_k: int,
    batch_size: int,
    table: str | None,
    pictures: str | None,
    contributions: bool,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Name what is in INPUTS (image files, folders, patterns) with the model NAME.

    \b
        zoo classify vim_micro.digits seven.png --save-picture out --contributions
        zoo classify vim_tiny.in1k photos/ --top-k 3 --csv answers.csv
    """
    import zoo
    from zoo.cli.predict import picture_name
    from zoo.files import check_place
    from zoo.pipelines import Failure

    from .pipelines import write_csv

    for place in (table, pictures):
        if place is not None:
            check_place(place)
    arguments = output.loading(options) | {"top_k": top_k, "contributions": contributions}
    pipe = zoo.pipeline(name, "image-classification", **arguments)
    results, rows = [], []
    try:
        for i, result in enumerate(_answers(pipe, inputs, batch_size, keep_going)):
            row, shown = result.to_dict(), str(result)
            if pictures is not None and result.has_picture:
                row["picture"] = str(result.save_picture(Path(pictures) / picture_name(result.source, i)))
                shown += f"  -> {row['picture']}"
            if not isinstance(result, Failure):
                result.image = None  # a folder's pictures would fill the memory
            results.append(result)
            rows.append(row)
            if not as_json:
                click.echo(shown)
    finally:  # what was answered before a damaged file is not lost
        if table is not None and results:
            write_csv(results, table)
    if as_json:
        output.emit(rows)
    return 1 if any(isinstance(r, Failure) for r in results) else 0


def _answers(pipe: Any, inputs: tuple[str, ...], batch_size: int, keep_going: bool) -> Iterator[Any]:
    """The pipeline's answers one after the other, with a bar for many of them if they are not read as they come."""
    from zoo.pipelines import progress_bar

    sources, _ = pipe.expand(list(inputs))
    shown = len(sources) > 4 and sys.stderr.isatty() and not sys.stdout.isatty()
    with progress_bar(shown, len(sources), pipe.name) as advance:
        for result in pipe.stream(sources, batch_size=batch_size, keep_going=keep_going):
            yield result
            advance()


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="A .npy or .parquet file.")
@click.option("--batch-size", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--keep-going", is_flag=True, help="Leave out files that cannot be read.")
@output.loading_options
@output.as_json
def embed_images(
    name: str,
    inputs: tuple[str, ...],
    out: str,
    batch_size: int,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Write the features of INPUTS (image files, folders, patterns) before the classifier of NAME.

    \b
        zoo embed-images vim_tiny.in1k photos/ --out photos.npy        # names in photos.txt
        zoo embed-images vim_tiny.in1k photos/ --out photos.parquet
    """
    import zoo
    from zoo.files import check_ending, check_place
    from zoo.pipelines import Failure

    from .pipelines import TABLES, parquet_writer, write_embeddings

    check_ending(out, TABLES)
    check_place(out)
    if out.lower().endswith(".parquet"):
        parquet_writer()  # or say what lacks, before the work
    pipe = zoo.pipeline(name, "image-embedding", **output.loading(options))
    results = pipe(list(inputs), batch_size=batch_size, keep_going=keep_going)
    path = write_embeddings(results, out)
    failed = [r for r in results if isinstance(r, Failure)]
    width = next((len(r.vector) for r in results if not isinstance(r, Failure)), 0)
    if as_json:
        output.emit({"file": str(path), "images": len(results) - len(failed), "features": width, "failed": len(failed)})
    else:
        click.echo(f"{len(results) - len(failed)} images, {width} features each -> {path}")
        for failure in failed:
            click.echo(str(failure), err=True)
    return 1 if failed else 0


def _check_folders(option: str, folder: str | None, pictures: str | None) -> None:
    """Refuse folders that cannot be written, and one folder for answers and drawings, whose files have one name."""
    from zoo.files import check_place

    for place in (folder, pictures):
        if place is not None:
            check_place(place)
    if folder is not None and pictures is not None and Path(folder).resolve() == Path(pictures).resolve():
        raise click.UsageError(
            f"{option} and --save-picture are both {folder}; their files have the same names: give two folders"
        )


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--out", required=True, type=click.Path(file_okay=False), help="Folder for one .png of class numbers each."
)
@click.option("--save-picture", "pictures", type=click.Path(file_okay=False), help="Draw the answers into this folder.")
@click.option("--short-side", type=click.IntRange(min=1), help="Pixels of the resized picture's shorter side.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be read.")
@output.loading_options
@output.as_json
def segment_images(
    name: str,
    inputs: tuple[str, ...],
    out: str,
    pictures: str | None,
    short_side: int | None,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Give every pixel of INPUTS (image files, folders, patterns) a class, with the model NAME.

    \b
        zoo segment-images mambavision_tiny_upernet.ade20k photos/ --out classes --save-picture drawn
    """
    import zoo
    from zoo.cli.predict import picture_name
    from zoo.pipelines import Failure

    _check_folders("--out", out, pictures)
    arguments = output.loading(options) | ({} if short_side is None else {"short_side": short_side})
    pipe = zoo.pipeline(name, "semantic-segmentation", **arguments)
    rows, failed = [], False
    for i, result in enumerate(pipe.stream(list(inputs), keep_going=keep_going)):
        row, shown = result.to_dict(), str(result)
        if isinstance(result, Failure):
            failed = True
        else:
            file = picture_name(result.source, i)
            row["file"] = str(result.save(Path(out) / file))  # type: ignore[attr-defined]
            if pictures is not None:
                row["picture"] = str(result.save_picture(Path(pictures) / file))
            shown += f"  -> {row['file']}"
        rows.append(row)
        if not as_json:
            click.echo(shown)
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option(
    "--min-score", default=0.3, show_default=True, type=click.FloatRange(0, 1), help="Leave out what is less."
)
@click.option("--coco", "results", type=click.Path(dir_okay=False), help="Write COCO's results format to this .json.")
@click.option("--numbers", type=click.Path(file_okay=False), help="Folder for one .png of object numbers each.")
@click.option("--save-picture", "pictures", type=click.Path(file_okay=False), help="Draw the answers into this folder.")
@click.option("--short-side", type=click.IntRange(min=1), help="Pixels of the resized picture's shorter side.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be read.")
@output.loading_options
@output.as_json
def detect(
    name: str,
    inputs: tuple[str, ...],
    min_score: float,
    results: str | None,
    numbers: str | None,
    pictures: str | None,
    short_side: int | None,
    keep_going: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the objects in INPUTS (image files, folders, patterns) with the detector NAME.

    \b
        zoo detect vmamba_tiny_s1l8_mask_rcnn.coco photos/ --checkpoint FILE --save-picture drawn --coco found.json
    """
    import zoo
    from zoo.cli.predict import picture_name
    from zoo.files import check_ending, check_place, whole
    from zoo.pipelines import Failure

    if results is not None:
        check_ending(results, [".json"])
        check_place(results)
    _check_folders("--numbers", numbers, pictures)
    arguments = output.loading(options) | ({} if short_side is None else {"short_side": short_side})
    pipe = zoo.pipeline(name, "object-detection", min_score=min_score, **arguments)
    rows, entries, failed = [], [], False
    try:
        for i, result in enumerate(pipe.stream(list(inputs), keep_going=keep_going)):
            row, shown = result.to_dict(), str(result)
            if isinstance(result, Failure):
                failed = True
            else:
                file = picture_name(result.source, i)
                entries.append((result.source, result.coco(Path(result.source).name)))  # type: ignore[attr-defined]
                if numbers is not None:
                    row["numbers"] = str(result.save(Path(numbers) / file))  # type: ignore[attr-defined]
                if pictures is not None:
                    row["picture"] = str(result.save_picture(Path(pictures) / file))
                    shown += f"  -> {row['picture']}"
            rows.append(row)
            if not as_json:
                click.echo(shown)
    finally:  # what was answered before a damaged file is not lost
        if results is not None and rows:
            with whole(results) as work:
                work.write_text(json.dumps(_told_apart(entries)), encoding="utf-8")
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


def _told_apart(entries: Sequence[tuple[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """All pictures' entries of COCO's results format, from (source, entries) of each: where two pictures of different
    folders have one name, ``image_id`` is the path as given instead of the name."""
    named: dict[str, set[str]] = {}
    for source, _ in entries:
        named.setdefault(Path(source).name, set()).add(source)
    return [
        row | ({"image_id": source} if len(named[Path(source).name]) > 1 else {})
        for source, rows in entries
        for row in rows
    ]
