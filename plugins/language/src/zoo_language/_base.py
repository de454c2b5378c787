"""What every language model of this plugin is: token ids in, logits out, and a :class:`State` between calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo import placement
from zoo.layers import GradCheckpointing, Recomputed

from .state import LayerState, State

if TYPE_CHECKING:
    from .decode import Decoder


class CausalLM(GradCheckpointing, nn.Module):
    """A causal language model.

    Subclasses have ``embedding`` (or override :meth:`embed`), ``layers`` of blocks with the methods of
    :class:`Block`, a last norm ``norm_f`` and :meth:`head`. Logits cover the padded vocabulary; ids of
    ``vocab_size`` and above are padding and never generated.
    """

    vocab_size: int
    layers: nn.ModuleList
    norm_f: nn.Module

    def embed(self, input_ids: Tensor) -> Tensor:
        """(batch, length) ids to (batch, length, channels)."""
        return self.embedding(input_ids)  # type: ignore[operator]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., channels) after the last norm to (..., padded vocabulary)."""
        raise NotImplementedError

    @property
    def state_name(self) -> str:
        """What a state belongs to: the zoo's name for these weights, or the class and its size."""
        info = getattr(self, "zoo_info", None)
        if info is not None and getattr(info, "name", None):
            return info.name
        return f"{type(self).__name__}-{sum(p.numel() for p in self.parameters())}"

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return placement.device_of(self)

    def init_state(self, batch: int = 1) -> State:
        """The state of ``batch`` empty texts."""
        layers: list[LayerState] = [layer.init_state(batch) for layer in self.layers]  # type: ignore[operator, misc]
        return State(layers, torch.zeros(batch, dtype=torch.long, device=self.device), None, self.state_name)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm, (batch, length, channels). ``state`` moves on, logits aside."""
        return self._through(input_ids, state, lengths)

    def _through(self, input_ids: Tensor, state: State | None, lengths: Tensor | None, **how: Any) -> Tensor:
        """Embedding, layers (which get ``how`` besides), last norm."""
        self._check(input_ids, state, lengths)
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            own = None if state is None else state.layers[i]
            x = layer(x, state=own, position=None if state is None else state.position, lengths=lengths, **how)
        if state is not None:
            state.position += input_ids.shape[1] if lengths is None else lengths
        return normed(self.norm_f, x)

    def forward(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits of every position, (batch, length, padded vocabulary).

        input_ids: (batch, length) int64, right-padded where ``lengths`` (batch,) says so. state: go on from it; it is
        moved on in place. Raises ValueError for a state of another batch size and (on a CPU, uncompiled; elsewhere
        indexing fails) for ids outside the vocabulary and lengths beyond the rows.
        """
        return self.head(self.backbone(input_ids, state=state, lengths=lengths))

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None, chunk: int = 4096
    ) -> State:
        """Read texts and return the state after them (a new one, or ``state`` moved on), with the next token's logits.

        Long texts are read ``chunk`` tokens at a time, so memory does not grow with their length. A row whose
        ``lengths`` entry is 0 stays as it was. Raises ValueError as :meth:`forward`, and for a state of another model.
        """
        self._check(input_ids, state, lengths)
        state = self.init_state(input_ids.shape[0]) if state is None else state
        state.check(self.state_name)
        batch, length = input_ids.shape
        count = torch.full((batch,), length, device=input_ids.device) if lengths is None else lengths
        for start in range(0, length, chunk):
            piece = input_ids[:, start : start + chunk]
            own = (count - start).clamp(min=0, max=piece.shape[1])
            padded = bool((own < piece.shape[1]).any())
            hidden = self.backbone(piece, state=state, lengths=own if padded else None)
            ends = (own > 0) & (count <= start + piece.shape[1])
            if bool(ends.any()):
                last = hidden[torch.arange(batch, device=hidden.device), (own - 1).clamp(min=0)]
                logits = self.head(last)
                if state.logits is None:
                    state.logits = torch.zeros_like(logits)
                state.logits = torch.where(ends[:, None], logits.to(state.logits.dtype), state.logits)
        return state

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        """Read one token of each text, (batch,) ids; returns the next token's logits (batch, padded vocabulary)."""
        x = self.embed(token[:, None])[:, 0]
        for layer, own in zip(self.layers, state.layers, strict=True):
            x = layer.step(x, own, state.position)  # type: ignore[operator]
        state.position += 1
        state.logits = self.head(normed(self.norm_f, x))
        return state.logits

    def fast_decoder(self, weights: str | None = None) -> Decoder:
        """What reads one text token by token on a CPU in one native call, its matrices stored as ``weights``.

        "float32", "bfloat16", "float16", "int8", or None: as they are. Give it to ``generate(..., decoder=...)``.
        Raises ValueError, with the reason, for models that have none (see :mod:`zoo_language.decode`).
        """
        from .decode import Decoder

        return Decoder(self, weights)

    def _check(self, input_ids: Tensor, state: State | None, lengths: Tensor | None) -> None:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; expected integers (batch, length)"
            )
        if state is not None and state.batch != input_ids.shape[0]:
            raise ValueError(f"the state holds {state.batch} texts, input_ids {input_ids.shape[0]}")
        if lengths is not None and lengths.shape != input_ids.shape[:1]:
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}; expected ({input_ids.shape[0]},)")
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(input_ids) is not Tensor
        if input_ids.device.type != "cpu" or traced or not input_ids.numel():
            return  # looking at values costs a transfer, or is not allowed
        rows = max(getattr(getattr(self, "embedding", None), "num_embeddings", 0), self.vocab_size)
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise ValueError(f"input_ids holds the token {wrong}; this model's ids are 0 to {self.vocab_size - 1}")
        if lengths is not None and not 0 <= int(lengths.min()) <= int(lengths.max()) <= input_ids.shape[1]:
            raise ValueError(f"lengths are {lengths.tolist()}; expected each from 0 to {input_ids.shape[1]}")


