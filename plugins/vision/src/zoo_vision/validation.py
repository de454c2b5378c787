"""Measuring a classifier on a folder of images, with timm's data set, transforms and loader."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.pipelines import progress_bar
from zoo.validation import Measured
from zoo_registry import errors

from .pipelines import ImageClassification


def validate_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Top-1 and top-5 accuracy over the images FOLDER/CLASS/IMAGE, one subfolder a class.

    Subfolders are matched to the classes by name (ImageNet's synset ids such as n01440764, or the labels); if no name
    fits and their number is the model's, in sorted order. ``workers``: processes that read files; ``limit``: at most so
    many images, spread over the classes.

    Raises ``zoo.errors.BadArgument`` when the folder holds no images or its classes cannot be matched to the model's.
    """
    from timm.data import ImageDataset, create_loader

    pipe = ImageClassification(model)
    classes = sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and not p.name.startswith("."))
    wanted, matching = match_classes(classes, pipe)
    try:
        data: Any = ImageDataset(str(folder), class_map=wanted, input_img_mode="L" if pipe.in_chans == 1 else "RGB")
    except RuntimeError as error:  # timm: no images
        raise errors.BadArgument(
            f"{folder} holds no images; expected {folder}/CLASS/IMAGE ({error})", argument="folder", accepted=[]
        ) from error
    if limit is not None and limit < len(data):
        # spread over the classes, which come one after the other
        chosen = torch.linspace(0, len(data) - 1, limit).long().tolist()
        data.reader.samples = [data.reader.samples[i] for i in chosen]
    settings = {k: v for k, v in pipe.settings.items() if k != "input_size"}
    loader = create_loader(
        data, pipe.settings["input_size"], batch_size, is_training=False, use_prefetcher=False,
        num_workers=workers, pin_memory=False, persistent_workers=False, device=torch.device("cpu"), **settings,
    )  # fmt: skip
    seen = right1 = right5 = 0
    outputs = 0
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(data), pipe.name) as advance, torch.inference_mode():
        for images, targets in loader:
            logits = pipe.model(pipe._to_model(images)).float().cpu()
            outputs = logits.shape[-1]
            best = logits.topk(min(5, outputs), dim=-1).indices
            hits = best == targets[:, None]
            right1 += int(hits[:, 0].sum())
            right5 += int(hits.any(dim=1).sum())
            seen += len(targets)
            for _ in range(len(targets)):
                advance()
    seconds = time.perf_counter() - began
    return Measured(
        model=pipe.name,
        data=str(folder),
        samples=seen,
        metrics={"top1": right1 / seen, "top5": right5 / seen if outputs > 5 else None},
        seconds=seconds,
        notes=matching,
    )


def match_classes(folders: list[str], pipe: ImageClassification) -> tuple[dict[str, int], str]:
    """Index of each class folder among the model's outputs, and how it was found, in words."""
    if not folders:
        raise errors.BadArgument(
            "the folder has no subfolders; expected one a class: FOLDER/CLASS/IMAGE", argument="folder", accepted=[]
        )
    for kind, names in _names(pipe):
        where = {name: i for i, name in enumerate(names)}
        if all(f in where for f in folders):
            return {f: where[f] for f in folders}, f"{len(folders)} folders matched to the classes by {kind}"
    count = int(getattr(pipe.model, "num_classes", 0))
    if len(folders) == count:
        return (
            {f: i for i, f in enumerate(folders)},
            f"{count} folders taken as the classes in sorted order (no folder name is a label)",
        )
    raise errors.BadArgument(
        f"{len(folders)} folders ({', '.join(folders[:3])} ...) fit neither the names nor the number of the model's "
        f"{count} classes; name them by label or by synset id",
        argument="folder",
        accepted=[],
    )


def _names(pipe: ImageClassification) -> list[tuple[str, list[str]]]:
    found: list[tuple[str, list[str]]] = []
    weights = pipe.info.weights if pipe.info is not None else None
    if weights is not None and weights.labels is not None and weights.labels.startswith("imagenet"):
        from timm.data import ImageNetInfo

        info = ImageNetInfo(weights.labels)
        found.append(("synset id", [info.index_to_label_name(i) for i in range(info.num_classes())]))
    if pipe.names is not None:
        found.append(("label", pipe.names))
    return found
