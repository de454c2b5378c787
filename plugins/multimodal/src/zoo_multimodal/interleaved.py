"""An interleaved document in: how well the model foresaw it, and how it goes on, in words or as a picture."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.pipelines import Pipeline, Result
from zoo.validation import Measured
from zoo_registry import errors

from .documents import END, PICTURE, Codec, Document, Span, make_document, read_documents
from .mixture_lm import MixtureLM, generate
from .mixture_training import bits

WRITE = ("auto", "text", "image", "tokens", "none")


@dataclass(kw_only=True)
class Continuation(Result):
    """What a document's model answered.

    rows: for each segment its ``kind``, ``tokens`` and ``bits`` a token (how unforeseen they were). text: what was
    written; codes: the codes of the picture that was drawn, in raster order; tokens: ids, from models that read tokens.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    codes: list[int] | None = None
    tokens: list[int] | None = None
    colours: Tensor | None = field(default=None, repr=False)

    def summary(self) -> str:
        count = sum(row["tokens"] for row in self.rows)
        total = sum(row["tokens"] * row["bits"] for row in self.rows)
        said = f"{total / max(count, 1):.2f} bits a token in {count}"
        if self.text is not None:
            return f"{self.text!r} ({said})"
        if self.codes is not None:
            return f"a picture of {len(self.codes)} codes ({said})"
        return said if self.tokens is None else f"{len(self.tokens)} tokens ({said})"

    @property
    def has_picture(self) -> bool:
        return self.colours is not None

    def picture(self) -> Any:
        """The drawn picture, its pixels enlarged to 256 or more; None where words were written."""
        if self.colours is None:
            return None
        from PIL import Image

        image = Image.fromarray((self.colours.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
        times = max(1, math.ceil(256 / image.width))
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _lines(source: Any) -> list[Any]:
    """The documents of a .jsonl file; anything else as it is."""
    several = isinstance(source, str | Path) and Path(source).suffix.lower() == ".jsonl"
    return list(read_documents(source)) if several else [source]


class _Sample(NamedTuple):
    ids: Tensor
    spans: list[Span]
    write: str


class Interleaved(Pipeline):
    """Documents (see :mod:`zoo_multimodal.documents`) to what they cost and how they go on.

    write: "text", "image", "tokens" (models that read tokens), "none" (score alone), or "auto": a picture behind words,
    words behind a picture. max_new_tokens: of text or tokens. temperature (0: the likeliest), top_k, seed: of the draw.
    """

    task = "interleaved-generation"
    extensions = (".json",)

    def __init__(
        self,
        model: nn.Module,
        write: str = "auto",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        if not isinstance(model, MixtureLM):
            raise ValueError(
                f"{type(model).__name__} reads continuous patches, whose autoencoder is not here; use its generate(), "
                "or a model of discrete tokens"
            )
        if write not in WRITE:
            raise ValueError(f"write is {write!r}; expected one of {', '.join(WRITE)}")
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}, temperature {temperature}; expected 1 or more, and 0 or more"
            )
        self.codec = Codec(model)
        self.write, self.max_new_tokens = write, max_new_tokens
        self.temperature, self.top_k, self.seed = temperature, top_k, seed

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        """A list of segments (dictionaries) is one document, each line of a .jsonl file one."""
        if isinstance(inputs, list) and inputs and all(isinstance(s, dict) for s in inputs):
            return [make_document(inputs)], True
        found, single = super().expand(inputs)
        lines = [_lines(one) for one in found]
        return [document for own in lines for document in own], single and all(len(own) == 1 for own in lines)

    def read(self, source: Any) -> Document:
        if isinstance(source, Document):
            return source
        if not isinstance(source, str | Path):
            return make_document(source)
        found = read_documents(source)
        if len(found) > 1:
            raise ValueError(f"{source} holds {len(found)} documents; expected one, or give the file to the pipeline")
        return found[0]

    def prepare(self, sample: Document) -> _Sample:
        ids, spans = self.codec.encode(sample)
        write = self.write
        if write == "auto":
            write = {"text": "image" if self.codec.patch else "text", "image": "text", "tokens": "tokens"}[
                spans[-1].kind
            ]
        needs = {"text": self.codec.alphabet, "image": self.codec.patch}
        if write in needs and not needs[write]:
            raise ValueError(
                f"{self.name} writes no {write}: it has no {'alphabet' if write == 'text' else 'codebook'}"
            )
        return _Sample(torch.tensor(ids), spans, write)

    def collate(self, samples: Sequence[Any]) -> Any:
        """One document at a time: each is continued from its own state."""
        return list(samples)

    def forward(self, batch: Any) -> list[dict[str, Any]]:
        return [self._one(sample) for sample in batch]

    def _one(self, sample: _Sample) -> dict[str, Any]:
        model = self.model
        assert isinstance(model, MixtureLM)
        ids = sample.ids.to(self.device)[None]
        state = model.init_state(1)
        logits = model(ids, state=state)[0]
        chance = logits[:-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] / -math.log(2)
        found: dict[str, Any] = {"bits": chance.cpu(), "spans": sample.spans, "write": sample.write, "new": []}
        if sample.write == "none":
            return found
        how: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k}
        how["generator"] = torch.Generator().manual_seed(self.seed)
        last = logits[-1]
        if sample.write == "image":
            last = model.step(torch.tensor([PICTURE], device=ids.device), state)[0]
            found["new"], _ = generate(model, last, state, 1, max_new_tokens=self.codec.grid**2, **how)
        elif sample.write == "text":
            stop = (PICTURE, END)
            found["new"], _ = generate(model, last, state, 0, max_new_tokens=self.max_new_tokens, stop=stop, **how)
        else:
            found["new"], _ = generate(model, last, state, None, max_new_tokens=self.max_new_tokens, **how)
        return found

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: dict[str, Any], sample: Document) -> Continuation:
        each = output["bits"]
        rows = [
            {"kind": s.kind, "tokens": s.stop - s.start, "bits": float(each[s.start - 1 : s.stop - 1].mean())}
            for s in output["spans"]
            if s.stop > s.start
        ]
        answer, new = Continuation(source=sample.name if "line " in sample.name else "", rows=rows), output["new"]
        if output["write"] == "text":
            answer.text = self.codec.decode_text(new).strip()
        elif output["write"] == "image":
            answer.codes = [i - self.codec.starts[1] for i in new]
            answer.colours = self.codec.decode_picture(new)
        elif output["write"] == "tokens":
            answer.tokens = new
        return answer


def validate_documents(model: nn.Module, data: str | Path, *, batch_size: int = 64) -> Measured:
    """Bits a token of the documents of a .jsonl (or .json) file, of each modality and of all."""
    pipe = Interleaved(model)
    began = time.perf_counter()
    try:
        rows = [pipe.codec.encode(d, end=bool(pipe.codec.alphabet))[0] for d in read_documents(data)]
        found = bits(pipe.model, rows, batch_size)  # type: ignore[arg-type]
    except ValueError as error:
        raise errors.BadArgument(str(error), argument="data", accepted=[]) from error
    names = ("text", "image", "speech")
    kinds = [names[m] if m < len(names) else f"modality {m}" for m in range(len(found))]
    return Measured(
        model=pipe.name,
        data=str(data),
        samples=len(rows),
        metrics={f"bits a token of {kind}": value for kind, value in zip(kinds, found, strict=True)},
        seconds=time.perf_counter() - began,
    )
