"""A model with everything that makes loading hard: ties, buffers of both kinds, a plain tensor, random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from torch import Tensor, nn

from zoo.adapting import InputChannels, NewHead
from zoo.pipelines import Pipeline, Result
from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules, Stack, Tied
from zoo.validation import Measured


class Toy(nn.Module):
    """Images (batch, in_chans, h, w) to logits (batch, num_classes)."""

    ends: ClassVar = {"num_classes": NewHead("head"), "in_chans": InputChannels("stem.weight")}

    def __init__(self, width: int = 8, num_classes: int = 4, in_chans: int = 3, tied: bool = True, bias: float = 0.0):
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1)
        self.pair = nn.Parameter(torch.randn(2, width))
        self.up = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, width, bias=False)
        if tied:
            self.down.weight = self.up.weight
        self.register_buffer("seen", torch.zeros(width))
        self.register_buffer("ramp", torch.linspace(0, 1, width), persistent=False)
        self.offset = torch.arange(width) * 0.01
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((-2, -1)) * self.ramp + self.offset.to(x) + self.seen
        x = self.down(torch.relu(self.up(x * self.pair[0]))) * self.pair[1]
        return self.head(x)


class ToyAdapter(ReferenceAdapter):
    system = "toy"

    def rules(self, state, *, model=None) -> Rules:
        return Rules(
            Drop("counter"),
            Tied("up.w", "down.w"),
            Stack(["first", "second"], "pair"),
            Rename("conv.{kind}", "stem.{kind}"),
            Rename("up.w", "up.weight"),
            Rename("classifier.{kind}", "head.{kind}"),
        )

    def arguments(self, config):
        return {"width": config["dim"], "num_classes": config["classes"]}

    def build(self, config, state, *, source=""):
        return self.load(Toy(**self.arguments(config)), state)

    def run(self, model, inputs, *, call=None):
        return {"logits": model(inputs["image"])}


@dataclass(kw_only=True)
class Count(Result):
    best: int
    label: str
    sure: float

    def summary(self) -> str:
        return self.label

    @property
    def confidence(self) -> float:
        return self.sure

    def picture(self) -> Any:
        from PIL import Image

        return Image.new("L", (4, 4), int(self.sure * 255))


class Counting(Pipeline):
    """Text files of numbers: 3 lines of 36."""

    task = "toy-counting"
    extensions = (".txt",)

    def __init__(self, model: nn.Module, *, upper: bool = False):
        super().__init__(model)
        self.upper = upper

    def read(self, source: Any) -> Tensor:
        if isinstance(source, Tensor):
            return source
        rows = [[float(v) for v in line.split()] for line in Path(source).read_text().splitlines()]
        return torch.tensor(rows).reshape(3, len(rows[0]) // 6, 6)

    def prepare(self, sample: Tensor) -> Tensor:
        return sample * self.preprocess.get("scale", 1.0)

    def finish(self, output: Tensor, sample: Tensor) -> Count:
        sure, best = output.softmax(0).max(0)
        names = self.labels() or [f"class {i}" for i in range(len(output))]
        label = names[int(best)]
        return Count(best=int(best), label=label.upper() if self.upper else label, sure=float(sure))


def count_right(model: nn.Module, data: Path, *, limit: int | None = None, progress: bool = True) -> Measured:
    """Accuracy over the files of a folder, each named LABEL_anything.txt."""
    pipe = Counting(model)
    files = sorted(data.glob("*.txt"))[:limit]
    right = [pipe(file).label == file.name.partition("_")[0] for file in files]
    per_class = {"ant": {"count": float(sum(f.name.startswith("ant") for f in files))}}
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(files),
        metrics={"accuracy": sum(right) / len(right), "kappa": None},
        seconds=0.5,
        per_class=per_class,
        notes="labels are the names of the files",
    )


@click.command()
def toys() -> None:
    """A plugin's own verb."""
    click.echo("toys!")
