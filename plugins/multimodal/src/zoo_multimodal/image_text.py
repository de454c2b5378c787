"""A picture and a question in, an answer out, as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import errors
from zoo.pipelines import Pipeline, Result

from .chat_template import CONTEXT, ask, template_of, with_pictures
from .generation import Sampling, stream
from .mmmamba import MmMamba, State
from .tiles import open_picture, pixels_of
from .tokenizer import Tokenizer, tokenizer_of

QUESTION = "Please describe the image shortly."  # the original's example


@dataclass
class Prompt:
    """Pictures (RGB), a question about them, and what was asked and answered before."""

    pictures: list[Any]
    question: str
    history: list[tuple[str, str]] = field(default_factory=list)


@dataclass(kw_only=True)
class Answer(Result):
    """What the model answered. ``reason``: why it ended, "stop" (by itself) or "length"; ``state``: what it remembers
    of the conversation, for :meth:`ImageTextToText.follow_up`."""

    question: str = ""
    text: str = ""
    tokens: int = 0
    tiles: int = 0
    reason: str = ""
    state: State | None = field(default=None, repr=False)

    def summary(self) -> str:
        return self.text

    def __str__(self) -> str:
        return f"{self.source}: {self.question} {self.text}"


class ImageTextToText(Pipeline):
    """Answers to questions about pictures.

    Inputs: a picture (a file or a ``PIL.Image``), which gets the option ``question``; ``(picture, question)``; or a
    dictionary with ``image`` (one, a list, or None for text alone), ``question`` and ``history`` (earlier (question,
    answer) pairs). Pictures stand in front of the question unless it holds "<image>" where they belong.

    Options: those of :class:`~zoo_multimodal.generation.Sampling`, ``max_new_tokens``, ``max_tiles`` (a picture becomes
    at most this many tiles, and a thumbnail), ``system`` (the system message; None: the template's), ``chunk`` (tokens
    read at once), ``tokenizer`` (the folder with tokenizer.model, or an object; default: what the weights card names).
    """

    task = "image-text-to-text"
    extensions = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

    def __init__(
        self,
        model: nn.Module,
        question: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        max_tiles: int | None = None,
        system: str | None = None,
        chunk: int = 1024,
        tokenizer: str | Path | Tokenizer | None = None,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, MmMamba):
            raise errors.BadArgument(
                f"{type(model).__name__} answers no questions about pictures; expected MmMamba", argument="model",
                accepted=[],
            )  # fmt: skip
        self.lm = model
        own = self.preprocess
        self.question = question if question is not None else own.get("question", QUESTION)
        self.sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
        self.max_new_tokens, self.chunk, self.system = max_new_tokens, chunk, system
        self.template = template_of(own.get("template", "internlm2-chat"))
        most = own.get("max_tiles", 12) if max_tiles is None else max_tiles
        self.cutting = {
            "size": model.image_size, "min_tiles": min(own.get("min_tiles", 1), most), "max_tiles": most,
            "thumbnail": own.get("thumbnail", True),
        }  # fmt: skip
        given = tokenizer is None or isinstance(tokenizer, (str, Path))
        self.tokenizer: Tokenizer = tokenizer_of(own, tokenizer, fetch=self.companion) if given else tokenizer  # type: ignore[arg-type, assignment]
        if self.tokenizer.id_of(CONTEXT) != model.image_token:
            raise errors.BadArgument(
                f"the tokenizer's {CONTEXT} is {self.tokenizer.id_of(CONTEXT)}, the model's image token "
                f"{model.image_token}: they do not belong together",
                argument="tokenizer",
                accepted=[],
            )
        self.stop = self.tokenizer.id_of(self.template.end)

    # -- the pipeline

    def read(self, source: Any) -> Prompt:
        if isinstance(source, Prompt):
            return source
        history: Sequence[tuple[str, str]] = ()
        if isinstance(source, Mapping):
            unknown = sorted(set(source) - {"image", "question", "history"})
            if unknown:
                raise ValueError(f"the input has the keys {unknown}; expected image, question and history")
            image, question = source.get("image"), source.get("question", self.question)
            history = source.get("history") or ()
        elif isinstance(source, tuple):
            if len(source) != 2 or not isinstance(source[1], str):
                raise ValueError(f"the input is a tuple of {len(source)}; expected (picture, question)")
            image, question = source
        else:
            image, question = source, self.question
        images = [] if image is None else list(image) if isinstance(image, (list, tuple)) else [image]
        return Prompt([open_picture(one) for one in images], str(question), [(str(q), str(a)) for q, a in history])

    def prepare(self, sample: Prompt) -> dict[str, Tensor]:
        tiles = [pixels_of(picture, **self.cutting) for picture in sample.pictures]
        history = list(sample.history)
        question = sample.question
        if history and "<image>" not in question:  # pictures came with the first question
            history[0] = (ask(history[0][0], len(tiles)), history[0][1])
        else:
            question = ask(question, len(tiles))
        text = self.template.text(question, history, self.system)
        counts = [t.shape[0] for t in tiles]
        found = {"input_ids": self._ids(text, counts, self.lm.tokens_per_tile)}
        if tiles:
            found["pixel_values"] = torch.cat(tiles)
            if self.lm.shuffle == "post":
                found["hd_input_ids"] = self._ids(text, counts, self.lm.patches_per_tile)
        return found

    def _ids(self, text: str, counts: Sequence[int], tokens: int) -> Tensor:
        return torch.tensor(self.tokenizer.encode(with_pictures(text, counts, tokens)))

    def forward(self, batch: Mapping[str, Tensor]) -> list[tuple[list[int], State, int]]:
        found = []
        for row in range(batch["input_ids"].shape[0]):
            inputs = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            tiles = inputs["pixel_values"].shape[1] if "pixel_values" in inputs else 0
            with torch.inference_mode(False), torch.no_grad():  # the state goes on elsewhere
                state = self.prefill(inputs)
                found.append((list(self._tokens(state)), state, tiles))
        return found

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: Any, sample: Prompt) -> Answer:
        tokens, state, tiles = output
        return self._answer(sample.question, tokens, state, tiles)

    def prefill(self, inputs: Mapping[str, Tensor]) -> State:
        """Read a prepared prompt, with its batch axis."""
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        return self.lm.prefill(ids, pixels, hd_input_ids=inputs.get("hd_input_ids"), chunk=self.chunk)

    def _tokens(self, state: State) -> Iterator[int]:
        return stream(
            self.lm, state, max_new_tokens=self.max_new_tokens, sampling=self.sampling, stop_tokens=(self.stop,)
        )

    def _answer(self, question: str, tokens: list[int], state: State, tiles: int) -> Answer:
        reason = "length" if len(tokens) >= self.max_new_tokens else "stop"
        text = self.tokenizer.decode(tokens).strip()
        return Answer(question=question, text=text, tokens=len(tokens), tiles=tiles, reason=reason, state=state)

    # -- as it comes

    def stream_text(self, source: Any) -> Iterator[str]:
        """The answer in pieces, whole characters only; ``self.last`` is the :class:`Answer` at its end."""
        prompt = self.read(source)
        ready = {k: self._to_model(t[None]) for k, t in self.prepare(prompt).items()}
        tiles = ready["pixel_values"].shape[1] if "pixel_values" in ready else 0
        yield from self._pieces(prompt.question, self.prefill(ready), tiles)

    def follow_up(self, question: str, state: State) -> Iterator[str]:
        """Another question about the same pictures, in pieces: the state of an earlier answer goes on, in place (see
        ``state.fork()``), and nothing is read again."""
        before = self.template.end + self.template.text(question, (), "")
        ids = torch.tensor([self.tokenizer.encode(before, begin=False)], device=self.lm.device)
        yield from self._pieces(question, self.lm.prefill(ids, state=state, chunk=self.chunk), 0)

    def _pieces(self, question: str, state: State, tiles: int) -> Iterator[str]:
        tokens: list[int] = []
        shown = ""
        for token in self._tokens(state):
            tokens.append(token)
            whole = self.tokenizer.decode(tokens)
            if whole.endswith("\N{REPLACEMENT CHARACTER}"):
                continue  # the rest of the character has not come yet
            yield whole[len(shown) :]
            shown = whole
        self.last: Answer = self._answer(question, tokens, state, tiles)
