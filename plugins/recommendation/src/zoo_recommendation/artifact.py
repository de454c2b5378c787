"""A trained recommender as a folder: the model, the names of its items, its users' states.

::

    model/              what zoo.save wrote: config.json, model.safetensors, README.md (zoo.load, zoo predict and
                        zoo validate read it); of a baseline the last two files' like
    items.json          item names by id, how often each was taken (what cold users get), how times were scaled
    users.sqlite        one row a user: items, times, state
    history.json        the training run, results.json: test metrics, curve.png: the learning curve
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from ._base import SequentialRecommender
from .baselines import build
from .protocol import Interactions
from .serving import Recommender, SQLiteStore


def save(
    folder: str | Path, model: SequentialRecommender, table: Interactions, metrics: Sequence[Mapping[str, Any]] = ()
) -> Recommender:
    """Write ``folder`` (model, items, users with their histories) and return the recommender that serves it.

    ``metrics``: what was measured, for the model's page, as in :func:`zoo.save`.
    """
    import zoo

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if model.built_from is None:
        zoo.save(model, folder / "model", labels=table.item_tokens[1:], metrics=metrics)
    else:
        (folder / "model").mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model" / "model.safetensors")
        _write(folder / "model" / "config.json", model.built_from)
    counts = np.bincount(table.item, minlength=table.n_items)
    items = {"items": table.item_tokens, "counts": counts.tolist(), "time_scale": table.time_scale}
    _write(folder / "items.json", items)
    store = SQLiteStore(folder / "users.sqlite")
    recommender = Recommender(model, table.item_tokens, store, counts, table.time_scale)
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
            f"Make one with: zoo train mamba4rec interactions.csv --out {folder}"
        )
    items = json.loads((folder / "items.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    if "baseline" in config:
        model = build(config.pop("baseline"), **config)
        model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    else:
        model = zoo.load(str((folder / "model").resolve()))
    scale = items.get("time_scale")
    store = SQLiteStore(folder / "users.sqlite")
    return Recommender(model, items["items"], store, np.array(items["counts"]), tuple(scale) if scale else None)


def _write(path: Path, content: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(path)
