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
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.files import existing, read_json, whole
from zoo_registry import errors

from ._base import SequentialRecommender
from .baselines import build
from .protocol import Interactions, scaled, seconds
from .serving import Recommender, SQLiteStore

logger = logging.getLogger("zoo")


def save(
    folder: str | Path, model: SequentialRecommender, table: Interactions, metrics: Sequence[Mapping[str, Any]] = ()
) -> Recommender:
    """Write ``folder`` (model, items, users with their histories) and return the recommender that serves it.

    Users that the folder held already keep what they took since (events of :meth:`Recommender.update`), with states
    computed anew for this model; those of another catalogue are dropped. ``metrics``: what was measured, for the
    model's page, as in :func:`zoo.save`.
    """
    import zoo

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    later = _later(folder, table)
    if model.built_from is None:
        zoo.save(model, folder / "model", labels=table.item_tokens[1:], metrics=metrics)
    else:
        with whole(folder / "model" / "model.safetensors") as work:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, work)
        _write(folder / "model" / "config.json", model.built_from)
    counts = np.bincount(table.item, minlength=table.n_items)
    items = {"items": table.item_tokens, "counts": counts.tolist(), "time_scale": table.time_scale}
    _write(folder / "items.json", items)
    with whole(folder / "users.sqlite") as work:  # whole or as it was: states of two models are never in one file
        store = SQLiteStore(work)
        try:
            recommender = Recommender(model, table.item_tokens, store, counts, table.time_scale)
            recommender.load_histories(table)
            recommender.put_histories(later)
        finally:
            store.close()
        for beside in ("-wal", "-shm"):  # what lay beside the file that is replaced
            (folder / f"users.sqlite{beside}").unlink(missing_ok=True)
    recommender.store = SQLiteStore(folder / "users.sqlite")
    return recommender


def _later(folder: Path, table: Interactions) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(user, items, times) of the users in ``folder`` that have more than the table says of them."""
    if not ((folder / "items.json").exists() and (folder / "users.sqlite").exists()):
        return []
    try:
        there = read_json(folder / "items.json")
        if there.get("items") != table.item_tokens:  # these numbers are other items there
            return []
        store = SQLiteStore(folder / "users.sqlite")
    except errors.BadFile as error:  # hours of training shall not end in this
        logger.warning("%s; its users are written anew, without what they took since", error)
        return []
    ids = {token: i for i, token in enumerate(table.user_tokens) if i}
    first = np.searchsorted(table.user, np.arange(table.n_users + 1))
    found = []
    for user in list(store.users()):
        record = store.get(user)
        assert record is not None
        own = slice(first[ids[user]], first[ids[user] + 1]) if user in ids else slice(0, 0)
        known = table.item[own]
        if len(record.items) > len(known) and np.array_equal(record.items[: len(known)], known):
            since = scaled(seconds(record.times[len(known) :], there.get("time_scale")), table.time_scale)
            found.append((user, record.items, np.concatenate([table.time[own], since])))
    store.close()
    return found


def load(folder: str | Path) -> Recommender:
    """The recommender in ``folder``. Raises FileNotFoundError that says what is missing and what makes it, and BadFile
    for a damaged file."""
    import zoo

    folder = Path(folder)
    parts = ("model/config.json", "items.json", "users.sqlite")
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing:
        text = "is a file" if folder.is_file() else f"has no {', '.join(missing)}"
        raise FileNotFoundError(
            f"{folder} is not a trained recommender: it {text}. "
            "Make one with: zoo train mamba4rec interactions.csv --out FOLDER"
        )
    items, config = read_json(folder / "items.json"), read_json(folder / "model" / "config.json")
    if not isinstance(items, dict) or not isinstance(config, dict) or not {"items", "counts"} <= items.keys():
        raise errors.BadFile(
            f"{folder}: items.json and model/config.json are not what zoo train writes", path=str(folder)
        )
    if "baseline" in config:
        model = build(config.pop("baseline"), **config)
        model.load_state_dict(_weights(folder / "model" / "model.safetensors"))
    else:
        model = zoo.load(str((folder / "model").resolve()))
    scale = items.get("time_scale")
    store = SQLiteStore(folder / "users.sqlite")
    return Recommender(model, items["items"], store, np.array(items["counts"]), tuple(scale) if scale else None)


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(existing(path, "weights in a .safetensors file"))
    except SafetensorError as error:
        raise errors.BadFile(f"{path} is no safetensors file: {error}", path=str(path)) from error


def _write(path: Path, content: Any) -> None:
    with whole(path) as work:
        work.write_text(json.dumps(content), encoding="utf-8")
