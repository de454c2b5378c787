"""Recordings to transcripts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors, package_path

from .decoding import Hypothesis, align, ctc_beam, ctc_greedy, decode_beam, decode_greedy
from .features import LogMel
from .files import EXTENSIONS, SILENCE, Audio, open_audio
from .pictures import waveform
from .samba_asr import SambaASR
from .streaming import Recogniser, Speed, Token, Transcript, Word, check_decoding, to_tokens, to_words
from .text import Tokenizer

#: Longest piece that a model which must see all of it at once reads, in seconds.
LONGEST = 30.0


@dataclass(kw_only=True)
class Speech(Result):
    """What was said, with the times of words and tokens in seconds (None where the model cannot tell), and what is
    worth knowing about the recording (``notes``: silence, clipping, stereo ...)."""

    text: str = ""
    words: list[Word] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    seconds: float = 0.0
    real_time_factor: float | None = None  #: seconds of computing for a second of audio; None where there is none
    notes: list[str] = field(default_factory=list)
    audio: Audio | None = field(default=None, repr=False)

    def summary(self) -> str:
        notes = f" [{'; '.join(self.notes)}]" if self.notes else ""
        return (self.text or "(nothing was said)") + notes

    def picture(self) -> Image.Image | None:
        """The waveform with its words; at most the first minute."""
        if self.audio is None:
            return None
        rate, shown = 8000, 0
        pieces = []
        for piece, _ in self.audio.pieces(rate):
            pieces.append(piece)
            shown += len(piece)
            if shown >= 60 * rate:
                break
        samples = np.concatenate(pieces)[: 60 * rate] if pieces else np.zeros(0, np.float32)
        words = [w for w in self.words if w.start is not None and w.start * rate < len(samples)]
        return waveform(samples, rate, words)


class SpeechRecognition(Pipeline):
    """Transcribe recordings of any length, rate and number of channels.

    Inputs: files, arrays (samples,) or (samples, channels) with ``rate``, or tuples (samples, rate). Options:
    ``decoding``: "ctc" or "decoder" (default: the CTC head where there is one); ``beam``: width of the beam search (1:
    greedy); ``rate``: of bare arrays; ``tokenizer``: a tokenizer.json (default: the weights card's).

    A causal model reads a recording piece by piece with its state carried, in constant memory, if it decodes greedily
    by CTC; otherwise recordings longer than 30 s are cut at quiet places.
    """

    task = "speech-recognition"
    extensions = EXTENSIONS

    def __init__(
        self,
        model: nn.Module,
        decoding: str | None = None,
        beam: int = 1,
        rate: float | None = None,
        tokenizer: str | Path | Tokenizer | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, SambaASR):
            raise errors.BadArgument(
                f"{self.name} is a {type(model).__name__}; speech recognition needs a SambaASR",
                argument="model", accepted=["SambaASR"],
            )  # fmt: skip
        self.asr: SambaASR = model
        self.decoding = decoding or ("ctc" if model.ctc is not None else "decoder")
        check_decoding(model, self.decoding)
        if beam < 1:
            raise errors.BadArgument(f"beam is {beam}; expected 1 (greedy) or more", argument="beam", accepted=[])
        self.beam, self.rate = beam, rate
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else self._tokenizer(tokenizer)
        if len(self.tokenizer) > model.vocab_size:
            raise errors.BadArgument(
                f"the tokenizer has {len(self.tokenizer)} tokens and {self.name} {model.vocab_size}; expected the "
                "tokenizer that the model was trained with",
                argument="tokenizer", accepted=[],
            )  # fmt: skip
        self.mel = LogMel(model.n_mels, rate=model.sample_rate, scaling=model.scaling).to(self.device)

    def _tokenizer(self, given: str | Path | None) -> Tokenizer:
        if given is not None:
            return Tokenizer(given)
        if (own := self.preprocess.get("tokenizer_json")) is not None:  # of trained weights: its text
            return Tokenizer.of(own)
        named = self.preprocess.get("tokenizer")
        card = self.info.card if self.info is not None else None
        if named is None or card is None:
            raise errors.BadArgument(
                "these weights name no tokenizer: pass tokenizer=, a path to a tokenizer.json",
                argument="tokenizer", accepted=[],
            )  # fmt: skip
        return Tokenizer(package_path(card.package, named))

    # -- the steps of a pipeline -----------------------------------------------------------------------------------

    def read(self, source: Any) -> Audio:
        return open_audio(source, self.rate)

    def prepare(self, sample: Audio) -> Audio:
        return sample

    def collate(self, samples: Any) -> list[Audio]:
        return list(samples)

    def forward(self, batch: list[Audio]) -> list[Transcript]:
        return [self.transcribe(audio) for audio in batch]

    def split(self, output: list[Transcript], count: int) -> list[Transcript]:
        return output

    def finish(self, output: Transcript, sample: Audio) -> Speech:
        notes = [f"{sample.channels} channels, averaged"] if sample.channels > 1 else []
        speed = output.speed
        return Speech(
            text=output.text, words=output.words, tokens=output.tokens, notes=[*output.notes, *notes], audio=sample,
            seconds=speed.audio if speed is not None else sample.seconds,
            real_time_factor=speed.real_time_factor if speed is not None else None,
        )  # fmt: skip

    # -- transcribing ----------------------------------------------------------------------------------------------

    def recogniser(self, rate: float | None = None) -> Recogniser:
        """A stream to push samples of ``rate`` into (see :class:`zoo_audio.streaming.Recogniser`)."""
        return Recogniser(self.asr, self.tokenizer, rate=rate, decoding=self.decoding)

    def transcribe(self, audio: Audio) -> Transcript:
        if self.asr.causal and self.decoding == "ctc" and self.beam == 1:
            return self._streamed(audio)
        return self._in_pieces(audio)

    def _streamed(self, audio: Audio) -> Transcript:
        stream, notes = self.recogniser(), ["no samples"]
        for piece, levels in audio.pieces(self.asr.sample_rate):
            stream.push(piece)
            notes = levels.notes()
        stream.finish()
        return Transcript(stream.text, stream.tokens, stream.words, notes, stream.speed)

    def _in_pieces(self, audio: Audio) -> Transcript:
        began = time.perf_counter()
        samples, levels = audio.whole(self.asr.sample_rate)
        tokens: list[Token] = []
        if levels.peak >= SILENCE:
            for start, end in quiet_cuts(samples, self.asr.sample_rate, LONGEST):
                offset = start / self.asr.sample_rate
                for token in to_tokens(self.asr, self.tokenizer, self._decode(samples[start:end])):
                    at = None if token.start is None else round(token.start + offset, 3)
                    tokens.append(Token(token.text, at))
        words = to_words(tokens, self.asr.seconds_per_position)
        spent = time.perf_counter() - began
        speed = Speed(total=spent, longest=spent, pieces=1, audio=len(samples) / self.asr.sample_rate)
        return Transcript(" ".join(w.text for w in words), tokens, words, levels.notes(), speed)

    @torch.inference_mode()
    def _decode(self, samples: np.ndarray) -> Hypothesis:
        features = self.mel(torch.from_numpy(samples)[None].to(self.device)).to(self.dtype)
        if not features.shape[1]:  # less than one frame
            return Hypothesis([], [])
        hidden, _ = self.asr.encode(features)
        if self.decoding == "ctc":
            assert self.asr.ctc is not None
            logits = self.asr.ctc(hidden)[0]
            return ctc_greedy(logits) if self.beam == 1 else ctc_beam(logits, self.beam)[0]
        found = decode_greedy(self.asr, hidden) if self.beam == 1 else decode_beam(self.asr, hidden, self.beam)[0]
        if self.asr.ctc is not None:  # the decoder itself does not say where its tokens are
            found.positions = align(self.asr.ctc(hidden)[0].float().log_softmax(-1), found.tokens)
        return found


def quiet_cuts(samples: np.ndarray, rate: int, longest: float) -> list[tuple[int, int]]:
    """(start, end) of pieces of at most ``longest`` seconds that end where it is quietest in their last third."""
    limit, frame = int(longest * rate), rate // 50
    cuts = [0]
    while len(samples) - cuts[-1] > limit:
        first = cuts[-1] + 2 * limit // 3
        region = samples[first : cuts[-1] + limit]
        loud = np.square(region[: len(region) // frame * frame]).reshape(-1, frame).mean(axis=1)
        cuts.append(first + int(loud.argmin()) * frame + frame // 2)
    return list(zip(cuts, [*cuts[1:], len(samples)], strict=True))
