"""Answers as files: tables (CSV, TSV, parquet, JSON) and arrays (safetensors)."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.files import check_place, whole
from zoo_registry import errors, optional

from .sequences import FASTA, endings

TABLES = (".csv", ".tsv", ".parquet", ".json")
SMILES_LISTS = (".smi", ".smiles", ".txt")
#: What else each task's answers are written as.
MORE = {
    "dna-embedding": (".safetensors",),
    "protein-generation": endings(FASTA),
    "molecule-generation": SMILES_LISTS,
}


def check_output(path: str | Path, task: str) -> None:
    """Raise BadArgument where answers of this task are not written under such a name, StoreError where nothing is."""
    expected = (*TABLES, *MORE.get(task, ()))
    if not str(path).lower().endswith(expected):
        raise errors.BadArgument(
            f"{path} ends in {Path(path).suffix!r}; expected {', '.join(expected)}",
            argument="out",
            accepted=[*expected],
        )
    check_place(path)


def write_table(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write columns of equal length; the ending chooses the format. Raises ValueError for another ending."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in TABLES:
        raise ValueError(
            f"{path}: no table is written as {path.suffix or 'a file without ending'}; use {', '.join(TABLES)}"
        )
    if kind == ".parquet":
        arrow = optional("pyarrow", "writing parquet", "ssm-zoo-biology[parquet]", otherwise="or write .csv")
        parquet = optional("pyarrow.parquet", "writing parquet", "ssm-zoo-biology[parquet]", otherwise="or write .csv")
        with whole(path) as work:
            parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), work)
        return path
    rows = list(zip(*columns.values(), strict=True))
    with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
        if kind == ".json":
            table = [{name: _known(value) for name, value in zip(columns, row, strict=True)} for row in rows]
            json.dump(table, file, indent=1)
        else:
            writer = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(rows)
    return path


def _known(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_vectors(path: str | Path, vectors: Tensor, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write (rows, width) with what describes the rows: as a table with a column a channel, or as safetensors with the
    tensor ``embeddings`` and the columns as JSON in the header."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        channels = {f"e{i}": values for i, values in enumerate(vectors.T.tolist())}
        return write_table(path, {**columns, **channels})
    from safetensors.torch import save_file

    header = {name: json.dumps(list(values)) for name, values in columns.items()}
    with whole(path) as work:
        save_file({"embeddings": vectors.contiguous()}, work, metadata=header)
    return path
