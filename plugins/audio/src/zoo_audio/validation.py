"""Measuring: a speech recogniser on recordings whose words are known, a model of sound on recordings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .manifests import read_manifest
from .metrics import ErrorRates, error_rates
from .pipelines import Speech, SpeechRecognition


def validate_speech(
    model: nn.Module,
    data: str | Path,
    *,
    decoding: str | None = None,
    beam: int = 1,
    tokenizer: str | Path | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """Word and character error rate, over all recordings together, after lower case and without punctuation.

    DATA is a folder of audio files, each with its text beside it (a.wav, a.txt), a folder as LibriSpeech's (flac files
    and *.trans.txt), a file of lines "AUDIO FILE<tab>WHAT IS SAID" (paths relative to it), a .tsv or .csv file with
    columns audio and text, or a .jsonl file with such keys (see :mod:`zoo_audio.manifests`). ``decoding``, ``beam`` and
    ``tokenizer`` are the pipeline's; ``limit``: at most so many recordings.

    Raises ``zoo.errors.BadArgument`` for recordings without a text and texts without a recording, ``MissingExtra``
    without jiwer.
    """
    pairs = read_manifest(Path(data))[:limit]
    pipe = SpeechRecognition(model, decoding=decoding, beam=beam, tokenizer=tokenizer)
    began = time.perf_counter()
    with progress_bar(progress and sys.stderr.isatty(), len(pairs), pipe.name) as advance:
        rates, answers = measure(pipe, pairs, advance)
    heard = sum(answer.seconds for answer in answers)
    computed = sum(answer.seconds * (answer.real_time_factor or 0.0) for answer in answers)
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(pairs),
        metrics={"WER": rates.wer, "CER": rates.cer, "real-time factor": computed / heard if heard else None},
        seconds=time.perf_counter() - began,
        notes=f"{rates.words} words: {rates.substitutions} wrong, {rates.deletions} missing, "
        f"{rates.insertions} too many",
    )


def measure(
    pipe: SpeechRecognition, pairs: Sequence[tuple[Path, str]], advance: Callable[[], object] = lambda: None
) -> tuple[ErrorRates, list[Speech]]:
    """Error rates of the pipeline's answers to (recording, text) pairs, and the answers; ``advance`` is called after
    each."""
    answers = []
    for path, _ in pairs:
        answers.append(pipe(path))
        advance()
    return error_rates([text for _, text in pairs], [answer.text for answer in answers]), answers


def validate_sound(
    model: nn.Module, data: str | Path, *, length: int | None = None, batch_size: int = 8, limit: int | None = None
) -> Measured:
    """Bits a sample: the mean -log2 of the probability that the model gives to each sample after those before it.

    DATA is an audio file, or a folder of them at any depth; they are resampled to the model's rate, as 8-bit mu-law.
    ``length``: samples of a window, which begins anew with nothing heard (default: those of the weights' training, else
    the card's); ``limit``: at most so many recordings.

    Raises ``zoo.errors.BadArgument`` for a folder without audio, and for a model that hears no mu-law samples.
    """
    from .sounds import bits, default_length, find_audio, read_tokens, sound_model

    began = time.perf_counter()
    lm = sound_model(model)
    sounds = [read_tokens(path, lm.sample_rate) for path in find_audio(Path(data))[:limit]]
    window = default_length(lm) if length is None else length
    return Measured(
        model=getattr(getattr(model, "zoo_info", None), "name", type(model).__name__),
        data=str(data),
        samples=len(sounds),
        metrics={"bits per sample": bits(lm, sounds, window, batch_size)},
        seconds=time.perf_counter() - began,
        notes=f"{sum(map(len, sounds))} samples, in windows of {window}",
    )
