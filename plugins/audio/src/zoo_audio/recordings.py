"""Recordings with their texts as batches of features and tokens, for training a recogniser."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .features import LogMel
from .files import open_audio
from .pipelines import LONGEST
from .samba_asr import SambaASR
from .text import Tokenizer

#: Widest bands of mel bins that are masked, as a share of all, and longest stretches of frames; each of them twice.
#: Source: Park et al., "SpecAugment", arXiv 1904.08779, policy LD (27 of 80 bins, 100 frames, at most a share).
MASKS, BINS, FRAMES, SHARE = 2, 27 / 80, 100, 0.2


@dataclass(frozen=True)
class Recording:
    """``seconds`` long, as its header says; ``tokens`` of its text."""

    path: Path
    tokens: list[int]
    seconds: float


def survey(
    pairs: Sequence[tuple[Path, str]],
    model: SambaASR,
    tokenizer: Tokenizer,
    advance: Callable[[], object] = lambda: None,
) -> tuple[list[Recording], list[str]]:
    """(the recordings that ``model`` can learn from, a sentence about each of the others). Every header is read.

    Left out are texts without a letter of the vocabulary, recordings longer than a model reads at once, and for a CTC
    head those that are too short for their text: it writes one token a position, and a blank between equal ones.
    Raises BadArgument for files that are no audio.
    """
    found, refused = [], []
    for path, text in pairs:
        audio, tokens = open_audio(path), tokenizer.encode(text)
        frames = torch.tensor(int(audio.seconds * 100))
        positions = int(model.front.lengths(frames))
        needed = len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))
        if not tokens:
            refused.append(f"{path}: nothing is said in its text {text!r:.60}")
        elif audio.seconds > LONGEST:
            refused.append(f"{path}: {audio.seconds:.1f} s; at most {LONGEST:g} s are read at once, cut it")
        elif positions < (needed if model.ctc is not None else 1):
            refused.append(f"{path}: {audio.seconds:.2f} s give {positions} positions, and its text needs {needed}")
        else:
            found.append(Recording(path, tokens, audio.seconds))
        advance()
    return found, refused


class Buckets:
    """The recordings of each batch: about equally long ones, all once an epoch (a last batch is filled up), in an order
    of its own that ``seed`` gives. A function of the batch's number, as :class:`zoo.training.Shuffled`."""

    def __init__(self, seconds: Sequence[float], batch_size: int, seed: int = 0) -> None:
        self.seconds, self.batch_size, self.seed = np.asarray(seconds), batch_size, seed % 2**63
        self.each = -(-len(self.seconds) // batch_size)  #: batches an epoch
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, index: int) -> list[int]:
        """Numbers of the recordings in batch ``index``."""
        epoch, place = divmod(index, self.each)
        if epoch not in self._orders:
            draw = np.random.default_rng((self.seed, 0, epoch))
            order = np.argsort(self.seconds * draw.uniform(0.9, 1.1, len(self.seconds)), kind="stable")
            groups = np.resize(order, self.each * self.batch_size).reshape(self.each, self.batch_size)
            # A new dictionary and not a changed one: batches are made on several threads.
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1} | {epoch: draw.permutation(groups)}
        return [int(i) for i in self._orders[epoch][place]]

    def random(self, index: int) -> np.random.Generator:
        """Random numbers for the augmentation of batch ``index``."""
        return np.random.default_rng((self.seed, 1, index))


@dataclass
class Spoken:
    """Batches by number, as :meth:`SambaASR.loss` takes them: features (batch, frames, mels), frames of each (batch,),
    tokens (batch, longest), tokens of each (batch,). Recordings are read and resampled as the pipeline does."""

    recordings: Sequence[Recording]
    mel: LogMel
    batch_size: int
    seed: int = 0
    augment: bool = True
    order: Buckets = field(init=False)

    def __post_init__(self) -> None:
        self.order = Buckets([r.seconds for r in self.recordings], self.batch_size, self.seed)

    def __call__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen, draw = [self.recordings[i] for i in self.order(index)], self.order.random(index)
        heard = [self.features(recording.path) for recording in chosen]
        if self.augment:
            heard = [masked(features, draw) for features in heard]
        tokens = [torch.tensor(recording.tokens) for recording in chosen]
        return (
            pad_sequence(heard, batch_first=True),
            torch.tensor([len(features) for features in heard]),
            pad_sequence(tokens, batch_first=True),
            torch.tensor([len(one) for one in tokens]),
        )

    def features(self, path: Path) -> Tensor:
        """(frames, mels) of a recording."""
        samples, _ = open_audio(path).whole(self.mel.rate)
        return self.mel(torch.from_numpy(samples)[None])[0]


def masked(features: Tensor, draw: np.random.Generator) -> Tensor:
    """SpecAugment without warping: bands of mel bins and stretches of frames take the mean of all."""
    found, mean = features.clone(), features.mean()
    frames, bins = features.shape
    for _ in range(MASKS):
        wide = int(draw.integers(int(BINS * bins) + 1))
        first = int(draw.integers(bins - wide + 1))
        found[:, first : first + wide] = mean
        long = int(draw.integers(min(FRAMES, int(SHARE * frames)) + 1))
        first = int(draw.integers(frames - long + 1))
        found[first : first + long] = mean
    return found
