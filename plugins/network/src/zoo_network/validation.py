"""Measuring a traffic classifier on labelled captures: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import nn

from zoo.files import refused
from zoo.validation import Measured
from zoo_registry import errors

from .data import read_folder
from .netmamba import NetMamba
from .pipelines import TrafficClassification
from .training import predict, scores


def validate_folder(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 128,
    limit: int | None = None,
    augment: bool = False,
    bidirectional: bool | None = None,
) -> Measured:
    """Accuracy and weighted precision, recall and F1 over the flows of DATA/CLASS/FILE, one subfolder a class.

    Files are captures (.pcap, .pcapng, .cap), which are split into their flows, or the authors' pictures of flows
    (.png, 40 x 40). Subfolders are matched to the classes by name, and by their sorted order where the model names
    none. augment: every run of five packets of a flow counts, as in the authors' CrossPlatform and ISCXTor data.
    limit: at most so many flows, spread over the classes.
    """
    if not isinstance(model, NetMamba):
        raise errors.BadArgument(
            f"{type(model).__name__} classifies no flows; expected a NetMamba classifier", argument="model", accepted=[]
        )
    pipe = TrafficClassification(model, bidirectional=bidirectional)
    named = pipe.names if pipe.labels() is not None else None
    began = time.perf_counter()
    with refused(data):
        flows = read_folder(data, pipe.representation, classes=named, augment=augment, bidirectional=pipe.bidirectional)
        if not len(flows):
            raise ValueError(f"{data} holds no flows of IPv4")
    if len(flows.classes) != model.num_classes:
        raise errors.BadArgument(
            f"{data} has {len(flows.classes)} classes, the model {model.num_classes}; expected a subfolder for each",
            argument="data",
            accepted=[],
        )
    if limit is not None and limit < len(flows):
        flows = flows.chosen(np.linspace(0, len(flows) - 1, limit).astype(int))
    metrics, per_class = scores(predict(model, flows.flows, batch_size), flows.labels, flows.classes)
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(flows),
        metrics=metrics,
        seconds=time.perf_counter() - began,
        per_class=per_class,
        notes="" if named else "subfolders were matched to the classes in sorted order",
    )
