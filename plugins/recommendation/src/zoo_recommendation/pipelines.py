"""A history file in, the next items out."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from ._base import SequentialRecommender


@dataclass(kw_only=True)
class NextItems(Result):
    """The best next items for one history, best first; ``share`` is each one's softmax over the whole catalogue."""

    items: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def summary(self) -> str:
        return ", ".join(self.items[:3])

    @property
    def confidence(self) -> float | None:
        return self.share[0] if self.share else None


class NextItem(Pipeline):
    """Next-item prediction for one history.

    Inputs: a CSV or TSV file with a column ``item`` (or ``item_id``) and, for models that read time, ``timestamp``
    (seconds), one row an interaction, oldest first or with timestamps to sort by; or a list of item names in memory.
    Options: ``top_k``; ``exclude_seen`` leaves out what the history holds already.
    """

    task = "next-item"
    extensions = (".csv", ".tsv", ".inter")

    def __init__(self, model: nn.Module, top_k: int = 10, exclude_seen: bool = True) -> None:
        super().__init__(model)
        if not isinstance(model, SequentialRecommender):
            raise errors.BadArgument(
                f"{type(model).__name__} is no sequential recommender", argument="model", accepted=[]
            )
        self.recommender = model
        self.top_k, self.exclude_seen = top_k, exclude_seen
        self.names = self.labels() or [str(i) for i in range(1, model.n_items)]
        if len(self.names) != model.n_items - 1:
            raise errors.BadArgument(
                f"{len(self.names)} item names for a model of {model.n_items - 1} items", argument="model", accepted=[]
            )
        self.ids = {name: i for i, name in enumerate(self.names, start=1)}

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        # A list of names that are no files is one history in memory.
        if isinstance(inputs, list) and inputs and all(isinstance(x, str) and x in self.ids for x in inputs):
            return [tuple(inputs)], True
        return super().expand(inputs)

    def read(self, source: Any) -> tuple[list[int], list[float]]:
        if isinstance(source, tuple):
            return self._known(list(source), "the given history"), [0.0] * len(source)
        path = Path(source)
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = list(csv.DictReader(text.splitlines(), delimiter=delimiter))
        names = {str(name).split(":")[0].strip().lower(): name for name in (rows[0] if rows else {})}
        column = names.get("item") or names.get("item_id")
        if column is None:
            raise ValueError(
                f"{path}: no column 'item'; found {sorted(names)}. Expected item[,timestamp], one row each"
            )
        when = names.get("timestamp") or names.get("time")
        times = [0.0] * len(rows)
        if when is not None:
            try:
                times = [float(row[when]) for row in rows]
            except ValueError as error:
                raise ValueError(f"{path}: column {when!r} is not a number of seconds everywhere: {error}") from error
            order = sorted(range(len(rows)), key=lambda i: times[i])
            rows, times = [rows[i] for i in order], [times[i] for i in order]
        return self._known([row[column] for row in rows], str(path)), times

    def _known(self, items: Sequence[str], where: str) -> list[int]:
        unknown = sorted({item for item in items if item not in self.ids})
        if unknown:
            raise ValueError(
                f"{where}: {len(unknown)} items that the model was not trained on, the first: {unknown[0]!r}; "
                f"it knows {len(self.ids)} items, for example {self.names[0]!r}"
            )
        if not items:
            raise ValueError(f"{where}: an empty history; the model needs at least one item")
        return [self.ids[item] for item in items]

    def prepare(self, sample: tuple[list[int], list[float]]) -> dict[str, Tensor]:
        items, times = sample
        length = self.recommender.max_length
        items, times = items[-length:], times[-length:]
        pad = length - len(items)
        return {
            "item_seq": torch.tensor(items + [0] * pad),
            "item_seq_len": torch.tensor(len(items)),
            "times": torch.tensor(times + [0.0] * pad),
        }

    def forward(self, batch: Any) -> Tensor:
        return self.recommender.scores(self.model(**batch))

    def finish(self, output: Tensor, sample: tuple[list[int], list[float]]) -> NextItems:
        scores = output.clone()
        scores[0] = -torch.inf
        share = scores.softmax(0)
        if self.exclude_seen:
            scores[torch.tensor(sample[0])] = -torch.inf
        k = min(self.top_k, int(torch.isfinite(scores).sum()))
        best = scores.topk(k).indices.tolist()
        return NextItems(
            items=[self.names[i - 1] for i in best],
            scores=[float(scores[i]) for i in best],
            share=[float(share[i]) for i in best],
        )
