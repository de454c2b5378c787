"""What commands print: text and tables for people, JSON for machines. rich is imported when a table is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def emit(value: Any) -> None:
    """One JSON document on stdout; numbers that JSON does not have (NaN, infinity) are null there."""
    try:
        text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=2, default=str, ensure_ascii=False)
    click.echo(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
    """A table on stdout; ``right`` are columns of numbers. Nothing is cut off when the output is not a terminal."""
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        drawn.add_column(title, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else _plain(cell) for cell in row))
    console().print(drawn)


def _plain(cell: Any) -> str:
    from rich.markup import escape

    return escape(str(cell))


def console(*, stderr: bool = False) -> Any:
    import sys

    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 200, highlight=False, soft_wrap=False)


def size(bytes_: float | None) -> str:
    if bytes_ is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if bytes_ < 1000:
            return f"{bytes_:.0f} {unit}" if unit == "B" else f"{bytes_:.1f} {unit}"
        bytes_ /= 1000
    return f"{bytes_:.2f} GB"


def params(count: int | None) -> str:
    if count is None:
        return ""
    if count < 1_000_000:
        return f"{count / 1e3:.1f} k"
    return f"{count / 1e6:.1f} M" if count < 1_000_000_000 else f"{count / 1e9:.2f} G"


def answers(
    pipe: Any, inputs: Sequence[str], out: Path | None, *, keep_going: bool, as_json: bool, between: str = "  "
) -> int:
    """Stream ``inputs`` through a pipeline whose results have ``save_csv``; print them, write each to a CSV file.

    ``out``: a file for one input, else a folder, where a number keeps files of equal names apart; ``between``: what
    stands before the file's name. Returns the exit status, 1 where an input failed. Raises click.UsageError for one
    file and several inputs.
    """
    from zoo.files import check_place
    from zoo.pipelines import Failure

    sources, _ = pipe.expand(list(inputs))
    if out is not None and len(sources) > 1 and out.suffix == ".csv":
        raise click.UsageError(f"--out is {out}, and there are {len(sources)} inputs; give a folder")
    if out is not None:
        check_place(out)
    rows, failed = [], 0
    for i, result in enumerate(pipe.stream(list(inputs), keep_going=keep_going)):
        row = result.to_dict()
        if isinstance(result, Failure):
            failed += 1
        elif out is not None:
            place = out if out.suffix == ".csv" else out / f"{i:03d}_{Path(result.source).stem}.csv"
            row["csv"] = str(result.save_csv(place))
        rows.append(row)
        if not as_json:
            click.echo(str(result) + (f"{between}-> {row['csv']}" if "csv" in row else ""))
    if as_json:
        emit(rows)
    return 1 if failed else 0


def pairs(values: tuple[str, ...], what: str) -> dict[str, Any]:
    """``KEY=VALUE`` options: values are JSON where they are JSON (numbers, true, lists), text otherwise."""
    found: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.UsageError(f"{what} is {text!r}; expected NAME=VALUE, for example num_classes=10")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that loads a model."""
    for option in reversed(
        (
            click.option("--checkpoint", type=click.Path(exists=True), help="Your own weights for this architecture."),
            click.option("--subkey", help="Where the state dict lies in --checkpoint (for example model_ema)."),
            click.option("--device", help="cpu, cuda, cuda:1, mps ... (default: cuda if there is one)."),
            click.option("--dtype", help="float32, bfloat16, float16 (default: the file's)."),
            click.option("--cache-dir", type=click.Path(), help="Another cache than the Hub's."),
            click.option("--offline", is_flag=True, help="Use cached files only."),
            click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Model argument; repeatable."),
        )
    ):
        command = option(command)
    return command


def loading(options: dict[str, Any]) -> dict[str, Any]:
    """Take the options of :func:`loading_options` out of ``options``, as keyword arguments of ``zoo.load``."""
    import torch

    settings = pairs(options.pop("settings"), "--set")
    device = options.pop("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.pop("dtype")
    found = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise click.UsageError(f"--dtype is {dtype!r}; expected float32, bfloat16 or float16")
    chosen = {
        "device": device,
        "dtype": dtype,
        "checkpoint": options.pop("checkpoint"),
        "subkey": options.pop("subkey"),
        "cache_dir": options.pop("cache_dir"),
        "local_files_only": options.pop("offline"),
    }
    return {k: v for k, v in chosen.items() if v} | settings
