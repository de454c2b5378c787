"""Samba-ASR: speech to text with Mamba blocks in the encoder, in the decoder, and between them.

Source: "Samba-ASR: State-Of-The-Art Speech Recognition Leveraging Structured State-Space Models", arXiv 2501.02832.
No code and no weights are public; the paper gives the parts (convolutional front end, Mamba encoder, autoregressive
Mamba decoder with a "Mamba cross-connection", no attention anywhere) and not their sizes. What it leaves open is
chosen here, and said to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Mamba, Recomputed, RMSNorm

State = dict[str, Tensor]


class ConvFront(nn.Module):
    """Two convolutions over time (kernel 3, GELU): features (batch, frames, n_mels) to (batch, ceil(frames / s), dim).

    ``strides`` of the two; s is their product. The first halves local detail, the second the rate (our reading: the
    paper names convolutional layers only). Keys ``conv1``, ``conv2``.
    """

    def __init__(self, n_mels: int, dim: int, strides: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        if len(strides) != 2 or min(strides) < 1:
            raise ValueError(f"strides is {tuple(strides)}; expected two positive numbers")
        self.conv1 = nn.Conv1d(n_mels, dim, 3, stride=strides[0], padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=strides[1], padding=1)

    @property
    def convolutions(self) -> tuple[nn.Conv1d, nn.Conv1d]:
        return self.conv1, self.conv2

    def lengths(self, frames: Tensor) -> Tensor:
        """Output positions of each row."""
        for conv in self.convolutions:
            frames = -(-frames // conv.stride[0])
        return frames

    def forward(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        x = features.transpose(1, 2)
        for conv in self.convolutions:
            if frames is not None:  # what lies behind a recording's end must not leak into its last positions
                x = x.masked_fill(torch.arange(x.shape[2], device=x.device) >= frames[:, None, None], 0)
                frames = -(-frames // conv.stride[0])
            x = F.gelu(conv(x))
        return x.transpose(1, 2)

    def init_state(self, batch: int = 1) -> list[Tensor]:
        """What each convolution has read and still needs: at first one zero frame, its left padding."""
        return [c.weight.new_zeros(batch, c.in_channels, 1) for c in self.convolutions]

    def stream(self, features: Tensor, state: list[Tensor], *, last: bool = False) -> Tensor:
        """A piece of the features to the positions that are complete; ``state`` moves on in place. ``last``: no more
        follow, so the right padding is added. All pieces together give :meth:`forward` of the whole."""
        x = features.transpose(1, 2)
        for i, conv in enumerate(self.convolutions):
            x = torch.cat([state[i], x], dim=2)
            if last:
                x = F.pad(x, (0, 1))
            stride = conv.stride[0]
            count = max(0, (x.shape[2] - 3) // stride + 1)
            state[i] = x[:, :, count * stride :]
            out = x.new_zeros(x.shape[0], conv.out_channels, 0)
            x = F.gelu(F.conv1d(x[:, :, : (count - 1) * stride + 3], conv.weight, conv.bias, stride)) if count else out
        return x.transpose(1, 2)


class EncoderLayer(Recomputed):
    """``x + mamba(norm(x))``; with two directions ``x + (forward(norm(x)) + backward(norm(x))) / 2``.

    The backward mixer walks each recording from its own end. Keys ``norm``, ``fwd``, ``bwd``.
    """

    def __init__(self, dim: int, bidirectional: bool, dropout: float = 0.0, **mixer: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.fwd = Mamba(dim, **mixer)
        self.bwd = Mamba(dim, **mixer) if bidirectional else None
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None, state: State | None = None) -> Tensor:
        n = self.norm(x)
        y = self.fwd(n, lengths=lengths, state=state)
        if self.bwd is not None:
            y = 0.5 * (y + self.bwd(n, reverse=True, lengths=lengths))
        return x + self.drop(y)


class Encoder(nn.Module):
    """``n_layers`` of :class:`EncoderLayer` and a last norm; ``bidirectional`` False can read audio as it comes."""

    def __init__(self, dim: int, n_layers: int, *, bidirectional: bool = True, dropout: float = 0.0, **mixer: Any):
        super().__init__()
        self.bidirectional = bidirectional
        self.layers = nn.ModuleList(EncoderLayer(dim, bidirectional, dropout, **mixer) for _ in range(n_layers))
        self.norm = RMSNorm(dim)

    def forward(self, x: Tensor, *, lengths: Tensor | None = None, state: list[State] | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, lengths=lengths, state=None if state is None else state[i])
        return self.norm(x)

    def init_state(self, batch: int = 1) -> list[State]:
        if self.bidirectional:
            raise ValueError(
                "this encoder reads the audio in both directions and cannot stream; build it with bidirectional=False"
            )
        return [layer.fwd.init_state(batch) for layer in self.layers]  # type: ignore[union-attr]


class CrossConnection(nn.Module):
    """The Mamba cross-connection: one mixer walks over the audio, then over the text, and its text outputs are kept.

    ``K = proj(norm_h(H))``, ``mamba(concat(K, y))``, last positions. Text at u sees all audio and the text up to u;
    the cost is linear in both lengths. The paper names the connection and not its form: this form is our reading.
    """

    def __init__(self, dim: int, **mixer: Any) -> None:
        super().__init__()
        self.norm_h = RMSNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.mamba = Mamba(dim, **mixer)

    def forward(self, hidden: Tensor, text: Tensor, hidden_lengths: Tensor | None = None) -> Tensor:
        """hidden: (batch, T, dim) of which ``hidden_lengths`` positions count; text: (batch, U, dim), already
        normed."""
        audio = self.proj(self.norm_h(hidden))
        T, U = audio.shape[1], text.shape[1]
        both = torch.cat([audio, text], dim=1)
        if hidden_lengths is None:
            return self.mamba(both)[:, T:]
        # A pad between audio and text would change the state that the text reads, so each row's text follows its own
        # audio directly and the padding goes to the end.
        place = torch.arange(T + U, device=text.device)[None]
        own = hidden_lengths[:, None]
        order = torch.where(place < own, place, torch.where(place < own + U, place - own + T, place - U))
        y = self.mamba(both.gather(1, order[..., None].expand(-1, -1, both.shape[2])), lengths=hidden_lengths + U)
        back = own + torch.arange(U, device=text.device)[None]
        return y.gather(1, back[..., None].expand(-1, -1, y.shape[2]))

    def listen(self, hidden: Tensor, state: State, hidden_lengths: Tensor | None = None) -> None:
        """Read audio into ``state`` (on from what it has read)."""
        if hidden.shape[1]:
            self.mamba(self.proj(self.norm_h(hidden)), state=state, lengths=hidden_lengths)


class DecoderLayer(Recomputed):
    """Self mixer, cross-connection and, with ``mlp``, a gated feed-forward (SwiGLU, 8/3 of the width), each
    residual."""

    def __init__(self, dim: int, mlp: bool = False, dropout: float = 0.0, **mixer: Any) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.self = Mamba(dim, **mixer)
        self.norm2 = RMSNorm(dim)
        self.cross = CrossConnection(dim, **mixer)
        self.norm3 = RMSNorm(dim) if mlp else None
        inner = 8 * dim // 3
        self.mlp_in = nn.Linear(dim, 2 * inner) if mlp else None
        self.mlp_out = nn.Linear(inner, dim) if mlp else None
        self.drop = nn.Dropout(dropout)

    def _feed_forward(self, y: Tensor) -> Tensor:
        if self.norm3 is None or self.mlp_in is None or self.mlp_out is None:
            return y
        value, gate = self.mlp_in(self.norm3(y)).chunk(2, dim=-1)
        return y + self.drop(self.mlp_out(value * F.silu(gate)))

    def forward(self, y: Tensor, hidden: Tensor, hidden_lengths: Tensor | None = None) -> Tensor:
        y = y + self.drop(self.self(self.norm1(y)))
        y = y + self.drop(self.cross(hidden, self.norm2(y), hidden_lengths))
        return self._feed_forward(y)

    def step(self, y: Tensor, state: dict[str, State]) -> Tensor:
        y = y + self.self.step(self.norm1(y), state["self"])
        y = y + self.cross.mamba.step(self.norm2(y), state["cross"])
        return self._feed_forward(y)


@dataclass
class TextState:
    """Where a decoder is: one entry a layer, of the text so far (``self``) and of audio then text (``cross``)."""

    layers: list[dict[str, State]]

    def select(self, rows: Tensor) -> TextState:
        """The states of some rows, copied: rows may repeat (hypotheses that branch)."""
        return TextState(
            [{k: {n: t.index_select(0, rows) for n, t in s.items()} for k, s in e.items()} for e in self.layers]
        )

    def clone(self) -> TextState:
        return TextState([{k: {n: t.clone() for n, t in s.items()} for k, s in e.items()} for e in self.layers])


class Decoder(nn.Module):
    """Token embedding, ``n_layers`` of :class:`DecoderLayer`, a last norm. Keys ``embed``, ``layers.{i}``, ``norm``."""

    def __init__(self, vocab_size: int, dim: int, n_layers: int, *, mlp: bool = False, dropout: float = 0.0, **mixer):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.layers = nn.ModuleList(DecoderLayer(dim, mlp, dropout, **mixer) for _ in range(n_layers))
        self.norm = RMSNorm(dim)

    def forward(self, tokens: Tensor, hidden: Tensor, hidden_lengths: Tensor | None = None) -> Tensor:
        y = self.embed(tokens)
        for layer in self.layers:
            y = layer(y, hidden, hidden_lengths)
        return self.norm(y)

    def init_state(self, batch: int = 1) -> TextState:
        return TextState(
            [
                {"self": layer.self.init_state(batch), "cross": layer.cross.mamba.init_state(batch)}  # type: ignore[union-attr]
                for layer in self.layers
            ]
        )

    def listen(self, hidden: Tensor, state: TextState, hidden_lengths: Tensor | None = None) -> None:
        """Read audio into the cross-connections of ``state``, which must not have read text yet."""
        for layer, own in zip(self.layers, state.layers, strict=True):
            layer.cross.listen(hidden, own["cross"], hidden_lengths)  # type: ignore[union-attr]

    def step(self, tokens: Tensor, state: TextState) -> Tensor:
        """One token of each row, (batch,) ids, to (batch, dim); ``state`` moves on in place."""
        y = self.embed(tokens)
        for layer, own in zip(self.layers, state.layers, strict=True):
            y = layer.step(y, own)  # type: ignore[operator]
        return self.norm(y)


class SambaASR(GradCheckpointing, nn.Module):
    """Log-mel features to text: front end, encoder, decoder, and as an option a CTC head on the encoder.

    Arguments: ``vocab_size`` V; ``dim`` D; ``n_enc``, ``n_dec`` layers (``n_dec`` 0: no decoder, for CTC alone);
    ``bidirectional``: an encoder that reads both ways (offline) or forwards only (can stream); ``ctc``: a CTC head
    whose blank is the padding id 0; ``strides`` of the front end; ``positions``: sinusoidal positions (off: the
    mixers know the order); ``mlp``: feed-forward in the decoder; ``tie``: output head = embedding; ``scaling``: see
    :class:`zoo_audio.features.LogMel`. Ids: 0 padding and CTC blank, 1 begin, 2 end.

    Parameters: ``front.*``, ``enc.*``, ``dec.*``, ``head.weight``, ``ctc.{weight,bias}``.
    """

    pad_id, bos_id, eos_id = 0, 1, 2

    def __init__(
        self,
        vocab_size: int = 5000,
        dim: int = 512,
        n_enc: int = 12,
        n_dec: int = 6,
        *,
        n_mels: int = 80,
        sample_rate: int = 16000,
        strides: Sequence[int] = (1, 2),
        bidirectional: bool = True,
        ctc: bool = False,
        positions: bool = False,
        mlp: bool = False,
        tie: bool = False,
        scaling: str = "utterance",
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if n_dec == 0 and not ctc:
            raise ValueError("n_dec is 0 and ctc is False: the model has no way to write text; set one of them")
        if not bidirectional and scaling != "fixed":
            raise ValueError(
                f"bidirectional=False is for streaming, which needs scaling='fixed'; scaling is {scaling!r}"
            )
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.vocab_size, self.dim, self.n_mels, self.sample_rate = vocab_size, dim, n_mels, sample_rate
        self.scaling, self.positions, self.causal = scaling, positions, not bidirectional
        self.front = ConvFront(n_mels, dim, strides)
        self.enc = Encoder(dim, n_enc, bidirectional=bidirectional, dropout=dropout, **mixer)
        self.dec: Decoder | None = None
        self.head: nn.Linear | None = None
        if n_dec:
            self.dec = Decoder(vocab_size, dim, n_dec, mlp=mlp, dropout=dropout, **mixer)
            self.head = nn.Linear(dim, vocab_size, bias=False)
            if tie:
                self.head.weight = self.dec.embed.weight
        self.ctc = nn.Linear(dim, vocab_size) if ctc else None

    @property
    def seconds_per_position(self) -> float:
        """Time between two outputs of the encoder; features come at 100 a second."""
        return 0.01 * self.front.conv1.stride[0] * self.front.conv2.stride[0]

    def no_weight_decay(self) -> set[str]:
        """A of every scan, which no weight decay pulls to zero."""
        return {name for name, _ in self.named_parameters() if name.endswith("A_log")}

    def encode(self, features: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(batch, frames, n_mels) to (batch, positions, dim) and how many positions of each row count.

        Raises ValueError for features of another width.
        """
        if features.dim() != 3 or features.shape[2] != self.n_mels:
            raise ValueError(f"features has shape {tuple(features.shape)}; expected (batch, frames, {self.n_mels})")
        x = self.front(features, frames)
        lengths = None if frames is None else self.front.lengths(frames)
        if self.positions:
            x = x + sinusoids(0, x.shape[1], self.dim, x)
        return self.enc(x, lengths=lengths), lengths

    def forward(
        self, features: Tensor, tokens: Tensor | None = None, frames: Tensor | None = None
    ) -> dict[str, Tensor]:
        """``logits`` (batch, U, V) of the token after each of ``tokens`` (batch, U), which begin with ``bos_id``;
        ``ctc_logits`` (batch, positions, V) with a CTC head. frames: (batch,) features that count in each row."""
        hidden, lengths = self.encode(features, frames)
        out: dict[str, Tensor] = {}
        if self.dec is not None and self.head is not None and tokens is not None:
            out["logits"] = self.head(self.dec(tokens, hidden, lengths))
        if self.ctc is not None:
            out["ctc_logits"] = self.ctc(hidden)
        if not out:
            raise ValueError("this model has no CTC head, so it needs tokens: (batch, U) ids that begin with bos_id")
        return out

    def loss(
        self, features: Tensor, frames: Tensor, tokens: Tensor, token_lengths: Tensor, *, ctc_weight: float = 0.3,
        label_smoothing: float = 0.1,
    ) -> Tensor:  # fmt: skip
        """Cross entropy of the next token, plus ``ctc_weight`` times CTC where there is such a head.

        tokens: (batch, U) without begin and end, padded with 0; token_lengths (batch,).
        """
        rows, longest = tokens.shape
        begin = torch.cat([tokens.new_full((rows, 1), self.bos_id), tokens], dim=1)
        given = {} if self.dec is None else {"tokens": begin}
        out = self(features, frames=frames, **given)
        total = features.new_zeros(())
        if "logits" in out:
            target = F.pad(tokens, (0, 1))
            target[torch.arange(rows, device=tokens.device), token_lengths] = self.eos_id
            counted = torch.arange(longest + 1, device=tokens.device)[None] <= token_lengths[:, None]
            total = total + F.cross_entropy(out["logits"][counted], target[counted], label_smoothing=label_smoothing)
        if "ctc_logits" in out:
            log_probs = out["ctc_logits"].float().log_softmax(-1).transpose(0, 1)
            ends = self.front.lengths(frames)
            ctc = F.ctc_loss(log_probs, tokens, ends, token_lengths, blank=self.pad_id, zero_infinity=True)
            total = total + (ctc if self.dec is None else ctc_weight * ctc)
        return total


def sinusoids(start: int, count: int, dim: int, like: Tensor) -> Tensor:
    """Positions ``start`` .. of width ``dim``: sines, then cosines, wavelengths from 2 pi to 10000 times that."""
    rates = torch.exp(torch.arange(dim // 2, device=like.device) * (-9.210340371976184 / max(dim // 2 - 1, 1)))
    angles = torch.arange(start, start + count, device=like.device)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2)).to(like.dtype)


def samba_asr(**config: Any) -> SambaASR:
    """Builder of the cards."""
    return SambaASR(**config)
