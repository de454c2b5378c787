"""Image classification from files people have, and embeddings of the same files."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.files import check_ending, whole
from zoo.images import EXTENSIONS, open_image
from zoo.pipelines import Pipeline
from zoo.results import Failure, RankedClasses, Result, ranked
from zoo_registry import errors, optional

#: settings that timm's transforms take from a weights card
_SETTINGS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(kw_only=True)
class Classification(RankedClasses):
    """The likeliest classes of one image, best first."""

    image: Image.Image | None = field(default=None, repr=False)
    contributions: Any = field(default=None, repr=False)  #: :class:`~zoo_vision.contributions.Contributions`

    def row(self) -> dict[str, Any]:
        """Flat: one column a value, for tables."""
        row: dict[str, Any] = {"source": self.source, "model": self.model}
        for i, (name, p) in enumerate(zip(self.labels, self.probabilities, strict=True), start=1):
            row |= {f"label_{i}": name, f"probability_{i}": round(p, 6)}
        return row

    def picture(self) -> Image.Image | None:
        """The image with its likeliest classes; with ``contributions`` also a map for each scan direction."""
        from .pictures import answer_card

        if self.image is None:
            return None
        parts = self.contributions
        maps = [] if parts is None else list(zip(parts.names, parts.maps.numpy(), strict=True))
        note = ""
        if parts is not None:
            note = f"contribution of each scan direction over {parts.blocks} blocks, 1 = average"
        rows = list(zip(self.labels, self.probabilities, strict=True))
        return answer_card(self.image, rows, title=f"{self.model}   {Path(self.source).name}", maps=maps, note=note)


class ImageClassification(Pipeline):
    """Image files to their likeliest classes.

    ``top_k`` classes are reported. ``contributions``: also measure what each scan direction contributes at each token
    (see :mod:`zoo_vision.contributions`) and draw it into the picture. Images: paths, PIL images, arrays (H, W) or
    (H, W, 3) of uint8, or tensors (in_chans, H, W) that are already prepared. Resizing, cropping and normalising are
    timm's, with the settings of the weights card.
    """

    task = "image-classification"
    extensions = EXTENSIONS
    #: whether the output is logits; not so in the kinds below
    needs_classes = True

    def __init__(self, model: nn.Module, top_k: int = 5, contributions: bool = False) -> None:
        super().__init__(model)
        if int(top_k) < 1:
            raise errors.BadArgument(f"top_k is {top_k}; expected 1 or more", argument="top_k", accepted=[])
        self.top_k, self.contributions = int(top_k), bool(contributions)
        self.in_chans = channels_of_files(model)
        if self.needs_classes and getattr(model, "num_classes", None) == 0:
            raise errors.BadArgument(
                f"{self.name} gives no vector of logits: it has no classes (num_classes=0, or features_only). For "
                "features there are the tasks image-embedding and image-backbone",
                argument="num_classes",
                accepted=[],
            )
        self.settings = transform_settings(model, self.preprocess)
        self._transform: Any = None
        self.names = self.labels()

    def read(self, source: Any) -> Any:
        if isinstance(source, Tensor):
            return source
        return open_image(source, self.in_chans)

    def prepare(self, sample: Any) -> Tensor:
        if isinstance(sample, Tensor):
            if sample.dim() != 3 or sample.shape[0] != self.in_chans or not sample.numel():
                raise errors.BadArgument(
                    f"a tensor of shape {tuple(sample.shape)} was given; expected ({self.in_chans}, height, width)",
                    argument="inputs",
                    accepted=[],
                )
            if not sample.is_floating_point():
                raise errors.BadArgument(
                    f"a tensor of {sample.dtype} was given; expected floats already resized and normalised, as "
                    "prepare(read(file)) gives them. Pixels of 8 bits go in as an array (height, width, 3)",
                    argument="inputs",
                    accepted=[],
                )
            return sample
        if self._transform is None:
            from timm.data import create_transform

            self._transform = create_transform(**self.settings, is_training=False)
        return self._transform(sample)

    def finish(self, output: Any, sample: Any) -> Classification:
        if not isinstance(output, Tensor) or output.dim() != 1:
            raise errors.BadArgument(
                f"{self.name} gives no vector of logits; is it a backbone, or a pyramid (features_only)?",
                argument="model",
                accepted=[],
            )
        parts = None
        if self.contributions:
            from .contributions import scan_contributions

            parts = scan_contributions(self.model, self._to_model(self.prepare(sample))[None])
        return Classification(
            **ranked(output, self.names, self.top_k),
            image=None if isinstance(sample, Tensor) else sample,
            contributions=parts,
        )

    def named_labels(self, name: str) -> list[str] | None:
        """ImageNet's subsets, as timm names them: the first synonym of each class, in the order of the logits."""
        if not name.startswith("imagenet"):
            return None
        from timm.data import ImageNetInfo

        info = ImageNetInfo(name)
        return [info.index_to_description(i) for i in range(info.num_classes())]


def channels_of_files(model: nn.Module) -> int:
    """1 or 3, as the model takes. Raises BadArgument for a model of other inputs than files of pictures hold."""
    channels = int(getattr(model, "in_chans", 3))
    if channels not in (1, 3):
        raise errors.BadArgument(
            f"the model takes {channels} channels; files of one or three channels can be read. Call the model on "
            "tensors of your own instead",
            argument="model",
            accepted=[],
        )
    return channels


