"""Measuring an image generator on pictures that it has not seen: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from zoo.validation import Measured

from .images import read_folder
from .pipeline import ImageGeneration
from .training import held_out_loss, to_model_space


def validate_images(
    model: nn.Module, data: str | Path, *, autoencoder: str | None = None, progress: bool = True
) -> Measured:
    """The flow-matching loss of a folder of pictures (FOLDER/CLASS/PICTURES, or FOLDER/PICTURES without labels).

    "loss" is the mean squared error of the velocity over fixed noise and evenly spread times; lower is better, and it
    can be compared between models of the same images. "loss without labels" tells what labels bring. How good images
    look is another question, which needs many samples and a judge (FID).
    """
    pipe = ImageGeneration(model, autoencoder=autoencoder)
    began = time.perf_counter()
    network = pipe.network
    side = network.img_resolution * (8 if pipe.latent else 1)
    found = read_folder(data, side, 3 if pipe.latent else network.in_channels, pipe.class_names())
    images = to_model_space(found.images, pipe.encoder() if pipe.latent else None)
    nothing = torch.full((len(images),), network.y_embedder.null)
    metrics: dict[str, float | None] = {}
    if found.labels is not None:
        metrics["loss"] = held_out_loss(model, images, found.labels)
    metrics["loss without labels"] = held_out_loss(model, images, nothing)
    return Measured(
        model=pipe.name, data=str(data), samples=len(images), metrics=metrics, seconds=time.perf_counter() - began,
        notes="latents" if pipe.latent else "",
    )  # fmt: skip
