"""B'MOJO: attention over the last tokens, over the outputs of a recurrence for those before (fading memory), and over
a few tokens kept for being surprising (eidetic memory).

Paper: Zancato et al., "B'MOJO: Hybrid State Space Realizations of Foundation Models with Eidetic and Fading Memory",
arXiv 2407.06324. B'MOJO-F, without eidetic memory, is the original's code: awslabs/hybrid-model-factory @ 04b6242,
Apache-2.0 (``layers/bmojo_f/modules.py``, ``bmojo_attention.py``). The eidetic memory has no public code and is our
reading of the paper (see :class:`Eidetic`). Differs: the attention's output keeps its type (the original casts it to
bfloat16), and decoding keeps 3 W keys and values a layer instead of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear, RMSNorm

from .attention import Cache, attend
from .bmojo_ssm import SSMS, rotate
from .state import LayerState

Phases = tuple[Tensor, Tensor]


def phases(position: Tensor, dim: int, base: float) -> Phases:
    """(cos, sin) of half-rotation, each (batch, length, dim), for positions (batch, length)."""
    frequency = base ** (-torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)
    angle = (position[..., None].float() * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


class Eidetic:
    """Which tokens are kept word for word: those that the recurrence did not foresee (a reading of the paper).

    A token's surprise is the squared distance between the recurrence's output there and the mean of the four outputs
    before. At the end of each window of W tokens the ``size`` most surprising ones so far are kept (the latest among
    equals); later queries see those of them that have left their sliding window.
    """

    TAPS = 4

    def __init__(self, size: int, window: int) -> None:
        self.size, self.window = size, window

    def surprise(self, fading: Tensor, before: Tensor | None = None) -> Tensor:
        """fading (batch, length, d), ``before`` the four outputs that precede them; (batch, length) float32."""
        x = fading.detach().float()
        first = x.new_zeros(x.shape[0], self.TAPS, x.shape[2]) if before is None else before.float()
        rows = torch.cat([first, x], dim=1)
        foreseen = rows.unfold(1, self.TAPS, 1)[:, :-1].mean(-1)
        return (x - foreseen).square().sum(-1)

    def choose(self, surprise: Tensor, position: Tensor) -> Tensor:
        """Indices (batch, size) of the most surprising of (batch, candidates); position -1: no candidate."""
        # The later of two equals: candidates are looked at from the last position on, by a stable sort.
        order = position.argsort(dim=-1, descending=True, stable=True)
        ranked = torch.where(position >= 0, surprise, -torch.inf).gather(1, order)
        best = ranked.argsort(dim=-1, descending=True, stable=True)[:, : self.size]
        return order.gather(1, best)

    def kept(self, surprise: Tensor) -> Tensor:
        """Positions (batch, windows, size) that queries of each window of a whole text see, -1 for none."""
        batch, length = surprise.shape
        windows = -(-length // self.window)
        found = surprise.new_full((batch, windows, self.size), -1, dtype=torch.long)
        memory = found[:, 0]
        values = surprise.new_full((batch, self.size), -torch.inf)
        for c in range(1, windows):
            new = torch.arange((c - 1) * self.window, c * self.window, device=surprise.device).expand(batch, -1)
            position = torch.cat([memory, new], dim=1)
            errors = torch.cat([values, surprise[:, (c - 1) * self.window : c * self.window]], dim=1)
            index = self.choose(errors, position)
            memory, values = position.gather(1, index), errors.gather(1, index)
            found[:, c] = memory
        return found


class BMojoLayer(nn.Module):
    """One softmax over the tokens of a sliding window, the fading tokens before it and, if asked for, eidetic ones.

    Query i sees tokens i-W+1 .. i, and fading tokens (outputs of the recurrence) i-2W+1 .. i-W, whose keys and values
    come from the same projections (``tie``) and turn by their own positions. Arguments: ``d_model``; ``heads``,
    ``kv_heads``, ``head_dim``; ``window`` W; ``ssm`` "mamba2", "gdn" or "gka" with its arguments in ``ssm_config``;
    ``qk_norm``; ``qkv_bias``, ``o_bias``; ``norm_eps`` of the query and key norms; ``eidetic``: how many tokens are
    kept (0: B'MOJO-F); ``fading``: False leaves the fading tokens out, then with ``eidetic=0`` this is sliding-window
    attention.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        kv_heads: int,
        head_dim: int | None = None,
        window: int = 2048,
        ssm: str = "mamba2",
        ssm_config: Mapping[str, Any] | None = None,
        tie: bool = True,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        o_bias: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        eidetic: int = 0,
        fading: bool = True,
    ) -> None:
        super().__init__()
        if ssm not in SSMS:
            raise ValueError(f"ssm is {ssm!r}; expected one of {', '.join(SSMS)}")
        if heads % kv_heads:
            raise ValueError(f"{heads} heads are not a multiple of {kv_heads} key and value heads")
        if window < 1 or eidetic < 0:
            raise ValueError(f"window is {window} and eidetic {eidetic}; expected at least 1 and 0")
        self.heads, self.kv_heads, self.window, self.dropout = heads, kv_heads, window, dropout
        self.head_dim = d_model // heads if head_dim is None else head_dim
        self.scale = self.head_dim**-0.5 if qk_norm else (d_model / heads) ** -0.5
        self.fading = fading
        self.eidetic = Eidetic(eidetic, window) if eidetic else None
        uses = fading or eidetic > 0
        self.ssm = SSMS[ssm](d_model, heads, kv_heads, self.head_dim, **(ssm_config or {})) if uses else None
        widths = {"q": heads * self.head_dim, "k": kv_heads * self.head_dim, "v": kv_heads * self.head_dim}
        for name, width in widths.items():
            setattr(self, f"{name}_proj", Linear(d_model, width, bias=qkv_bias))
        self.o_proj = Linear(heads * self.head_dim, d_model, bias=o_bias)
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.tie = tie or not fading
        if not self.tie:
            for name, width in widths.items():
                setattr(self, f"{name}_proj_", Linear(d_model, width, bias=qkv_bias))
            self.q_norm_ = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
            self.k_norm_ = RMSNorm(self.head_dim, norm_eps) if qk_norm else None
        self.near, self.far = Cache(window), Cache(2 * window)

    # -- parts -----------------------------------------------------------------------------------------------------

    def _part(self, x: Tensor, name: str, turn: Phases, own: str = "") -> Tensor:
        """Queries, keys or values (batch, length, heads, P): projected, normalised, turned."""
        y = getattr(self, f"{name}_proj{own}")(x).unflatten(-1, (-1, self.head_dim))
        if name == "v":
            return y
        norm = getattr(self, f"{name}_norm{own}")
        return rotate(y if norm is None else norm(y), turn)

    def project(self, x: Tensor, faded: Tensor | None, turn: Phases) -> tuple[list[Tensor], list[Tensor]]:
        """(q, k, v) of the tokens and (q, k, v) of the fading path (none without one)."""
        near = [self._part(x, name, turn) for name in "qkv"]
        if faded is None or not self.fading:
            return near, []
        own = "" if self.tie else "_"
        q = near[0] if self.tie else self._part(x, "q", turn, own)
        return near, [q, self._part(faded, "k", turn, own), self._part(faded, "v", turn, own)]

    def _joint(
        self, near: list[Tensor], far: list[Tensor], q_at: Tensor, k_at: Tensor, f_at: Tensor, kept: list[Tensor]
    ) -> Tensor:
        """One softmax over tokens, fading tokens and kept ones; positions (rows, queries or keys), negative for none.

        near, far: (q, k, v), each (rows, n, heads, P); kept: (k, v, positions) of the eidetic memory, or nothing.
        """
        gap = q_at[:, :, None] - k_at[:, None]
        seen = [(gap >= 0) & (gap < self.window) & (k_at[:, None] >= 0)]
        parts = [near]
        if far:
            gap = q_at[:, :, None] - f_at[:, None]
            seen.append((gap >= self.window) & (gap < 2 * self.window) & (f_at[:, None] >= 0))
            parts.append(far)
        if kept:
            gap = q_at[:, :, None] - kept[2][:, None]
            seen.append((gap >= self.window) & (kept[2][:, None] >= 0))
            parts.append([near[0], kept[0], kept[1]])
        mask = torch.cat(seen, -1)[:, None]
        v = torch.cat([part[2] for part in parts], dim=1)
        dropout = self.dropout if self.training else 0.0
        if self.tie:  # one query for all keys
            q, k = near[0], torch.cat([part[1] for part in parts], dim=1)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, dropout_p=dropout,
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            return out.transpose(1, 2).flatten(2)
        scores = torch.cat([self._scores(part[0], part[1]) for part in parts], -1)
        weights = F.dropout(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), dropout)
        return torch.einsum("rgmqk,rkgp->rqgmp", weights, v).flatten(2)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(rows, kv heads, heads of each, queries, keys)."""
        return torch.einsum("rqgmp,rkgp->rgmqk", q.unflatten(2, (self.kv_heads, -1)) * self.scale, k)

    # -- whole texts -----------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        turn: Phases,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, d_model) to the same. ``turn``: (cos, sin), each (1 or batch, length, P).

        With ``state``, ``position`` (batch,) tokens were read before; it moves on in place.
        """
        ssm_state = None if state is None else {k[4:]: v for k, v in state.items() if k.startswith("ssm_")}
        faded = None if self.ssm is None else self.ssm(x, turn, state=ssm_state, lengths=lengths)
        if state is not None:
            assert position is not None
            return self._go_on(x, faded, turn, state, position, lengths)
        near, far = self.project(x, faded, turn)
        length = x.shape[1]
        if length <= self.window:  # everything is near
            at = torch.arange(length, device=x.device)[None]
            return self.o_proj(self._joint(near, [], at, at, at, []).to(x.dtype))
        # Windows of queries, each against its own tokens and those of the window before it: linear in length.
        windows = -(-length // self.window)
        q, k, v = (self._windows(t, windows) for t in near)
        at = torch.arange(windows * self.window, device=x.device).view(windows, self.window)
        key_at = torch.cat([at - self.window, at], dim=1)
        far_at = torch.cat([at - 2 * self.window, at - self.window], dim=1)
        rows = x.shape[0]

        def paired(t: Tensor, back: int) -> Tensor:
            """Each window behind the one before it, both ``back`` windows earlier: (batch * windows, 2 W, ...)."""
            padded = F.pad(t, (0, 0, 0, 0, 0, 0, back + 1, 0))
            return torch.cat([padded[:, :windows], padded[:, 1 : windows + 1]], dim=2).flatten(0, 1)

        tokens = [q.flatten(0, 1), paired(k, 0), paired(v, 0)]
        old = [t if i == 0 else self._windows(t, windows) for i, t in enumerate(far)]
        fading = [self._windows(old[0], windows).flatten(0, 1), paired(old[1], 1), paired(old[2], 1)] if far else []
        kept: list[Tensor] = []
        if self.eidetic is not None:
            assert faded is not None
            where = self.eidetic.kept(self.eidetic.surprise(faded)).flatten(1)  # (batch, windows * size)
            index = where.clamp(min=0)[..., None, None].expand(-1, -1, self.kv_heads, self.head_dim)
            kept = [t.gather(1, index).unflatten(1, (windows, -1)).flatten(0, 1) for t in near[1:]]
            kept.append(where.unflatten(1, (windows, -1)).flatten(0, 1))
        at, key_at, far_at = (t.repeat(rows, 1) for t in (at, key_at, far_at))
        out = self._joint(tokens, fading, at, key_at, far_at, kept)
        return self.o_proj(out.view(rows, windows * self.window, -1)[:, :length].to(x.dtype))

    def _windows(self, t: Tensor, windows: int) -> Tensor:
        """(batch, length, heads, P) to (batch, windows, W, heads, P)."""
        return F.pad(t, (0, 0, 0, 0, 0, windows * self.window - t.shape[1])).unflatten(1, (windows, self.window))

    # -- texts in pieces -------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> LayerState:
        """The recurrence's state (``ssm_*``), the last W keys and values, 2 W fading ones, and the eidetic memory."""
        weight = self.o_proj.weight
        kind = {"device": weight.device, "dtype": weight.dtype}
        state = self.near.empty(batch, self.kv_heads, self.head_dim, **kind)
        if self.ssm is not None:
            state |= {f"ssm_{k}": v for k, v in self.ssm.init_state(batch).items()}
        if self.fading:
            state |= {f"far_{k}": v for k, v in self.far.empty(batch, self.kv_heads, self.head_dim, **kind).items()}
        if self.eidetic is not None:
            size = (batch, self.eidetic.size)
            state |= {
                "eidetic_k": torch.zeros(*size, self.kv_heads, self.head_dim, **kind),
                "eidetic_v": torch.zeros(*size, self.kv_heads, self.head_dim, **kind),
                "eidetic_at": torch.full(size, -1, dtype=torch.long, device=weight.device),
                "eidetic_surprise": torch.full(size, -torch.inf, device=weight.device),
                "surprise": torch.zeros(batch, self.window, device=weight.device),  # of the tokens in the window
                "recent": torch.zeros(batch, Eidetic.TAPS, weight.shape[0], **kind),  # the recurrence's last outputs
            }
        return state

    def _go_on(
        self, x: Tensor, faded: Tensor | None, turn: Phases, state: LayerState, position: Tensor, lengths: Tensor | None
    ) -> Tensor:
        near, far = self.project(x, faded, turn)
        batch, length = x.shape[:2]
        count = torch.full((batch,), length, device=x.device) if lengths is None else lengths
        surprise = None
        if self.eidetic is not None:
            assert faded is not None
            surprise = self.eidetic.surprise(faded, state["recent"])
            rows = torch.cat([state["recent"], faded], dim=1)
            index = count[:, None] + torch.arange(Eidetic.TAPS, device=x.device)
            state["recent"].copy_(rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2])).detach())
        # At most a window at a time, and where tokens are kept, up to the next end of a window of any row.
        cuts = list(range(0, length, self.window))
        if self.eidetic is not None:
            ends = {int(t) for p in position.unique() for t in range(-int(p) % self.window, length, self.window)}
            cuts = sorted({0, *cuts, *ends})
        found = []
        for start, end in zip(cuts, [*cuts[1:], length], strict=True):
            part = slice(start, end)
            found.append(
                self._piece(
                    [t[:, part] for t in near], [t[:, part] for t in far], state, position + count.clamp(max=start),
                    (count - start).clamp(0, end - start), None if surprise is None else surprise[:, part],
                )
            )  # fmt: skip
        return self.o_proj(torch.cat(found, dim=1).to(x.dtype))

    def _piece(
        self,
        near: list[Tensor],
        far: list[Tensor],
        state: LayerState,
        position: Tensor,
        count: Tensor,
        surprise: Tensor | None,
    ) -> Tensor:
        """At most W tokens, of which ``count`` (batch,) are real, behind ``position`` (batch,)."""
        at = position[:, None] + torch.arange(near[0].shape[1], device=position.device)
        k_at = torch.cat([self.near.positions(state, position), at], dim=1)
        tokens = [near[0], *(torch.cat([state[n].to(t.dtype), t], 1) for n, t in zip("kv", near[1:], strict=True))]
        fading: list[Tensor] = []
        f_at = k_at
        if far:
            faded = {"k": state["far_k"], "v": state["far_v"]}
            f_at = torch.cat([self.far.positions(faded, position), at], dim=1)
            fading = [far[0], *(torch.cat([faded[n].to(t.dtype), t], 1) for n, t in zip("kv", far[1:], strict=True))]
        kept = [state[f"eidetic_{n}"] for n in ("k", "v", "at")] if self.eidetic is not None else []
        out = self._joint(tokens, fading, at, k_at, f_at, kept)
        self.near.write(state, near[1].detach(), near[2].detach(), position, count)
        if far:
            self.far.write(faded, far[1].detach(), far[2].detach(), position, count)
        if surprise is not None:
            self._remember(state, position, count, surprise)
        return out

    def _remember(self, state: LayerState, position: Tensor, count: Tensor, surprise: Tensor) -> None:
        """Rows that reached the end of a window choose anew among what they keep and that window's tokens."""
        assert self.eidetic is not None
        row = torch.arange(len(position), device=position.device)[:, None].expand_as(surprise)
        t = torch.arange(surprise.shape[1], device=position.device)[None].expand_as(surprise)
        real = t < count[:, None]
        slot = (position[:, None] + t) % self.window
        state["surprise"].index_put_((row[real], slot[real]), surprise[real].to(state["surprise"].dtype))
        done = (count > 0) & ((position + count) % self.window == 0)
        if not bool(done.any()):
            return
        places = self.near.positions(state, position + count)  # a whole window where a row is done
        where = torch.cat([state["eidetic_at"], places], dim=1)
        errors = torch.cat([state["eidetic_surprise"], state["surprise"]], dim=1)
        index = self.eidetic.choose(errors, where)
        for name, old in (("at", where), ("surprise", errors)):
            new = old.gather(1, index)
            state[f"eidetic_{name}"].copy_(torch.where(done[:, None], new, state[f"eidetic_{name}"]))
        for name in "kv":
            every = torch.cat([state[f"eidetic_{name}"], state[name]], dim=1)
            new = every.gather(1, index[..., None, None].expand(-1, -1, *every.shape[2:]))
            state[f"eidetic_{name}"].copy_(torch.where(done[:, None, None, None], new, state[f"eidetic_{name}"]))


