"""Dialogue files in, the emotion of every utterance out."""

from __future__ import annotations

import csv
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.files import whole
from zoo.pipelines import Pipeline, Result
from zoo.validation import Measured
from zoo_registry import errors

from .broad_mamba import BroadMamba
from .dialogues import EXTENSIONS, Batch, Dialogue, join, read_dialogues
from .emotion_training import measure


@dataclass(kw_only=True)
class Emotions(Result):
    """One row for each utterance of a file, in its order: ``dialogue``, ``utterance`` (from 1), ``speaker`` and
    ``words`` where the file has them, ``label``, ``confidence``, and the modalities' ``weights`` in the answer."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def summary(self) -> str:
        counts = Counter(row["label"] for row in self.rows)
        return f"{len(self.rows)} utterances: " + ", ".join(f"{n} {label}" for label, n in counts.most_common())

    @property
    def confidence(self) -> float | None:
        """The mean of the rows'."""
        return sum(row["confidence"] for row in self.rows) / len(self.rows) if self.rows else None

    def save_csv(self, path: str | Path) -> Path:
        """One line an utterance; the weights as columns ``weight_text`` ..."""
        path = Path(path)
        flat = [
            {k: v for k, v in row.items() if k != "weights"} | {f"weight_{m}": w for m, w in row["weights"].items()}
            for row in self.rows
        ]
        names = list(dict.fromkeys(k for row in flat for k in row)) or ["dialogue"]
        with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in flat)
        return path


class EmotionRecognition(Pipeline):
    """Dialogues (see :mod:`zoo_multimodal.dialogues`) to emotions; all dialogues of a file are one batch."""

    task = "emotion-recognition-in-conversation"
    extensions = EXTENSIONS

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not isinstance(model, BroadMamba):
            raise ValueError(f"{type(model).__name__} is no BroadMamba; this task's models read dialogues")

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        """A list of dialogues is one sample, like a file of them."""
        if isinstance(inputs, list) and inputs and all(isinstance(d, Dialogue) for d in inputs):
            return [inputs], True
        return super().expand(inputs)

    def read(self, source: Any) -> list[Dialogue]:
        """A file, a :class:`~zoo_multimodal.dialogues.Dialogue` or a list of them."""
        if isinstance(source, Dialogue):
            return [source]
        if not isinstance(source, (list, str, Path)):
            raise ValueError(f"dialogues are given as {type(source).__name__}; expected a file, or a list of Dialogue")
        return source if isinstance(source, list) else read_dialogues(source)

    def prepare(self, sample: list[Dialogue]) -> Batch:
        assert isinstance(self.model, BroadMamba)
        bare = [Dialogue(d.features, d.speakers, d.words, None, d.name) for d in sample]  # labels are not looked at
        return join(bare, self.model)

    def collate(self, samples: Sequence[Any]) -> Any:
        """One file at a time: its dialogues are a batch already."""
        return list(samples)

    def forward(self, batch: Any) -> list[dict[str, torch.Tensor]]:
        return [self.model(**inputs) for inputs, _ in batch]

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: dict[str, torch.Tensor], sample: list[Dialogue]) -> Emotions:
        assert isinstance(self.model, BroadMamba)
        share = output["logits"].softmax(-1)
        rows = []
        for i, d in enumerate(sample):
            for t in range(len(d)):
                best = int(share[i, t].argmax())
                row: dict[str, Any] = {"dialogue": d.name, "utterance": t + 1}
                row |= {} if d.speakers is None else {"speaker": d.speakers[t]}
                row |= {} if d.words is None else {"words": d.words[t]}
                row |= {"label": self.model.classes[best], "confidence": float(share[i, t, best])}
                weights = output["weights"][i, t].tolist()
                rows.append(row | {"weights": dict(zip(self.model.modalities, weights, strict=True))})
        return Emotions(rows=rows)


def validate_dialogues(model: nn.Module, data: str | Path, *, batch_size: int = 32) -> Measured:
    """Weighted F1, accuracy and the F1 of each emotion on the labelled dialogues of a .json or .npz file."""
    pipe = EmotionRecognition(model)
    assert isinstance(model, BroadMamba)
    began = time.perf_counter()
    try:
        dialogues = read_dialogues(data)
        found = measure(model, dialogues, batch_size)
    except ValueError as error:
        raise errors.BadArgument(str(error), argument="data", accepted=[]) from error
    per_class = {
        name: {"count": float(n), "f1": f1}
        for name, n, f1 in zip(model.classes, found.support, found.f1, strict=True)
        if n
    }
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=sum(found.support),
        metrics={"weighted F1": found.weighted_f1, "accuracy": found.accuracy},
        seconds=time.perf_counter() - began,
        per_class=per_class,
    )
