"""``zoo predict``: a model's answer for the user's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import output


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--task", help="Use the model for another task than its own.")
@click.option("--batch-size", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--pictures", type=click.Path(file_okay=False), help="Folder for answers that are better looked at.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be answered.")
@click.option("--option", "-o", "choices", multiple=True, metavar="NAME=VALUE", help="Pipeline option, as top_k=3.")
@output.loading_options
@output.as_json
def predict(
    name: str,
    inputs: tuple[str, ...],
    task: str | None,
    batch_size: int,
    pictures: str | None,
    keep_going: bool,
    choices: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Run NAME on INPUTS: files, folders, patterns; for text models the text itself.

    \b
        zoo predict vim_micro.digits some.png
        zoo predict vim_tiny.in1k photos/ --batch-size 8 -o top_k=3 --json
    """
    import zoo
    from zoo.files import check_place
    from zoo.pipelines import Failure

    folder = None if pictures is None else Path(pictures)
    if folder is not None:
        check_place(folder)
    arguments = output.loading(options) | output.pairs(choices, "--option")
    pipe = zoo.pipeline(name, task, **arguments)
    rows, failed, seen = [], False, False
    for i, result in enumerate(
        pipe.stream([pipe.argument(text) for text in inputs], batch_size=batch_size, keep_going=keep_going)
    ):
        row = result.to_dict()
        failed, seen = failed or isinstance(result, Failure), seen or result.has_picture
        if folder is not None and result.has_picture:
            row["picture"] = str(result.save_picture(folder / picture_name(result.source, i)))
        if as_json:
            rows.append(row)
        else:
            click.echo(str(result) + (f"  -> {row['picture']}" if "picture" in row else ""))
    if as_json:
        output.emit(rows)
    elif folder is None and seen:
        click.echo("these answers are better looked at: --pictures FOLDER saves them", err=True)
    return 1 if failed else 0


def picture_name(source: str, number: int) -> str:
    """A file name for the picture of an answer; the number keeps files of equal names apart."""
    stem = Path(source.partition(" + ")[0]).name.partition(".")[0] or "answer"
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:60]
    return f"{number:03d}_{kept}.png"
