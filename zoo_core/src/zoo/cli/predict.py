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
    from zoo.pipelines import Failure

    arguments = output.loading(options) | output.pairs(choices, "--option")
    pipe = zoo.pipeline(name, task, **arguments)
    results = pipe([pipe.argument(text) for text in inputs], batch_size=batch_size, keep_going=keep_going)
    folder = None if pictures is None else Path(pictures)
    saved: list[str | None] = []
    for i, result in enumerate(results):
        drawn = folder is not None and result.has_picture
        saved.append(str(result.save_picture(folder / picture_name(result.source, i))) if drawn and folder else None)
    if as_json:
        output.emit([r.to_dict() | ({"picture": s} if s else {}) for r, s in zip(results, saved, strict=True)])
    else:
        for result, picture in zip(results, saved, strict=True):
            click.echo(str(result) + (f"  -> {picture}" if picture else ""))
        if folder is None and any(r.has_picture for r in results):
            click.echo("these answers are better looked at: --pictures FOLDER saves them", err=True)
    return 1 if any(isinstance(r, Failure) for r in results) else 0


def picture_name(source: str, number: int) -> str:
    """A file name for the picture of an answer; the number keeps files of equal names apart."""
    stem = Path(source.partition(" + ")[0]).name.partition(".")[0] or "answer"
    kept = "".join(c if c.isalnum() or c in "-_" else "_" for c in stem)[:60]
    return f"{number:03d}_{kept}.png"
