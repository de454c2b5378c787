"""MambaMIM's pre-training: mask cells of a volume, encode what is visible, interpolate tokens, decode, compare.

Paper: Tang et al., "MambaMIM", arXiv 2408.08070, sections 3.2 (bottom-up hybrid masking) and 3.3 (TOKI). Original:
FengheTan9/MambaMIM @ 471c2f6, Apache-2.0 (``models/MambaMIM.py``, ``models/decoder.py``). Differs: the interpolation
is written over all positions at once instead of gap by gap (the same numbers).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Recomputed

from ._base import Undecayed, check_input
from .mambamim import (
    CHANNELS,
    DEPTHS,
    EXPANSION,
    KERNELS,
    STRIDE,
    Embeddings,
    TokenMixer,
    Visible,
    check_encoder,
    second_direction,
)

#: 2^LEVELS is the encoder's stride
LEVELS = 4


def toki(features: Tensor, active: Tensor, A: Tensor) -> Tensor:
    """TOKI, state-space token interpolation: values for hidden positions from the visible ones around them.

    features (batch, C, f, f, f), active (batch, 1, f, f, f) bool, A (1, C, C). Visible positions, the first and
    the last are keys. In the gap from key p to the next key q = p + g, token p + j is the sum over i <= j of
    ``A^(g-1-i) ((1 - a_i) X_p + a_i X_q)``, a = linspace(0, 1, g); the last position is ``A X``. Returned as the
    original does: the (positions, C) array *read* as (C, f, f, f), which mixes the axes, in
    (batch, C, f, f, f). Source: arXiv 2408.08070, section 3.3; ``manba_mask`` of the original.
    """
    batch, channels = features.shape[:2]
    x = features.flatten(2).transpose(1, 2)
    n = x.shape[1]
    where = torch.arange(n, device=x.device)
    key = active.flatten(1) | (where == 0) | (where == n - 1)
    before = torch.where(key, where, 0).cummax(dim=1).values
    later = torch.where(key, where, n - 1).flip(1).cummin(dim=1).values.flip(1)  # the next key, itself included
    after = torch.cat([later[:, 1:], later[:, -1:]], dim=1)  # the next key behind the position
    gap, inside = after - before, where - before
    wide = torch.promote_types(x.dtype, torch.float32)
    share = (inside.to(wide) / (gap - 1).clamp(min=1))[..., None].to(x.dtype)

    def at(index: Tensor) -> Tensor:
        return x.gather(1, index[..., None].expand(-1, -1, channels))

    value = (1 - share) * at(before) + share * at(after)
    value = torch.where((where == n - 1)[:, None], x, value)
    power = torch.where(where == n - 1, 1, gap - 1 - inside)
    step = A[0].transpose(0, 1)  # tokens are rows here, A acts on columns
    bit = 1
    while bit < n:
        value = torch.where(((power // bit) % 2 == 1)[..., None], value @ step, value)
        bit *= 2
        if bit < n:
            step = step @ step
    same = (before[:, :, None] == before[:, None, :]) & (where[None, :] <= where[:, None])
    tokens = same.to(value.dtype) @ value
    return tokens.reshape(batch, *features.shape[1:])


class DoubleConv(Recomputed):
    """Twice: 3x3x3 convolution, batch norm, ReLU; with ``up`` a transposed convolution (2, stride 2) before them."""

    def __init__(self, cin: int, cout: int, *, up: bool = False) -> None:
        super().__init__()
        self.up_sample = nn.ConvTranspose3d(cin, cin, 2, stride=2) if up else None
        self.conv = nn.Sequential(
            nn.Conv3d(cin, cout, 3, padding=1), nn.BatchNorm3d(cout), nn.ReLU(),
            nn.Conv3d(cout, cout, 3, padding=1), nn.BatchNorm3d(cout), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.up_sample is None else self.up_sample(x))


class LightDecoder(nn.Module):
    """From the map at stride 16 to one channel at full size, taking in the finer maps on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width // 2**i for i in range(LEVELS + 1)]
        self.dec = nn.ModuleList(DoubleConv(a, b, up=True) for a, b in zip(widths, widths[1:], strict=False))  # noqa: RUF007
        self.fuse = nn.ModuleList(DoubleConv(2 * a, a) for a in widths[:-1])
        self.proj = nn.Conv3d(widths[-1], 1, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.dec[0](maps[0])
        for i in range(1, LEVELS):
            x = self.dec[i](self.fuse[i](torch.cat([x, maps[i]], dim=1)))
        return self.proj(x)


class SparseEncoder(nn.Module):
    """The hybrid encoder on what is visible: the map at stride 16, then the skips from stride 8 up to full size."""

    def __init__(self, embeddings: Embeddings, mae: TokenMixer) -> None:
        super().__init__()
        self.embeddings, self.mae = embeddings, mae

    def forward(self, x: Tensor, active: Tensor, kept: int | None) -> tuple[list[Tensor], dict[str, Any]]:
        """The maps, and for a sparse encoder the inverse order and the number of tokens that were walked."""
        x, skips = self.embeddings(x, Visible(active, norms=self.mae.masked))
        found: dict[str, Any] = {}
        if self.mae.masked:
            x, restore, walked = self.mae.forward_masked(x, active, kept)
            found = {"ids_restore": restore[..., None], "n_kept": walked}
        else:
            x = self.mae(x)
        return [x, *reversed(skips)], found


class MambaMIM(Undecayed, GradCheckpointing, nn.Module):
    """Masked pre-training: ``model(volumes)`` is the reconstruction loss on the hidden cells.

    Arguments: the encoder's as in :class:`zoo_medical.mambamim.Hybird`; ``decoder_width`` (halved at each level),
    ``mask_ratio`` of hidden cells; ``sparse=False`` keeps the norms and the Mamba blocks of the encoder dense: hidden
    cells are walked too, and only its convolutions and pools are masked. Input (batch, in_chans, S, S, S); ``active``
    (batch, 1, S/16, S/16, S/16) bool, True where a cell is visible, is drawn when it is not given. The state of
    ``sparse_encoder`` goes into ``Hybird`` with :func:`encoder_state`. Source: arXiv 2408.08070, section 3.
    """

    #: the number of tokens that are walked is counted over the whole batch, as in the original
    mixes_batch = True

    def __init__(
        self,
        in_chans: int = 1,
        img_size: int = 96,
        channels: Sequence[int] = CHANNELS,
        depths: Sequence[int] = DEPTHS,
        kernels: Sequence[int] = KERNELS,
        expansion: Sequence[int] = EXPANSION,
        depth: int = 4,
        decoder_width: int = 768,
        mask_ratio: float = 0.75,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        check_encoder(channels, depths, kernels, expansion, img_size)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio is {mask_ratio}; expected a share between 0 and 1")
        if decoder_width < 2**LEVELS:
            raise ValueError(f"decoder_width is {decoder_width}; it is halved {LEVELS} times, give 16 or more")
        if in_chans != 1:
            raise ValueError(f"in_chans is {in_chans}; the decoder reconstructs one channel")
        self.in_chans, self.img_size, self.grid, self.mask_ratio = in_chans, img_size, img_size // STRIDE, mask_ratio
        self.kept = round(self.grid**3 * (1 - mask_ratio))
        if self.kept < 1:
            raise ValueError(f"mask_ratio {mask_ratio} hides all of {self.grid**3} cells; use a larger img_size")
        self.sparse_encoder = SparseEncoder(
            Embeddings(in_chans, channels, depths, kernels, expansion),
            TokenMixer(channels[-1], self.grid, depth, masked=sparse),
        )
        self.dense_decoder = LightDecoder(decoder_width)
        widths = [channels[4], channels[4], channels[3], channels[2], channels[1]]
        self.mask_tokens = nn.ParameterList(nn.init.trunc_normal_(torch.zeros(1, w, 1, 1, 1), std=0.02) for w in widths)
        projections: list[nn.Module] = []
        for i, width in enumerate(widths):
            wanted = decoder_width // 2**i
            if i == 0 and width == wanted:
                projections.append(nn.Identity())
            else:
                kernel = 1 if i == 0 else 3
                projections.append(nn.Conv3d(width, wanted, kernel, padding=kernel // 2))
        self.densify_projs = nn.ModuleList(projections)
        self.A_interpolation = nn.Parameter(torch.zeros(1, channels[4], channels[4]))

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """In the original's checkpoints, and read by nothing there either."""
        backward = second_direction("sparse_encoder.mae.", len(self.sparse_encoder.mae.blocks))
        unread = ("sparse_encoder.embeddings.encoder1.", "densify_projs.4.")  # the finest map
        return (*backward, *unread, "mask_tokens.0", "mask_tokens.4", "dense_decoder.fuse.0.")

    def draw_mask(
        self,
        batch: int,
        device: torch.device | str | None = None,
        *,
        ratio: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A random grid for each volume: (batch, 1, f, f, f), True in ``round(f^3 (1 - mask_ratio))`` cells. ratio:
        another than the model's; generator: where chance comes from, in place of torch's own."""
        kept = self.kept if ratio is None else round(self.grid**3 * (1 - ratio))
        noise = torch.rand(batch, self.grid**3, generator=generator, device=generator.device if generator else device)
        active = torch.zeros(batch, self.grid**3, dtype=torch.bool, device=device)
        shape = (batch, 1, self.grid, self.grid, self.grid)
        return active.scatter(1, noise.argsort(dim=1)[:, :kept].to(active.device), True).view(shape)

    def forward(self, image: Tensor, active: Tensor | None = None) -> Tensor:
        kept = image.shape[0] * self.kept if active is None else None
        active = self.draw_mask(image.shape[0], image.device) if active is None else active
        return self.loss(image, self.reconstruct(image, active, kept=kept), active)

    def reconstruct(
        self, image: Tensor, active: Tensor, *, kept: int | None = None, parts: dict[str, Any] | None = None
    ) -> Tensor:
        """The decoder's output (batch, 1, S, S, S), in units of each cell's mean and deviation. ``parts`` receives the
        intermediates: the level's map, its interpolation, the inverse order, the number of walked tokens."""
        image = check_input("MambaMIM", image, self.in_chans, 3, STRIDE)
        shape = (image.shape[0], 1, *(s // STRIDE for s in image.shape[2:]))
        if active.dtype != torch.bool or tuple(active.shape) != shape:
            raise ValueError(
                f"active is {active.dtype} of shape {tuple(active.shape)}; expected torch.bool of shape {shape}, True "
                "where a cell is visible"
            )
        visible = Visible(active)
        maps, walk = self.sparse_encoder(visible(image), active, kept)
        filled = toki(maps[0], active, self.A_interpolation)
        if parts is not None:
            parts.update(bcfff=maps[0], mask_token=filled, **walk)
        dense = []
        for i, found in enumerate(maps[:LEVELS]):  # the original also projects the finest map, and drops it
            hidden = filled if i == 0 else self.mask_tokens[i].to(found.dtype)
            dense.append(self.densify_projs[i](torch.where(visible.at(found.shape[2]), found, hidden)))
        return self.dense_decoder(dense)

    def loss(self, image: Tensor, reconstruction: Tensor, active: Tensor) -> Tensor:
        """The mean of :meth:`cell_errors` over the hidden cells."""
        error = self.cell_errors(image, reconstruction)
        hidden = (~active).flatten(1).to(error.dtype)
        return (error * hidden).sum() / (hidden.sum() + 1e-8)

    @staticmethod
    def cell_errors(image: Tensor, reconstruction: Tensor) -> Tensor:
        """Mean squared error in each cell against the cell scaled to mean 0, deviation 1: (batch, cells)."""
        return (_cells(reconstruction) - _normalised(_cells(image))[0]).pow(2).mean(dim=-1)

    @staticmethod
    def filled(image: Tensor, reconstruction: Tensor, active: Tensor) -> Tensor:
        """The input with hidden cells replaced by the prediction, at the cells' true means and deviations."""
        _, mean, deviation = _normalised(_cells(image))
        predicted = _volume(_cells(reconstruction) * deviation + mean, image.shape)
        return torch.where(Visible(active).at(image.shape[2]), image, predicted)

    @torch.no_grad()
    def visualise(self, image: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The input, the input with hidden cells at 0, and :meth:`filled`."""
        active = self.draw_mask(image.shape[0], image.device) if active is None else active
        reconstruction = self.reconstruct(image, active)
        return image, image * Visible(active).at(image.shape[2]), self.filled(image, reconstruction, active)


def _cells(x: Tensor) -> Tensor:
    """(batch, 1, S, S, S) to (batch, cells, 16^3), raster order of cells and of voxels inside one."""
    x = x.unflatten(4, (-1, STRIDE)).unflatten(3, (-1, STRIDE)).unflatten(2, (-1, STRIDE))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)


def _volume(cells: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`_cells`."""
    f = [s // STRIDE for s in shape[2:]]
    x = cells.view(shape[0], *f, STRIDE, STRIDE, STRIDE)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape[0], 1, *shape[2:])


def _normalised(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells with mean 0 and (unbiased) deviation 1, the means, the deviations."""
    mean = cells.mean(dim=-1, keepdim=True)
    deviation = (cells.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (cells - mean) / deviation, mean, deviation


def encoder_state(model: MambaMIM) -> Mapping[str, Tensor]:
    """What pre-training leaves for :class:`~zoo_medical.mambamim.Hybird`: ``embeddings.*`` and ``mae.*``, without the
    mask token. ``hybird.load_state_dict(encoder_state(model), strict=False)`` leaves the decoder as it is."""
    state = model.sparse_encoder.state_dict()
    return OrderedDict((k, v) for k, v in state.items() if k != "mae.mask_token")
