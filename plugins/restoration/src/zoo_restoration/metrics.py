"""PSNR and SSIM as the field of image restoration reports them: on RGB, or on luma with the borders cut off.

Images are (batch, 3 or 1, height, width), 0 to 1; results are one number an image, float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .degradations import gaussian_kernel


def luma(x: Tensor) -> Tensor:
    """Y of BT.601 in studio range, of RGB (..., 3, H, W) in 0..1: (..., 1, H, W) from 16/255 to 235/255.

    MATLAB's ``rgb2ycbcr``, which tables of super-resolution use. Grey images (one channel) stay as they are.
    """
    if x.shape[-3] == 1:
        return x
    weights = x.new_tensor([65.481, 128.553, 24.966])
    return ((x * weights[:, None, None]).sum(-3, keepdim=True) + 16) / 255


def _ready(found: Tensor, wanted: Tensor, border: int, y: bool) -> tuple[Tensor, Tensor]:
    if found.shape != wanted.shape or found.dim() != 4 or found.shape[1] not in (1, 3):
        raise ValueError(
            f"the images have shapes {tuple(found.shape)} and {tuple(wanted.shape)}; expected the same, (batch, 3 or 1 "
            "channels, height, width)"
        )
    height, width = found.shape[2:]
    if border < 0 or 2 * border >= min(height, width):
        raise ValueError(f"border is {border}, and the images are {height} x {width}; nothing would be left")
    pair = []
    for image in (found, wanted):
        image = image.to(torch.float64)
        image = luma(image) if y else image
        pair.append(image[..., border : height - border, border : width - border])
    return pair[0], pair[1]


def psnr(found: Tensor, wanted: Tensor, *, border: int = 0, y: bool = False) -> Tensor:
    """Peak signal-to-noise ratio in dB, (batch,): 10 log10(1 / mean squared difference); infinite for equal images.

    ``border``: pixels left out at every edge (the scale, in super-resolution); ``y``: on :func:`luma`.
    """
    a, b = _ready(found, wanted, border, y)
    return -10 * torch.log10((a - b).square().flatten(1).mean(1))


def ssim(found: Tensor, wanted: Tensor, *, border: int = 0, y: bool = False) -> Tensor:
    """Structural similarity, (batch,): mean over positions and channels, windows of 11 x 11 with sigma 1.5.

    K1 = 0.01, K2 = 0.03, windows that lie inside the image alone. Source: Wang et al., "Image quality assessment: from
    error visibility to structural similarity", 2004, equation 13.
    """
    a, b = _ready(found, wanted, border, y)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"SSIM needs 11 x 11 pixels within the border; the images leave {tuple(a.shape[2:])}")
    kernel = gaussian_kernel(1.5, 11).to(a)

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None, :, None])
        return F.conv2d(x, kernel[None, None, None, :]).unflatten(0, a.shape[:2])[:, :, 0]

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return index.flatten(1).mean(1)
