"""PSNR and SSIM of a restorer on a folder of images: what ``zoo validate`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from zoo.validation import Measured

from . import metrics
from .degradations import Degradation, crop_to_multiple, resize_bicubic
from .images import read_picture
from .pipelines import ImageRestoration
from .training import check_scale


def degradation_for(model: nn.Module, given: str | None) -> Degradation:
    """``given``, or that of the weights' card, or for a model that enlarges the bicubic one."""
    pipe = ImageRestoration(model)
    text = given or pipe.preprocess.get("degradation") or (f"bicubic:scale={pipe.scale}" if pipe.scale > 1 else None)
    if text is None:
        raise ValueError(
            "what the model was trained to take off is not known; give degradation=, as blur:sigma=2 or noise:std=0.1"
        )
    found = Degradation.parse(text)
    check_scale(model, found)
    return found


def plain_for(degradation: Degradation) -> Callable[[Tensor], Tensor]:
    """What a restorer is compared with: the degraded image itself, or its bicubic enlargement."""

    def plain(x: Tensor) -> Tensor:
        scale = degradation.scale
        return x if scale == 1 else resize_bicubic(x, x.shape[-2] * scale, x.shape[-1] * scale)

    return plain


def validate_images(
    model: nn.Module,
    data: str | Path,
    *,
    degradation: str | None = None,
    tile: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Measured:
    """PSNR (dB) and SSIM on RGB and on luma, of the restored image and of what was given.

    DATA is a folder of clean images, which are degraded first (``degradation``: as "blur:sigma=2,noise=0.05",
    "down:factor=8", "bicubic:scale=2", "box:share=0.25", "pixels:share=0.5", "noise:std=0.1"; default: the weights'
    own), noise and masks from ``seed``. Or it holds two folders, ``clean`` and ``degraded``, with files of the same
    names. For a model that enlarges, images are cropped to multiples of the scale, borders of that width left out, and
    the enlargement compared with is bicubic. Restored images are rounded to 8 bits first, as files are.
    """
    pipe = ImageRestoration(model, tile=tile)
    began = time.perf_counter()
    folder = Path(data)
    pairs = (folder / "clean").is_dir() and (folder / "degraded").is_dir()
    sources, _ = pipe.expand(folder / "clean" if pairs else folder)
    sources = sources[:limit]
    spoil = None if pairs else degradation_for(model, degradation)
    border = pipe.scale if pipe.scale > 1 else 0
    restore = pipe.restorer()
    total: dict[str, list[float]] = {}
    for number, source in enumerate(sources):
        clean = crop_to_multiple(_tensor(read_picture(source).colours), pipe.scale)
        if spoil is None:
            spoilt = _tensor(read_picture(_partner(folder / "degraded", Path(source))).colours)
        else:
            spoilt = spoil(clean, torch.Generator().manual_seed(seed * 1_000_003 + number))
        spoilt = _rounded(spoilt)
        plain = spoilt if pipe.scale == 1 else resize_bicubic(spoilt, *(pipe.scale * side for side in spoilt.shape[2:]))
        if plain.shape != clean.shape:
            raise ValueError(
                f"{source}: is {tuple(clean.shape[2:])} pixels and its degraded image {tuple(spoilt.shape[2:])}; "
                f"expected {pipe.scale} times its sides"
            )
        for name, image in (("", restore(spoilt)), ("given ", plain)):
            for key, value in _scores(_rounded(image), clean, border).items():
                total.setdefault(name + key, []).append(value)
    found: dict[str, float | None] = {name: float(np.mean(values)) for name, values in total.items()}
    return Measured(
        model=pipe.name, data=str(data), samples=len(sources), metrics=found, seconds=time.perf_counter() - began,
        notes=f"degradation {spoil}" if spoil is not None else "pairs of files",
    )  # fmt: skip


def _tensor(colours: np.ndarray) -> Tensor:
    return torch.from_numpy(colours).permute(2, 0, 1)[None]


def _rounded(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def _partner(folder: Path, clean: Path) -> Path:
    found = [p for p in sorted(folder.glob(f"{clean.stem}.*")) if p.is_file()]
    if not found:
        raise ValueError(f"{folder} has no degraded image for {clean.name}; expected {clean.stem} with any ending")
    return found[0]


def _scores(found: Tensor, clean: Tensor, border: int) -> dict[str, float]:
    functions: dict[str, Callable[..., Tensor]] = {"psnr": metrics.psnr, "ssim": metrics.ssim}
    return {
        name + "_y" * y: float(function(found, clean, border=border, y=y))
        for name, function in functions.items()
        for y in (False, True)
    }
