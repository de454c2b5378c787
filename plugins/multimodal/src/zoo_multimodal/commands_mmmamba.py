"""``zoo ask`` and ``zoo distill``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training

OPTIONS = [
    click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=0)),
    click.option("--temperature", default=0.0, show_default=True, help="0: always the most likely token."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k most likely tokens (0: all)."),
    click.option("--top-p", default=1.0, show_default=True, help="Keep the tokens that reach this probability."),
    click.option("--repetition-penalty", default=1.0, show_default=True),
    click.option("--seed", default=0, show_default=True),
    click.option("--max-tiles", type=click.IntRange(min=1), help="Tiles of a picture at most; default: the card's."),
    click.option("--system", help="Another system message than the template's."),
    click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="The folder of tokenizer.model."),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="Local weights, the zoo's or the original's."),
    click.option("--dtype", help="float32, bfloat16 or float16."),
    training.device,
]


def _with(options: list[Any]) -> Any:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@click.argument("model")
@click.argument("pictures", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("question")
@click.option("--chat", is_flag=True, help="Ask on, line by line, about the same pictures; an empty line ends.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end instead of streaming.")
@_with(OPTIONS)
def ask(model: str, pictures: tuple[Path, ...], question: str, chat: bool, as_json: bool, **options: Any) -> None:
    """Ask MODEL a QUESTION about PICTURES (none: text alone); the answer streams.

    \b
        zoo ask mmmamba_micro.scenes scene.png "how many shapes are there ?"
        zoo ask mmmamba_linear photo.jpg "What is this?" --temperature 0.7
    """
    import zoo

    if chat and as_json:
        raise click.UsageError("give --chat or --json, not both")
    chosen = {k: v for k, v in options.items() if v is not None}
    pipe: Any = zoo.pipeline(model, task="image-text-to-text", **chosen)
    began = time.perf_counter()
    for piece in pipe.stream_text({"image": list(pictures), "question": question}):
        if not as_json:
            click.echo(piece, nl=False)
    seconds = time.perf_counter() - began
    if as_json:
        found = pipe.last.to_dict() | {"model": pipe.name, "pictures": [str(p) for p in pictures], "seconds": seconds}
        output.emit(found)
        return
    click.echo()
    while chat:
        try:
            line = click.prompt("", prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            return
        if not line:
            return
        for piece in pipe.follow_up(line, pipe.last.state):
            click.echo(piece, nl=False)
        click.echo()


def _layers(text: str | None, counts: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Indices of each stack from the published numbering: the language stack's begin at 8."""
    from .mmmamba_formats import LANGUAGE_FROM

    try:
        named = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError as error:
        raise click.BadParameter(f"{text!r}; expected numbers, as 0,4,8") from error
    first = [i for i in named if i < LANGUAGE_FROM]
    second = [i - LANGUAGE_FROM for i in named if i >= LANGUAGE_FROM]
    for indices, count, what in ((first, counts[0], "embedding"), (second, counts[1], "language")):
        outside = [i for i in indices if i >= count]
        if outside:
            raise click.BadParameter(f"{text!r} names layer {outside[0]} of the {what} stack, which has {count}")
    return first, second