class FullAttention(nn.Module):
    """The layers between: grouped attention over the whole text with query and key norms and rotary phases (Qwen3)."""

    def __init__(
        self, d_model: int, heads: int, kv_heads: int, head_dim: int, *, qk_norm: bool, bias: bool, norm_eps: float
    ) -> None:
        super().__init__()
        self.kv_heads, self.head_dim = kv_heads, head_dim
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            setattr(self, f"{name}_proj", Linear(d_model, count * head_dim, bias=bias))
        self.o_proj = Linear(heads * head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.cache = Cache()

    def init_state(self, batch: int) -> LayerState:
        weight = self.o_proj.weight
        return self.cache.empty(batch, self.kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        x: Tensor,
        turn: Phases,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`BMojoLayer.forward`."""
        q, k, v = (getattr(self, f"{n}_proj")(x).unflatten(-1, (-1, self.head_dim)) for n in "qkv")
        q, k = (t if norm is None else norm(t) for t, norm in ((q, self.q_norm), (k, self.k_norm)))
        q, k = rotate(q, turn), rotate(k, turn)
        scale = self.head_dim**-0.5
        if state is None:
            return self.o_proj(attend(q, k, v, scale=scale).flatten(-2))
        assert position is not None
        at = position[:, None] + torch.arange(x.shape[1], device=x.device)
        k_at = torch.cat([self.cache.positions(state, position), at], dim=1)
        keys, values = (torch.cat([state[n].to(t.dtype), t], dim=1) for n, t in (("k", k), ("v", v)))
        out = attend(q, keys, values, scale=scale, q_position=at, k_position=k_at)
        self.cache.write(state, k.detach(), v.detach(), position, lengths)
        return self.o_proj(out.flatten(-2))
