"""Latents without an autoencoder: a fixed linear map of small patches, for models that are too small for one."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rec. 601's shares of red, green and blue in brightness
LUMA = (0.299, 0.587, 0.114)


class PatchLatents:
    """2 x 2 pixels to four numbers and back: the means of red, green and blue, and how much brighter the left half is.

    Every map of pictures in [-1, 1] to latents here and in the Stable Diffusion autoencoder has the same two methods;
    what comes out of ``encode`` has about unit deviation.
    """

    side = 2  #: pixels of a picture for one of a latent, on each axis

    def encode(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, 4, H / 2, W / 2)."""
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"pictures are {x.shape[3]} x {x.shape[2]}; expected even sizes")
        means = torch.nn.functional.avg_pool2d(x, 2)
        luma = (x * torch.tensor(LUMA, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        halves = torch.nn.functional.avg_pool2d(luma, (2, 1))
        return torch.cat([2 * means, 2 * (halves[..., 0::2] - halves[..., 1::2])], dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """(N, 4, h, w) to (N, 3, 2 h, 2 w); values may lie outside [-1, 1]."""
        means, edge = z[:, :3] / 2, z[:, 3:] / 4
        columns = torch.stack([means + edge, means - edge], dim=-1).flatten(-2)
        return columns.repeat_interleave(2, dim=-2)
