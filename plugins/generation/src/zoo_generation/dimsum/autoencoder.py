"""Images to latents and back by Stable Diffusion's autoencoder, which ``diffusers`` holds (an extra).

The published networks work on its latents: 4 numbers for every 8 x 8 pixels, times 0.18215.
Source: VinAIResearch/DiMSUM ``dimsum/sample.py`` and ``preprocess_latent_imagenet_dat.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo_registry import optional

REPOSITORY = "stabilityai/sd-vae-ft-ema"
SCALE = 0.18215


def needed() -> Any:
    """diffusers. Raises MissingExtra without it."""
    return optional(
        "diffusers", "making images of latents", "ssm-zoo-generation[autoencoder]",
        otherwise="or ask for the latents: --latents, decode=False",
    )  # fmt: skip


class Autoencoder:
    """``repository``: a diffusers ``AutoencoderKL`` on the Hub, or a folder with one; ``scale``: of the latents.

    Raises ``zoo.errors.MissingExtra`` without diffusers, naming the command that installs it.
    """

    def __init__(
        self, repository: str = REPOSITORY, scale: float = SCALE, device: torch.device | str | None = None
    ) -> None:
        self.scale = scale
        self.network = needed().AutoencoderKL.from_pretrained(repository).eval().to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, 4, h, w) to images (batch, 3, 8 h, 8 w), about [-1, 1]."""
        device = next(self.network.parameters()).device
        parts = [self.network.decode(one.to(device) / self.scale).sample for one in latents.split(1)]
        return torch.cat(parts).to(latents)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (batch, 3, H, W) in [-1, 1] to drawn latents (batch, 4, H / 8, W / 8)."""
        device = next(self.network.parameters()).device
        parts = [self.network.encode(one.to(device)).latent_dist.sample(generator) for one in images.split(1)]
        return torch.cat(parts).to(images) * self.scale
