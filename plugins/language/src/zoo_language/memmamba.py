"""MemMamba: Mamba layers that note important tokens in a pool of fixed size and read the notes where they forget.

Paper: Wang et al., "MemMamba: Rethinking Memory Patterns in State Space Model", arXiv 2510.03279. No official code or
weights are public, and the paper's equations were not readable: the parts are the paper's (note block,
threshold-triggered cross-token attention, periodic cross-layer attention, pools of limited capacity), what fills the
gaps is our reading and said so where it stands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Linear, Mamba, Recomputed, RMSNorm

from ._base import CausalLM, normed
from .state import LayerState, State


@dataclass
class Views:
    """The pools that the tokens of a call see: one a piece. notes (batch, pieces, P, d_s), valid (batch, pieces, P),
    ``piece`` (length,): which of them each token sees."""

    notes: Tensor
    valid: Tensor
    piece: Tensor


class Note(nn.Module):
    """Importance scores, notes, and the pool that keeps those of the highest scores.

    ``s = sigmoid(w2 . relu(W1 x))`` with W1 to a quarter of the width; a token with s above ``threshold`` leaves the
    note ``s * compress(x)``. The pool holds the ``pool`` notes of the highest scores so far, the earlier one among
    equals (a full pool replaces its lowest one by a higher one). Notes of ``chunk`` tokens enter together: their tokens
    see the pool as it was before, so a note never serves its own or earlier tokens; ``chunk=1`` is the sequential
    definition.
    Our reading: the score multiplies the note, so that the scorer learns behind a hard threshold.
    """

    def __init__(self, d_model: int, note_dim: int, pool: int, threshold: float, chunk: int) -> None:
        super().__init__()
        hidden = max(1, d_model // 4)
        self.score1, self.score2 = Linear(d_model, hidden, bias=False), Linear(hidden, 1, bias=False)
        self.compress = Linear(d_model, note_dim, bias=False)
        self.note_dim, self.pool, self.threshold, self.chunk = note_dim, pool, threshold, chunk

    def init_state(self, batch: int) -> LayerState:
        """``pool_*``: the pool; ``new_*``: notes of the chunk that is not full yet."""
        weight = self.compress.weight
        return {
            "pool_note": weight.new_zeros(batch, self.pool, self.note_dim),
            "pool_score": weight.new_full((batch, self.pool), -torch.inf),
            "new_note": weight.new_zeros(batch, self.chunk, self.note_dim),
            "new_score": weight.new_full((batch, self.chunk), -torch.inf),
        }

    def notes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Notes (batch, length, d_s), and their scores, minus infinity for tokens that leave none."""
        score = torch.sigmoid(self.score2(F.relu(self.score1(x))))
        kept = torch.where(score > self.threshold, score, -torch.inf)[..., 0].detach()
        return score * self.compress(x), kept

    def best(self, note: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The pool's worth of (batch, candidates), highest score first, earlier ones first among equals."""
        order = score.argsort(dim=-1, descending=True, stable=True)[:, : self.pool]
        return note.gather(1, order[..., None].expand(-1, -1, self.note_dim)), score.gather(1, order)

    def forward(self, x: Tensor, state: LayerState | None, position: Tensor | None, lengths: Tensor | None) -> Views:
        """The pools that the tokens of x (batch, length, d_model) see; ``state`` moves on."""
        note, score = self.notes(x)
        if state is None:
            return self._whole(note, score)
        assert position is not None
        return self._go_on(note, score, state, position, lengths)

    def _views(self, found: list[tuple[Tensor, Tensor]], piece: Tensor) -> Views:
        notes, scores = (torch.stack([pair[i] for pair in found], dim=1) for i in (0, 1))
        return Views(notes, scores > -torch.inf, piece)

    def _whole(self, note: Tensor, score: Tensor) -> Views:
        batch, length = score.shape
        pool = note.new_zeros(batch, self.pool, self.note_dim), score.new_full((batch, self.pool), -torch.inf)
        found = []
        for start in range(0, length, self.chunk):
            found.append(pool)
            part = slice(start, start + self.chunk)
            pool = self.best(torch.cat([pool[0], note[:, part]], dim=1), torch.cat([pool[1], score[:, part]], dim=1))
        return self._views(found, torch.arange(length, device=note.device) // self.chunk)

    def _go_on(self, note: Tensor, score: Tensor, state: LayerState, position: Tensor, lengths: Tensor | None) -> Views:
        batch, length = score.shape
        note = note.detach()
        count = torch.full((batch,), length, device=note.device) if lengths is None else lengths
        ends = {int(t) for p in position.unique() for t in range(-int(p) % self.chunk, length, self.chunk)}
        cuts = [*sorted({0, *ends}), length]  # pieces in which no row ends a chunk but at their ends
        found, piece = [], torch.empty(length, dtype=torch.long, device=note.device)
        for i, (start, end) in enumerate(itertools.pairwise(cuts)):
            piece[start:end] = i
            found.append((state["pool_note"].clone(), state["pool_score"].clone()))
            at = position[:, None] + torch.arange(start, end, device=note.device)
            real = torch.arange(start, end, device=note.device) < count[:, None]
            row = torch.arange(batch, device=note.device)[:, None].expand_as(at)[real]
            slot = (at % self.chunk)[real]
            state["new_note"].index_put_((row, slot), note[:, start:end][real].to(state["new_note"].dtype))
            state["new_score"].index_put_((row, slot), score[:, start:end][real].to(state["new_score"].dtype))
            done = (count >= end) & ((position + end) % self.chunk == 0)
            if not bool(done.any()):
                continue
            every = (torch.cat([state[f"pool_{n}"], state[f"new_{n}"]], dim=1) for n in ("note", "score"))
            notes, scores = self.best(*every)
            state["pool_note"].copy_(torch.where(done[:, None, None], notes, state["pool_note"]))
            state["pool_score"].copy_(torch.where(done[:, None], scores, state["pool_score"]))
            state["new_score"].masked_fill_(done[:, None], -torch.inf)
        return self._views(found, piece)


class Recall(nn.Module):
    """Attention of tokens over notes: ``o(softmax(q x . k n / sqrt(d_s)) v n)``, nothing where there are no notes.

    ``zero_init``: ``o`` is zero at first, so a new layer changes nothing.
    """

    def __init__(self, d_model: int, note_dim: int, zero_init: bool) -> None:
        super().__init__()
        self.q = Linear(d_model, note_dim, bias=False)
        self.k, self.v = Linear(note_dim, note_dim, bias=False), Linear(note_dim, note_dim, bias=False)
        self.o = Linear(note_dim, d_model, bias=False)
        if zero_init:
            nn.init.zeros_(self.o.weight)

    def forward(self, x: Tensor, views: Views) -> Tensor:
        """x (batch, length, d_model) to the same."""
        notes, valid = views.notes.to(x.dtype)[:, views.piece], views.valid[:, views.piece]
        scores = torch.einsum("bld,blpd->blp", self.q(x), self.k(notes)) / math.sqrt(notes.shape[-1])
        some = valid.any(-1, keepdim=True)
        scores = scores.masked_fill(~valid & some, -torch.inf)  # without any note: even weights, then nothing
        read = torch.einsum("blp,blpd->bld", scores.softmax(-1), self.v(notes))
        return self.o(read * some.to(read.dtype))


class MemMambaLayer(Recomputed):
    """``x + Mamba(norm x)``, then notes, then what is recalled from them where the layer forgets.

    Our reading: both act behind the scan; forgetting is a second sigmoid score of the same form as importance, above
    ``forget_threshold``; the threshold passes gradients straight through.
    """

    def __init__(
        self, d_model: int, ssm: Mapping[str, Any], note: Note, *, forget_threshold: float, cross_token: bool,
        cross_layer: bool, zero_init: bool, norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm, self.mixer, self.note = RMSNorm(d_model, norm_eps), Mamba(d_model, **ssm), note
        self.forget_threshold = forget_threshold
        hidden = max(1, d_model // 4)
        if cross_token:
            self.forget1, self.forget2 = Linear(d_model, hidden, bias=False), Linear(hidden, 1, bias=False)
        self.cross_token = Recall(d_model, note.note_dim, zero_init) if cross_token else None
        self.cross_layer = Recall(d_model, note.note_dim, zero_init) if cross_layer else None

    def init_state(self, batch: int) -> LayerState:
        return self.mixer.init_state(batch) | self.note.init_state(batch)

    def triggered(self, x: Tensor) -> Tensor:
        """1 where notes are read, 0 elsewhere, (batch, length, 1), with the score's gradient."""
        score = torch.sigmoid(self.forget2(F.relu(self.forget1(x))))
        return (score > self.forget_threshold).to(score.dtype) + score - score.detach()

    def forward(
        self,
        x: Tensor,
        earlier: list[Views],
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Views]:
        """x (batch, length, d_model) to the same, and the pools that its tokens saw. earlier: those of the layers
        before in its group."""
        own = None if state is None else {k: v for k, v in state.items() if k in ("conv", "ssm")}
        x = x + self.mixer(normed(self.norm, x), state=own, lengths=lengths)
        views = self.note(x, state, position, lengths)
        if self.cross_token is not None:
            x = x + self.triggered(x) * self.cross_token(x, views)
        if self.cross_layer is not None and earlier:
            joined = Views(
                torch.cat([v.notes for v in earlier], dim=2), torch.cat([v.valid for v in earlier], dim=2),
                earlier[0].piece,
            )  # fmt: skip
            x = x + self.cross_layer(x, joined)
        return x, views


class MemMambaLM(CausalLM):
    """Embedding, MemMamba layers, norm; the head is the embedding.

    Arguments: ``d_model``; ``n_layer``; ``vocab_size``; ``ssm`` (Mamba's arguments); ``note_dim`` d_s; ``pool`` P;
    ``note_threshold`` and ``forget_threshold``; ``chunk`` (see :class:`Note`); ``cross_layer_every`` p: layers p, 2p
    ... also read the pools of the p layers before them (0: none do); ``cross_token``; ``zero_init``: nothing is read at
    first, so training starts from Mamba; ``norm_eps``. With thresholds of 1 and without cross-layer attention it is
    Mamba. The state does not grow with the text.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        ssm: Mapping[str, Any] | None = None,
        note_dim: int = 64,
        pool: int = 50,
        note_threshold: float = 0.5,
        forget_threshold: float = 0.5,
        chunk: int = 16,
        cross_layer_every: int = 6,
        cross_token: bool = True,
        zero_init: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in (("note_dim", note_dim), ("pool", pool), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if cross_layer_every < 0:
            raise ValueError(f"cross_layer_every is {cross_layer_every}; expected 0 (none) or more")
        self.vocab_size, self.every = vocab_size, cross_layer_every
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            MemMambaLayer(
                d_model, ssm or {}, Note(d_model, note_dim, pool, note_threshold, chunk),
                forget_threshold=forget_threshold, cross_token=cross_token, cross_layer=self._crosses(i),
                zero_init=zero_init,
                norm_eps=norm_eps,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = RMSNorm(d_model, norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def _crosses(self, i: int) -> bool:
        return self.every > 0 and i > 0 and i % self.every == 0

    @property
    def unused_parameters(self) -> tuple[str, ...]:
        """Notes that nothing reads: without cross-token attention, those behind the last cross-layer attention."""
        if self.layers[0].cross_token is not None:
            return ()
        last = max((i for i in range(len(self.layers)) if self._crosses(i)), default=0)
        return tuple(f"layers.{i}.note." for i in range(last, len(self.layers)))

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        self._check(input_ids, state, lengths)
        return self._run(input_ids, state, lengths)[0]

    def _run(
        self, input_ids: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[tuple[Views, Tensor]]]:
        """Hidden states, and each layer's pools and output."""
        x = self.embed(input_ids)
        found: list[tuple[Views, Tensor]] = []
        position = None if state is None else state.position
        for i, layer in enumerate(self.layers):
            own = None if state is None else state.layers[i]
            earlier = [views for views, _ in found[i - self.every : i]] if self._crosses(i) else []
            x, views = layer(x, earlier, state=own, position=position, lengths=lengths)
            found.append((views, x))
        if state is not None:
            state.position += input_ids.shape[1] if lengths is None else lengths
        return normed(self.norm_f, x), found

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        state.logits = self.head(self._run(token[:, None], state, None)[0][:, 0])
        return state.logits

    @torch.no_grad()
    def memory(self, input_ids: Tensor) -> list[dict[str, Tensor]]:
        """What each layer noted and read of whole texts: ``scores`` (batch, length; minus infinity: no note), ``notes``
        and ``reads`` (batch,) how many tokens did."""
        x = self.embed(input_ids)
        found: list[dict[str, Tensor]] = []
        views: list[Views] = []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, MemMambaLayer)
            behind = x + layer.mixer(normed(layer.norm, x))
            _, scores = layer.note.notes(behind)
            reads = torch.zeros(len(x), dtype=torch.long, device=x.device)
            if layer.cross_token is not None:
                reads = (layer.triggered(behind) > 0.5).sum((1, 2))
            found.append({"scores": scores, "notes": (scores > -torch.inf).sum(1), "reads": reads})
            x, own = layer(x, views[i - self.every : i] if self._crosses(i) else [])
            views.append(own)
        return found


# -- how faithfully layers remember (the paper's metrics, formulae of our reading) -------------------------------------


def fidelity(original: Tensor, memory: Tensor) -> float:
    """Mean cosine between tokens (n, d) and their best linear reconstruction from ``memory`` (n, m).

    1 where the memory determines them linearly; needs n above m to say anything.
    """
    found = torch.linalg.lstsq(memory.double(), original.double()).solution
    return float(F.cosine_similarity(memory.double() @ found, original.double(), dim=-1).mean())


def token_fidelity(tokens: Tensor, states: Tensor, lag: int) -> float:
    """ETMF at one lag: :func:`fidelity` of tokens (length, d) in the states (length, m) ``lag`` steps later."""
    return fidelity(tokens[: len(tokens) - lag], states[lag:])


def layer_fidelity(layers: list[Tensor], gap: int) -> float:
    """ECLMF: the mean :func:`fidelity` of each layer's outputs (length, d) in those of the layer ``gap`` above."""
    if not 0 < gap < len(layers):
        raise ValueError(f"gap is {gap}; expected 1 to {len(layers) - 1}")
    return sum(fidelity(a, b) for a, b in zip(layers, layers[gap:], strict=False)) / (len(layers) - gap)
