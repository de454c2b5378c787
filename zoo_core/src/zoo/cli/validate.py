"""``zoo validate``: how good a model is on the user's own labelled data."""

from __future__ import annotations

import inspect
from typing import Any

import click

from . import output


@click.command()
@click.argument("name")
@click.argument("data", required=False)
@click.option("--task", help="Use the model for another task than its own.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples at a time.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many samples.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes that read files.")
@click.option("--option", "-o", "choices", multiple=True, metavar="NAME=VALUE", help="An option of the task's own.")
@output.loading_options
@output.as_json
def validate(
    name: str, data: str | None, task: str | None, choices: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Measure NAME on DATA, labelled data of the model's task; without DATA, say what it must look like.

    \b
        zoo validate vim_tiny.in1k imagenet/val --batch-size 64 --workers 4
        zoo validate vim_tiny                                # what does DATA look like?
    """
    import zoo
    from zoo import catalog
    from zoo.loading import card_of
    from zoo.validation import options_of

    asked = {k: options.pop(k) for k in ("batch_size", "limit", "workers")}
    asked = {k: v for k, v in asked.items() if v is not None} | output.pairs(choices, "--option")
    function = catalog.validator(task or card_of(name).task)
    accepted = options_of(function)
    if data is None:
        click.echo(inspect.getdoc(function) or "")
        click.echo(f"\nOptions: {', '.join(accepted) or 'none'}.")
        return 0
    if unknown := [k for k in asked if k not in accepted]:
        raise click.UsageError(
            f"{unknown[0].replace('_', '-')}: this task has no such option; it has {', '.join(accepted) or 'none'}"
        )
    found = zoo.validate(name, data, task, progress=not as_json, **asked, **output.loading(options))
    if as_json:
        output.emit(found.to_dict())
        return 0
    output.table(
        ("model", "samples", *found.metrics, "samples/s"),
        [(found.model, found.samples, *(_value(v) for v in found.metrics.values()), f"{found.per_second:.1f}")],
        right=range(1, len(found.metrics) + 3),
    )
    if found.per_class:
        columns = list(dict.fromkeys(name for row in found.per_class.values() for name in row))
        output.table(
            ("class", *columns),
            [(label, *(_value(row.get(c)) for c in columns)) for label, row in found.per_class.items()],
            right=range(1, len(columns) + 1),
        )
    if found.notes:
        click.echo(found.notes)
    return 0


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
