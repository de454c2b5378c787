"""DNA-xLSTM: read one way or both, with or without reverse-complement equivariance.

Source: Schmidinger et al., "Bio-xLSTM", arXiv 2411.04165, section 4.1; ml-jku/DNA-xLSTM
``models/dna_xlstm/xlstm/{xlstm_block_stack,modeling_xlstm_rcps}.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .mlstm import MLSTM, Rotary, frequencies
from .state import State
from .xlstm import Block, SequenceModel

#: Complement of each id of the tokenizer: A 7 and T 10, C 8 and G 9; all others are their own.
COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)


class DNAXLSTM(SequenceModel):
    """A DNA language model, masked (read both ways) or causal.

    Arguments: ``vocab_size``, ``d_model``, ``num_blocks``, ``slstm_at``, ``mlstm``, ``slstm``, ``ffn`` (arguments of
    the layers), ``bias`` of the mLSTM's projections, ``dropout``, ``final_norm``, ``embedding_dropout``, and

    bidirectional: every block reads the sequence and its reverse with the same weights, and the two outputs, residual
        included, are added. With ``alternating`` even blocks read the reverse alone and odd ones the sequence alone.
        With ``native`` mLSTM blocks have one memory that reads both ways (``native_causal``: they read forwards alone,
        which is what the original's chunked form does when asked for this).
    rcps: reverse-complement equivariant by sharing parameters: the network runs on the sequence and on its reverse
        complement. sLSTM blocks only. Exact with one head; with several, the reference's order of heads before their
        norm breaks it, and is kept so that its weights give its numbers.
    complement: the complement of every id, vocab_size of them (default: that of the published tokenizer).
    sinusoidal_positions: a scaled sinusoidal embedding is added before the first block (not with rcps).
    rotary_positions: q and k of mLSTM blocks are turned by position in each head, base 500000; the gates see them
        before that.
    """

    complement: Tensor | None

    def __init__(
        self,
        vocab_size: int = 12,
        d_model: int = 256,
        num_blocks: int = 4,
        slstm_at: Sequence[int] | str = (),
        mlstm: Mapping[str, Any] | None = None,
        slstm: Mapping[str, Any] | None = None,
        ffn: Mapping[str, Any] | None = None,
        bidirectional: bool = False,
        alternating: bool = False,
        native: bool = False,
        native_causal: bool = False,
        rcps: bool = False,
        complement: Sequence[int] | None = None,
        sinusoidal_positions: bool = False,
        rotary_positions: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        final_norm: bool = True,
        embedding_dropout: bool = False,
    ) -> None:
        super().__init__(
            vocab_size, d_model, num_blocks, slstm_at, {"rotate_gates": False, **(mlstm or {})}, slstm, ffn, bias,
            dropout, final_norm, embedding_dropout=embedding_dropout,
        )  # fmt: skip
        self.bidirectional, self.alternating, self.native = bidirectional, alternating, native
        self.native_causal = native_causal
        self.rcps, self.rotary_positions = rcps, rotary_positions
        if rcps and any(block.is_mlstm for block in self.blocks):  # type: ignore[union-attr]
            raise ValueError("rcps is defined for sLSTM blocks alone; expected slstm_at = 'all'")
        if rcps and sinusoidal_positions:
            raise ValueError("rcps and sinusoidal_positions exclude each other: positions are no reverse complement")
        self.register_buffer("complement", None)
        if rcps:
            pairs = tuple(complement) if complement is not None else _complement(vocab_size)
            if len(pairs) != vocab_size or sorted(set(pairs)) != sorted(pairs) or max(pairs) >= vocab_size:
                raise ValueError(f"complement has {len(pairs)} entries; expected a pairing of the {vocab_size} ids")
            self.complement = torch.tensor(pairs, dtype=torch.long)
        self.position_scale = nn.Parameter(torch.full((1,), d_model**-0.5)) if sinusoidal_positions else None

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every place, (batch, length, vocab_size); of a causal model those of the next base.

        ids: (batch, length) int64. Raises ValueError for what are no ids.
        """
        x = self.hidden(ids)
        if not self.rcps:
            return self.head(x)
        ahead, back = x.chunk(2, dim=-1)
        # The head of the complement: its columns exchanged, no flip along the sequence.
        return self.head(ahead) + self.head(back.flip(-1))[..., self.complement]

    def hidden(self, ids: Tensor) -> Tensor:
        """After the last norm, (batch, length, d_model); twice as wide with rcps: the sequence's own half, then that of
        its reverse complement, flipped in length and channels."""
        return self.wide(self._read_through(self.embed(ids)))

    def wide(self, x: Tensor) -> Tensor:
        """With rcps: the reverse complement's half of the batch laid beside the other, flipped in length and channels;
        else ``x``."""
        if not self.rcps:
            return x
        ahead, back = x.chunk(2)
        return torch.cat([ahead, back.flip(1, 2)], dim=-1)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, length, d_model); with rcps the reverse complements follow in the batch, so that one pass of shared
        weights reads both."""
        self.check_ids(ids)
        if self.rcps:
            assert self.complement is not None
            ids = torch.cat([ids, self.complement[ids.flip(1)]])
        x = self.emb_dropout(self.embedding(ids))
        if self.position_scale is None:
            return x
        return x + self._sinusoids(torch.arange(ids.shape[1], device=ids.device)).to(x.dtype)

    def _read_through(self, x: Tensor) -> Tensor:
        how: dict[str, Any] = {}
        if self.rcps:
            how["heads_flipped_from"] = x.shape[0] // 2
        ahead, back = self._rotary(x.shape[1])
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            one, other = (
                ({**how, "rotary": ahead}, {**how, "rotary": back, "reverse": True})
                if block.is_mlstm
                else (how, {**how, "reverse": True})
            )
            if not self.bidirectional:
                x = block(x, **one)
            elif self.alternating:
                x = block(x, **(other if i % 2 == 0 else one))
            elif self.native and block.is_mlstm:
                x = block(x, **one, bidirectional=not self.native_causal)
            else:
                x = block(x, **one) + block(x, **other)
        return self.finish(x)

    def _rotary(self, length: int) -> tuple[Rotary | None, Rotary | None]:
        """By row, for the sequence and for its reverse, whose positions are counted from its own start."""
        mixer = next((b.mixer for b in self.blocks if b.is_mlstm), None)  # type: ignore[union-attr]
        if not self.rotary_positions or mixer is None:
            return None, None
        assert isinstance(mixer, MLSTM)
        cos, sin = frequencies(torch.arange(length, device=self.device), mixer.headdim, 500000.0)
        return (cos, sin), (cos.flip(0), sin.flip(0))

    def _sinusoids(self, position: Tensor) -> Tensor:
        """(..., d_model) for positions (...,): all sines, then all cosines, times the learned scale."""
        half = self.d_model // 2
        rates = 100000.0 ** -(torch.arange(half, device=position.device, dtype=torch.float32) / half)
        angle = position[..., None].float() * rates
        assert self.position_scale is not None
        return torch.cat([angle.sin(), angle.cos()], dim=-1) * self.position_scale


class CausalDNAXLSTM(DNAXLSTM):
    """The causal form, which also goes on from a state and reads base by base."""

    def forward(self, ids: Tensor, *, state: State | None = None) -> Tensor:  # type: ignore[override]
        """As :meth:`DNAXLSTM.forward`; ``state``: go on from it, it moves on in place."""
        return self.head(self.hidden(ids, state=state))

    def hidden(self, ids: Tensor, *, state: State | None = None) -> Tensor:  # type: ignore[override]
        if state is None:
            return super().hidden(ids)
        self.check_ids(ids)
        position = state.position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        x = self._placed(self.embedding(ids), position)
        for block, own in zip(self.blocks, state.layers, strict=True):
            x = block(x, state=own, **self._turned(block, position))
        state.position += ids.shape[1]
        return self.finish(x)

    def init_state(self, batch: int = 1) -> State:
        """The memory of ``batch`` empty sequences."""
        return State.of(self.blocks, batch, self.device)

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        """Read one base of each sequence, (batch,) ids, and return the next one's logits (batch, vocab_size)."""
        self.check_ids(token, axes=1)
        x = self._placed(self.embedding(token), state.position)
        for block, own in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, own, **self._turned(block, state.position))  # type: ignore[operator]
        state.position += 1
        return self.head(self.finish(x))

    def _placed(self, x: Tensor, position: Tensor) -> Tensor:
        return x if self.position_scale is None else x + self._sinusoids(position).to(x.dtype)

    def _turned(self, block: nn.Module, position: Tensor) -> dict[str, Any]:
        assert isinstance(block, Block)
        if not (self.rotary_positions and isinstance(block.mixer, MLSTM)):
            return {}
        return {"rotary": frequencies(position, block.mixer.headdim, 500000.0)}


def dna_xlstm(**config: Any) -> DNAXLSTM:
    """A DNA-xLSTM from the arguments of :class:`DNAXLSTM`; one that reads forwards alone can also step."""
    ahead = not config.get("bidirectional") and not config.get("rcps")
    causal = all((config.get(kind) or {}).get("conv_causal", True) for kind in ("mlstm", "slstm"))
    return (CausalDNAXLSTM if ahead and causal else DNAXLSTM)(**config)


def _complement(vocab_size: int) -> tuple[int, ...]:
    if vocab_size < len(COMPLEMENT):
        raise ValueError(f"a vocabulary of {vocab_size} is not the published one (12 ids): give complement")
    return COMPLEMENT + tuple(range(len(COMPLEMENT), vocab_size))
