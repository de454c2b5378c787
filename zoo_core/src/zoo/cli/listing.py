"""``zoo list`` and ``zoo info``: from the cards alone, without torch."""

from __future__ import annotations

import re
from typing import Any

import click

from . import output


@click.command(name="list")
@click.argument("patterns", nargs=-1)
@click.option("--exclude", multiple=True, help="Leave out what matches; repeatable.")
@click.option("--domain", help="For example vision.")
@click.option("--task", help="For example image-classification.")
@click.option("--system", help="Published system, for example vmamba.")
@click.option("--licence", "--license", help="Of the weights; a pattern such as 'cc-by*' works.")
@click.option("--plugin", help="Of this plugin only.")
@click.option("--min-params", help="At least so many parameters: 500k, 10M, 1.5G.")
@click.option("--max-params", help="At most so many parameters.")
@click.option("--pretrained/--not-pretrained", default=None, help="Weights that the zoo can load by itself, or not.")
@click.option("--on-hub/--not-on-hub", default=None, help="Weights on the Hub, or not.")
@click.option("-l", "--long", "long_", is_flag=True, help="A table with task, parameters, licence and weights.")
@output.as_json
def list_(patterns: tuple[str, ...], long_: bool, as_json: bool, **filters: Any) -> int:
    """List models and checkpoints.

    PATTERNS are shell patterns; several mean any of them.

    \b
        zoo list 'v*mamba*' --domain vision --pretrained
        zoo list 'vision/*' --max-params 30M --long
    """
    from zoo_registry import query

    for key in ("min_params", "max_params"):
        filters[key] = _number(filters[key], key)
    found = query(list(patterns) or "*", **{k: v for k, v in filters.items() if v not in (None, ())})
    if as_json:
        from zoo.catalog import ModelInfo

        output.emit([ModelInfo(entry.card, entry.weights).to_dict() for entry in found])
    elif long_:
        output.table(
            ("model", "task", "parameters", "licence", "weights"),
            [
                (
                    entry.name,
                    entry.card.task,
                    output.params(entry.card.params),
                    entry.weights.licence if entry.weights else None,
                    _where(entry.weights),
                )
                for entry in found
            ],
            right=(2,),
        )
    else:
        for entry in found:
            click.echo(entry.name)
    if not found and not as_json:
        click.echo("nothing matches; `zoo list` shows everything", err=True)
    return 0


def _where(weights: Any) -> str:
    if weights is None:
        return "none"
    if weights.on_hub:
        return f"hf-hub:{weights.repo_id}"
    return "in the plugin" if weights.package_file else "not on the Hub"


def _number(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB]?)", text)
    if found is None:
        raise click.UsageError(f"--{option.replace('_', '-')} is {text!r}; expected a number such as 500k, 10M or 1.5G")
    return int(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}[found[2].lower()])


@click.command()
@click.argument("name")
@output.as_json
def info(name: str, as_json: bool) -> int:
    """Everything known about a model: NAME is "architecture" or "architecture.tag".

    \b
        zoo info vim_tiny
    """
    from zoo.catalog import info as look_up

    found = look_up(name)
    if as_json:
        output.emit(found.to_dict())
    else:
        for title, text in found.rows():
            click.echo(f"{click.style(f'{title:<19}', bold=True)}{text}")
    return 0
