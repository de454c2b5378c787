"""The parts of Hydra's language model beside its state-space path: sparse global attention, experts a chunk, memories.

Paper: Chaudhary et al., "Hydra: A Modular Architecture for Efficient Long-Context Reasoning" (v1: "A 1.6B-Parameter
State-Space Language Model with Sparse Attention, Mixture-of-Experts, and Memory"), arXiv 2508.15099. Its code could not
be obtained; what the paper's readable parts leave open is our reading. Product keys: Lample et al., arXiv 1907.05242.

All parts cut a text into chunks, and what a chunk leaves behind (its summary, its experts' choice, its writing into the
workspace) is seen by later chunks alone, so every part is causal. They read whole texts; the model keeps the text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear

from .attention import rotary


class SparseGlobalAttention(nn.Module):
    """Causal attention over the last ``window`` tokens, the first one, and summaries of the finished chunks that the
    window no longer holds whole.

    A summary is the mean of its chunk's keys and values (``summary`` "mean") or the last token's ("last"). Rotary
    phases are those of the tokens, so a mean summary has the mean of turned keys. Keys a query: window + length / chunk
    + 1 at most; a window that holds the text gives full attention.
    """

    def __init__(self, d_model: int, heads: int, window: int = 256, chunk: int = 64, summary: str = "mean") -> None:
        super().__init__()
        if d_model % heads or (d_model // heads) % 2:
            raise ValueError(f"d_model {d_model} does not divide into {heads} heads of even width")
        if summary not in ("mean", "last"):
            raise ValueError(f"summary is {summary!r}; expected 'mean' or 'last'")
        if window < 1 or chunk < 1:
            raise ValueError(f"window is {window} and chunk {chunk}; expected at least 1 each")
        self.heads, self.window, self.chunk, self.summary = heads, window, chunk, summary
        for name in "qkvo":
            setattr(self, f"{name}_proj", Linear(d_model, d_model, bias=False))

    def summaries(self, x: Tensor) -> Tensor:
        """(batch, length, heads, d) to one a finished chunk, (batch, chunks, heads, d)."""
        finished = x.shape[1] // self.chunk
        parts = x[:, : finished * self.chunk].unflatten(1, (finished, self.chunk))
        return parts.mean(2) if self.summary == "mean" else parts[:, :, -1]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        q, k, v = (getattr(self, f"{n}_proj")(x).unflatten(-1, (self.heads, -1)) for n in "qkv")
        at = torch.arange(x.shape[1], device=x.device)
        q, k = (rotary(t, at[None], t.shape[-1]) for t in (q, k))
        gap = at[:, None] - at
        near = (gap >= 0) & ((gap < self.window) | (at == 0))
        if x.shape[1] >= self.chunk:
            ends = torch.arange(x.shape[1] // self.chunk, device=x.device) * self.chunk + self.chunk - 1
            left = at[:, None] - (ends - self.chunk + 1) >= self.window  # its first token is no longer in the window
            near = torch.cat([near, (at[:, None] > ends) & left], dim=1)
            k, v = (torch.cat([t, self.summaries(t)], dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=near[None, None]
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = Linear(d_model, hidden, bias=False), Linear(d_model, hidden, bias=False)
        self.w2 = Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ChunkExperts(nn.Module):
    """A mixture of SwiGLU experts with one choice a chunk: ``top_k`` of ``experts``, their weights summing to 1.

    ``routing`` "previous": a chunk's experts are chosen by the mean of the chunk before it (the first chunk's by its
    first token), which is causal; "current": by its own mean, for analysis.
    """

    def __init__(
        self, d_model: int, hidden: int, experts: int = 8, top_k: int = 2, chunk: int = 64, routing: str = "previous"
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}; expected 1 to the {experts} experts")
        if routing not in ("previous", "current"):
            raise ValueError(f"routing is {routing!r}; expected 'previous' or 'current'")
        self.top_k, self.chunk, self.routing = top_k, chunk, routing
        self.router = Linear(d_model, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(d_model, hidden) for _ in range(experts))

    def route(self, x: Tensor) -> Tensor:
        """Router logits of each chunk, (batch, chunks, experts)."""
        chunks = -(-x.shape[1] // self.chunk)
        padded = F.pad(x, (0, 0, 0, chunks * self.chunk - x.shape[1])).unflatten(1, (chunks, self.chunk))
        last = x.shape[1] - (chunks - 1) * self.chunk
        sizes = torch.full((chunks, 1), self.chunk, device=x.device, dtype=x.dtype)
        sizes[-1] = last
        means = padded.sum(2) / sizes
        return self.router(means if self.routing == "current" else torch.cat([x[:, :1], means[:, :-1]], dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, length, d_model) to the same, and the router's logits, (batch, chunks, experts)."""
        logits = self.route(x)
        best, which = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        share = torch.zeros_like(logits, dtype=torch.float32).scatter(-1, which, best / best.sum(-1, keepdim=True))
        share = share.to(x.dtype).repeat_interleave(self.chunk, dim=1)[:, : x.shape[1]]  # (batch, length, experts)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = y + share[..., e : e + 1] * expert(x)
        return y, logits

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Load balance ``E sum_e f_e P_e`` (1 when both are uniform; f: share of choices, P: mean probability), and the
        router's z loss, the mean squared log-sum-exp."""
        p = logits.float().softmax(-1).flatten(0, 1)
        chosen = torch.zeros_like(p).scatter(1, p.topk(self.top_k, dim=-1).indices, 1.0) / self.top_k
        balance = p.shape[1] * (chosen.mean(0) * p.mean(0)).sum()
        return balance, logits.float().logsumexp(-1).square().mean()


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with one head, of (batch, tokens, d); with an axis of heads, without which ONNX has none."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]


