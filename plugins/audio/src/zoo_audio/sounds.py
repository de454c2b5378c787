"""Recordings as windows of mu-law samples, for training a model of sound and for measuring it.

A sample is a byte, so an hour at 16 kHz takes 58 MB of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.training import Shuffled
from zoo_registry import errors

from .files import EXTENSIONS, open_audio
from .mulaw import mu_law_encode
from .sashimi import SashimiLM

#: Stands where a window has no sample.
NOTHING = -1


def find_audio(place: Path) -> list[Path]:
    """The audio files of a folder, at any depth, or the file itself. Raises BadArgument where there is none."""
    if place.is_file():
        return [place]
    found = sorted(f for f in place.rglob("*") if f.name.lower().endswith(EXTENSIONS) and f.name[0] != ".")
    if not found:
        raise errors.BadArgument(
            f"{place} holds no audio file; expected {', '.join(EXTENSIONS)}", argument="data", accepted=[]
        )
    return found


def sound_model(model: Any) -> SashimiLM:
    """``model``, which hears 8-bit samples. Raises BadArgument for another."""
    if not isinstance(model, SashimiLM) or model.vocab_size != 256:
        kind = f"of {model.vocab_size} tokens" if isinstance(model, SashimiLM) else f"a {type(model).__name__}"
        raise errors.BadArgument(
            f"the model is {kind}; expected a SashimiLM of 256 tokens, 8-bit mu-law samples",
            argument="model", accepted=["SashimiLM"],
        )  # fmt: skip
    return model


def default_length(model: SashimiLM) -> int:
    """Samples of a window: those that the weights were trained with, else those of the card."""
    info = model.zoo_info
    own = info.weights.preprocess.get("length") if info.weights is not None else None  # type: ignore[union-attr]
    return int(own or info.card.input["shape"][0])  # type: ignore[union-attr, index]


def read_tokens(path: Path, rate: int) -> np.ndarray:
    """(samples,) uint8 at ``rate``, as the pipeline reads what it continues: mono, as loud as it is.

    Raises BadArgument for a file that is no audio, and for one without samples.
    """
    samples, _ = open_audio(path).whole(rate)
    if not len(samples):
        raise errors.BadArgument(f"{path} holds no samples; remove it", argument="data", accepted=[])
    return mu_law_encode(torch.from_numpy(samples)[None, :, None], scale=False)[0, :, 0].numpy().astype(np.uint8)


def windows(sounds: Sequence[np.ndarray], length: int) -> list[tuple[int, int]]:
    """(recording, first sample) of windows that hold every sample once."""
    return [(i, start) for i, sound in enumerate(sounds) for start in range(0, len(sound), length)]


@dataclass
class Sounds:
    """Batches of windows by number: int64 (batch, length), ``NOTHING`` behind a recording's end. Each window is moved
    by up to half its length, so that every epoch has others."""

    sounds: Sequence[np.ndarray]
    length: int
    batch_size: int
    seed: int = 0
    places: list[tuple[int, int]] = field(init=False)
    order: Shuffled = field(init=False)

    def __post_init__(self) -> None:
        self.places = windows(self.sounds, self.length)
        self.order = Shuffled(len(self.places), self.batch_size, self.seed)

    def __call__(self, index: int) -> Tensor:
        draw, half = self.order.random(index), self.length // 2
        rows = []
        for place in self.order(index):
            sound, start = self.places[place]
            last = max(len(self.sounds[sound]) - self.length, 0)
            rows.append((sound, min(max(start + int(draw.integers(-half, half + 1)), 0), last)))
        return together(self.sounds, rows, self.length)


def together(sounds: Sequence[np.ndarray], places: Sequence[tuple[int, int]], length: int) -> Tensor:
    """(windows, length) int64 of the windows at ``places``."""
    found = torch.full((len(places), length), NOTHING)
    for row, (sound, start) in enumerate(places):
        piece = sounds[sound][start : start + length]
        found[row, : len(piece)] = torch.from_numpy(piece.astype(np.int64))
    return found


def likelihood(model: nn.Module, tokens: Tensor, *, reduction: str = "mean") -> Tensor:
    """-log p of every sample of windows (batch, length) after those before it, in nats; what is ``NOTHING`` does not
    count. Before the first sample stands silence."""
    silence = torch.full_like(tokens[:, :1], 128)
    logits = model(torch.cat([silence, tokens[:, :-1]], dim=1).clamp(min=0))
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=NOTHING, reduction=reduction)


@torch.no_grad()
def bits(model: SashimiLM, sounds: Sequence[np.ndarray], length: int, batch_size: int = 8) -> float:
    """Mean -log2 p of every sample of the recordings, in windows of ``length``."""
    device = next(model.parameters()).device
    # longest first, so that windows of a batch are about equally long and short ones are not filled up to the longest
    places = sorted(windows(sounds, length), key=lambda place: -min(len(sounds[place[0]]) - place[1], length))
    total = 0.0
    for first in range(0, len(places), batch_size):
        part = places[first : first + batch_size]
        longest = min(len(sounds[part[0][0]]) - part[0][1], length)
        total += float(likelihood(model, together(sounds, part, longest).to(device), reduction="sum"))
    return total / sum(map(len, sounds)) / math.log(2)
