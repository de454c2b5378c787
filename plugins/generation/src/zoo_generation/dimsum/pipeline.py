"""Class labels in, images out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo import errors, files
from zoo.pipelines import Pipeline, Result
from zoo_registry import optional

from . import flow
from .autoencoder import REPOSITORY, SCALE, Autoencoder, needed
from .model import DiMSUM

SMALL = 96  #: images below this side are shown enlarged


@dataclass(kw_only=True)
class GeneratedImages(Result):
    """Images of the labels that were asked for, in their order. ``images``: (count, H, W) or (count, H, W, 3), uint8;
    ``latents``: (count, C, R, R), what the flow ended with; ``evaluations`` of the network."""

    labels: list[str] = field(default_factory=list)
    seed: int = 0
    method: str = ""
    evaluations: int = 0
    images: np.ndarray | None = field(default=None, repr=False)
    latents: np.ndarray | None = field(default=None, repr=False)

    def summary(self) -> str:
        what = "latents" if self.images is None else "images"
        shown = self.images if self.images is not None else self.latents
        size = "" if shown is None else f" of {' x '.join(map(str, shown.shape[1:]))}"
        names = list(dict.fromkeys(self.labels))
        named = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"{len(self.labels)} {what}{size} ({named}), {self.evaluations} evaluations"

    def picture(self) -> Image.Image | None:
        """All images in a grid, small ones enlarged; None for latents alone."""
        if self.images is None:
            return None
        count, height, width = self.images.shape[:3]
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        times, gap = max(1, SMALL // max(height, width)), 2
        sheet = np.full(
            (rows * (height + gap) - gap, columns * (width + gap) - gap, *self.images.shape[3:]), 255, np.uint8
        )
        for i, image in enumerate(self.images):
            top, left = i // columns * (height + gap), i % columns * (width + gap)
            sheet[top : top + height, left : left + width] = image
        return Image.fromarray(sheet).resize((sheet.shape[1] * times, sheet.shape[0] * times), Image.Resampling.NEAREST)

    def save(self, folder: str | Path) -> list[Path]:
        """Every image as FOLDER/NUMBER_LABEL.png, or latents as FOLDER/latents.npy."""
        folder = Path(folder)
        if self.images is None:
            assert self.latents is not None
            with files.whole(folder / "latents.npy") as work:
                np.save(work, self.latents)
            return [folder / "latents.npy"]
        written = []
        for i, (image, label) in enumerate(zip(self.images, self.labels, strict=True)):
            words = "".join(c if c.isalnum() else "_" for c in label)[:40]
            written.append(folder / f"{i:03d}_{words}.png")
            with files.whole(written[-1]) as work:
                Image.fromarray(image).save(work)
        return written


class ImageGeneration(Pipeline):
    """Images from class labels: a name or number, several with commas between them, "all", "none" (no label), or a
    text file with one label a line. All images of one answer are made together.

    ``seed``: image i of an answer begins with the noise of seed + i, on every device. ``count``: images of each label.
    ``method``, ``steps``, ``atol``, ``rtol``: see :func:`zoo_generation.dimsum.flow.sample`; one step size serves all
    images of an answer with "dopri5", so an image hangs a little on those beside it. ``cfg``: strength of guidance (1:
    none), by default the weights' own; ``adaptive``: guidance that fades, by the power 4. ``decode``: False leaves
    latents as they are; models of pixels have none. ``autoencoder``: a repository or folder of a diffusers
    AutoencoderKL, or an object with ``decode``. ``images_at_once``: through the network, before guidance doubles them.
    """

    task = "image-generation"
    extensions = (".txt",)
    text_input = True

    def __init__(
        self,
        model: nn.Module,
        seed: int = 0,
        count: int = 1,
        method: str = "dopri5",
        steps: int = 50,
        cfg: float | None = None,
        adaptive: bool = False,
        decode: bool = True,
        autoencoder: Any = None,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        images_at_once: int = 64,
        labels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, DiMSUM):
            raise errors.BadArgument(
                f"{type(model).__name__} generates no images from labels; expected a DiMSUM",
                argument="model",
                accepted=[],
            )
        for name, value in (("count", count), ("steps", steps), ("images_at_once", images_at_once)):
            if value < 1:
                raise errors.BadArgument(f"{name} is {value}; expected 1 or more", argument=name, accepted=[])
        if method not in flow.METHODS:
            raise errors.BadArgument(
                f"method is {method!r}; expected one of {', '.join(flow.METHODS)}", argument="method",
                accepted=list(flow.METHODS),
            )  # fmt: skip
        if cfg is not None and not math.isfinite(cfg):
            raise errors.BadArgument(f"cfg is {cfg}; expected a finite number, 1 for none", argument="cfg", accepted=[])
        own = self.preprocess
        self.network, self.seed, self.count, self.images_at_once = model, seed, count, images_at_once
        #: models of 4 channels that say nothing else work on latents
        self.latent = own.get("space", "latent" if model.in_channels == 4 else "pixel") == "latent"
        self.cfg = float(own.get("cfg", 1.0)) if cfg is None else cfg
        self.power = 4.0 if adaptive else None
        self.solver: dict[str, Any] = {"method": method, "steps": steps, "atol": atol, "rtol": rtol}
        self.decode = decode
        self.scale = float(own.get("latent_scale", SCALE))
        self.autoencoder = own.get("autoencoder", REPOSITORY) if autoencoder is None else autoencoder
        self.names = list(labels) if labels is not None else None

    # -- which images

    def named_labels(self, name: str) -> list[str] | None:
        """ImageNet's classes by timm's names, an extra; numbers need none."""
        if not name.startswith("imagenet"):
            return None
        data: Any = optional(
            "timm.data", "names of ImageNet's classes", "ssm-zoo-generation[imagenet]", otherwise="or give numbers"
        )
        info = data.ImageNetInfo(name)
        return [info.index_to_description(i) for i in range(info.num_classes())]

    def label(self, text: str | int) -> int:
        """The class of a name or number; "none" is the row without a label."""
        text = str(text).strip()
        null, classes = self.network.y_embedder.null, self.network.num_classes
        if text.lower() in ("", "none"):
            return null
        if text.lstrip("-").isdigit():
            if not 0 <= int(text) < classes:
                raise errors.BadArgument(
                    f"the class is {text}; expected 0 to {classes - 1}, or none", argument="inputs", accepted=[]
                )
            return int(text)
        names = self.class_names()
        if not names:
            raise errors.BadArgument(
                f"{self.name} has no names of classes, so {text!r} says nothing to it; expected a number from 0 to "
                f"{classes - 1}, or none", argument="inputs", accepted=[],
            )  # fmt: skip
        lower = [n.lower() for n in names]
        if text.lower() in lower:
            return lower.index(text.lower())
        import difflib

        near = difflib.get_close_matches(text.lower(), lower, 3, 0.5) or [n for n in lower if text.lower() in n][:3]
        some = f"did you mean {', '.join(near)}?" if near else f"some are {', '.join(names[:8])}"
        raise errors.BadArgument(f"there is no class {text!r}; {some}", argument="inputs", accepted=near)

    def class_names(self) -> list[str] | None:
        if self.names is None:
            self.names = self.labels()
        return self.names

    def read(self, source: Any) -> list[int]:
        """The classes asked for, one an image."""
        if isinstance(source, Path):
            lines = [line.partition("#")[0].strip() for line in files.read_text(source).splitlines()]
            asked: list[Any] = [line for line in lines if line]
            if not asked:
                raise errors.BadArgument(
                    f"{source} holds no label; expected one a line", argument="inputs", accepted=[]
                )
        elif isinstance(source, (tuple, Mapping, np.ndarray, Tensor)):
            asked = list(source)
        elif source is None or isinstance(source, (int, np.integer)):
            asked = ["none" if source is None else int(source)]
        elif str(source).strip().lower() == "all":
            asked = list(range(self.network.num_classes))
        else:
            text = str(source)
            known = self.class_names() if "," in text and any(c.isalpha() for c in text) else None
            whole = known is not None and text.strip().lower() in (n.lower() for n in known)  # "crane, a bird"
            asked = [text] if whole else text.split(",")
        if not asked:
            raise errors.BadArgument(
                "no label is given; expected names, numbers or none", argument="inputs", accepted=[]
            )
        return [self.label(one) for one in asked for _ in range(self.count)]

    # -- the flow

    def prepare(self, sample: list[int]) -> dict[str, Tensor]:
        """Labels (count,) and the noise that each image begins with, (count, C, R, R)."""
        side = self.network.img_resolution
        noise = torch.stack(
            [
                torch.randn(
                    self.network.in_channels, side, side, generator=torch.Generator().manual_seed(self.seed + i)
                )
                for i in range(len(sample))
            ]
        )
        return {"labels": torch.tensor(sample), "noise": noise}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every request by itself, so that no answer hangs on the others of its batch."""
        decoder = self.encoder() if self.decode and self.latent else None  # what it lacks is said before the work
        ends, counts = [], []
        for labels, noise in zip(batch["labels"], batch["noise"], strict=True):
            times: list[float] = []
            chunks = zip(labels.split(self.images_at_once), noise.split(self.images_at_once), strict=True)
            ends.append(torch.cat([self._solve(y, x, times) for y, x in chunks]))
            counts.append(len(times))
        found = {"latents": torch.stack(ends), "evaluations": torch.tensor(counts)}
        if decoder is not None:
            found["images"] = torch.stack([decoder.decode(one) for one in ends])
        return found

    def _solve(self, labels: Tensor, noise: Tensor, times: list[float]) -> Tensor:
        dtype, null = self.dtype, self.network.y_embedder.null

        def velocity(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:  # the solver's sums stay in float32
            return self.network(x.to(dtype), t.to(dtype), y)[:, : self.network.in_channels].float()

        guide = self.cfg if bool((labels != null).any()) else 1.0
        return flow.sample(
            velocity, noise.float(), labels, null=null, cfg=guide, power=self.power, trace=times, **self.solver
        )

    def encoder(self) -> Any:
        """The autoencoder of a model of latents, loaded when it is first needed."""
        if isinstance(self.autoencoder, (str, Path)):
            place = str(self.autoencoder)
            weights = None if self.info is None else self.info.weights
            if weights is not None and place in weights.companions:  # as the model was loaded: offline, from a folder
                needed()  # before anything is fetched
                files = [self.companion(place, name) for name in weights.companions[place]]
                place = str(files[0].parent)
            self.autoencoder = Autoencoder(place, self.scale, self.device)
        return self.autoencoder

    def finish(self, output: Mapping[str, Tensor], sample: list[int]) -> GeneratedImages:
        pixels = output.get("images", None if self.latent else output["latents"])
        images = None
        if pixels is not None:
            images = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            images = images[..., 0] if images.shape[-1] == 1 else images[..., :3]
        return GeneratedImages(
            labels=[self._name(i) for i in sample], seed=self.seed, method=self.solver["method"],
            evaluations=int(output["evaluations"]), images=images, latents=output["latents"].numpy(),
        )  # fmt: skip

    def _name(self, label: int) -> str:
        if label == self.network.y_embedder.null:
            return "none"
        try:
            names = self.class_names()
        except errors.MissingExtra:  # numbers were given; they serve as names
            names = None
        return names[label] if names is not None and label < len(names) else str(label)
