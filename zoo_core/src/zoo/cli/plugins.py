"""``zoo plugins``: what is installed, and ``zoo plugins new``: a plugin that works as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

import click

from . import output

#: template -> where it goes
FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "init.py.txt": "src/$package/__init__.py",
    "plugin.py.txt": "src/$package/plugin.py",
    "cards.toml.txt": "src/$package/cards/$domain.toml",
    "model.py.txt": "src/$package/model.py",
    "pipelines.py.txt": "src/$package/pipelines.py",
    "test_plugin.py.txt": "tests/test_plugin.py",
}


@click.group(invoke_without_command=True)
@output.as_json
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> int:
    """List the installed plugins, also those that are broken or disabled."""
    if ctx.invoked_subcommand is not None:
        return 0
    from zoo_registry import manager

    found = manager()
    if as_json:
        output.emit(
            {
                "loaded": [
                    {
                        "name": p.name,
                        "distribution": p.distribution,
                        "version": p.version,
                        "models": [card.name for card in p.models],
                        "systems": _systems(p),
                        "tasks": sorted(p.pipelines),
                        "commands": sorted(p.commands),
                    }
                    for p in found.plugins
                ],
                "broken": [
                    {"name": b.name, "distribution": b.distribution, "version": b.version, "reason": b.reason}
                    for b in found.broken
                ],
                "disabled": [e.name for e in found.disabled],
                "conflicts": [[kind, name, *owners] for kind, name, owners in found.conflicts()],
            }
        )
    else:
        output.table(
            ("plugin", "distribution", "version", "models", "systems", "tasks"),
            [
                (p.name, p.distribution, p.version, len(p.models), len(_systems(p)), ", ".join(sorted(p.pipelines)))
                for p in found.plugins
            ],
            right=(3, 4),
        )
        for broken in found.broken:
            click.echo(f"broken: {broken}")
        for entry in found.disabled:
            click.echo(f"disabled: {entry.name} of {entry.distribution}")
        for kind, name, owners in found.conflicts():
            click.echo(f"conflict: the {kind} {name!r} is claimed by {owners[0]} and {owners[1]}")
    return 6 if found.broken or found.conflicts() else 0


def _systems(plugin: Any) -> list[str]:
    """Those that its adapters read, and those of its models whose originals published nothing to read."""
    return sorted({*plugin.adapters, *(card.system for card in plugin.models if card.system)})


@plugins.command()
@click.argument("domain")
@click.option("--out", type=click.Path(file_okay=False), help="Folder to create (default: ./zoo-DOMAIN).")
@click.option("--distribution", help="Name of the distribution (default: zoo-DOMAIN).")
@output.as_json
def new(domain: str, out: str | None, distribution: str | None, as_json: bool) -> int:
    """Write a plugin for DOMAIN: a small model of zoo.layers, its card, a pipeline, and tests that pass as they stand.

    \b
        zoo plugins new seismology
        pip install -e "./zoo-seismology[test]" && pytest zoo-seismology
    """
    written = write_skeleton(domain, out, distribution)
    if as_json:
        output.emit({"folder": str(written[0]), "files": [str(p) for p in written[1:]]})
    else:
        for path in written[1:]:
            click.echo(str(path))
        click.echo(f'next: pip install -e "{written[0]}[test]" && zoo list --domain {domain} && pytest {written[0]}')
    return 0


def write_skeleton(domain: str, out: str | None = None, distribution: str | None = None) -> list[Path]:
    """Write the files; returns the folder and then each file. Raises BadName, and BadArgument for a folder in use."""
    from zoo_registry import errors, manager
    from zoo_registry.cards import NAME

    if not NAME.fullmatch(domain):
        raise errors.BadName(
            f"{domain!r} cannot be a domain; expected lower case, digits and underscores, beginning with a letter",
            name=domain,
        )
    taken = [p.distribution for p in manager().plugins if domain in (p.name, *p.domains)]
    if taken:
        raise errors.BadName(f"the domain {domain!r} is taken by {taken[0]}; choose another name", name=domain)
    if distribution is not None and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", distribution):
        raise errors.BadName(
            f"{distribution!r} cannot be a distribution; expected letters, digits, dots, dashes and underscores",
            name=distribution,
        )
    dashed = domain.replace("_", "-")
    values = {
        "domain": domain,
        "title": domain.replace("_", " "),
        "package": f"zoo_{domain}",
        "distribution": distribution or f"zoo-{dashed}",
        "model": f"{domain}_labeller",
        "task": f"{dashed}-labelling",
    }
    folder = Path(out or f"zoo-{dashed}")
    if folder.exists() and any(folder.iterdir()):
        raise errors.BadArgument(
            f"the folder {folder} exists and is not empty; choose another with --out", argument="out", accepted=[]
        )
    written = [folder]
    templates = Path(__file__).parent / "skeleton"
    for template, target in FILES.items():
        path = folder / Template(target).substitute(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            Template((templates / template).read_text(encoding="utf-8")).substitute(values), encoding="utf-8"
        )
        written.append(path)
    return written
