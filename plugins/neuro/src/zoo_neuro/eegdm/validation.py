"""Measuring a classifier of EEG on labelled recordings: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import nn

from zoo.validation import Measured
from zoo_registry import errors

from .data import read_labelled
from .fusion import EEGClassifier
from .pipelines import EEGClassification
from .training import measures, predict


def validate_folder(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    step: float | None = None,
    missing: str = "error",
) -> Measured:
    """Accuracy, balanced accuracy, kappa and weighted F1 over the windows of DATA/CLASS/RECORDING, a subfolder a class.

    Or recordings with TUEV's annotations beside them (NAME.edf, NAME.rec): a window for each annotation, as the authors
    cut them. For one logit also the areas under ROC and precision-recall curves. step: seconds between windows.
    missing: "zeros" for recordings that lack channels. limit: at most so many windows, spread over the classes.
    """
    if not isinstance(model, EEGClassifier):
        raise errors.BadArgument(
            f"{type(model).__name__} classifies no EEG; expected an EEGClassifier", argument="model", accepted=[]
        )
    pipe = EEGClassification(model)
    named = pipe.names if pipe.labels() is not None else None
    began = time.perf_counter()
    try:
        found = read_labelled(data, pipe.preparation, pipe.ids, classes=named, step=step, missing=missing)
    except ValueError as error:
        raise errors.BadArgument(str(error), argument="data", accepted=[]) from error
    if len(found.classes) != len(pipe.names):
        raise errors.BadArgument(
            f"{data} has {len(found.classes)} classes, the model {len(pipe.names)}; expected a subfolder for each",
            argument="data",
            accepted=[],
        )
    if limit is not None and limit < len(found):
        found = found.chosen(np.linspace(0, len(found) - 1, limit).astype(int))
    shares = predict(model, found.x, batch_size)
    said = (shares[:, 0] > 0.5).astype(int) if pipe.binary else shares.argmax(1)
    per_class = {
        name: {"windows": float((found.labels == i).sum()), "recall": float((said[found.labels == i] == i).mean())}
        for i, name in enumerate(found.classes)
        if (found.labels == i).any()
    }
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(found),
        metrics=measures(shares, found.labels),
        seconds=time.perf_counter() - began,
        per_class=per_class,
        notes="" if named else "subfolders were matched to the classes in sorted order",
    )