@click.command()
@click.argument("teacher")
@click.argument("conversations", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--stage", required=True, type=click.Choice(["1", "2", "3"]), help="New parts, whole mixers, end to end.")
@training.out_folder("The student goes here.", file_okay=False)
@click.option("--student", type=click.Path(exists=True, path_type=Path), help="What the stage before wrote (2 and 3).")
@click.option("--softmax", help="Layers that stay softmax, as 0,4,8: the language stack's are numbered from 8.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps, the schedule in proportion.")
@click.option("--learning-rate", type=float, help="Default: the published recipe's.")
@click.option("--accumulation", type=click.IntRange(min=1), help="Conversations a step; default 16, 16 and 8.")
@click.option("--max-length", default=8192, show_default=True, help="Longer conversations are left out.")
@click.option("--max-tiles", type=click.IntRange(min=1), help="Tiles of a picture at most; default: the card's.")
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where pictures lie.")
@click.option("--labels", is_flag=True, help="Stage 3: add the cross entropy of the answers.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="The folder of tokenizer.model.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="The teacher's local weights.")
@click.option("--seed", default=0, show_default=True)
@click.option("--dtype", help="float32 or bfloat16.")
@training.device
@training.resume
@output.as_json
def distill(
    teacher: str, conversations: Path, stage: str, out: Path, student: Path | None, softmax: str | None,
    steps: int | None, learning_rate: float | None, accumulation: int | None, max_length: int, max_tiles: int | None,
    images: Path | None, labels: bool, seed: int, resume: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """One stage of mmMamba's distillation: TEACHER (softmax throughout) on CONVERSATIONS, a JSON line each.

    \b
        zoo distill hovle chats.jsonl --stage 1 --checkpoint HoVLE/ --out stage1
        zoo distill hovle chats.jsonl --stage 2 --checkpoint HoVLE/ --student stage1 --out stage2
        zoo distill hovle chats.jsonl --stage 3 --checkpoint HoVLE/ --student stage2 --out student
    """
    from dataclasses import replace

    import torch

    import zoo
    from zoo_registry import WeightsCard

    from . import conversations as data
    from . import mmmamba_distill as d
    from .image_text import ImageTextToText

    number = int(stage)
    torch.manual_seed(seed)
    chosen = {k: v for k, v in options.items() if v is not None}
    pipe: Any = zoo.pipeline(teacher, task="image-text-to-text", max_tiles=max_tiles, **chosen)
    assert isinstance(pipe, ImageTextToText)
    taught = pipe.lm.requires_grad_(False)
    learner: Any
    if student is not None:
        learner = zoo.load(student, device=options["device"], dtype=next(taught.parameters()).dtype)
    elif number == 1:
        kept = _layers(softmax, (len(taught.embedding.layers), len(taught.language.layers)))
        info: Any = taught.zoo_info  # type: ignore[union-attr]
        made = zoo.create("mmmamba_linear", **d.student_arguments(info.config, kept))
        learner = made.to(next(taught.parameters()))
        d.seed(taught, learner)
    else:
        raise click.UsageError(f"stage {number} goes on from the stage before: give --student, the folder it wrote")
    if number == 2:
        d.with_shadows(learner, taught)
    settings = replace(d.STAGES[number], accumulation=accumulation or (8 if number == 3 else 16))
    settings = settings if steps is None else settings.scaled(steps)
    settings = settings if learning_rate is None else replace(settings, learning_rate=learning_rate)
    reader = data.Reader(learner, pipe.tokenizer, pipe.template, pipe.cutting, max_length)
    chats = data.read(conversations, images)
    batches = reader.batches(chats, seed=seed)
    if not labels:
        batches = (replace(batch, labels=None) for batch in batches)
    began, every = time.perf_counter(), max(1, settings.total // 20)

    def report(step: int, loss: float) -> None:
        if not as_json and (step % every == 0 or step in (1, settings.total)):
            click.echo(f"step {step} of {settings.total}: loss {loss:.4f}, {time.perf_counter() - began:.0f} s")

    with training.run(out, resume, quiet=as_json, conversations=len(chats)) as run:
        losses = d.distil(learner, batches, number, teacher=taught, settings=settings, on_step=report, run=run)
        # what the student is fed stays what its teacher was fed
        learner.zoo_info.weights = WeightsCard(tag="own", where=f"distilled from {teacher}", preprocess=pipe.preprocess)
        zoo.save(d.without_shadows(learner), out)
    if as_json:
        facts = {"stage": number, "steps": len(losses), "loss": [losses[0], losses[-1]], "left_out": reader.left_out}
        output.emit(facts | {"folder": str(out)})
        return
    left = f", {reader.left_out} conversations left out as too long" if reader.left_out else ""
    click.echo(f"stage {number}: loss {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps{left} -> {out}")
