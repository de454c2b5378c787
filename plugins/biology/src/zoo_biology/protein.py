"""Prot-xLSTM: proteins read one after the other as context, with positions inside and among them.

Source: Schmidinger et al., "Bio-xLSTM", arXiv 2411.04165, section 4.2; ml-jku/Prot-xLSTM
``protxlstm/xlstm/xlstm_lm_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .mlstm import MLSTM, Rotary, frequencies
from .parts import small_init
from .state import State
from .xlstm import SequenceModel

POSITIONS = ("none", "abs_1d", "abs_2d", "rot", "rot_1d", "rot_2d")


class ProtXLSTM(SequenceModel):
    """A causal mLSTM language model of proteins.

    Arguments: ``vocab_size``, ``d_model``, ``num_blocks``, ``mlstm`` (arguments of the layer), ``bias``, ``dropout``,
    ``final_norm``, ``tie_weights``, ``embedding_dropout``, and

    positions: "none"; "rot_1d" turns q and k, all inner channels together, by the position in the protein; "rot_2d"
        shares the channels between that and the number of the protein, as ``max_positions`` to ``max_sequences``;
        "rot" turns by the place in the given piece, counted from 0 in every call, with base 10000; "abs_1d" and
        "abs_2d" learn tables of ``max_positions`` and ``max_sequences`` rows that take half of the embedding.
    rope_base: the base of the rotary frequencies.
    """

    def __init__(
        self,
        vocab_size: int = 38,
        d_model: int = 512,
        num_blocks: int = 16,
        mlstm: Mapping[str, Any] | None = None,
        positions: str = "none",
        max_positions: int = 2048,
        max_sequences: int = 512,
        rope_base: float = 10000,
        bias: bool = False,
        dropout: float = 0.0,
        final_norm: bool = True,
        tie_weights: bool = False,
        embedding_dropout: bool = False,
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}")
        parts = {"abs_1d": 2, "abs_2d": 4}.get(positions)
        if parts is not None and d_model % parts:
            raise ValueError(f"positions {positions!r} divide d_model by {parts}; it is {d_model}")
        super().__init__(
            vocab_size, d_model, num_blocks, mlstm=mlstm, bias=bias, dropout=dropout, final_norm=final_norm,
            tie_weights=tie_weights, embedding_dropout=embedding_dropout,
            embedding_width=None if parts is None else d_model // 2,
        )  # fmt: skip
        self.positions, self.rope_base = positions, rope_base
        self.max_positions, self.max_sequences = max_positions, max_sequences
        if parts is not None:
            width = d_model // parts
            self.position_embedding = nn.Embedding(max_positions, width)
            small_init(self.position_embedding.weight, width)
            if positions == "abs_2d":
                self.sequence_embedding = nn.Embedding(max_sequences, width)
                small_init(self.sequence_embedding.weight, width)

    @property
    def reads_sequence_ids(self) -> bool:
        return self.positions.endswith("_2d")

    @property
    def reads_position_ids(self) -> bool:
        return self.positions.endswith(("_1d", "_2d"))

    def forward(
        self,
        ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Logits of the next token after every token, (batch, length, vocab_size).

        ids, position_ids, sequence_ids: (batch, length) int64; the positions default to 0, 1, 2 .. counted from where
        ``state`` stands, the sequence numbers to 0 (:func:`zoo_biology.homologs.context` gives them for several
        proteins). state: go on from it; it moves on in place. Raises ValueError for ids of the wrong shape, and for
        positions outside of a learnt table.
        """
        return self.head(self.hidden(ids, position_ids=position_ids, sequence_ids=sequence_ids, state=state))

    def hidden(
        self,
        ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """After the last norm, (batch, length, d_model)."""
        self.check_ids(ids)
        if position_ids is None:
            start = ids.new_zeros(ids.shape[0]) if state is None else state.position
            position_ids = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        if sequence_ids is None:
            sequence_ids = torch.zeros_like(ids)
        self._check_positions(ids, position_ids, sequence_ids)
        x = self.embed(ids, position_ids, sequence_ids)
        rotary = self.rotary(position_ids, sequence_ids)
        for i, block in enumerate(self.blocks):
            x = block(x, state=None if state is None else state.layers[i], rotary=rotary)
        if state is not None:
            state.position += ids.shape[1]
        return self.finish(x)

    def init_state(self, batch: int = 1) -> State:
        """The memory of ``batch`` empty sequences."""
        return State.of(self.blocks, batch, self.device)

    @torch.no_grad()
    def step(
        self, token: Tensor, state: State, *, position_ids: Tensor | None = None, sequence_ids: Tensor | None = None
    ) -> Tensor:
        """Read one token of each sequence, (batch,) ids, and return the next one's logits (batch, vocab_size).

        position_ids, sequence_ids: (batch,), as in :meth:`forward`.
        """
        self.check_ids(token, axes=1)
        position_ids = state.position if position_ids is None else position_ids
        sequence_ids = torch.zeros_like(token) if sequence_ids is None else sequence_ids
        if self.positions == "rot":  # counted from 0 in every call
            position_ids = torch.zeros_like(token)
        x = self.embed(token, position_ids, sequence_ids)
        rotary = self.rotary(position_ids, sequence_ids)
        for block, own in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, own, rotary=rotary)  # type: ignore[operator]
        state.position += 1
        return self.head(self.finish(x))

    def embed(self, ids: Tensor, position_ids: Tensor, sequence_ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions.startswith("abs"):
            x = torch.cat([x, self.position_embedding(position_ids)], dim=-1)
        if self.positions == "abs_2d":
            x = torch.cat([x, self.sequence_embedding(sequence_ids)], dim=-1)
        return self.emb_dropout(x)

    def rotary(self, position_ids: Tensor, sequence_ids: Tensor) -> Rotary | None:
        """Cosines and sines, (..., inner / 2), or None for models that turn nothing."""
        if not self.positions.startswith("rot"):
            return None
        mixer = self.blocks[0].mixer  # type: ignore[union-attr]
        assert isinstance(mixer, MLSTM)
        if self.positions == "rot_1d":
            return frequencies(position_ids, mixer.inner, self.rope_base)
        if self.positions == "rot":
            if position_ids.dim() == 2:
                place = torch.arange(position_ids.shape[1], device=position_ids.device)
                position_ids = place.expand(position_ids.shape)
            return frequencies(position_ids, mixer.inner, 10000)
        width = mixer.inner * self.max_positions // (self.max_positions + self.max_sequences)
        width -= width % 2
        one = frequencies(position_ids, width, self.rope_base)
        two = frequencies(sequence_ids, mixer.inner - width, self.rope_base)
        return torch.cat([one[0], two[0]], dim=-1), torch.cat([one[1], two[1]], dim=-1)

    def _check_positions(self, ids: Tensor, position_ids: Tensor, sequence_ids: Tensor) -> None:
        for name, given in (("position_ids", position_ids), ("sequence_ids", sequence_ids)):
            if given.shape != ids.shape:
                raise ValueError(f"{name} has shape {tuple(given.shape)}; expected that of the ids, {tuple(ids.shape)}")
        if not self.positions.startswith("abs") or torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
            return
        tables = [("position_ids", position_ids, self.max_positions)]
        if self.positions == "abs_2d":
            tables.append(("sequence_ids", sequence_ids, self.max_sequences))
        for name, given, rows in tables:
            if int(given.max()) >= rows or int(given.min()) < 0:
                raise ValueError(f"{name} reach {int(given.max())}; this model learnt positions 0 to {rows - 1}")
