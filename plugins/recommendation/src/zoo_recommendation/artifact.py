"""A trained recommender as a folder: the model, the names of its items, its users' states.

::

    model/              what zoo.save wrote: config.json, model.safetensors, README.md
    items.json          item names by id, and how often each was taken (what cold users get)
    users.sqlite        one row a user: items, times, state
    history.json        the training run, results.json: test metrics, curve.png: the learning curve
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ._base import SequentialRecommender
from .protocol import Interactions
from .serving import Recommender, SQLiteStore


def save(folder: str | Path, model: SequentialRecommender, table: Interactions) -> Recommender:
    """Write ``folder`` (model, items, users with their histories) and return the recommender that serves it."""
    import zoo

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    zoo.save(model, folder / "model")
    counts = np.bincount(table.item, minlength=table.n_items)
    part = folder / "items.json.part"
    part.write_text(json.dumps({"items": table.item_tokens, "counts": counts.tolist()}), encoding="utf-8")
    part.replace(folder / "items.json")
    recommender = Recommender(model, table.item_tokens, SQLiteStore(folder / "users.sqlite"), counts)
    recommender.load_histories(table)
    return recommender


def load(folder: str | Path) -> Recommender:
    """The recommender in ``folder``. Raises FileNotFoundError that says what is missing and what makes it."""
    import zoo

    folder = Path(folder)
    missing = [name for name in ("model", "items.json", "users.sqlite") if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a trained recommender: no {', '.join(missing)} in it. "
            f"Make one with: zoo train mamba4rec_ml1m interactions.csv --out {folder}"
        )
    items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    model = zoo.load(str((folder / "model").resolve()))
    return Recommender(model, items["items"], SQLiteStore(folder / "users.sqlite"), np.array(items["counts"]))