class Rereading(CausalLM):
    """A model without a recurrent form: its state is the text, which is read again for each token.

    Subclasses have :meth:`read`, and :meth:`read_rows` where what stands behind a text's end would change it.
    """

    def read(self, input_ids: Tensor) -> Tensor:
        """Whole texts (batch, length) to hidden states after the last norm, (batch, length, channels)."""
        raise NotImplementedError

    def read_rows(self, ids: Tensor, count: Tensor) -> Tensor:
        """As :meth:`read`, of texts of ``count`` (batch,) tokens with anything behind them."""
        return self.read(ids)

    def init_state(self, batch: int = 1) -> State:
        empty = {"ids": torch.zeros(batch, 0, dtype=torch.long, device=self.device)}
        return State([empty], torch.zeros(batch, dtype=torch.long, device=self.device), None, self.state_name)

    def backbone(self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None) -> Tensor:
        self._check(input_ids, state, lengths)
        batch, length = input_ids.shape
        if state is None and lengths is None:
            return self.read(input_ids)
        count = torch.full((batch,), length, device=input_ids.device) if lengths is None else lengths
        if state is None:
            return self.read_rows(input_ids, count)
        before = state.position
        room = int((before + length).max())
        ids = torch.nn.functional.pad(state.layers[0]["ids"], (0, max(0, room - state.layers[0]["ids"].shape[1])))
        rows = torch.arange(batch, device=self.device)[:, None]
        slots = before[:, None] + torch.arange(length, device=self.device)
        ids[rows, slots] = input_ids
        hidden = self.read_rows(ids, before + count)[rows, slots]
        state.layers[0]["ids"], state.position = ids, before + count
        return hidden

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        state.logits = self.head(self.backbone(token[:, None], state=state))[:, 0]
        return state.logits


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the norm's own dtype, whatever the residual stream is kept in."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))


class Block(Recomputed):
    """``x + mixer(norm(x))``, and with an MLP ``x + mlp(norm2(x))`` behind it: the pre-norm residual block.

    The originals carry (hidden, residual) and add before each norm; the sums are the same. ``residual_in_fp32`` keeps x
    in float32 while the mixer computes in its weights' dtype.
    """

    def __init__(
        self, norm: nn.Module, mixer: nn.Module, norm2: nn.Module | None = None, mlp: nn.Module | None = None,
        *, residual_in_fp32: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm, self.mixer = norm, mixer
        self.norm2, self.mlp = norm2, mlp
        self.residual_in_fp32 = residual_in_fp32
        self._positional = hasattr(mixer, "cache")  # attention needs to know where it is

    def init_state(self, batch: int) -> LayerState:
        return self.mixer.init_state(batch)  # type: ignore[operator]

    def _in(self, x: Tensor) -> Tensor:
        return x.float() if self.residual_in_fp32 and x.dtype in (torch.bfloat16, torch.float16) else x

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Tensor:
        x = self._in(x)
        where: dict[str, Any] = {"position": position} if self._positional else {}
        if resets is not None:
            if self._positional:
                raise ValueError("resets: attention sees its whole row; texts packed into one need a model without it")
            where["resets"] = resets
        x = x + self.mixer(normed(self.norm, x), state=state, lengths=lengths, **where)
        if self.mlp is not None:
            assert self.norm2 is not None
            x = x + self.mlp(normed(self.norm2, x))
        return x

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        x = self._in(x)
        n = normed(self.norm, x)
        mixed = self.mixer.step(n, state, position) if self._positional else self.mixer.step(n, state)  # type: ignore[operator]
        x = x + mixed
        if self.mlp is not None:
            assert self.norm2 is not None
            x = x + self.mlp(normed(self.norm2, x))
        return x
