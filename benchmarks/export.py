"""Which systems go to ONNX and to torch.export: one tiny model of each, written by ``zoo.export`` and compared.

uv run python benchmarks/export.py                  # every system; docs/export.md has the table
uv run python benchmarks/export.py vim mamba2       # some
uv run python benchmarks/export.py --table          # the table of docs/export.md, from results/export.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

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


def tried(name: str, kind: str) -> dict[str, object]:
    case = zoo.testing.case(name)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = zoo.export(case.build(), Path(folder) / f"model.{kind}", inputs=case.inputs())
        except zoo.errors.NotExportable as error:
            return {"exported": False, "why": str(error), "seconds": round(time.perf_counter() - began, 1)}
    return {
        "exported": True,
        "any_size": list(made.dynamic),
        "difference": made.difference,
        "notes": list(made.notes),
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(results: dict[str, dict[str, object]]) -> str:
    """Markdown rows: system, model, what either format leaves open, the larger difference."""
    lines = ["| system | model | ONNX | torch.export | largest difference |", "| --- | --- | --- | --- | --- |"]
    for system, row in results.items():
        cells = [_cell(row[kind]) for kind in FORMATS]  # type: ignore[arg-type]
        worst = max((row[k]["difference"] for k in FORMATS if row[k]["exported"]), default=None)  # type: ignore[index]
        lines.append(f"| `{system}` | `{row['model']}` | {' | '.join(cells)} | {_number(worst)} |")
    return "\n".join(lines)


def _cell(found: dict[str, object]) -> str:
    if not found["exported"]:
        return "no"
    return f"any {' and '.join(found['any_size'])}" if found["any_size"] else "sizes fixed"  # type: ignore[arg-type]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def main(wanted: list[str]) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if wanted == ["--table"]:
        print(table(results))
        return
    torch.set_num_threads(1)
    for system, name in models().items():
        if wanted and system not in wanted:
            continue
        results[system] = {"model": name} | {kind: tried(name, kind) for kind in FORMATS}
        print(system, json.dumps(results[system]), flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
