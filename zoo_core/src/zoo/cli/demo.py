"""``zoo demo``: every installed plugin does its main job on files that it brings along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from . import output


@click.command()
@click.option("--domain", help="Only the demos of this plugin.")
@click.option(
    "--out", type=click.Path(file_okay=False), default="zoo-demo", show_default=True, help="Pictures go here."
)
@output.as_json
def demo(domain: str | None, out: str, as_json: bool) -> int:
    """Run every installed plugin's demo checkpoint on its sample files, and show the answers.

    The checkpoints are small ones that ship with the plugins, for trying things out: no network is needed.
    """
    import logging

    from zoo_registry import errors, manager

    found = [(p, d) for p, d in manager().demos() if domain is None or domain in (p.name, *p.domains)]
    if not found:
        what = f"no installed plugin has a demo for {domain!r}" if domain else "no installed plugin has a demo"
        raise errors.MissingExtra(
            f"{what}: pip install 'ssm-zoo[all]'", extra="all", command="pip install 'ssm-zoo[all]'"
        )
    logging.getLogger("zoo").info("%d demos", len(found))
    folder = Path(out)
    pipes: dict[str, Any] = {}
    rows = [_run(plugin, entry, folder, pipes) for plugin, entry in found]
    failed = [row for row in rows if row.get("error")]
    if as_json:
        output.emit(rows)
    else:
        output.table(
            ("model", "input", "answer", "confidence", "ms"),
            [
                (
                    row["model"],
                    row["input"],
                    row.get("error") or row["answer"],
                    "" if row.get("confidence") is None else f"{row['confidence']:.1%}",
                    "" if row.get("milliseconds") is None else f"{row['milliseconds']:.1f}",
                )
                for row in rows
            ],
            right=(3, 4),
        )
        for row in rows:
            if row.get("picture"):
                click.echo(f"picture: {row['picture']}")
    return 1 if failed else 0


def _run(plugin: Any, entry: Mapping[str, Any], folder: Path, pipes: dict[str, Any]) -> dict[str, Any]:
    """One row: the model's answer for one sample, or what went wrong; one broken demo does not stop the others."""
    import zoo
    from zoo_registry import package_path

    package = plugin.module.partition(".")[0]
    names = [name.strip() for name in entry["file"].split(";")]
    row: dict[str, Any] = {
        "plugin": plugin.name,
        "model": entry["model"],
        "input": " + ".join(Path(n).name for n in names),
    }
    try:
        files = [package_path(package, name) for name in names]
        pipe = pipes.get(entry["model"]) or pipes.setdefault(entry["model"], zoo.pipeline(entry["model"]))
        given: Any = tuple(files) if len(files) > 1 else files[0]
        pipe(given)  # the first answer pays for kernels and caches; the time shown is a second one's
        result = pipe(given)
        answers = result if isinstance(result, list) else [result]
        row |= {
            "answer": "; ".join(a.summary() for a in answers),
            "confidence": answers[0].confidence,
            "milliseconds": sum(a.milliseconds or 0 for a in answers),
        }
        if entry.get("picture") == "yes" and answers[0].has_picture:
            target = folder / f"{entry['model'].replace('.', '_')}_{Path(names[0]).stem}.png"
            row["picture"] = str(answers[0].save_picture(target))
    except Exception as error:  # reported in the table
        row["error"] = f"{type(error).__name__}: {error}"
    return row
