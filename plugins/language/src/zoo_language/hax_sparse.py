"""HAX's attention branch: which keys a query may see, and the sum over them.

Paper: Zhan et al., "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention",
arXiv 2507.00449. Original: DeepGraphLearning/HAX @ 73d3c18 (``src/modeling_enhanced_mamba.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear

from .attention import Cache
from .state import LayerState

#: Sources of keys, in the order in which the original draws their hash projections.
HASHED = ("argmax_lsh", "sign_bin_lsh")
POSITIONAL = ("sliding_window", "sink", "dilated")
SOURCES = (*POSITIONAL, *HASHED, "key_selection")
EPS = 1e-12  # torch.nn.functional.normalize


@dataclass(frozen=True)
class Pattern:
    """Which keys queries may see: ``arch`` as the original writes it, sources joined by "+", or "full", or "none".

    With "none", the default of the original's configurations, no key is allowed and every query averages over the text.

    Each source has ``budget = keys // (number of sources)`` keys a query. ``num_hash``: hash functions of the LSH
    sources. ``max_length``: what the dilated pattern spreads its keys over.
    """

    arch: str
    keys: int = 64
    num_hash: int = 8
    max_length: int = 2048

    def __post_init__(self) -> None:
        parts = self.arch.split("+") if self.arch else []
        alone = self.arch in ("full", "none")
        if not alone and (not parts or set(parts) - set(SOURCES) or len(set(parts)) < len(parts)):
            raise ValueError(
                f"sparse_arch is {self.arch!r}; expected 'full' or 'none' alone, or different ones of "
                f"{', '.join(SOURCES)}, joined by '+'"
            )
        if not alone and self.budget < 1:
            raise ValueError(f"sparse_keys {self.keys} gives no key to each of the {len(parts)} sources of {self.arch}")
        if "dilated" in parts and self.dilation < 1:
            raise ValueError(f"data_max_length {self.max_length} is below the {self.budget} keys that dilated spreads")
        if (self.hashes and self.num_hash < 1) or ("sign_bin_lsh" in parts and self.num_hash > 63):
            raise ValueError(f"num_hash is {self.num_hash}; expected 1 to 63 (argmax_lsh takes more)")

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.arch.split("+"))

    @property
    def budget(self) -> int:
        return self.keys // len(self.sources)

    @property
    def dilation(self) -> int:
        return self.max_length // self.budget

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(h for h in HASHED if h in self.sources)

    @property
    def reads_context(self) -> bool:
        """Whether the keys depend on what the text says, and not only on where it stands."""
        return bool(self.hashes) or "key_selection" in self.sources

    @property
    def never_empty(self) -> bool:
        """Whether every query has a key."""
        return bool({"full", "sliding_window", "sink", "key_selection"} & set(self.sources))

    def allowed(
        self, query: Tensor, key: Tensor, buckets: list[tuple[Tensor, Tensor]], score: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(allowed, past), both (batch, queries, keys) bool.

        query (batch or 1, queries), key (batch or 1, keys): positions, negative for keys that do not exist, increasing
        where a source depends on the content. buckets: (of queries, of keys) of each hash source. score: of keys.
        """
        past = (key[:, None] >= 0) & (key[:, None] <= query[:, :, None])
        if self.arch == "full":
            return past, past
        found = torch.zeros_like(past)
        if "sliding_window" in self.sources:
            found = found | (past & (query[:, :, None] - key[:, None] < self.budget))
        if "sink" in self.sources:
            found = found | (past & (key[:, None] < self.budget))
        if "dilated" in self.sources:
            found = found | (past & (key[:, None] % self.dilation == self.dilation - 1))
        for of_query, of_key in buckets:
            same = past & (of_query[:, :, None] == of_key[:, None])
            recent = same.flip(-1).cumsum(-1).flip(-1) <= self.budget  # the most recent of the bucket
            found = found | (same & recent)
        if score is not None:
            ranked = torch.where(past, score[:, None].to(torch.float32), -torch.inf)
            best = ranked.topk(min(self.budget, ranked.shape[-1]), dim=-1).indices
            chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True)
            found = found | (chosen & past)
        return found, past


