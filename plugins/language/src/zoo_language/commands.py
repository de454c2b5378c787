"""``zoo generate``, ``zoo score`` and ``zoo chat``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

SAMPLING = [
    click.option("--max-new-tokens", default=128, show_default=True),
    click.option("--temperature", default=0.0, show_default=True, help="0: always the most likely token."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k most likely tokens (0: all)."),
    click.option("--top-p", default=1.0, show_default=True, help="Keep the tokens that reach this probability."),
    click.option("--min-p", default=0.0, show_default=True, help="Keep tokens this likely relative to the best."),
    click.option("--repetition-penalty", default=1.0, show_default=True),
    click.option("--seed", default=0, show_default=True),
    click.option(
        "--decode-weights",
        type=click.Choice(["float32", "bfloat16", "float16", "int8"]),
        help="Store the weights like this for decoding on a CPU: faster, at a small cost in perplexity.",
    ),
    click.option("--stop", multiple=True, help="End at this string; repeatable."),
    click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json instead of the card's."),
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
@click.option("--save-state", type=click.Path(path_type=Path), help="Write the state after the text here.")
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
    from .state import State

    if file is not None and prompt is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if file is not None:
        prompt = file.read_text(encoding="utf-8")
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
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
        text = "".join(pieces)
        click.echo(json.dumps({"model": pipe.name, "prompt": prompt, "text": text, "seconds": seconds}))
    else:
        click.echo()


@click.command()
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--window", default=2048, show_default=True, help="Tokens read at a time.")
@click.option("--carry/--no-carry", default=True, show_default=True, help="Carry the state from window to window.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Local weights, in the zoo's or original format.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json instead of the card's.")
@click.option("--dtype", help="float32, bfloat16 or float16.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def score(model: str, file: Path, window: int, carry: bool, as_json: bool, **options: Any) -> None:
    """Perplexity and bits per byte of a text FILE under MODEL."""
    from rich.console import Console
    from rich.progress import Progress

    from .scoring import score as run

    text = file.read_text(encoding="utf-8")
    pipe = _pipeline(model, **options)
    ids = pipe.tokenizer.encode(text)
    with Progress(console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("reading", total=len(ids))
        found = run(
            pipe.lm, ids, text_bytes=len(text.encode()), window=window, carry_state=carry,
            start=pipe.tokenizer.end_of_text, progress=lambda done, _: bar.update(task, completed=done),
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
@click.option("--state", "state_file", type=click.Path(path_type=Path), help="Keep the conversation in this file.")
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
