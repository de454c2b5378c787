"""Speech to train on, spoken by espeak-ng: commands and digit strings in many voices, some of them held out.

Nothing that is made here is kept in the repository. A voice is an accent of English with one of espeak-ng's variants
(``en-us+f3``); every seventh variant in alphabetical order is held out, in all accents.
"""

from __future__ import annotations

import io
import random
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

RATE = 16000
ACCENTS = (
    *("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc"),
)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
#: Whispers and the two rate tests have no voice to learn from; they are left out on both sides.
LEFT_OUT = {"whisper", "whisperf", "fast", "Storm"}


def variants() -> tuple[list[str], list[str]]:
    """(variants to train on, variants held out). Raises SystemExit without espeak-ng."""
    try:
        listed = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise SystemExit("espeak-ng is not installed: apt-get install espeak-ng") from None
    names = sorted(set(re.findall(r"!v/(\S+)", listed)) - LEFT_OUT, key=str.lower)
    names = [name for name in names if name != "Mr"]  # a file name with a space in it
    held = names[3::7]
    return [name for name in names if name not in held], held


def sentence(draw: random.Random) -> str:
    """A command, a digit string, or words of both in any order."""
    pick = draw.choice
    digits = lambda low, high: " ".join(pick(DIGITS) for _ in range(draw.randint(low, high)))  # noqa: E731
    kind = draw.random()
    if kind < 0.4:
        return digits(1, 8)
    if kind < 0.55:
        return " ".join(pick(WORDS) for _ in range(draw.randint(1, 5)))
    return pick(
        [
            f"{pick(['turn', 'switch'])} {pick(['on', 'off'])} the {pick(['light', 'fan', 'radio', 'heater'])}",
            f"{pick(['open', 'close'])} the {pick(['door', 'window', 'gate'])}",
            f"go {pick(['left', 'right', 'forward', 'back', 'up', 'down', 'home'])}",
            f"{pick(['start', 'stop', 'play', 'pause'])} the {pick(['music', 'radio', 'timer'])}",
            f"set the timer to {digits(1, 2)} {pick(['minutes', 'seconds', 'hours'])}",
            f"volume {pick(['up', 'down'])}",
            f"call {digits(3, 7)}",
            f"channel {digits(1, 2)}",
            pick(["yes", "no", "stop", "go", "help", "cancel", "repeat"]),
        ]
    )


WORDS = [
    *DIGITS,
    *(
        "turn",
        "switch",
        "on",
        "off",
        "the",
        "light",
        "fan",
        "radio",
        "heater",
        "open",
        "close",
        "door",
        "window",
        "gate",
    ),
    *("go", "left", "right", "forward", "back", "up", "down", "home", "start", "stop", "play", "pause", "music"),
    *("timer", "set", "to", "minutes", "seconds", "hours", "volume", "call", "channel", "yes", "no"),
    *("help", "cancel", "repeat"),
]


@dataclass(frozen=True)
class Utterance:
    """What is said and how; :func:`speak` makes the sound."""

    text: str
    accent: str
    variant: str
    speed: int  #: words a minute
    pitch: int  #: espeak-ng's scale, 0 to 99
    gap: int  #: pause between words in units of 10 ms
    noise: str  #: "none", "white" or "pink"
    snr: float  #: decibels
    level: float  #: peak in decibels below full scale
    before: float  #: seconds of silence
    after: float
    seed: int


def plan(count: int, names: list[str], seed: int) -> list[Utterance]:
    """``count`` utterances drawn from the voices of ``names``."""
    draw = random.Random(seed)
    return [
        Utterance(
            sentence(draw), draw.choice(ACCENTS), draw.choice(names), draw.randint(120, 220), draw.randint(20, 80),
            draw.choice([0, 0, 0, 1, 3, 6]), draw.choice(["none", "white", "pink"]), draw.uniform(10, 40),
            -draw.uniform(0, 20), draw.uniform(0.05, 0.6), draw.uniform(0.1, 0.6), draw.randrange(2**31),
        )
        for _ in range(count)
    ]  # fmt: skip


def speak(said: Utterance) -> np.ndarray:
    """Samples in [-1, 1] at 16 kHz, float32."""
    command = [
        *("espeak-ng", "--stdout", "-v", f"{said.accent}+{said.variant}", "-s", str(said.speed)),
        *("-p", str(said.pitch), "-g", str(said.gap), said.text),
    ]
    made = subprocess.run(command, capture_output=True, check=True).stdout
    # The header is written before the length is known; libsndfile reads on to the end of the data.
    audio, rate = soundfile.read(io.BytesIO(made), dtype="float32")
    audio = soxr.resample(audio, rate, RATE)
    peak = np.abs(audio).max()
    if peak == 0:
        raise ValueError(f"espeak-ng was silent for {said}")
    audio = np.pad(audio / peak, (int(said.before * RATE), int(said.after * RATE)))
    audio = audio + noise(said, np.sqrt(np.mean(np.square(audio))), len(audio))
    return (audio * (10 ** (said.level / 20) / max(1.0, np.abs(audio).max()))).astype(np.float32)


def noise(said: Utterance, loudness: float, length: int) -> np.ndarray:
    """Noise ``snr`` decibels below ``loudness`` (root mean square)."""
    if said.noise == "none":
        return np.zeros(length)
    made = np.random.default_rng(said.seed).standard_normal(length)
    if said.noise == "pink":
        spectrum = np.fft.rfft(made)
        made = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), length)
    return made / np.sqrt(np.mean(np.square(made))) * loudness * 10 ** (-said.snr / 20)


def speak_all(utterances: list[Utterance], workers: int = 2):
    """Yield (utterance, samples), in order."""
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(utterances, pool.map(speak, utterances), strict=True)


def write_samples(folder: Path) -> None:
    """The sample recordings of the package: three voices that were held out, three formats, and what they say."""
    _, held = variants()
    said = [
        ("sample_1.wav", "open the door", "en-us", "f1", 180),
        ("sample_2.flac", "call seven two nine four", "en-gb", "m2", 180),
        ("sample_3.ogg", "set the timer to one five minutes", "en-gb-scotland", "david", 150),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (name, text, accent, variant, speed) in enumerate(said):
        assert variant in held
        one = Utterance(text, accent, variant, speed, 50, 0, "pink" if i == 2 else "none", 30, -3, 0.1, 0.1, i)
        soundfile.write(folder / name, speak(one), RATE)
        lines.append(f"{name}\t{text}\n")
    (folder / "transcripts.tsv").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_samples(Path(__file__).parents[1] / "src" / "zoo_audio" / "examples")
