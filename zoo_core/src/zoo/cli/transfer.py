"""``zoo load``, ``zoo download`` and ``zoo convert``."""

from __future__ import annotations

import time
from typing import Any

import click

from . import output


@click.command()
@click.argument("name")
@output.loading_options
@click.option("--verify", is_flag=True, help="Compute the digest anew.")
@output.as_json
def load(name: str, as_json: bool, verify: bool, **options: Any) -> int:
    """Fetch, verify, convert and build NAME; say what came of it.

    \b
        zoo load vim_tiny.in1k
        zoo load vim_tiny --checkpoint my.pth --set num_classes=10
        zoo load ./my-folder
    """
    import zoo
    from zoo.testing.fullsize import count

    arguments = output.loading(options)
    began = time.perf_counter()
    model = zoo.load(name, verify=verify, **arguments)
    seconds = time.perf_counter() - began
    found = model.zoo_info
    first = next(model.parameters())
    facts = {
        "model": found.name,
        "source": found.source,
        "parameters": count(model),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "seconds": round(seconds, 3),
        "changes": found.changes,
    }
    if as_json:
        output.emit(facts)
    else:
        for title, value in facts.items():
            text = "; ".join(value) if isinstance(value, list) else f"{value:,}" if title == "parameters" else value
            if text != "":
                click.echo(f"{click.style(f'{title:<12}', bold=True)}{text}")
    return 0


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--to", type=click.Path(file_okay=False), help="A folder to carry to another machine.")
@click.option("--cache-dir", type=click.Path(), help="Another cache than the Hub's.")
@click.option("--force", is_flag=True, help="Fetch again.")
@output.as_json
def download(names: tuple[str, ...], to: str | None, cache_dir: str | None, force: bool, as_json: bool) -> int:
    """Fetch checkpoints without building them. NAMES may be patterns.

    \b
        zoo download vim_tiny.in1k
        zoo download vim_tiny.in1k --to ./vim_tiny    # then: zoo load ./vim_tiny, also offline
    """
    from pathlib import Path

    import zoo
    from zoo_registry import query

    wanted: list[str] = []
    for name in names:
        if any(c in name for c in "*?["):
            matching = [entry.name for entry in query(name, pretrained=True)]
            if not matching:
                raise click.UsageError(f"no model with weights that can be fetched matches {name!r}")
            wanted += matching
        else:
            wanted.append(name)
    done = []
    for name in wanted:
        folder = None if to is None else Path(to) / name if len(wanted) > 1 else Path(to)
        paths = zoo.download(name, folder, cache_dir=cache_dir, force_download=force)
        done.append({"model": name, "files": [str(p) for p in paths], "bytes": sum(p.stat().st_size for p in paths)})
        if not as_json:
            click.echo(f"{name}  {output.size(done[-1]['bytes'])}  {done[-1]['files'][0]}")  # type: ignore[index,arg-type]
    if as_json:
        output.emit(done)
    return 0


@click.command()
@click.argument("source")
@click.argument("out", type=click.Path())
@click.option(
    "--to", type=click.Choice(["zoo", "reference"]), default="zoo", show_default=True, help="Format to write."
)
@click.option("--model", help="Architecture of the zoo that the file belongs to.")
@click.option("--system", help="Published system, with --config, where no architecture fits.")
@click.option("--config", type=click.Path(exists=True), help="JSON file: the original constructor's arguments.")
@click.option("--subkey", help="Where the state dict lies in the file.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Model argument; repeatable.")
@output.as_json
def convert(
    source: str,
    out: str,
    to: str,
    model: str | None,
    system: str | None,
    config: str | None,
    subkey: str | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> int:
    """Convert a checkpoint between an original's format and the zoo's.

    \b
        zoo convert vim_t.pth ./vim_tiny --model vim_tiny
        zoo convert ./vim_tiny vim_t_again.pth --to reference
        zoo convert vim_tiny_patch16_224 ./vim_tiny
    """
    import zoo
    from zoo.files import read_json
    from zoo_registry import errors

    table = None if config is None else read_json(config)
    if not (table is None or isinstance(table, dict)):
        raise errors.BadFile(f"{config} holds a {type(table).__name__}; expected the arguments as {{...}}", path=config)
    written = zoo.convert(
        source,
        out,
        to=to,
        model=model,
        system=system,
        config=table,
        subkey=subkey,
        **output.pairs(settings, "--set"),
    )
    if as_json:
        output.emit({"written": str(written)})
    else:
        click.echo(str(written))
    return 0
