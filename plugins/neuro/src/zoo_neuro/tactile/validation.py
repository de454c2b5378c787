"""Measuring a network of touch on labelled recordings: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from zoo.validation import Measured
from zoo_registry import errors

from .pipelines import TouchClassification
from .recordings import read_folder
from .training import predict


def validate_folder(model: nn.Module, data: str | Path, *, batch_size: int = 64, limit: int | None = None) -> Measured:
    """Top-1 and top-5 accuracy over the recordings of DATA/CATEGORY/FILE, or of DATA/FILE with a label in each file.

    limit: at most so many recordings, spread over the categories.
    """
    try:
        pipe = TouchClassification(model)
        named = pipe.labels()
        recordings = read_folder(data, pipe.layout, named)
    except ValueError as error:
        raise errors.BadArgument(str(error), argument="data", accepted=[]) from error
    if len(recordings.classes) > len(pipe.names):
        raise errors.BadArgument(
            f"{data} has {len(recordings.classes)} categories, the model {len(pipe.names)}",
            argument="data",
            accepted=[],
        )
    if limit is not None and limit < len(recordings):
        recordings = recordings.chosen(torch.linspace(0, len(recordings) - 1, limit).long())
    began = time.perf_counter()
    best = predict(model, recordings.frames, batch_size).topk(min(5, len(pipe.names)), dim=1).indices
    right = best == recordings.labels[:, None]
    per_class = {}
    for i, name in enumerate(recordings.classes):
        own = recordings.labels == i
        if own.any():
            per_class[name] = {"recordings": int(own.sum()), "accuracy": float(right[own, 0].float().mean())}
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(recordings),
        metrics={
            "accuracy": float(right[:, 0].float().mean()),
            "top5": float(right.any(1).float().mean()),
        },
        seconds=time.perf_counter() - began,
        per_class=per_class,
        notes="" if named else "subfolders were matched to the categories in sorted order",
    )
