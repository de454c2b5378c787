"""What a frozen backbone says about a recording: gates of its blocks, reduced over windows of time to tokens.

Source: arXiv 2508.14086, section III; jhpuah/EEGDM ``LatentActivityExtractor`` and ``LatentActivityReducer``.
Axes are named as there: B batch, C EEG channels, n layers, q queries, p windows, L samples, H features; after
reduction T towers, P pools, Q queries that a stack reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .backbone import QUERIES, DiffusionBackbone

#: A backbone was trained on signals of so many samples; longer ones are folded into pieces of them.
FOLD = 1000


class LatentExtractor(nn.Module):
    """Gates and filters of the layers start to end of a frozen backbone, read at diffusion step ``diffusion_t``.

    ``use_cond``: class ids of the EEG channels, in their order; by default 0, 1, ... ``fold``: signals of more samples
    are cut into ``samples // fold`` pieces (None: never).

    Signals are folded as the original folds them, which its checkpoints for long signals are trained with: pieces lie
    channel by channel, but class ids cycle over the channels along them and the result is read as if pieces came
    first. So "channel" j of slot g in the result holds piece (g C + j) % f of the real channel (g C + j) // f, seen
    with the class id of channel j.

    forward: (B, C, L) signals, or (B, C, in_channels, L); optionally ``local`` (B, C, F, W). Returns
    (B, C, n, q, L, H). Nothing has a gradient.
    """

    cond: Tensor
    diffusion_steps: Tensor

    def __init__(
        self,
        model: DiffusionBackbone,
        start: int = 0,
        end: int | None = None,
        diffusion_t: int = 1,
        query: Sequence[str] = ("inter",),
        use_cond: Sequence[int] | None = None,
        fold: int | None = FOLD,
    ) -> None:
        super().__init__()
        depth = len(model.layers)
        self.start, self.end = start, end or depth
        if not 0 <= self.start < self.end <= depth:
            raise ValueError(f"layers {start}:{end} of {depth} are none; expected 0 <= start < end <= {depth}")
        if unknown := [q for q in query if q not in QUERIES]:
            raise ValueError(f"query holds {unknown[0]!r}; expected names of {', '.join(QUERIES)}")
        self.model = model.requires_grad_(False).eval()
        self.query, self.fold = tuple(query), fold
        ids = list(range(model.channels)) if use_cond is None else list(use_cond)
        self.channels, self.n_layer = len(ids), self.end - self.start
        self.register_buffer("cond", torch.tensor(ids, dtype=torch.long).reshape(-1, 1))
        self.register_buffer("diffusion_steps", torch.full((len(ids), 1), diffusion_t, dtype=torch.long))

    def train(self, mode: bool = True) -> LatentExtractor:
        """The backbone stays in eval mode, where its kernels are kept: it is frozen."""
        super().train(mode)
        self.model.eval()
        return self

    def pieces(self, signals: Tensor, rate: float = 1.0) -> int:
        """Into how many pieces the signals are folded. Raises ValueError for shapes that do not fit."""
        if signals.dim() not in (3, 4) or signals.shape[1] != self.channels:
            raise ValueError(
                f"signals have shape {tuple(signals.shape)}; expected (batch, {self.channels} channels, samples), the "
                f"channels in the order of the class ids {self.cond.flatten().tolist()}"
            )
        length = signals.shape[-1]
        if self.fold is None or length <= self.fold:
            return 1
        if rate != 1:
            raise ValueError(f"rate is {rate} for {length} samples; signals longer than {self.fold} take rate 1 only")
        count = length // self.fold
        if length % count:
            raise ValueError(
                f"signals of {length} samples do not divide into {count} equal pieces; give a multiple of {self.fold}"
            )
        return count

    @torch.no_grad()
    def forward(self, signals: Tensor, local: Tensor | None = None, rate: float = 1.0) -> Tensor:
        f = self.pieces(signals, rate)
        batch = signals.shape[0]
        x = signals.flatten(0, 1)
        x = x[:, None] if x.dim() == 2 else x
        x = x.unflatten(-1, (f, -1)).movedim(-2, 1).flatten(0, 1)  # (B C f), in_channels, L / f
        if local is not None:
            local = local.flatten(0, 1)
            local = local[:, None] if local.dim() == 3 else local
            local = local.unflatten(-1, (f, -1)).movedim(-2, 1).flatten(0, 1)
        context = self.model.condition(self.diffusion_steps.repeat(batch * f, 1), self.cond.repeat(batch * f, 1))
        h: Tensor | None = self.model.embed(x)
        found = []
        for i, block in enumerate(self.model.layers):
            if i == self.end:
                break
            gates = block.gates(h, context, local, rate)  # type: ignore[operator]
            if i >= self.start:
                found.append(torch.stack([gates[q] for q in self.query], dim=1))
            if i + 1 < self.end:
                h = block.following(h, gates["inter"])  # type: ignore[operator]
        latents = torch.stack(found, dim=1)  # (B f C), n, q, L / f, H
        latents = latents.unflatten(0, (batch, f, self.channels))
        return latents.movedim(1, 4).flatten(4, 5)


class LatentReducer(nn.Module):
    """Latents to tokens: the mean or the (unbiased) standard deviation of every window of time.

    ``query`` and ``reduce``: lists of the same length; ``window_size``, ``window_step`` samples; ``L``: the signals'
    length, from which the number of windows follows. ``pool_merge``: windows stay pools of their own ("share"), become
    further channels ("mix") or features ("cat"). ``multi_query_merge``, for two queries or more: all read by one stack
    ("seq"), a tower each ("ind"), or features ("cat"). ``rescale``: values to about [-1, 1] by the factor and offset
    of the LAST query, as in the original.

    forward: (B, C, n, q, L, H) to (B, n, T, P, Q, C, H). Raises ValueError for lists and sizes that do not fit.
    """

    def __init__(
        self,
        query: Sequence[str] = ("inter",),
        reduce: Sequence[str] = ("mean",),
        rescale: bool = False,
        L: int = 1000,
        window_size: int = 200,
        window_step: int = 200,
        pool_merge: str = "share",
        multi_query_merge: str = "seq",
    ) -> None:
        super().__init__()
        if len(query) != len(reduce) or not query:
            raise ValueError(f"query {list(query)} and reduce {list(reduce)} must be lists of the same length")
        if unknown := [r for r in reduce if r not in ("mean", "std")]:
            raise ValueError(f"reduce holds {unknown[0]!r}; expected 'mean' or 'std'")
        if pool_merge not in ("share", "mix", "cat"):
            raise ValueError(f"pool_merge is {pool_merge!r}; expected 'share', 'mix' or 'cat'")
        if multi_query_merge not in ("seq", "ind", "cat"):
            raise ValueError(f"multi_query_merge is {multi_query_merge!r}; expected 'seq', 'ind' or 'cat'")
        if window_size > L or (L - window_size) % window_step:
            raise ValueError(
                f"windows of {window_size} samples every {window_step} do not tile L={L}: L - window_size must be a "
                "multiple of window_step"
            )
        self.reduce, self.L = tuple(reduce), L
        self.window_size, self.window_step = window_size, window_step
        self.pool_merge, self.multi_query_merge = pool_merge, multi_query_merge
        self.n_query = len(query)
        self.n_pool = (L - window_size) // window_step + 1
        self.width_factor = self.n_pool if pool_merge == "cat" else 1
        if self.n_query > 1 and multi_query_merge == "cat":
            self.width_factor *= self.n_query
        self.scale, self.offset = 1.0, 0.0
        if rescale:
            self.scale, self.offset = (2.0, -1.0) if query[-1] == "gate" else (1.0, 0.0)
            if reduce[-1] == "std":
                self.scale, self.offset = 2 * self.scale, -1.0

    @torch.no_grad()
    def forward(self, latents: Tensor, rate: float = 1.0) -> Tensor:
        if rate != 1 and latents.shape[4] != self.L * rate:
            raise ValueError(
                f"signals have {latents.shape[4]} samples at rate {rate}; expected {self.L} * {rate}, a whole number"
            )
        if latents.shape[4] < self.window_size:
            raise ValueError(f"signals have {latents.shape[4]} samples; a window takes {self.window_size}")
        windows = latents.unfold(4, self.window_size, self.window_step)  # B C n q p H l
        reduced = [
            windows[:, :, :, i].mean(-1) if how == "mean" else windows[:, :, :, i].std(-1)
            for i, how in enumerate(self.reduce)
        ]
        tokens = torch.stack(reduced, dim=3) * self.scale + self.offset  # B C n q p H
        if self.pool_merge == "share":
            tokens = tokens.permute(0, 2, 4, 3, 1, 5)
        elif self.pool_merge == "mix":
            tokens = tokens.permute(0, 2, 3, 4, 1, 5).flatten(3, 4)[:, :, None]
        else:
            tokens = tokens.permute(0, 2, 3, 1, 4, 5).flatten(4, 5)[:, :, None]
        # B n P q C H
        if self.n_query == 1 or self.multi_query_merge == "seq":
            return tokens[:, :, None]
        if self.multi_query_merge == "ind":
            return tokens.permute(0, 1, 3, 2, 4, 5)[:, :, :, :, None]
        return tokens.permute(0, 1, 2, 4, 3, 5).flatten(4, 5)[:, :, None, :, None]
