"""Which systems go to ONNX and to torch.export: one tiny model of each, written by ``zoo.export`` and compared.

uv run python benchmarks/export.py                  # every system; docs/export.md has the table
uv run python benchmarks/export.py vim mamba2       # some
uv run python benchmarks/export.py --table          # the table of docs/export.md, from results/export.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import zoo
import zoo.testing
from zoo_registry import query

RESULTS = Path(__file__).parent / "results" / "export.json"
FORMATS = ("onnx", "pt2")


def models() -> dict[str, str]:
    """system -> its first model, of those that have its name if there are any."""
    found: dict[str, str] = {}
    for entry in sorted(query("*"), key=lambda entry: not entry.card.name.startswith(entry.card.system)):
        found.setdefault(entry.card.system, entry.card.name)
    return dict(sorted(found.items()))


def tried(name: str, kind: str) -> dict[str, Any]:
    case = zoo.testing.case(name)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = zoo.export(case.build(), Path(folder) / f"model.{kind}", inputs=case.inputs())
        except zoo.errors.NotExportable as error:
            return {"exported": False, "why": str(error)}
    return {
        "exported": True,
        "any_size": list(made.dynamic),
        "difference": made.difference,
        "notes": list(made.notes),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown rows: system, model, what either format leaves open, the larger difference."""
    lines = ["| system | model | ONNX | torch.export | largest difference |", "| --- | --- | --- | --- | --- |"]
    for system, name in models().items():
        found = [results.get(system, {}).get(kind) for kind in FORMATS]
        worst = [one["difference"] for one in found if one and one["exported"]]
        difference = f"{max(worst):.0e}" if worst else ""
        lines.append(f"| `{system}` | `{name}` | {' | '.join(_cell(one) for one in found)} | {difference} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if not found["exported"]:
        return "no"
    return f"any {' and '.join(found['any_size'])}" if found["any_size"] else "sizes fixed"


def main(wanted: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if wanted == ["--table"]:
        print(table(results))
        return
    torch.set_num_threads(1)
    for system, name in models().items():
        if wanted and system not in wanted:
            continue
        for kind in FORMATS:
            row = results.setdefault(system, {})
            row[kind] = tried(name, kind)
            print(system, kind, json.dumps(row[kind]), flush=True)
            RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
