"""Blocks, the stack of them, and the causal language model that Chem-xLSTM is.

Source: Beck et al., "xLSTM", arXiv 2405.04517; NX-AI/xlstm ``xlstm/xlstm_block_stack.py``, ``xlstm_lm_model.py``;
Schmidinger et al., "Bio-xLSTM", arXiv 2411.04165.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Recomputed
from zoo.layers.linear import Linear

from .mlstm import MLSTM
from .parts import GatedFeedForward, LayerNorm, small_init
from .slstm import SLSTM
from .state import State


class Block(Recomputed):
    """``x + mixer(norm(x))``, and behind an sLSTM ``x + ffn(norm(x))``."""

    def __init__(self, d_model: int, mixer: MLSTM | SLSTM, ffn: GatedFeedForward | None = None) -> None:
        super().__init__()
        self.norm, self.mixer = LayerNorm(d_model), mixer
        self.ffn_norm = None if ffn is None else LayerNorm(d_model)
        self.ffn = ffn

    @property
    def is_mlstm(self) -> bool:
        return isinstance(self.mixer, MLSTM)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        """x: (batch, length, d_model); ``how`` goes to the mixer."""
        return self._feed(x + self.mixer(self.norm(x), **how))

    def step(self, x: Tensor, state: dict[str, Tensor], **how: Any) -> Tensor:
        return self._feed(x + self.mixer.step(self.norm(x), state, **how))

    def _feed(self, x: Tensor) -> Tensor:
        if self.ffn is None:
            return x
        assert self.ffn_norm is not None
        return x + self.ffn(self.ffn_norm(x))


def blocks_of(
    d_model: int,
    num_blocks: int,
    slstm_at: Sequence[int] | str,
    mlstm: Mapping[str, Any] | None,
    slstm: Mapping[str, Any] | None,
    ffn: Mapping[str, Any] | None,
) -> nn.ModuleList:
    """``num_blocks`` blocks, sLSTM at the indices ``slstm_at`` ("all": everywhere), mLSTM at the others.

    mlstm, slstm, ffn: arguments of :class:`MLSTM`, :class:`SLSTM`, :class:`GatedFeedForward`; ``ffn`` None leaves the
    feed-forward layers out. Raises ValueError for indices outside of the network.
    """
    if isinstance(slstm_at, str) and slstm_at != "all":
        raise ValueError(f"slstm_at is {slstm_at!r}; expected a list of block indices or 'all'")
    where = set(range(num_blocks)) if isinstance(slstm_at, str) else set(slstm_at)
    outside = sorted(i for i in where if not 0 <= i < num_blocks)
    if outside:
        raise ValueError(f"slstm_at names the blocks {outside}; the network has {num_blocks}, counted from 0")

    def block(i: int) -> Block:
        if i not in where:
            return Block(d_model, MLSTM(d_model, num_blocks=num_blocks, **(mlstm or {})))
        mixer = SLSTM(d_model, block=i, num_blocks=num_blocks, **(slstm or {}))
        return Block(d_model, mixer, None if ffn is None else GatedFeedForward(d_model, num_blocks=num_blocks, **ffn))

    return nn.ModuleList(block(i) for i in range(num_blocks))


class SequenceModel(GradCheckpointing, nn.Module):
    """What the three networks share: an embedding, blocks, a last norm, a head; ids in, logits out."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_blocks: int,
        slstm_at: Sequence[int] | str = (),
        mlstm: Mapping[str, Any] | None = None,
        slstm: Mapping[str, Any] | None = None,
        ffn: Mapping[str, Any] | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        final_norm: bool = True,
        tie_weights: bool = False,
        embedding_dropout: bool = False,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("vocab_size", vocab_size), ("d_model", d_model), ("num_blocks", num_blocks)):
            if size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        self.vocab_size, self.d_model = vocab_size, d_model
        width = d_model if embedding_width is None else embedding_width
        self.embedding = nn.Embedding(vocab_size, width)
        self.emb_dropout = nn.Dropout(dropout if embedding_dropout else 0.0)
        self.blocks = blocks_of(
            d_model, num_blocks, slstm_at, {"bias": bias, "dropout": dropout, **(mlstm or {})},
            {"dropout": dropout, **(slstm or {})}, ffn,
        )  # fmt: skip
        self.norm = LayerNorm(d_model) if final_norm else None
        self.head = Linear(d_model, vocab_size, bias=False)
        small_init(self.embedding.weight, width)
        small_init(self.head.weight, d_model)
        if tie_weights:
            if width != d_model:
                raise ValueError(
                    f"tie_weights needs an embedding as wide as the network; it is {width} of {d_model} channels wide "
                    "beside learnt positions"
                )
            self.head.weight = self.embedding.weight

    def finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def check_ids(self, ids: Tensor, axes: int = 2) -> None:
        """Raise ValueError for what are no token ids, (batch, length) or (batch,)."""
        if ids.dim() != axes or ids.is_floating_point() or ids.is_complex():
            expected = "(batch, length)" if axes == 2 else "(batch,)"
            raise ValueError(f"the token ids are {ids.dtype} of shape {tuple(ids.shape)}; expected integers {expected}")


class XLSTMLM(SequenceModel):
    """A causal xLSTM language model: Chem-xLSTM, and any language model of the package xlstm.

    Arguments: ``vocab_size``; ``d_model``; ``num_blocks``; ``slstm_at`` (indices of sLSTM blocks, or "all");
    ``mlstm``, ``slstm``, ``ffn``: arguments of the layers of those names (``ffn`` None: sLSTM blocks have none);
    ``bias`` of the mLSTM's projections; ``dropout``; ``final_norm``; ``tie_weights``; ``embedding_dropout``.
    """

    def forward(self, ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits of the next token after every token, (batch, length, vocab_size).

        ids: (batch, length) int64, right-padded where ``lengths`` (batch,) says so. state: go on from it; it moves on
        in place. Raises ValueError for what are no ids.
        """
        return self.head(self.hidden(ids, state=state, lengths=lengths))

    def hidden(self, ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        """After the last norm, (batch, length, d_model)."""
        self.check_ids(ids)
        x = self.emb_dropout(self.embedding(ids))
        for i, block in enumerate(self.blocks):
            own = None if state is None else state.layers[i]
            x = block(x, state=own, lengths=lengths)
        if state is not None:
            state.position += ids.shape[1] if lengths is None else lengths
        return self.finish(x)

    def init_state(self, batch: int = 1) -> State:
        """The memory of ``batch`` empty sequences."""
        return State.of(self.blocks, batch, self.device)

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        """Read one token of each sequence, (batch,) ids, and return the next one's logits (batch, vocab_size)."""
        self.check_ids(token, axes=1)
        x = self.embedding(token)
        for block, own in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, own)  # type: ignore[operator]
        state.position += 1
        return self.head(self.finish(x))
