"""Measuring answers about pictures: what ``zoo validate`` runs for image-text-to-text models."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from zoo.pipelines import progress_bar
from zoo.validation import Measured

from .conversations import IGNORED, Reader, read
from .image_text import ImageTextToText


@torch.no_grad()
def validate_conversations(
    model: nn.Module,
    data: str | Path,
    *,
    images: str | Path | None = None,
    tokenizer: str | Path | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> Measured:
    """How well a model answers the questions of a file of conversations, a JSON line each (:mod:`.conversations`):
    ``{"image": "a.png", "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}``.

    accuracy: the share of answers that are, written greedily and given the true ones before them, the recorded ones to
    the letter (white space at the ends aside); nll: mean negative log-probability of the recorded answers' tokens, in
    nats. ``images``: the folder that paths of pictures begin in; ``limit``: so many conversations at most.
    """
    pipe = ImageTextToText(model, tokenizer=tokenizer, max_new_tokens=256)
    found = read(data, images)[:limit]
    reader = Reader(pipe.lm, pipe.tokenizer, pipe.template, pipe.cutting)
    began = time.perf_counter()
    right: list[bool] = []
    losses: list[torch.Tensor] = []
    with progress_bar(progress, len(found), pipe.name) as advance:
        for conversation in found:
            for turn, (question, answer) in enumerate(conversation.turns):
                source = {
                    "image": list(conversation.pictures),
                    "question": question,
                    "history": list(conversation.turns[:turn]),
                }
                right.append(pipe(source).text == answer.strip())
            ids, pixels, hd = (batch := reader.batch(conversation)).inputs(pipe.device)
            logits = pipe.lm(ids, None if pixels is None else pixels.to(pipe.dtype), hd_input_ids=hd)
            assert batch.labels is not None
            labels = batch.labels.to(pipe.device)[:, 1:]
            chosen = labels != IGNORED
            losses.append(F.cross_entropy(logits[:, :-1][chosen].float(), labels[chosen], reduction="none").cpu())
            advance()
    metrics = {"accuracy": sum(right) / len(right), "nll": float(torch.cat(losses).mean())}
    return Measured(
        model=pipe.name, data=str(data), samples=len(right), metrics=metrics, seconds=time.perf_counter() - began
    )
