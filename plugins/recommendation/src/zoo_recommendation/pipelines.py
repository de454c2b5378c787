"""A history file in, the next items out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from ._base import SequentialRecommender
from .protocol import scaled
from .tables import read_history


@dataclass(kw_only=True)
class NextItems(Result):
    """The best next items for one history, best first; ``share`` is each one's softmax over the whole catalogue."""

    items: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def summary(self) -> str:
        return ", ".join(self.items[:3]) or "nothing: the history holds every item"

    @property
    def confidence(self) -> float | None:
        return self.share[0] if self.share else None


class NextItem(Pipeline):
    """Next-item prediction for one history.

    Inputs: a CSV, TSV, parquet or RecBole .inter file with a column ``item`` (or ``item_id``) and, for models that read
    time, ``timestamp`` (seconds), one row an interaction, oldest first or with timestamps to sort by, all of one user;
    or, for models that do not read time, a list of item names in memory (a list of such lists: several histories).
    Options: ``top_k``; ``exclude_seen`` leaves out what the history holds already. The last ``max_length`` items count.
    """

    task = "next-item"
    extensions = (".csv", ".tsv", ".inter", ".parquet")

    def __init__(self, model: nn.Module, top_k: int = 10, exclude_seen: bool = True) -> None:
        if not isinstance(model, SequentialRecommender):
            raise errors.BadArgument(
                f"{type(model).__name__} is no sequential recommender", argument="model", accepted=[]
            )
        if top_k < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        super().__init__(model)
        self.recommender = model
        self.top_k, self.exclude_seen = top_k, exclude_seen
        self.names = self.labels() or [str(i) for i in range(1, model.n_items)]
        if len(self.names) != model.n_items - 1:
            raise errors.BadArgument(
                f"{len(self.names)} item names for a model of {model.n_items - 1} items", argument="model", accepted=[]
            )
        self.ids = {name: i for i, name in enumerate(self.names, start=1)}

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        # Names are told from files by what the model knows: one that it knows makes the list a history in memory.
        if isinstance(inputs, list) and self._is_history(inputs):
            return [tuple(inputs)], True
        if isinstance(inputs, list):
            inputs = [tuple(one) if isinstance(one, list) else one for one in inputs]
        return super().expand(inputs)

    def _is_history(self, items: Sequence[Any]) -> bool:
        return any(isinstance(x, int) or (isinstance(x, str) and x in self.ids) for x in items)

    def read(self, source: Any) -> tuple[list[int], list[float]]:
        if isinstance(source, tuple):
            items, times = self._known([str(item) for item in source], "the given history"), None
            where = "the given history"
        elif isinstance(source, str | Path):
            names, times = read_history(source)
            items, where = self._known(names, str(source)), str(source)
        else:
            raise errors.BadArgument(
                f"an input is a {type(source).__name__}; expected a file or a list of item names",
                argument="inputs",
                accepted=[],
            )
        if times is None and self.recommender.reads_times:
            raise errors.BadArgument(
                f"{where} has no times, and {self.name} reads the time of each interaction; expected a file with the "
                "columns item and timestamp (seconds)",
                argument="inputs",
                accepted=[],
            )
        scale = self.recommender.time_scale
        when = np.zeros(len(items)) if times is None else scaled(times, None if scale is None else (scale[0], scale[1]))
        return items, when.tolist()

    def _known(self, items: Sequence[str], where: str) -> list[int]:
        unknown = sorted({item for item in items if item not in self.ids})
        if unknown:
            raise errors.BadArgument(
                f"{where}: {len(unknown)} items that the model was not trained on, the first: {unknown[0]!r}; "
                f"it knows {len(self.ids)} items, for example {self.names[0]!r}",
                argument="inputs",
                accepted=[],
            )
        if not items:
            raise errors.BadArgument(
                f"{where}: an empty history; the model needs at least one item", argument="inputs", accepted=[]
            )
        return [self.ids[item] for item in items]

    def prepare(self, sample: tuple[list[int], list[float]]) -> dict[str, Tensor]:
        items, times = sample
        length = self.recommender.max_length
        items, times = items[-length:], times[-length:]
        pad = length - len(items)
        return {
            "item_seq": torch.tensor(items + [0] * pad),
            "item_seq_len": torch.tensor(len(items)),
            "times": torch.tensor(times + [0.0] * pad, dtype=torch.float32),
        }

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)  # seconds stay in float32, whatever the model's weights are in

    def forward(self, batch: Any) -> Tensor:
        return self.recommender.scores(self.model(**batch))

    def finish(self, output: Tensor, sample: tuple[list[int], list[float]]) -> NextItems:
        scores = output.clone()
        scores[0] = -torch.inf
        if bool(scores.isnan().any()):
            raise ValueError(
                f"the scores of {self.name} are not numbers (NaN): its weights or the timestamps are broken"
            )
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
