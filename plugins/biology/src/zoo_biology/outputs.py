"""Answers as files: tables (CSV, TSV, parquet, JSON) and arrays (safetensors)."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo_registry import optional

TABLES = (".csv", ".tsv", ".parquet", ".json")


def write_table(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write columns of equal length; the ending chooses the format. Raises ValueError for another ending."""
    path = Path(path)
    if path.suffix not in TABLES:
        raise ValueError(
            f"{path}: no table is written as {path.suffix or 'a file without ending'}; use {', '.join(TABLES)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        arrow = optional("pyarrow", "writing parquet", "ssm-zoo-biology[parquet]", otherwise="or write .csv")
        parquet = optional("pyarrow.parquet", "writing parquet", "ssm-zoo-biology[parquet]", otherwise="or write .csv")
        parquet.write_table(arrow.table({name: list(values) for name, values in columns.items()}), path)
        return path
    rows = list(zip(*columns.values(), strict=True))
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump([dict(zip(columns, row, strict=True)) for row in rows], file, indent=1)
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(rows)
    return path


def write_vectors(path: str | Path, vectors: Tensor, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write (rows, width) with what describes the rows: as a table with a column a channel, or as safetensors with the
    tensor ``embeddings`` and the columns as JSON in the header."""
    path = Path(path)
    if path.suffix != ".safetensors":
        channels = {f"e{i}": values for i, values in enumerate(vectors.T.tolist())}
        return write_table(path, {**columns, **channels})
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    header = {name: json.dumps(list(values)) for name, values in columns.items()}
    save_file({"embeddings": vectors.contiguous()}, path, metadata=header)
    return path
