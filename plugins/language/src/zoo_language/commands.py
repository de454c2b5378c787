"""``zoo generate``, ``zoo score`` and ``zoo chat``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

NOT_NEGATIVE = click.IntRange(min=0)


def _writable(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file that can be written, found out before a text is waited for."""
    from zoo.files import check_place

    if value is not None:
        if value.is_dir():
            raise click.BadParameter(f"{str(value)!r} is a folder; expected the name of a file", ctx, parameter)
        try:
            check_place(value)
        except OSError as error:
            raise click.BadParameter(str(error), ctx, parameter) from error
    return value


def _sampling(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """A value that :class:`Sampling` takes."""
    from .generation import Sampling

    try:
        Sampling(**{str(parameter.name): value})
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error
    return value


def _stop(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:
        raise click.BadParameter("an empty string ends every text at once; leave it out", ctx, parameter)
    return value


SAMPLING = [
    click.option("--max-new-tokens", default=128, show_default=True, type=NOT_NEGATIVE),
    click.option(
        "--temperature", default=0.0, show_default=True, callback=_sampling, help="0: always the most likely token."
    ),
    click.option("--top-k", default=0, show_default=True, type=NOT_NEGATIVE, help="Keep the k most likely (0: all)."),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        callback=_sampling,
        help="Keep the tokens that reach this probability.",
    ),
    click.option(
        "--min-p",
        default=0.0,
        show_default=True,
        callback=_sampling,
        help="Keep tokens this likely relative to the best.",
    ),
    click.option("--repetition-penalty", default=1.0, show_default=True, callback=_sampling),
    click.option("--seed", default=0, show_default=True, callback=_sampling),
    click.option(
        "--decode-weights",
        type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
        help="Store the weights like this for decoding on a CPU: faster, at a small cost in perplexity.",
    ),
    click.option("--stop", multiple=True, callback=_stop, help="End at this string; repeatable."),
    click.option(
        "--tokenizer",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="A tokenizer.json instead of the card's.",
    ),
    click.option(
        "--checkpoint", type=click.Path(path_type=Path), help="Local weights, in the zoo's or original format."
    ),
    click.option("--dtype", help="float32, bfloat16 or float16."),
    click.option("--device", help="cpu (default), cuda, cuda:1 ..."),
    click.option(
        "--device-map",
        type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
        help="Instead of --device: spread a large model over devices, the CPU and the disk (needs accelerate).",
    ),
    click.option(
        "--draft",
        "speculative",
        help="Draft tokens with 'ngram' or a smaller model of the zoo and check them in trees; the text is the same.",
    ),
    click.option("--cuda-graphs", is_flag=True, default=None, help="On CUDA: record a decoding step and replay it."),
]


def sampling(command: Any) -> Any:
    for option in reversed(SAMPLING):
        command = option(command)
    return command


def _pipeline(model: str, **options: Any) -> Any:
    import zoo
    from zoo.loading import card_of

    task = card_of(model).task
    if task != "text-generation":  # told before gigabytes are fetched
        raise click.UsageError(f"{model} is for {task}; `zoo list --domain language` shows the language models")
    if options.get("speculative") and (options.get("decode_weights") or options.get("cuda_graphs")):
        raise click.UsageError("--draft goes with neither --decode-weights nor --cuda-graphs: give one of them")
    if options.get("device") is None and options.get("device_map") is None:
        options["device"] = "cpu"
    chosen = {k: v for k, v in options.items() if v is not None}
    return zoo.pipeline(model, task="text-generation", **chosen)


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--file", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A prompt from a file."
)
@click.option(
    "--state", "state_file", type=click.Path(path_type=Path), help="Go on from this state file, if it exists."
)
@click.option(
    "--save-state", type=click.Path(path_type=Path), callback=_writable, help="Write the state after the text here."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end instead of streaming text.")
@sampling
def generate(
    model: str, prompt: str | None, file: Path | None, state_file: Path | None, save_state: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Continue PROMPT (or the text on standard input) with MODEL, streaming.

    A state file holds all that the model has read: `--save-state` after a long document, `--state` to go on from it
    in another process without reading it again.
    """
    from zoo.files import read_text

    from .state import State

    if file is not None and prompt is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if file is not None:
        prompt = read_text(file)
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else _standard_input()
    state = State.load(state_file) if state_file is not None and state_file.exists() else None
    if state_file is not None and state is None and save_state is None:
        raise click.ClickException(f"there is no state file {state_file}; make one with --save-state")
    if not prompt and state is None:
        raise click.UsageError("nothing to continue: give PROMPT, --file, --state or text on standard input")
    pipe = _pipeline(model, **options)
    began = time.perf_counter()
    pieces = []
    for piece in pipe.stream_text(prompt, state):
        pieces.append(piece)
        if not as_json:
            click.echo(piece, nl=False)
    seconds = time.perf_counter() - began
    if save_state is not None:
        pipe.last_state.save(save_state)
    if as_json:
        found = {"text": "".join(pieces), "tokens": len(pipe.last_text.tokens), "reason": pipe.last_text.reason}
        click.echo(json.dumps({"model": pipe.name, "prompt": prompt, **found, "seconds": seconds}))
    else:
        click.echo()


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"standard input is no text in UTF-8: {error}") from error


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", default=2048, show_default=True, type=click.IntRange(min=1), help="Tokens read at a time.")
@click.option("--carry/--no-carry", default=True, show_default=True, help="Carry the state from window to window.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Local weights, in the zoo's or original format.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json instead of the card's.",
)
@click.option("--dtype", help="float32, bfloat16 or float16.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def score(model: str, file: Path, window: int, carry: bool, as_json: bool, **options: Any) -> None:
    """Perplexity and bits per byte of a text FILE under MODEL, from its first token on: it is read after the end of
    another text, or (bytes have no such token) a line feed.
    """
    from rich.console import Console
    from rich.progress import Progress

    from zoo.files import read_text

    from .validation import score_text

    text = read_text(file)
    if not text:
        raise click.UsageError(f"{file} is empty; there is nothing to score")
    pipe = _pipeline(model, **options)
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("reading", total=None)
        found = score_text(
            pipe, text, window=window, carry_state=carry,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    values = {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte, "tokens": found.tokens}
    if as_json:
        click.echo(json.dumps({"model": pipe.name, "file": str(file), **values}))
        return
    click.echo(
        f"{file}: perplexity {found.perplexity:.3f} over {found.tokens} tokens, {found.bits_per_byte:.4f} bits/byte"
    )


@click.command()
@click.argument("model")
@click.option(
    "--state",
    "state_file",
    type=click.Path(path_type=Path),
    callback=_writable,
    help="Keep the conversation in this file.",
)
@click.option("--user", default="", help="Text put before each line you type.")
@click.option("--answer", default="\n", help="Text put behind each line you type.")
@sampling
def chat(model: str, state_file: Path | None, user: str, answer: str, **options: Any) -> None:
    """Talk with MODEL line by line; it remembers in constant memory. An empty line ends.

    With --state the memory is a file: end, come back tomorrow, go on. Copy the file to fork the conversation.
    """
    from .state import State

    pipe = _pipeline(model, **options)
    state = State.load(state_file) if state_file is not None and state_file.exists() else None
    if state is not None:
        state.check(pipe.lm.state_name)
        click.echo(f"(going on after {int(state.position[0])} tokens)", err=True)
    while True:
        try:
            line = click.prompt("", prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            break
        if not line:
            break
        for piece in pipe.stream_text(f"{user}{line}{answer}", state):
            click.echo(piece, nl=False)
        click.echo()
        state = pipe.last_state
        if state_file is not None:
            state.save(state_file)
