"""Training a restorer on clean images: random crops, flips and turns, a degradation, L1, an averaged model, resume.

Every step draws from its own generator (seed and step), so a run that was interrupted and resumed equals one that was
not. The averaged (EMA) weights are the result. Source: the customary recipe of SwinIR, HAT and MambaIR; numbers are
ours.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo import errors
from zoo.files import whole
from zoo.runs import seeded

from . import metrics
from .degradations import Degradation, crop_to_multiple


class Images(Protocol):
    """Clean images by number: (height, width, channels) uint8 or uint16."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Settings:
    """``patch``: side of the clean crops; ``batch_size`` crops a step; Adam with ``betas``, its rate falling by half a
    cosine from ``learning_rate`` to a hundredth; ``ema``: decay of the averaged weights (0: none); ``clip``: largest
    norm of the gradient (0: none); ``save_every`` steps the run is written."""

    steps: int = 10_000
    batch_size: int = 16
    patch: int = 96
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float = 1.0
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.patch, self.save_every) < 1 or self.learning_rate <= 0:
            raise ValueError(f"{self}: steps, batch_size, patch, save_every and learning_rate must be positive")


def to_tensor(image: np.ndarray) -> Tensor:
    """(height, width, channels) uint8 or uint16 to (channels, height, width) float32, 0 to 1."""
    top = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}[image.dtype]
    return torch.from_numpy(image.astype(np.float32) / np.float32(top)).permute(2, 0, 1)