class SparseAttention(nn.Module):
    """``gain * softmax(Q K^T / sqrt(N)) V`` over the keys of a :class:`Pattern`; K and Q are projections of V.

    One head: keys and queries of ``d_state`` N channels, values the mixer's own ``d_inner`` channels. Without a key a
    query averages over everything, as in the original (forbidden scores are the least number, not minus infinity).

    The original's buckets and key scores are not causal: means and norms are over the whole text. ``causal=True`` takes
    those of the text so far instead, each token's bucket and score staying as they were when it was read; then the text
    can be read in pieces. ``hash_seed``: fixed projections; None draws new ones at every forward, as the original.
    """

    def __init__(
        self, d_inner: int, d_state: int, pattern: Pattern, *, causal: bool = False, hash_seed: int | None = None
    ) -> None:
        super().__init__()
        self.d_inner, self.d_state, self.pattern, self.causal = d_inner, d_state, pattern, causal
        self.xx_proj = Linear(d_inner, 2 * d_state, bias=False)
        self.gain = nn.Parameter(torch.ones(d_inner))
        self.selects = "key_selection" in pattern.sources
        if self.selects:
            wide = 2 * d_state
            self.dx_proj_1, self.dx_proj_2 = nn.Linear(wide, wide), nn.Linear(wide, wide)
            self.dx_proj_3 = nn.Linear(wide, 1)
        self.hash: Tensor | None
        fixed = None
        if pattern.hashes and hash_seed is not None:
            draws = np.random.RandomState(hash_seed).standard_normal((len(pattern.hashes), d_state, pattern.num_hash))
            fixed = torch.from_numpy(draws.astype(np.float32))
        self.register_buffer("hash", fixed, persistent=False)
        only_window = pattern.sources == ("sliding_window",)
        self.cache = Cache(pattern.budget if only_window else None)

    # -- state -----------------------------------------------------------------------------------------------------

    def init_state(self, batch: int, *, device=None, dtype=None) -> LayerState:
        """Keys (with their scores and hash bits behind them), values, and the sums behind the running norms."""
        extra = (self.pattern.num_hash * len(self.pattern.hashes)) + self.selects
        device = self.gain.device if device is None else device
        dtype = self.gain.dtype if dtype is None else dtype
        slots = self.cache.window or 0
        state = {
            "k": torch.zeros(batch, slots, 1, self.d_state + extra, device=device, dtype=dtype),
            "v": torch.zeros(batch, slots, 1, self.d_inner, device=device, dtype=dtype),
        }
        if self.pattern.reads_context:
            # (q, q^2, k, k^2, (sum of q)^2): sums so far. In float64: a bit is the sign of a difference.
            state["sums"] = torch.zeros(batch, 5, self.d_state, device=device, dtype=self._exact(device))
        return state

    @staticmethod
    def _exact(device: torch.device | str) -> torch.dtype:
        return torch.float32 if torch.device(device).type == "mps" else torch.float64

    # -- what buckets and scores are made of -----------------------------------------------------------------------

    def _normalised(
        self, k: Tensor, q: Tensor, state: LayerState | None, position: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Centred q and k and the summed q, each over its norm along the text; (batch, length, N)."""
        if not self.causal:
            parts = [q - q.mean(1, keepdim=True), k - k.mean(1, keepdim=True), q.cumsum(1)]
            cq, ck, total = (F.normalize(p, dim=1) for p in parts)  # along the text: the original's default axis
            return cq, ck, total
        exact = self._exact(q.device)
        q, k = q.to(exact), k.to(exact)
        batch, length = q.shape[:2]
        before = q.new_zeros(batch, 5, 1, self.d_state) if state is None else state["sums"].to(exact)[:, :, None]
        start = torch.zeros(batch, device=q.device, dtype=torch.long) if position is None else position
        count = (start[:, None] + torch.arange(1, length + 1, device=q.device))[..., None].to(exact)
        sums = torch.stack([q, q * q, k, k * k], dim=1).cumsum(2) + before[:, :4]
        total = sums[:, 0]
        squares = (total * total).cumsum(1) + before[:, 4]

        def over(x: Tensor, square: Tensor) -> Tensor:
            return x / square.clamp(min=0).sqrt().clamp(min=EPS)

        mean_q, mean_k = total / count, sums[:, 2] / count
        cq = over(q - mean_q, sums[:, 1] - count * mean_q * mean_q)
        ck = over(k - mean_k, sums[:, 3] - count * mean_k * mean_k)
        if state is not None:
            every = torch.cat([before, torch.cat([sums, squares[:, None]], dim=1)], dim=2)  # (batch, 5, length + 1, N)
            last = torch.full((batch,), length, device=q.device) if lengths is None else lengths
            end = every.gather(2, last[:, None, None, None].expand(-1, 5, 1, self.d_state))[:, :, 0]
            state["sums"].copy_(end.detach())
        return cq, ck, over(total, squares)

    def score(self, k: Tensor, total: Tensor) -> Tensor:
        """How much later queries will want each key, (batch, length); trained by :meth:`gate_loss` alone."""
        x = torch.cat([k, total.to(k.dtype)], dim=-1).detach()
        x = F.relu(self.dx_proj_2(F.relu(self.dx_proj_1(x))))
        return self.dx_proj_3(x)[..., 0]

    def _codes(self, x: Tensor, hashes: list[Tensor]) -> list[Tensor]:
        """The hash bits (0 or 1), or for argmax the one that is largest, (batch, length, num_hash), of each source."""
        found = []
        for name, h in zip(self.pattern.hashes, hashes, strict=True):
            projected = x @ h.to(x.dtype)
            found.append(
                projected > 0 if name == "sign_bin_lsh" else F.one_hot(projected.argmax(-1), projected.shape[-1]) > 0
            )
        return found

    @staticmethod
    def _bucket(name: str, codes: Tensor) -> Tensor:
        if name == "argmax_lsh":
            return codes.long().argmax(-1)
        return (codes.long() << torch.arange(codes.shape[-1], device=codes.device)).sum(-1)

    def _hashes(self, given: Iterator[Tensor] | None, like: Tensor) -> list[Tensor]:
        if given is not None:
            return [next(given) for _ in self.pattern.hashes]
        if self.hash is not None:
            return list(self.hash)
        shape = (self.d_state, self.pattern.num_hash)
        return [torch.randn(shape, device=like.device, dtype=torch.float32) for _ in self.pattern.hashes]

    # -- the branch ------------------------------------------------------------------------------------------------

    def forward(
        self,
        h: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        hashes: Iterator[Tensor] | None = None,
        losses: list[Tensor] | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """h (batch, length, d_inner), the mixer's input after its convolution, to the same.

        hashes: the projections (N, num_hash) to use, taken in order. losses: receives :meth:`gate_loss`, whose draws
        are ``noise`` (batch, length), with ``mask`` (batch, length) False at padding.
        """
        k, q = self.xx_proj(h).chunk(2, dim=-1)
        k = k / self.d_state**0.5
        batch, length = h.shape[:2]
        rows = torch.zeros(1, dtype=torch.long, device=h.device) if position is None else position
        at = rows[:, None] + torch.arange(length, device=h.device)
        codes_q: list[Tensor] = []
        marks: list[Tensor] = []  # what is kept of each key beside itself
        score = None
        if self.pattern.reads_context:
            cq, ck, total = self._normalised(k, q, state, position, lengths)
            if self.selects:
                score = self.score(k, total)
                marks.append(score[..., None])
            if self.pattern.hashes:
                projections = self._hashes(hashes, q)
                codes_q, codes_k = self._codes(cq, projections), self._codes(ck, projections)
                marks += [code.to(k.dtype) for code in codes_k]
        if losses is not None and self.selects:
            assert score is not None
            losses.append(self.gate_loss(q, k, score, noise, mask))
        key_at, v = at, h
        if state is not None:
            assert position is not None
            kept = torch.cat([k, *marks], dim=-1)[:, :, None]
            key_at = torch.cat([self.cache.positions(state, position), at.expand(batch, -1)], dim=1)
            every = torch.cat([state["k"].to(k.dtype), kept], dim=1)[:, :, 0]
            v = torch.cat([state["v"].to(h.dtype)[:, :, 0], h], dim=1)
            self.cache.write(state, kept.detach(), h.detach()[:, :, None], position, lengths)
            k, rest = every[..., : self.d_state], every[..., self.d_state :]
            if self.selects:
                score, rest = rest[..., 0], rest[..., 1:]
            marks = [c > 0.5 for c in rest.split(self.pattern.num_hash, dim=-1)] if self.pattern.hashes else []
        elif self.pattern.hashes:
            marks = codes_k
        buckets = []
        if codes_q:
            for name, a, b in zip(self.pattern.hashes, codes_q, marks, strict=True):
                buckets.append((self._bucket(name, a), self._bucket(name, b)))
        allowed, past = self.pattern.allowed(at, key_at, buckets, score if self.selects else None)
        scores = q @ k.transpose(1, 2)
        least = torch.finfo(scores.dtype).min
        scores = scores + torch.where(allowed, 0.0, least).to(scores.dtype)
        if self.causal or state is not None:
            scores = scores.masked_fill(~past, -torch.inf)
        return scores.softmax(-1) @ v * self.gain

    def gate_loss(self, q: Tensor, k: Tensor, score: Tensor, noise: Tensor | None, mask: Tensor | None) -> Tensor:
        """Ranks some keys, drawn at random, by the sigmoid scores that all later queries give them; a scalar.

        Mean over the batch and all ordered pairs of the binary cross-entropy between the sigmoid of the difference of
        scores and which of the two is wanted more. Only the score's own parameters receive its gradient.
        """
        noise = torch.rand(score.shape, device=score.device) if noise is None else noise
        if mask is not None:
            noise = noise.masked_fill(~mask.bool(), -1.0)
        chosen = noise.topk(min(self.pattern.budget, noise.shape[1]), dim=-1).indices  # (batch, s)
        picked = k.detach().gather(1, chosen[..., None].expand(-1, -1, self.d_state))
        later = torch.arange(q.shape[1], device=q.device)[None, :, None] >= chosen[:, None]  # (batch, queries, s)
        target = ((q.detach() @ picked.transpose(1, 2)).sigmoid() * later).sum(1)
        own = score.gather(1, chosen)
        wanted = 0.5 * (
            (target[:, :, None] > target[:, None]).to(own.dtype) + (target[:, :, None] >= target[:, None]).to(own.dtype)
        )
        return F.binary_cross_entropy_with_logits(own[:, :, None] - own[:, None], wanted)