class Workspace(nn.Module):
    """A few latent slots: a finished chunk writes into them, the tokens of later chunks read them.

    Writing: slots attend over the chunk's tokens and take the answer through a GRU cell. Reading: tokens attend over
    the slots. The slots begin as parameters, anew for each text.
    """

    def __init__(self, d_model: int, slots: int = 32, chunk: int = 64) -> None:
        super().__init__()
        self.chunk = chunk
        self.slots = nn.Parameter(torch.randn(slots, d_model) * d_model**-0.5)
        for name in ("write_q", "write_k", "write_v", "read_q", "read_k", "read_v"):
            setattr(self, name, Linear(d_model, d_model, bias=False))
        self.gate = nn.GRUCell(d_model, d_model)

    def write(self, slots: Tensor, x: Tensor) -> Tensor:
        """slots (batch, S, d) after a chunk x (batch, tokens, d)."""
        read = _attended(self.write_q(slots), self.write_k(x), self.write_v(x))
        return self.gate(read.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)

    def read(self, slots: Tensor, x: Tensor) -> Tensor:
        """What tokens x (batch, tokens, d) find in the slots."""
        return _attended(self.read_q(x), self.read_k(slots), self.read_v(slots))

    def forward(self, x: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, length, d_model) to the same, and the slots after the last finished chunk. slots: to go on from."""
        slots = self.slots.expand(x.shape[0], -1, -1).to(x.dtype) if slots is None else slots
        found = []
        for start in range(0, x.shape[1], self.chunk):
            part = x[:, start : start + self.chunk]
            found.append(self.read(slots, part))
            if part.shape[1] == self.chunk:
                slots = self.write(slots, part)
        return torch.cat(found, dim=1), slots


class ProductKeys(nn.Module):
    """A table of ``keys``^2 values, read at the ``top_k`` best pairs of half keys for each of ``heads`` queries.

    The score of pair (i, j) is q1 . a_i + q2 . b_j; the best pairs lie among the best ``top_k`` of either half.
    """

    def __init__(self, d_model: int, keys: int = 256, heads: int = 4, top_k: int = 16, d_key: int = 64) -> None:
        super().__init__()
        if d_key % 2 or not 1 <= top_k <= keys:
            raise ValueError(f"d_key is {d_key} and top_k {top_k}; expected an even width and 1 to {keys}")
        self.heads, self.keys, self.top_k = heads, keys, top_k
        self.query = Linear(d_model, heads * d_key, bias=False)
        self.norm = nn.LayerNorm(d_key)
        self.half_keys = nn.Parameter(torch.randn(2, heads, keys, d_key // 2) * (d_key // 2) ** -0.5)
        self.values = nn.Embedding(keys * keys, d_model)
        nn.init.normal_(self.values.weight, std=d_model**-0.5)

    def select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and indices of the values read, (batch, length, heads, top_k) each."""
        q = self.norm(self.query(x).unflatten(-1, (self.heads, -1)))
        halves = torch.einsum("blhtd,thkd->blhtk", q.unflatten(-1, (2, -1)), self.half_keys)
        best, at = halves.topk(self.top_k, dim=-1)
        total = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        place = (at[..., 0, :, None] * self.keys + at[..., 1, None, :]).flatten(-2)
        score, chosen = total.topk(self.top_k, dim=-1)
        return score, place.gather(-1, chosen)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        score, place = self.select(x)
        return torch.einsum("blhk,blhkd->bld", score.softmax(-1), self.values(place))
