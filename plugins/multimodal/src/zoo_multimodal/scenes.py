"""Generated pictures of coloured shapes, with questions and answers: what mmMamba's demo learns and is measured on.

A scene has one to four shapes, at most one a quarter of the picture. Questions ask for counts, colours, kinds, places
and whether something is there; every answer follows from the picture, and no kind of question has one answer alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SIZE = 32
COLOURS = {"red": (214, 48, 49), "green": (38, 166, 91), "blue": (45, 85, 214), "yellow": (240, 200, 40)}
KINDS = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")

#: The words of questions and answers, marks of the chat first; a word's place here is its token id.
WORDS = (
    "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "?", "what", "where", "how", "many", "is", "are", "there", "the",
    "a", "colour", "shape", "shapes", "circle", "circles", "square", "squares", "triangle", "triangles", *COLOURS,
    "top", "bottom", "left", "right", "yes", "no", "nothing", "0", "1", "2", "3", "4",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """``place``: 0 to 3, an index of :data:`PLACES`; ``x``, ``y`` (the centre) and ``radius`` in pixels."""

    kind: str
    colour: str
    place: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``background``: a grey level."""

    shapes: tuple[Shape, ...]
    background: int
    seed: int

    def picture(self) -> Image.Image:
        """SIZE x SIZE pixels in RGB, with a little noise."""
        import numpy as np
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (SIZE, SIZE), (self.background,) * 3)
        draw = ImageDraw.Draw(image)
        for s in self.shapes:
            box = (s.x - s.radius, s.y - s.radius, s.x + s.radius, s.y + s.radius)
            if s.kind == "circle":
                draw.ellipse(box, fill=COLOURS[s.colour])
            elif s.kind == "square":
                draw.rectangle(box, fill=COLOURS[s.colour])
            else:
                draw.polygon([(s.x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=COLOURS[s.colour])
        noise = np.random.default_rng(self.seed).normal(0, 6, (SIZE, SIZE, 3))
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def scene(rng: random.Random) -> Scene:
    """A scene drawn at random."""
    half = SIZE / 2
    shapes = []
    for place in sorted(rng.sample(range(4), rng.randint(1, 4))):
        x = half * (place % 2 + 0.5) + rng.uniform(-2, 2)
        y = half * (place // 2 + 0.5) + rng.uniform(-2, 2)
        shapes.append(Shape(rng.choice(KINDS), rng.choice(list(COLOURS)), place, x, y, rng.uniform(4, 5.5)))
    return Scene(tuple(shapes), rng.randint(90, 235), rng.getrandbits(32))


# -- questions: each takes a scene and returns (question, answer), or None where it has no clear answer


def _some(rng: random.Random, scene: Scene, there: bool) -> tuple[str, str]:
    """A colour and a kind, of a shape in the scene or perhaps not."""
    if there:
        shape = rng.choice(scene.shapes)
        return shape.colour, shape.kind
    return rng.choice(list(COLOURS)), rng.choice(KINDS)


def _all(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    return "how many shapes are there ?", str(len(scene.shapes))


def _of_colour(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    colour, _ = _some(rng, scene, rng.random() < 0.7)
    return f"how many {colour} shapes are there ?", str(sum(s.colour == colour for s in scene.shapes))


def _of_kind(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    _, kind = _some(rng, scene, rng.random() < 0.7)
    return f"how many {kind}s are there ?", str(sum(s.kind == kind for s in scene.shapes))


def _colour(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    shape = rng.choice(scene.shapes)
    if sum(s.kind == shape.kind for s in scene.shapes) > 1:
        return None
    return f"what colour is the {shape.kind} ?", shape.colour


def _kind(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    shape = rng.choice(scene.shapes)
    if sum(s.colour == shape.colour for s in scene.shapes) > 1:
        return None
    return f"what shape is {shape.colour} ?", shape.kind


def _where(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    shape = rng.choice(scene.shapes)
    if sum((s.kind, s.colour) == (shape.kind, shape.colour) for s in scene.shapes) > 1:
        return None
    return f"where is the {shape.colour} {shape.kind} ?", PLACES[shape.place]


def _at(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    place = rng.choice(scene.shapes).place if rng.random() < 0.7 else rng.randrange(4)
    found = next((s for s in scene.shapes if s.place == place), None)
    return f"what is {PLACES[place]} ?", "nothing" if found is None else f"{found.colour} {found.kind}"


def _is_there(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    colour, kind = _some(rng, scene, rng.random() < 0.4)
    there = any((s.colour, s.kind) == (colour, kind) for s in scene.shapes)
    return f"is there a {colour} {kind} ?", "yes" if there else "no"


QUESTIONS: dict[str, Callable[[random.Random, Scene], tuple[str, str] | None]] = {
    "count": _all, "count of a colour": _of_colour, "count of a kind": _of_kind, "colour": _colour, "kind": _kind,
    "place": _where, "what lies there": _at, "presence": _is_there,
}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A scene with a question, its answer and the kind of question (a key of :data:`QUESTIONS`)."""

    scene: Scene
    question: str
    answer: str
    about: str


def sample(rng: random.Random, about: str | None = None) -> Sample:
    """A sample at random, of the named kind of question or of any."""
    about = rng.choice(list(QUESTIONS)) if about is None else about
    while True:
        drawn = scene(rng)
        found = QUESTIONS[about](rng, drawn)
        if found is not None:
            return Sample(drawn, *found, about)


def conversation(rng: random.Random, count: int) -> list[Sample]:
    """``count`` questions about one scene, of kinds at random."""
    drawn = scene(rng)
    found: list[Sample] = []
    while len(found) < count:
        about = rng.choice(list(QUESTIONS))
        pair = QUESTIONS[about](rng, drawn)
        if pair is not None:
            found.append(Sample(drawn, *pair, about))
    return found


def samples(count: int, seed: int, abouts: Sequence[str] | None = None) -> list[Sample]:
    """``count`` samples from a seed; kinds of questions in turn."""
    rng = random.Random(seed)
    kinds = list(QUESTIONS) if abouts is None else list(abouts)
    return [sample(rng, kinds[i % len(kinds)]) for i in range(count)]
