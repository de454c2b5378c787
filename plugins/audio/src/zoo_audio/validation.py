"""Measuring a speech recogniser on recordings whose words are known."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch import nn

from zoo import errors
from zoo.files import read_text
from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .files import EXTENSIONS
from .metrics import error_rates
from .pipelines import SpeechRecognition


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

    DATA is a folder of audio files, each with its text beside it (a.wav, a.txt), or a file of lines
    "AUDIO FILE<tab>WHAT IS SAID" (paths relative to it). ``decoding``, ``beam`` and ``tokenizer`` are the pipeline's;
    ``limit``: at most so many recordings.

    Raises ``zoo.errors.BadArgument`` for recordings without a text and texts without a recording, ``MissingExtra``
    without jiwer.
    """
    pairs = read_manifest(Path(data))[:limit]
    pipe = SpeechRecognition(model, decoding=decoding, beam=beam, tokenizer=tokenizer)
    began = time.perf_counter()
    answers = []
    with progress_bar(progress and sys.stderr.isatty(), len(pairs), pipe.name) as advance:
        for path, _ in pairs:
            answers.append(pipe(path))
            advance()
    rates = error_rates([text for _, text in pairs], [answer.text for answer in answers])
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


def read_manifest(path: Path) -> list[tuple[Path, str]]:
    """(audio file, text) pairs. Raises BadArgument for lines without a tab, files without a text, and none at all."""

    def bad(message: str) -> Exception:
        return errors.BadArgument(message, argument="data", accepted=[])

    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.lower().endswith(EXTENSIONS) and f.name[0] != ".")
        lacking = [f.name for f in files if not f.with_suffix(".txt").is_file()]
        if lacking:
            raise bad(f"{lacking[0]} in {path} has no text beside it; expected {Path(lacking[0]).stem}.txt")
        spoken = {f.stem for f in files}
        lost = sorted(f.name for f in path.glob("*.txt") if f.stem not in spoken and f.name[0] != ".")
        if files and lost:
            raise bad(f"{lost[0]} in {path} has no recording beside it; expected one of {', '.join(EXTENSIONS)}")
        pairs = [(f, read_text(f.with_suffix(".txt")).strip()) for f in files]
    else:
        pairs = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                file, tab, text = line.partition("\t")
                if not tab:
                    raise bad(f"line {number} of {path} has no tab; expected an audio file, a tab, and what is said")
                if not (path.parent / file.strip()).is_file():
                    raise bad(f"line {number} of {path} names {file.strip()!r}; there is no such file in {path.parent}")
                pairs.append((path.parent / file.strip(), text))
    if not pairs:
        raise bad(f"{path} names no audio file; expected one of {', '.join(EXTENSIONS)}")
    return pairs
