"""Measuring a recommender on a table of interactions: what ``zoo validate`` runs for next-item models."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from .pipelines import NextItem
from .protocol import Interactions, Ranking, Samples, at_once, scaled
from .tables import read_table


def validate_interactions(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 256,
    limit: int | None = None,
    scale_time: bool | None = None,
    progress: bool = True,
) -> Measured:
    """Hit, NDCG and MRR at 10 and 20: the last interaction of every user, from those before it, among all items.

    DATA is a CSV, TSV, parquet or RecBole .inter file with the columns user, item and timestamp (seconds). Items are
    matched by name; interactions with items that the model does not know are left out, and the notes count them. A user
    needs two interactions. Nothing else is filtered, and seen items stay in the ranking, as in RecBole. ``scale_time``:
    timestamps scaled to [0, 1] over this file, or (false) as they are; left out, as the model was trained by
    ``zoo train``. ``limit``: at most so many users.

    On the file that a model was trained on with ``zoo train`` these are the test scores, if the 5-core filter kept all.
    """
    pipe = NextItem(model)
    users, items, times = read_table(data)
    ids = np.array([pipe.ids.get(item, 0) for item in items], dtype=np.int64)
    known = ids > 0
    if not known.any():
        raise errors.BadArgument(
            f"{data}: none of its {len(set(items))} items is known to the model, whose items have names like "
            f"{pipe.names[0]!r}",
            argument="data",
            accepted=[],
        )
    tokens, code = np.unique(users[known].astype(str), return_inverse=True)
    when = times[known]
    scale = pipe.recommender.time_scale if scale_time is None else None
    if scale_time:
        scale = float(when.min()), float(when.max())
    stored = scaled(when, None if scale is None else (scale[0], scale[1])).astype(np.float32)
    order = np.lexsort((np.arange(len(code)), stored, code))
    table = Interactions(
        code[order] + 1, ids[known][order], stored[order], ["[PAD]", *tokens.tolist()], ["[PAD]", *pipe.names]
    )
    last = np.flatnonzero(np.r_[table.user[1:] != table.user[:-1], True])
    first = np.r_[0, last[:-1] + 1]
    several = last > first
    end, start = last[several][:limit], first[several][:limit]
    if not len(end):
        raise errors.BadArgument(f"{data}: no user has two interactions with known items", argument="data", accepted=[])
    window = pipe.recommender.max_length
    samples = Samples(table, np.maximum(start, end - window), end, window)
    ranking = Ranking((10, 20))
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(samples), pipe.name) as advance, torch.inference_mode():
        for batch in samples.batches(at_once(batch_size, pipe.recommender.n_items)):
            batch = {name: tensor.to(pipe.device) for name, tensor in batch.items()}
            user = pipe.recommender(batch["item_seq"], batch["item_seq_len"], batch["times"])
            ranking.add(pipe.recommender.scores(user).float(), batch["target"])
            for _ in batch["target"]:
                advance()
    missing = int((~known).sum())
    notes = f"{missing} of {len(known)} interactions left out: the model does not know their items" if missing else ""
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(samples),
        metrics=ranking.result(),
        seconds=time.perf_counter() - began,
        notes=notes,
    )
