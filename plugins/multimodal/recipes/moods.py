"""Generated dialogues whose moods have a history, for the Broad Mamba demo.

Two speakers take turns, each with a mood of four: neutral, happy, sad, angry. A mood stays with 85 % chance; else it
becomes the other speaker's (half of the changes) or any. Every utterance shows its speaker's mood in three modalities
as a point of that mood plus noise, so that one utterance alone is ambiguous: each modality is missing in 20 % of the
utterances, and in 35 % it shows nothing but noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zoo_multimodal.dialogues import Dialogue

MOODS = ("neutral", "happy", "sad", "angry")
DIMS = {"text": 8, "audio": 6, "visual": 5}
#: how far apart the moods lie, in units of the noise
DISTANCE = {"text": 1.0, "audio": 0.8, "visual": 0.7}
_r = np.random.default_rng(7)
POINTS = {m: DISTANCE[m] * _r.normal(size=(len(MOODS), n)) / np.sqrt(n / 3) for m, n in DIMS.items()}


def dialogue(r: np.random.Generator, name: str) -> Dialogue:
    length = int(r.integers(6, 25))
    mood = r.integers(0, len(MOODS), 2)
    speaker, moods, speakers = 0, [], []
    for _ in range(length):
        if r.random() > 0.85:
            mood[speaker] = mood[1 - speaker] if r.random() < 0.5 else r.integers(len(MOODS))
        moods.append(int(mood[speaker]))
        speakers.append("AB"[speaker])
        speaker = 1 - speaker if r.random() < 0.8 else speaker
    here = r.random((length, len(DIMS))) > 0.2
    here[~here.any(1), 0] = True  # at least the words
    features = {}
    for i, (m, n) in enumerate(DIMS.items()):
        shown = r.random((length, 1)) > 0.35
        array = r.normal(size=(length, n)) + np.where(shown, POINTS[m][moods], 0)
        features[m] = np.where(here[:, i : i + 1], array, np.nan).astype(np.float32)
    return Dialogue(features, speakers, None, [MOODS[k] for k in moods], name)


def exact(d: Dialogue) -> np.ndarray:
    """The best answers there are, by exact inference with everything above known: (utterances,) numbers."""
    n = len(MOODS)
    here = [{m: a[t] for m, a in d.features.items() if not np.isnan(a[t]).any()} for t in range(len(d))]
    shows = np.ones((len(d), n))
    for t, utterance in enumerate(here):
        for m, x in utterance.items():
            off = ((x - np.vstack([POINTS[m], np.zeros_like(x)])) ** 2).sum(1) / 2
            each = np.exp(off.min() - off)
            shows[t] *= 0.65 * each[:n] + 0.35 * each[n]
    stay, other = 0.85 * np.eye(n), 0.15 * 0.5
    forward = np.full((n, n), 1 / n**2)  # moods of A and B
    past, moves = [], []
    for t in range(len(d)):
        b = (d.speakers or [])[t] == "B"
        move = np.zeros((n, n, n))  # the listener's mood, the speaker's before and after
        for k in range(n):
            move[k] = stay + other / n
            move[k, :, k] += other
        forward = forward.T if b else forward
        forward = np.einsum("sk,ksr->rk", forward, move) * shows[t][:, None]
        forward /= forward.sum()
        past.append(forward)
        moves.append((move, b))
        forward = forward.T if b else forward
    answers, back = [], np.ones((n, n))
    for t in reversed(range(len(d))):
        move, b = moves[t]
        own = back.T if b else back
        answers.append(int((past[t] * own).sum(1).argmax()))
        own = np.einsum("ksr,r,rk->sk", move, shows[t], own)
        back = (own.T if b else own) / own.max()
    return np.array(answers[::-1])


def dialogues(count: int, seed: int) -> list[Dialogue]:
    r = np.random.default_rng(seed)
    return [dialogue(r, f"d{i + 1}") for i in range(count)]


def write(path: str | Path, count: int, seed: int, digits: int | None = None) -> Path:
    """An .npz file of dialogues. digits: round features, which makes the file smaller."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = dialogues(count, seed)
    features = {m: np.concatenate([d.features[m] for d in own]) for m in DIMS}
    if digits is not None:
        features = {m: a.round(digits) for m, a in features.items()}
    sides = {
        "speaker": [s for d in own for s in d.speakers or []],
        "label": [s for d in own for s in d.labels or []],
        "lengths": [len(d) for d in own],
        "name": [d.name for d in own],
    }
    np.savez_compressed(path, **features, **{k: np.array(v) for k, v in sides.items()})
    return path
