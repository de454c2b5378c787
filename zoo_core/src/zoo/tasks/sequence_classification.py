"""Pictures read pixel by pixel, signals and tokens to their class.

The image models of the family read a picture as one long sequence: row by row, one pixel a position, normalised as in
the original's data loaders (state-spaces/s4 ``src/dataloaders/{basic,lra}.py``, ``example.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import images
from zoo.pipelines import Pipeline, describe_source
from zoo.results import RankedClasses, ranked
from zoo_registry import errors, optional, package_path

from . import sequence_files


@dataclass(kw_only=True)
class SequenceClass(RankedClasses):
    """The likeliest classes of one sequence, best first."""

    length: int  #: positions that the model read


class SequenceClassification(Pipeline):
    """Sequences to their likeliest classes.

    Inputs: .npy files, tables (.csv, .tsv, .txt: one position a line, one channel a column) and arrays or tensors
    (length, channels), taken as they are; for models of tokens (length,) integers. For models of pictures (an
    ``image_size``) also picture files, PIL images and uint8 arrays (height, width[, 3]): pictures of another size are
    cut to the form and resized (bicubic), those of the size itself are read pixel by pixel.

    ``top_k`` classes are reported, called by ``labels`` (default: the weights' or the card's). ``columns``: those of a
    table that are the channels, by name or number. ``image_size`` (height, width), ``mean`` and ``std`` (one number a
    channel, of pixels from 0 to 1): of your own models of pictures; default: what the weights or the card say.
    """

    task = "sequence-classification"
    extensions = (*sequence_files.EXTENSIONS, *images.EXTENSIONS)

    def __init__(
        self,
        model: nn.Module,
        top_k: int = 5,
        labels: Sequence[str] | None = None,
        columns: Sequence[str | int] | None = None,
        image_size: Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model)
        if top_k < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        if getattr(model, "mixes_batch", False):
            raise errors.BadArgument(
                f"{self.name} judges pairs of documents; call the model itself on a batch that holds all first "
                "documents, then all second ones",
                argument="model",
                accepted=[],
            )
        if getattr(model, "num_classes", None) == 0:
            raise errors.BadArgument(
                f"{self.name} was built with num_classes=0 and gives features, no classes",
                argument="model",
                accepted=[],
            )
        encoder = getattr(model, "encoder", None)
        self.tokens = encoder.num_embeddings if isinstance(encoder, nn.Embedding) else None
        self.channels = encoder.in_features if isinstance(encoder, nn.Linear) else None
        self.top_k, self.columns = top_k, columns
        self.names = list(labels) if labels is not None else self.labels()
        self._set_image(image_size, mean, std)

    def _set_image(self, size: Sequence[int] | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        card = self.info.card if self.info is not None else None
        known = {**(card.input if card is not None else {}), **self.preprocess}
        size = known.get("image_size") if size is None else size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise errors.BadArgument(
                f"image_size is {list(size)}; expected (height, width)", argument="image_size", accepted=[]
            )
        self.image_size = None if size is None else (int(size[0]), int(size[1]))
        channels = self.channels or 1
        if self.image_size is not None and (self.tokens is not None or channels not in (1, 3)):
            if known.get("image_size") is not size:
                raise errors.BadArgument(
                    f"image_size was given; {self.name} takes "
                    + (f"{channels} channels, pictures have 1 or 3" if self.tokens is None else "tokens"),
                    argument="image_size",
                    accepted=[],
                )
            self.image_size = None  # built with other channels than the card's
        for key, value in (("mean", mean), ("std", std)):
            if value is not None and len(value) != channels:
                raise errors.BadArgument(
                    f"{key} has {len(value)} numbers; the model has {channels} channels", argument=key, accepted=[]
                )
        # a card's numbers fit its own channels; models built with others get their mean
        self.mean = _for_channels(known.get("mean", [0.0]) if mean is None else mean, channels)
        self.std = _for_channels(known.get("std", [1.0]) if std is None else std, channels)

    def labels(self) -> list[str] | None:
        """The names of the weights or, for a model with as many classes as its card says, of the card."""
        found = super().labels()
        card = self.info.card if self.info is not None else None
        if found is not None or card is None or "labels" not in card.output:
            return found
        path = package_path(card, f"labels/{card.output['labels']}.txt")
        names = path.read_text(encoding="utf-8").splitlines()
        return names if len(names) == getattr(self.model, "num_classes", len(names)) else None

    # -- the pipeline ----------------------------------------------------------------------------------------------

    def read(self, source: Any) -> Any:
        """A path or object to a picture (PIL) or to numbers, (length, channels) or (length,) tokens."""
        is_picture = not isinstance(source, (str, Path, Tensor, np.ndarray))
        if isinstance(source, (str, Path)):
            is_picture = str(source).lower().endswith(images.EXTENSIONS)
        elif isinstance(source, np.ndarray):
            is_picture = self.image_size is not None and source.dtype == np.uint8
        if not is_picture:
            return self._checked(sequence_files.read_sequence(source, self.columns), describe_source(source))
        if self.image_size is None:
            raise errors.BadArgument(
                f"{describe_source(source)} was given; {self.name} is no model of pictures. Expected "
                f"{', '.join(sequence_files.EXTENSIONS)} or an array; for pictures give image_size=(height, width)",
                argument="inputs",
                accepted=[],
            )
        return images.open_image(source, self.channels or 1)

    def prepare(self, sample: Any) -> Tensor:
        """(length, channels) float32, or (length,) int64 tokens."""
        if isinstance(sample, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(sample, dtype=np.float32 if sample.ndim == 2 else np.int64))
        assert self.image_size is not None
        height, width = self.image_size
        if sample.size != (width, height):
            ImageOps: Any = optional("PIL.ImageOps", "resizing a picture", "pillow")
            sample = ImageOps.fit(sample, (width, height))
        pixels = np.asarray(sample, dtype=np.float32).reshape(height * width, -1) / np.float32(255)
        return (torch.from_numpy(pixels) - torch.tensor(self.mean)) / torch.tensor(self.std)

    def finish(self, output: Any, sample: Any) -> SequenceClass:
        if not isinstance(output, Tensor) or output.dim() != 1:
            raise errors.BadArgument(f"{self.name} gives no vector of logits", argument="model", accepted=[])
        height, width = self.image_size or (0, 0)
        return SequenceClass(
            **ranked(output, self.names, self.top_k),
            length=len(sample) if isinstance(sample, np.ndarray) else height * width,
        )

    def _checked(self, values: np.ndarray, what: str) -> np.ndarray:
        """Numbers that fit the model, or BadArgument that says what does not."""
        if not values.size:
            raise errors.BadArgument(f"{what} is empty (shape {values.shape})", argument="inputs", accepted=[])
        sequence_files.check_finite(values, what)
        if self.tokens is not None:
            return self._checked_tokens(values, what)
        values = values[:, None] if values.ndim == 1 else values
        if self.channels is not None and values.shape[1] != self.channels:
            turned = "; its axes are the other way round, transpose it" if values.shape[0] == self.channels else ""
            raise errors.BadArgument(
                f"{what} has {values.shape[1]} channels (shape {values.shape}); {self.name} takes (length, "
                f"{self.channels}){turned}",
                argument="inputs",
                accepted=[],
            )
        if self.image_size is not None and len(values) != self.image_size[0] * self.image_size[1]:
            height, width = self.image_size
            raise errors.BadArgument(
                f"{what} has {len(values)} positions; {self.name} reads pictures of {height} x {width} pixels, so "
                f"{height * width}. For another size give image_size=(height, width)",
                argument="inputs",
                accepted=[],
            )
        return values

    def _checked_tokens(self, values: np.ndarray, what: str) -> np.ndarray:
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim != 1 or (values != np.round(values)).any():
            raise errors.BadArgument(
                f"{what} has shape {values.shape} and {values.dtype}; {self.name} takes (length,) whole numbers, its "
                "tokens",
                argument="inputs",
                accepted=[],
            )
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= (self.tokens or 0):
            raise errors.BadArgument(
                f"{what} has tokens from {low} to {high}; {self.name} knows 0 to {(self.tokens or 0) - 1}",
                argument="inputs",
                accepted=[],
            )
        return values


def _for_channels(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [float(np.mean(values))] * channels