def crops(images: Images, settings: Settings, step: int, multiple: int = 1) -> tuple[Tensor, torch.Generator]:
    """The clean crops of a step, (batch, channels, patch, patch), each flipped or turned at random; and the generator
    that drew them, for the degradation."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    side = settings.patch // multiple * multiple
    parts = []
    for index in torch.randint(len(images), (settings.batch_size,), generator=generator).tolist():
        image = images[index]
        if min(image.shape[:2]) < side:
            files = getattr(images, "files", None)
            name = f"image {index}" if files is None else str(files[index])
            raise ValueError(
                f"{name} has {image.shape[0]} x {image.shape[1]} pixels and the crops {side}; give larger images or "
                "smaller crops"
            )
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in image.shape[:2])
        x = to_tensor(np.ascontiguousarray(image[top : top + side, left : left + side]))
        flip_rows, flip_columns, turn = (torch.rand(3, generator=generator) < 0.5).tolist()
        x = x.flip(1) if flip_rows else x
        x = x.flip(2) if flip_columns else x
        parts.append(x.transpose(1, 2) if turn else x)
    return torch.stack(parts), generator


class Trainer:
    """One run: ``model`` learns, :attr:`averaged` is what comes out.

    ``degradation`` fits ``model.scale``. With ``folder`` the run is written there (``run.safetensors``: weights,
    averaged weights, Adam's moments) and a run found there goes on. Raises ValueError where that run had other
    settings.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        degradation: Degradation,
        settings: Settings = Settings(),
        *,
        folder: str | Path | None = None,
    ) -> None:
        check_scale(model, degradation)
        if not len(images):
            raise ValueError("there is no image to train on")
        self.model, self.images, self.degradation, self.settings = model.train(), images, degradation, settings
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=settings.betas)
        self.step = self.saved = 0  # saved: what the folder holds
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._resume()

    def rate(self) -> float:
        share = self.step / self.settings.steps
        return self.settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))

    def one_step(self) -> float:
        """One update; returns the loss (mean absolute difference)."""
        s = self.settings
        clean, generator = crops(self.images, s, self.step, self.degradation.scale)
        spoilt = self.degradation(clean, generator)
        with seeded(s.seed * 1_000_003 + self.step, self.device):  # for dropped paths
            loss = F.l1_loss(self.model(spoilt.to(self.device)), clean.to(self.device))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        self.optimizer.step()
        self._average()
        self.step += 1
        if self.folder is not None and (self.step % s.save_every == 0 or self.step == s.steps):
            self.save()
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        """Averaged weights follow; fast in the beginning, when there is nothing worth keeping."""
        keep = min(self.settings.ema, (1 + self.step) / (10 + self.step)) if self.settings.ema else 0.0
        for ours, theirs in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            ours.lerp_(theirs, 1 - keep)
        for ours, theirs in zip(self.averaged.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)

    def train(self, on_step: Callable[[int, float], None] | None = None) -> nn.Module:
        """All steps that are left; ``on_step(step, loss)`` after each. Returns the averaged model."""
        while self.step < self.settings.steps:
            loss = self.one_step()
            if on_step is not None:
                on_step(self.step, loss)
        return self.averaged

    # -- a run on disk

    def _about(self) -> dict[str, Any]:
        shapes = ", ".join(f"{k}{list(v.shape)}" for k, v in self.model.state_dict().items())
        settings = {k: v for k, v in asdict(self.settings).items() if k != "save_every"}
        about = {
            "settings": settings,
            "degradation": str(self.degradation),
            "model": shapes,
            "images": len(self.images),
        }
        return json.loads(json.dumps(about))

    def save(self) -> None:
        """Write the run, whole or not at all."""
        assert self.folder is not None
        flat = {f"model/{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        flat |= {f"averaged/{k}": v.contiguous() for k, v in self.averaged.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            flat |= {f"optimizer/{index}/{k}": torch.as_tensor(v).contiguous() for k, v in moments.items()}
        with whole(self.folder / "run.safetensors") as work:
            save_file(flat, work, metadata={"step": str(self.step), "about": json.dumps(self._about())})
        self.saved = self.step

    def _resume(self) -> None:
        assert self.folder is not None
        path = self.folder / "run.safetensors"
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
            stored, wanted = json.loads(said["about"]), self._about()
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise errors.BadFile(
                f"{path} is no run that can be gone on with: damaged, or another file; move it away, or train into an "
                "empty folder",
                path=str(path),
            ) from error
        changed = [k for k in wanted if k != "settings" and stored[k] != wanted[k]]
        changed += [k for k in wanted["settings"] if stored["settings"].get(k) != wanted["settings"][k]]
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other {', '.join(changed)}; go on with the same, or train into an "
                "empty folder"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "averaged": {}, "optimizer": {}}
        for key, value in load_file(path).items():
            group, _, name = key.partition("/")
            parts[group][name] = value
        self.model.load_state_dict(parts["model"])
        self.averaged.load_state_dict(parts["averaged"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            index, _, name = key.partition("/")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = self.saved = int(said["step"])


def check_scale(model: nn.Module, degradation: Degradation) -> None:
    """Raises ValueError where the model enlarges by another factor than the degradation reduces."""
    own = int(getattr(model, "scale", 1))
    if own != degradation.scale:
        raise ValueError(
            f"the model enlarges {own} times and the degradation {degradation} makes images {degradation.scale} times "
            "smaller; expected the same factor"
        )


@torch.no_grad()
def measure(
    restore: Callable[[Tensor], Tensor], images: Iterable[np.ndarray] | Sequence[np.ndarray], degradation: Degradation,
    *, seed: int = 0, border: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Means over clean ``images`` of ``psnr`` and ``ssim`` on RGB, ``psnr_y`` and ``ssim_y`` on luma, after degrading
    each (noise and masks from ``seed`` and its number) and calling ``restore`` on (1, channels, h, w).

    ``border``: pixels left out (None: the scale for super-resolution, else 0). Results are clipped to 0..1.
    """
    border = (degradation.scale if degradation.scale > 1 else 0) if border is None else border
    total: dict[str, float] = {"psnr": 0.0, "ssim": 0.0, "psnr_y": 0.0, "ssim_y": 0.0}
    count = 0
    for image in images:
        clean = crop_to_multiple(to_tensor(image)[None], degradation.scale)
        spoilt = degradation(clean, torch.Generator().manual_seed(seed * 1_000_003 + count))
        found = restore(spoilt).clamp(0, 1)
        for name, function in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
            for y in (False, True):
                total[name + "_y" * y] += float(function(found, clean, border=border, y=y))
        count += 1
    if not count:
        raise ValueError("there is no image to measure on")
    return {k: v / count for k, v in total.items()}
