"""Speech to text while the audio comes: states are carried, nothing is read twice, memory does not grow."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from zoo_registry import errors

from .decoding import CTCGreedy, Hypothesis, decode_greedy
from .features import LogMel, LogMelStream
from .files import SILENCE, Mono
from .samba_asr import SambaASR, sinusoids
from .text import Tokenizer, words_of


@dataclass(frozen=True)
class Token:
    """A piece of text and the second at which it begins (None: the model has no CTC head to tell)."""

    text: str
    start: float | None


@dataclass(frozen=True)
class Word:
    """One word of the text, and when it is heard (None: the decoder wrote it and there is no CTC head to place it)."""

    text: str
    start: float | None  #: seconds, when its first piece is recognised
    end: float | None  #: seconds, when its last piece is


@dataclass
class Speed:
    """What streaming cost. ``lookahead``: seconds of audio behind an instant that must be heard before it is written;
    ``longest``, ``total``: seconds of computing for one piece, and for all."""

    lookahead: float = 0.0
    longest: float = 0.0
    total: float = 0.0
    pieces: int = 0
    audio: float = 0.0

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of computing for a second of audio; None before there is any."""
        return self.total / self.audio if self.audio else None

    def __str__(self) -> str:
        return (
            f"latency {1000 * (self.lookahead + self.longest):.0f} ms behind the end of a piece "
            f"({1000 * self.lookahead:.0f} ms of lookahead, at most {1000 * self.longest:.0f} ms of computing), "
            f"real-time factor {'-' if self.real_time_factor is None else f'{self.real_time_factor:.4f}'}"
        )


