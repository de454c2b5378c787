"""Measuring animations against true videos: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch import nn

from zoo.validation import Measured
from zoo_registry import errors

from .data import psnr, read_clips
from .pipeline import HumanAnimation
from .unet import UNet


def validate_folder(
    model: nn.Module,
    data: str | Path,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    autoencoder: str | None = None,
    clip: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Measured:
    """PSNR in dB over the clips of DATA/CLIP/ (see :mod:`zoo_generation.unianimate.data`), and that of the reference
    shown in every frame, which an animation should exceed.

    The reference is the clip's own, or its first frame. Videos are made one by one, whatever batch_size says.
    limit: at most so many clips. autoencoder, clip, steps, guidance, seed: as for the pipeline.
    """
    if not isinstance(model, UNet):
        raise errors.BadArgument(
            f"{type(model).__name__} animates nobody; expected a UNet of UniAnimate", argument="model", accepted=[]
        )
    pipe = HumanAnimation(
        model, autoencoder=autoencoder, clip=clip, steps=steps, guidance=guidance, seed=seed, aligned=False
    )
    began = time.perf_counter()
    found, copied = [], []
    for one in read_clips(data, pipe.video_size())[:limit]:
        picture, pose = one.reference, one.reference_pose
        if picture is None or pose is None:
            picture, pose = one.frames[0], one.poses[[0]]
        answer = pipe((picture, (one.poses, pose)))
        found.append(psnr(answer.frames, one.frames))
        copied.append(psnr(np.repeat(picture[None], len(one.frames), axis=0), one.frames))
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(found),
        metrics={"psnr": float(np.mean(found)), "psnr_copied": float(np.mean(copied))},
        seconds=time.perf_counter() - began,
    )