def finite(name: str, *values: Tensor) -> None:
    """Raise ValueError where the ``values`` that the model ``name`` gives are not all finite."""
    if not all(bool(torch.isfinite(v).all()) for v in values):
        raise ValueError(
            f"the answer of {name} is not finite: the input or the weights hold NaN or infinite values, or numbers are "
            "too large for the model's type of numbers (float32 and bfloat16 have room)"
        )


def transform_settings(model: nn.Module, preprocess: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``timm.data.create_transform``: the card's settings, at the size that the model was built for."""
    from timm.data import resolve_data_config

    channels = int(getattr(model, "in_chans", 3))
    info = getattr(model, "zoo_info", None)
    if not preprocess and info is not None and info.card is not None and info.card.default_weights is not None:
        preprocess = info.card.default_weights.preprocess  # random weights: what the published ones would get
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocess.items() if k in _SETTINGS}
    built_for = getattr(model, "img_size", None)
    trained_at = tuple(known.get("input_size", (channels, 224, 224)))[1:]
    known["input_size"] = (channels, *(built_for if isinstance(built_for, tuple) else trained_at))
    if len(known.get("mean", (0,) * channels)) != channels:  # built with other channels than the weights were
        mean, std = float(np.mean(known.pop("mean"))), float(np.mean(known.pop("std")))
        known |= {"mean": (mean,) * channels, "std": (std,) * channels}
    if channels == 1:
        known.setdefault("mean", (0.5,))
        known.setdefault("std", (0.5,))
    resolved = resolve_data_config(args=known, pretrained_cfg=known)
    return {k: resolved[k] for k in _SETTINGS if k in resolved}


# -- tables and vectors ----------------------------------------------------------------------------------------------


def write_csv(results: Sequence[Result], path: str | Path) -> Path:
    """One line an image: source, model, then label and probability of each of the top classes; failures say why."""
    rows = [
        {"source": r.source, "model": r.model, "error": str(r.error)} if isinstance(r, Failure) else r.row()  # type: ignore[attr-defined]
        for r in results
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as work, work.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


#: endings that :func:`write_embeddings` knows
TABLES = (".npy", ".parquet")


@dataclass(kw_only=True)
class Embedding(Result):
    """The pooled features of one image, before the classifier."""

    vector: np.ndarray = field(repr=False)

    def summary(self) -> str:
        return f"{len(self.vector)} features, norm {float(np.linalg.norm(self.vector)):.3g}"


class ImageEmbedding(ImageClassification):
    """Image files to vectors: the features that the classifier sees (``forward_head(..., pre_logits=True)``)."""

    task = "image-embedding"
    needs_classes = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise errors.BadArgument(
                f"{self.name} has no forward_features and forward_head to take embeddings from",
                argument="model",
                accepted=[],
            )

    def forward(self, batch: Any) -> Any:
        model: Any = self.model
        return model.forward_head(model.forward_features(batch), pre_logits=True)

    def finish(self, output: Any, sample: Any) -> Embedding:  # type: ignore[override]
        finite(self.name, output)
        return Embedding(vector=output.float().numpy())


def write_embeddings(results: Sequence[Result], path: str | Path) -> Path:
    """Vectors to ``.npy`` ((images, features) float32, names beside it in .txt) or ``.parquet`` (source, embedding).

    Failed images are left out of the file. Parquet needs pyarrow. Raises BadArgument for any other ending.
    """
    path = Path(path)
    check_ending(path, TABLES)
    done = [r for r in results if isinstance(r, Embedding)]
    vectors = np.stack([r.vector for r in done]) if done else np.zeros((0, 0), dtype=np.float32)
    names = [r.source for r in done]
    if path.suffix.lower() == ".npy":
        with whole(path) as work, work.open("wb") as file:
            np.save(file, vectors)
        with whole(path.with_suffix(".txt")) as work:
            work.write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
        return path
    parquet = parquet_writer()
    pyarrow: Any = optional("pyarrow", "writing parquet", "pyarrow")
    flat = pyarrow.array(vectors.reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1] if vectors.size else 1)
    with whole(path) as work:
        parquet.write_table(
            pyarrow.table({"source": pyarrow.array(names, pyarrow.string()), "embedding": column}), work
        )
    return path


def parquet_writer() -> Any:
    """``pyarrow.parquet``. Raises ``zoo.errors.MissingExtra``."""
    return optional("pyarrow.parquet", "writing parquet", "pyarrow", otherwise="or choose a name that ends in .npy")


def embed(model: nn.Module, inputs: Any, *, batch_size: int = 8) -> np.ndarray:
    """Vectors (images, features) of files, folders, patterns or images, in order; float32."""
    found = ImageEmbedding(model)(inputs if isinstance(inputs, list) else [inputs], batch_size=batch_size)
    return np.stack([r.vector for r in found])


def as_tensor(images: Sequence[Any], pipeline: ImageClassification) -> Tensor:
    """Images prepared and stacked: (batch, in_chans, H, W)."""
    return torch.stack([pipeline.prepare(pipeline.read(image)) for image in images])
