"""What pipelines answer: the base of every task's results, and those that several tasks share.

A plugin's result is a dataclass of a few fields with one line that says them::

    @dataclass(kw_only=True)
    class Labels(Result):
        labels: list[str]

        def summary(self) -> str:
            return ", ".join(self.labels)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo_registry import errors

from .files import check_ending, whole


@dataclass(kw_only=True)
class Result:
    """What a model answered for one input. Subclasses add fields and override :meth:`summary`."""

    source: str = ""  #: the file, or what was given, in words
    model: str = ""  #: name of the model that answered
    milliseconds: float | None = None  #: forward time of this sample (its share of the batch)

    def summary(self) -> str:
        """The answer in one line, for tables."""
        raise NotImplementedError

    @property
    def confidence(self) -> float | None:
        """How sure the model is, 0 to 1; None where that has no meaning."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain Python: numbers, strings, lists and dictionaries, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}
        return plain({k: v for k, v in values.items() if v is not None} | self._derived())

    def _derived(self) -> dict[str, Any]:
        sure = self.confidence
        return {"answer": self.summary()} | ({} if sure is None else {"confidence": sure})

    def picture(self) -> Any:
        """The answer as a ``PIL.Image``, or None when reading it is as good as looking."""
        return None

    @property
    def has_picture(self) -> bool:
        return type(self).picture is not Result.picture

    def save_picture(self, path: str | Path) -> Path:
        """Write :meth:`picture` to ``path`` (the ending chooses the format). Raises BadArgument if there is none."""
        image = self.picture()
        if image is None:
            raise errors.BadArgument(
                f"a {type(self).__name__} has no picture; print it, or use to_dict()", argument="path", accepted=[]
            )
        path = Path(path)
        check_ending(path)
        with whole(path) as work:
            image.save(work)
        return path

    def __str__(self) -> str:
        sure = self.confidence
        return f"{self.source}: {self.summary()}" + ("" if sure is None else f" ({sure:.1%})")


@dataclass(kw_only=True)
class RankedClasses(Result):
    """The likeliest classes of one input, best first."""

    labels: list[str]
    indices: list[int]
    probabilities: list[float]

    @property
    def label(self) -> str:
        return self.labels[0]

    @property
    def confidence(self) -> float:
        return self.probabilities[0]

    def summary(self) -> str:
        return self.labels[0]

    def __str__(self) -> str:
        rows = ", ".join(f"{n} {p:.1%}" for n, p in zip(self.labels, self.probabilities, strict=True))
        return f"{self.source}: {rows}"


def ranked(logits: Tensor, names: Sequence[str] | None, top_k: int) -> dict[str, Any]:
    """The fields of :class:`RankedClasses` of one input's logits (classes,); a class without a name is "class i"."""
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "the model's answer is not finite; the input holds NaN or infinite values, or numbers too large for the "
            "model's type of numbers"
        )
    probabilities, indices = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    found = indices.tolist()
    labels = [names[i] if names is not None and i < len(names) else f"class {i}" for i in found]
    return {"labels": labels, "indices": found, "probabilities": probabilities.tolist()}


@dataclass(kw_only=True)
class Failure(Result):
    """An input that could not be answered, in runs that go on after errors."""

    error: Exception

    def summary(self) -> str:
        return f"failed: {self.error}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "model": self.model,
            "error": type(self.error).__name__,
            "message": str(self.error),
        }


def plain(value: Any) -> Any:
    """Tensors, arrays, paths and dataclasses as plain Python."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