class Recogniser:
    """One stream of speech and its text.

    ``push`` samples of any rate, mono or (n, channels), as they come; it returns the tokens that are new. ``finish``
    ends the stream. Then ``words``, ``tokens``, ``text`` are complete. ``decoding``: "ctc" writes a token as soon as
    its position is heard, and gives the same text whatever the pieces; "decoder" decodes again after each piece and
    commits what two pieces running agree on, so it can write something else than for the whole at once.

    Raises ValueError for a model that reads the audio in both directions, and for samples after ``finish``.
    """

    def __init__(
        self, model: SambaASR, tokenizer: Tokenizer, *, rate: float | None = None, decoding: str | None = None
    ) -> None:
        decoding = decoding or ("ctc" if model.ctc is not None else "decoder")
        check_decoding(model, decoding)
        if not model.causal:
            raise errors.BadArgument(
                "this model reads the audio in both directions and cannot stream; transcribe the whole recording, or "
                "load a streaming model (samba_asr_base_streaming, samba_asr_micro)",
                argument="model", accepted=[],
            )  # fmt: skip
        self.model, self.tokenizer, self.decoding = model, tokenizer, decoding
        device = next(model.parameters()).device
        self.mono = Mono(model.sample_rate if rate is None else rate, model.sample_rate)
        mel = LogMel(model.n_mels, rate=model.sample_rate, scaling=model.scaling).to(device)
        self.features = LogMelStream(mel)
        self.front = model.front.init_state()
        self.encoder = model.enc.init_state()
        self.ctc = CTCGreedy(model.pad_id)
        self.heard = model.dec.init_state() if decoding == "decoder" and model.dec is not None else None
        self.ids: list[int] = []  #: what is committed
        self.positions: list[int] = []
        self.guess: list[int] = []  #: the decoder's last answer, of which the agreed part was committed
        self.quiet = 0  #: samples before the first that is not silence
        self.loud = False
        self.over = False  #: no more samples are taken
        self.read = 0  #: positions that the encoder has given
        first = model.front.conv1.stride[0]
        self.speed = Speed(lookahead=(mel.n_fft // 2 + (1 + first) * mel.hop) / mel.rate)

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def push(self, samples: np.ndarray | Tensor) -> list[Token]:
        """The next samples; returns the tokens that they complete."""
        self._open()
        began = time.perf_counter()
        array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
        return self._read(self.mono.push(array), began)

    @torch.inference_mode()
    def finish(self) -> list[Token]:
        """No more samples follow; returns the tokens that were still open."""
        self._open()
        self.over = True
        began = time.perf_counter()
        return self._read(self.mono.push(np.zeros(0, np.float32), last=True), began, last=True)

    def _open(self) -> None:
        if self.over:
            raise ValueError("this stream was finished; make another Recogniser for the next recording")

    def _read(self, mono: np.ndarray, began: float, last: bool = False) -> list[Token]:
        self._listen_for_sound(mono)
        device = self.front[0].device
        made = self.features.push(torch.from_numpy(mono).to(device))
        if last:
            made = torch.cat([made, self.features.finish()], dim=1)
        hidden = self._encode(made.to(self.front[0].dtype), last)
        new = self._write_ctc(hidden) if self.decoding == "ctc" else self._write_decoder(hidden, last)
        spent = time.perf_counter() - began
        self.speed.pieces += 1
        self.speed.total += spent
        self.speed.longest = max(self.speed.longest, spent)
        self.speed.audio += len(mono) / self.model.sample_rate
        return new

    def _listen_for_sound(self, mono: np.ndarray) -> None:
        if not self.loud:
            loud = np.flatnonzero(np.abs(mono) >= SILENCE)
            self.loud = len(loud) > 0
            self.quiet += int(loud[0]) if self.loud else len(mono)

    def _encode(self, features: Tensor, last: bool) -> Tensor:
        x = self.model.front.stream(features, self.front, last=last)
        if self.model.positions and x.shape[1]:
            x = x + sinusoids(self.read, x.shape[1], self.model.dim, x)
        self.read += x.shape[1]
        return self.model.enc(x, state=self.encoder) if x.shape[1] else x

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write_ctc(self, hidden: Tensor) -> list[Token]:
        assert self.model.ctc is not None
        if not hidden.shape[1]:
            return []
        new = [(i, p) for i, p in self.ctc.push(self.model.ctc(hidden)[0]) if self._after_silence(p)]
        self.ids += [i for i, _ in new]
        self.positions += [p for _, p in new]
        return [Token(self.tokenizer.piece(i), self.time(p)) for i, p in new]

    def _after_silence(self, position: int) -> bool:
        """Nothing can be said before the first sound."""
        return self.loud and (position + 1) * self.model.seconds_per_position * self.model.sample_rate > self.quiet

    def _write_decoder(self, hidden: Tensor, last: bool) -> list[Token]:
        assert self.model.dec is not None
        assert self.heard is not None
        if hidden.shape[1]:
            self.model.dec.listen(hidden, self.heard)
        if not self.loud or not self.read or not (last or hidden.shape[1]):
            return []
        answer = decode_greedy(self.model, hidden, prefix=self.ids, state=self.heard.clone()).tokens
        agreed = len(self.ids)
        while agreed < min(len(answer), len(self.guess)) and answer[agreed] == self.guess[agreed]:
            agreed += 1
        new = answer[len(self.ids) :] if last else answer[len(self.ids) : agreed]
        self.ids, self.guess = [*self.ids, *new], answer
        return [Token(self.tokenizer.piece(i), None) for i in new]

    # -- what was said ---------------------------------------------------------------------------------------------

    def time(self, position: int) -> float:
        return round(position * self.model.seconds_per_position, 3)

    @property
    def text(self) -> str:
        return self.tokenizer.decode(self.ids)

    @property
    def tokens(self) -> list[Token]:
        times = [self.time(p) for p in self.positions] if self.positions else [None] * len(self.ids)
        return [Token(self.tokenizer.piece(i), t) for i, t in zip(self.ids, times, strict=True)]

    @property
    def words(self) -> list[Word]:
        return to_words(self.tokens, self.model.seconds_per_position)


def to_words(tokens: list[Token], width: float) -> list[Word]:
    """Words with times from tokens; a word ends ``width`` seconds after its last token begins."""
    words = []
    for text, first, behind in words_of([t.text for t in tokens]):
        start, end = tokens[first].start, tokens[behind - 1].start
        words.append(Word(text, start, None if end is None else round(end + width, 3)))
    return words


def to_tokens(model: SambaASR, tokenizer: Tokenizer, found: Hypothesis) -> list[Token]:
    """Tokens with times from a hypothesis of one recording."""
    width = model.seconds_per_position
    places = [None] * len(found.tokens) if found.positions is None else [round(p * width, 3) for p in found.positions]
    return [Token(tokenizer.piece(i), t) for i, t in zip(found.tokens, places, strict=True)]


def check_decoding(model: SambaASR, decoding: str) -> None:
    """Raises BadArgument, which is a ValueError, where ``model`` cannot decode so."""
    if decoding not in ("ctc", "decoder"):
        raise bad_decoding(f"decoding is {decoding!r}; expected 'ctc' or 'decoder'")
    if decoding == "ctc" and model.ctc is None:
        raise bad_decoding("this model has no CTC head; use decoding='decoder'")
    if decoding == "decoder" and model.dec is None:
        raise bad_decoding("this model has no decoder; use decoding='ctc'")


def bad_decoding(message: str) -> errors.BadArgument:
    """The error for a head that the model does not have."""
    return errors.BadArgument(message, argument="decoding", accepted=["ctc", "decoder"])


@dataclass
class Transcript:
    """Text of one recording, before it becomes a pipeline's result."""

    text: str
    tokens: list[Token]
    words: list[Word]
    notes: list[str] = field(default_factory=list)
    speed: Speed | None = None
