"""MorpMamba: the class of a pixel of a hyperspectral image, from the small window around it.

Paper: "Spatial-spectral morphological mamba for hyperspectral image classification", arXiv 2408.01372. Original:
mahmad000/MorpMamba, a Keras notebook (``Spatial-Spectral MorpMamba.ipynb``); this is what its code computes. Its
"erosion" and "dilation" are depthwise convolutions (no minimum or maximum is taken), and its state space is a linear
recurrence that does not depend on the input, where the paper's text describes more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapting import NewHead

KERNEL = 5
HIDDEN = 128


class Morphology(nn.Module):
    """A depthwise 5x5 convolution that begins as ones, zero padded; with ``sign`` -1 it is called erosion.

    Input and output: (batch, planes, rows, columns)."""

    def __init__(self, planes: int, sign: int) -> None:
        super().__init__()
        self.sign = sign
        self.weight = nn.Parameter(torch.ones(planes, 1, KERNEL, KERNEL))

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * F.conv2d(x, self.weight, padding=KERNEL // 2, groups=x.shape[1])


class TokenGeneration(nn.Module):
    """Patches (batch, W, W, bands) to spatial and spectral tokens, both (batch, W, W, dim).

    Spatial: every band is a plane. Spectral: every column of the window is a plane of bands by rows. One linear layer
    makes tokens of both.
    """

    def __init__(self, bands: int, window: int, dim: int) -> None:
        super().__init__()
        self.erosion_spatial, self.dilation_spatial = Morphology(bands, -1), Morphology(bands, 1)
        self.erosion_spectral, self.dilation_spectral = Morphology(window, -1), Morphology(window, 1)
        self.proj = nn.Linear(2 * bands, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        planes = x.permute(0, 3, 1, 2)  # (batch, bands, rows, columns)
        spatial = torch.cat([self.erosion_spatial(planes), self.dilation_spatial(planes)], dim=1).permute(0, 2, 3, 1)
        planes = x.permute(0, 2, 3, 1)  # (batch, columns, bands, rows)
        parts = [self.erosion_spectral(planes), self.dilation_spectral(planes)]
        spectral = torch.cat([p.permute(0, 3, 1, 2) for p in parts], dim=-1)  # (batch, rows, columns, 2 bands)
        return self.proj(spatial), self.proj(spectral)


class Enhancement(nn.Module):
    """Gate both token maps by the middle row of the spatial one.

    The gate made of column j of that row multiplies *row* j of the maps: an oddity of the original, kept.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spatial_gate, self.spectral_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, spatial: Tensor, spectral: Tensor) -> tuple[Tensor, Tensor]:
        centre = spatial[:, spatial.shape[1] // 2]  # (batch, W, dim)
        return (
            spatial * torch.sigmoid(self.spatial_gate(centre))[:, :, None],
            spectral * torch.sigmoid(self.spectral_gate(centre))[:, :, None],
        )


class CrossAttention(nn.Module):
    """Queries from the spatial tokens, keys and values from the spectral ones; no output projection.

    Two maps (batch, W, W, dim) to (batch, W * W, heads * (dim // heads)).
    """

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.heads, self.width = heads, heads * (dim // heads)
        self.query, self.key, self.value = (nn.Linear(dim, self.width) for _ in range(3))
        self.drop = nn.Dropout(drop)

    def forward(self, spatial: Tensor, spectral: Tensor) -> Tensor:
        q, k, v = (
            layer(x.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, spatial), (self.key, spectral), (self.value, spectral))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.drop((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class LinearStateSpace(nn.Module):
    """``s_t = A s_{t-1} + a + U x_t + b`` from s_0 = 0: (batch, length, dim) to the last state (batch, state)."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        self.transition, self.update = nn.Linear(state, state), nn.Linear(dim, state)

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.update(x)
        state = torch.zeros_like(inputs[:, 0])
        for t in range(inputs.shape[1]):
            state = self.transition(state) + inputs[:, t]
        return state


class MorpMamba(nn.Module):
    """A pixel's window to the logits of its class.

    Arguments: ``bands`` k (after the PCA), ``window`` W (even in the original: the pixel is at index W / 2), ``dim`` of
    the tokens, ``heads``, ``state``, ``drop`` after the attention, ``num_classes``.

    Input: (batch, W, W, k), channels last. Output: logits (batch, num_classes); their softmax is what the original puts
    out. The original adds 0.01 times the squared weights of ``hidden`` to its loss. Source: the notebook's
    ``SSMambaModel``; arXiv 2408.01372, section 3.
    """

    def __init__(
        self,
        bands: int = 15,
        window: int = 4,
        num_classes: int = 15,
        *,
        dim: int = 64,
        heads: int = 4,
        state: int = 128,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        if not 1 <= heads <= dim:
            raise ValueError(f"heads is {heads}; expected 1 to dim = {dim}")
        self.bands, self.window, self.num_classes, self.num_features = bands, window, num_classes, HIDDEN
        self.tokens = TokenGeneration(bands, window, dim)
        self.enhance = Enhancement(dim)
        self.attention = CrossAttention(dim, heads, drop)
        self.state_space = LinearStateSpace(self.attention.width, state)
        self.hidden = nn.Linear(state, HIDDEN)
        self.head = nn.Linear(HIDDEN, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or tuple(x.shape[1:]) != (self.window, self.window, self.bands):
            raise ValueError(
                f"the windows have shape {tuple(x.shape)}; expected (batch, {self.window}, {self.window}, "
                f"{self.bands}), channels last"
            )
        return F.relu(self.hidden(self.state_space(self.attention(*self.enhance(*self.tokens(x))))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    @property
    def ends(self) -> dict[str, Any]:
        return {"num_classes": NewHead("head")}

    def reset_classifier(self, num_classes: int) -> None:
        """A new head of ``num_classes`` (0: none)."""
        like = self.hidden.weight
        self.num_classes = num_classes
        self.head = (
            nn.Linear(HIDDEN, num_classes, device=like.device, dtype=like.dtype) if num_classes > 0 else nn.Identity()
        )
