"""``zoo cache``: what of the zoo lies in the Hub's cache."""

from __future__ import annotations

import click

from . import output


@click.group(invoke_without_command=True)
@click.option("--cache-dir", type=click.Path(), help="Another cache than the Hub's.")
@output.as_json
@click.pass_context
def cache(ctx: click.Context, cache_dir: str | None, as_json: bool) -> int:
    """Show cached checkpoints, and what was converted from them. Files of other programs are never touched."""
    ctx.obj = cache_dir
    if ctx.invoked_subcommand is not None:
        return 0
    from zoo_registry.cache import cached_weights, local_derived

    found, own = cached_weights(cache_dir=cache_dir), local_derived()
    if as_json:
        output.emit(
            {
                "checkpoints": [
                    {
                        "model": e.name,
                        "bytes": e.size,
                        "converted_bytes": e.derived_size,
                        "complete": e.complete,
                        "files": [str(p) for p in (*e.paths, *e.derived)],
                    }
                    for e in found
                ],
                "converted_from_own_files": [{"file": str(e.path), "from": e.origin, "bytes": e.size} for e in own],
            }
        )
        return 0
    if found:
        output.table(
            ("model", "size", "converted", "state"),
            [
                (
                    e.name,
                    output.size(e.size),
                    output.size(e.derived_size) if e.derived else "",
                    "" if e.complete else "incomplete",
                )
                for e in found
            ],
            right=(1, 2),
        )
    for entry in own:
        click.echo(f"converted from {', '.join(entry.origin)}: {output.size(entry.size)}")
    total = sum(e.size + e.derived_size for e in found) + sum(e.size for e in own)
    click.echo(f"{len(found)} checkpoints, {output.size(total)}" if total else "no checkpoint of the zoo is cached")
    return 0


@cache.command()
@click.argument("pattern", default="*")
@output.as_json
@click.pass_obj
def verify(cache_dir: str | None, pattern: str, as_json: bool) -> int:
    """Read cached checkpoints again and compare their digests; wrong files are moved aside."""
    from zoo_registry.cache import cached_weights
    from zoo_registry.cache import verify as compare

    verdicts = [compare(entry) for entry in cached_weights(pattern, cache_dir=cache_dir)]
    if as_json:
        output.emit([{"model": v.name, "state": v.state, "message": v.message} for v in verdicts])
    else:
        for v in verdicts:
            click.echo(f"{v.name}: {v.state}" + (f" ({v.message})" if v.message else ""))
        if not verdicts:
            click.echo("nothing is cached that matches")
    return 5 if any(v.state == "wrong" for v in verdicts) else 0


@cache.command()
@click.argument("pattern")
@click.option("--converted", is_flag=True, help="Only what was converted; the originals stay.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output.as_json
@click.pass_obj
def remove(cache_dir: str | None, pattern: str, converted: bool, yes: bool, as_json: bool) -> int:
    """Delete the cached checkpoints that match PATTERN."""
    from zoo_registry.cache import cached_weights
    from zoo_registry.cache import remove as delete

    found = cached_weights(pattern, cache_dir=cache_dir)
    if found and not yes and not as_json:
        click.confirm(f"delete {', '.join(e.name for e in found)}?", abort=True)
    freed = sum(delete(entry, only_derived=converted) for entry in found)
    if as_json:
        output.emit({"removed": [e.name for e in found], "bytes": freed})
    else:
        click.echo(f"{len(found)} checkpoints, {output.size(freed)} freed")
    return 0
