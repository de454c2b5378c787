"""Other projects' networks around the UNet, behind one small interface: what pictures, prompts and poses become.

Order of reading: :class:`Encoders` (what a pipeline asks for), latents, features, poses. Each is imported where it is
used; without its library or files the error says what to install or to fetch. Files: ModelScope ``iic/unianimate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_registry import errors, optional

from .latents import PatchLatents
from .poses import Poses, from_coco_wholebody

SCALE = 0.18215  #: latents of Stable Diffusion's autoencoder times this have about unit deviation
VIT_SIZE = 224
VIT_MEAN, VIT_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Latents(Protocol):
    """Pictures to latents and back."""

    side: int  #: pixels of a picture for one of a latent, on each axis

    def encode(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, 4, H / side, W / side)."""

    def decode(self, z: Tensor) -> Tensor:
        """(N, 4, h, w) to (N, 3, side * h, side * w)."""


class Features(Protocol):
    """Pictures and the empty prompt to what the attention in space reads."""

    def picture(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 1, width)."""

    def prompt(self) -> Tensor:
        """The empty prompt, (1, tokens, width)."""


class Detector(Protocol):
    """Pictures to poses."""

    def __call__(self, pictures: Sequence[np.ndarray]) -> Poses:
        """(H, W, 3) uint8 each, to the first person's pose in each."""


# -- latents ----------------------------------------------------------------------------------------------------------


class StableDiffusionLatents(nn.Module):
    """The autoencoder of Stable Diffusion 2.1, by ``diffusers``.

    where: a folder as diffusers saves it, or the single file ``v2-1_512-ema-pruned.ckpt`` that the authors name (or its
    safetensors form). sampled: the latent is drawn from the encoder's distribution, as the authors do, else its mean.
    """

    side = 8

    def __init__(self, where: str | Path, *, sampled: bool = True, frames: int = 2) -> None:
        super().__init__()
        diffusers = optional("diffusers", "the autoencoder of latents", "ssm-zoo-generation[autoencoder]")
        path = _existing(where, "the autoencoder", "v2-1_512-ema-pruned.ckpt, or a folder saved by diffusers")
        kind: Any = diffusers.AutoencoderKL
        self.network = (kind.from_pretrained(str(path)) if path.is_dir() else kind.from_single_file(str(path))).eval()
        self.sampled, self.frames = sampled, frames

    def encode(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, 4, H / 8, W / 8)."""
        with torch.no_grad():
            found = [self.network.encode(part).latent_dist for part in self._cast(x).split(self.frames)]
        drawn = [d.sample(generator) if self.sampled else d.mode() for d in found]
        return SCALE * torch.cat(drawn).to(x)

    def decode(self, z: Tensor) -> Tensor:
        """(N, 4, h, w) to (N, 3, 8 h, 8 w), some frames at a time."""
        with torch.no_grad():
            parts = [self.network.decode(part).sample for part in self._cast(z / SCALE).split(self.frames)]
        return torch.cat(parts).to(z)

    def _cast(self, x: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        return x.to(weight.device, weight.dtype)


def latents_of(kind: str | Latents, autoencoder: str | Path | None) -> Latents:
    """The latents that a card names: "patch" (fixed, no file) or "autoencoder" (:class:`StableDiffusionLatents`)."""
    if not isinstance(kind, str):
        return kind
    if kind == "patch":
        return PatchLatents()
    if kind != "autoencoder":
        raise ValueError(f"latents is {kind!r}; expected 'patch' or 'autoencoder'")
    if autoencoder is None:
        raise errors.BadArgument(
            "this model works on latents of Stable Diffusion 2.1's autoencoder, and none was given; fetch "
            "v2-1_512-ema-pruned.ckpt (ModelScope iic/unianimate) and give autoencoder=PATH",
            argument="autoencoder",
            accepted=[],
        )
    return StableDiffusionLatents(autoencoder)


# -- features ---------------------------------------------------------------------------------------------------------


class ClipFeatures(nn.Module):
    """OpenCLIP ViT-H/14 by ``transformers``: a folder with its weights in that library's format.

    Pictures are resized to 224 x 224 whatever their shape, the prompt's features are of the layer before the last one.
    """

    def __init__(self, where: str | Path) -> None:
        super().__init__()
        transformers = optional("transformers", "features of the reference", "ssm-zoo-generation[autoencoder]")
        path = str(_existing(where, "OpenCLIP ViT-H/14", "a folder with its weights in the format of transformers"))
        self.vision = transformers.CLIPVisionModelWithProjection.from_pretrained(path).eval()
        self.text = transformers.CLIPTextModel.from_pretrained(path).eval()

    def picture(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] to (N, 1, width)."""
        size = self.vision.config.image_size
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(1, 3, 1, 1) for v in (VIT_MEAN, VIT_STD))
        weight = next(self.vision.parameters())
        with torch.no_grad():
            found = self.vision(((x - mean) / std).to(weight.device, weight.dtype)).image_embeds
        return found[:, None].to(x)

    def prompt(self) -> Tensor:
        """(1, 77, width): begin, end, and zeros behind them, as OpenCLIP fills up."""
        config = self.text.config
        device = next(self.text.parameters()).device
        tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.long, device=device)
        tokens[0, 0], tokens[0, 1] = config.vocab_size - 2, config.vocab_size - 1
        with torch.no_grad():
            states = self.text(tokens, output_hidden_states=True).hidden_states
            norm = getattr(self.text, "text_model", self.text).final_layer_norm
            return norm(states[-2])


# -- poses ------------------------------------------------------------------------------------------------------------


class DWPose:
    """YOLOX and DWPose by ``rtmlib`` (onnxruntime): ``yolox_l.onnx`` and ``dw-ll_ucoco_384.onnx``."""

    def __init__(self, detector: str | Path, pose: str | Path, *, device: str = "cpu") -> None:
        rtmlib: Any = optional("rtmlib", "finding poses in pictures", "ssm-zoo-generation[pose]")
        found = _existing(detector, "the detector of people", "yolox_l.onnx")
        own = _existing(pose, "DWPose", "dw-ll_ucoco_384.onnx")
        kind = {"backend": "onnxruntime", "device": device}
        self.people = rtmlib.YOLOX(str(found), model_input_size=(640, 640), **kind)
        self.points = rtmlib.RTMPose(str(own), model_input_size=(288, 384), to_openpose=False, **kind)

    def __call__(self, pictures: Sequence[np.ndarray]) -> Poses:
        """(H, W, 3) uint8 RGB each, to the first person's pose in each. Raises ValueError for sizes that differ."""
        sizes = {p.shape[:2] for p in pictures}
        if len(sizes) != 1:
            raise ValueError(f"pictures are of {len(sizes)} sizes; expected one or more of the same")
        points, scores = [], []
        for picture in pictures:
            swapped = np.ascontiguousarray(picture[..., ::-1])  # both networks were trained on blue, green, red
            p, s = self.points(swapped, bboxes=self.people(swapped))
            points.append(p[0])
            scores.append(s[0])
        height, width = next(iter(sizes))
        return from_coco_wholebody(np.stack(points), np.stack(scores), (width, height))


def _existing(where: str | Path, what: str, expected: str) -> Path:
    path = Path(where).expanduser()
    if not path.exists():
        raise errors.LocalFileMissing(f"{path}: there is no such file for {what}; expected {expected}", path=str(path))
    return path
