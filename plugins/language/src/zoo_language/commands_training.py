"""``zoo train-language``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training

if TYPE_CHECKING:
    from ._base import CausalLM
    from .tokenizer import OwnTokenizer

_TEXTS = click.Path(exists=True, path_type=Path)
#: Where the tokens lie while a model is trained, in the folder that ``--out`` names.
TOKENS = "training.tokens"
FILE = "tokenizer.json"
#: Of AdamW, as in the Mamba paper (arXiv 2312.00752, appendix E.2).
BETAS = (0.9, 0.95)
#: Of the bytes, held out.
SHARE = 0.05


@click.command()
@click.argument("name")
@click.argument("texts", nargs=-1, required=True, type=_TEXTS)
@training.out
@click.option("--tokenizer", help="A tokenizer.json or its folder, or 'bytes' (default: that of the weights).")
@click.option("--end-of-text", help="The token of --tokenizer between texts (default: <|endoftext|>, if it has it).")
@click.option("--length", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens of a window.")
@training.planned(
    steps=2000,
    rate=1e-3,
    weight_decay=0.1,
    batch_size=8,
    of="Windows.",
    share=SHARE,
    validation="path",
    example="n_layer=4",
)
def train_language(
    name: str,
    texts: tuple[Path, ...],
    tokenizer: str | None,
    end_of_text: str | None,
    length: int,
    plan: training.Plan,
) -> None:
    """Train the language model NAME on TEXTS: .txt and .md files, .jsonl files with a "text" a line, folders of them,
    each also with .gz.

    Texts are packed into windows, the end-of-text token (or a line feed) between them. They are tokenised once, into
    OUT, and not held in memory. Some are held out and measured as `zoo validate` measures; the weights of the best
    measure are kept. A run that was interrupted goes on when the same command is given again.

    \b
        zoo train-language mamba2_micro notes/ --out mine --start mamba2_micro.bible --rate 3e-4
        zoo train-language mamba_130m corpus.jsonl.gz --out mine --start mamba_130m.pile --device cuda --recompute
        zoo train-language mamba_130m corpus/ --out mine --tokenizer tokenizer.json --set n_layer=6
    """
    import torch.distributed

    import zoo
    from zoo.building import trained
    from zoo.training import fit

    from .corpus import Corpus, files_in, prepare
    from .training import Windows, check_causal, held_out_score, next_token_loss, streams, takes_resets
    from .validation import figures

    if end_of_text is not None and tokenizer in (None, "bytes"):
        raise click.UsageError("--end-of-text names a token of a tokenizer.json: give it with --tokenizer")
    files, others = files_in(texts), files_in([] if plan.validation is None else [plan.validation])
    model, coding, said = _begun(name, plan.start, plan.seed, tokenizer, end_of_text, plan.arguments)
    carry = streams(model)
    how: dict[str, Any] = {"window": 2048 if carry else length, "carry": carry}  # what zoo validate does by itself
    settings = dataclasses.replace(plan.settings, betas=BETAS)

    with training.processes(plan.device) as place:
        check_causal(model.to(place.device), min(length, 2048), name)
        if place.first:
            prepare(plan.out / TOKENS, files, coding, held_out=plan.share, validation=others, seed=plan.seed)
        if place.world > 1:
            torch.distributed.barrier()
        corpus = Corpus(plan.out / TOKENS)
        train, held = corpus.train, corpus.held
        measured = 0 if held is None else len(held) - len(held.begins)
        with plan.run(tokens=len(train), measured=measured) as run:
            if not plan.as_json:
                apart = "apart" if takes_resets(model) else "as one text (the model does not take resets)"
                click.echo(f"{len(train.begins)} texts, {len(train)} tokens; {measured} to measure on")
                click.echo(f"windows of {length} tokens, texts in one are read {apart}")
            fitted = fit(
                model,
                Windows(train, length, plan.batch_size, plan.seed),
                lambda m, batch: next_token_loss(m, batch, recompute=settings.recompute),  # type: ignore[arg-type]
                settings,
                run=run,
                report=plan.report(),
                score=None if held is None else lambda m: -held_out_score(m, held, **how).bits_per_byte,
                score_every=plan.score_every,
            )
            found = {} if held is None else figures(held_out_score(model, held, **how))
            if place.first:
                source = texts[0] if plan.validation is None else plan.validation
                split = "held out" if plan.validation is None else "validation"
                metrics = training.measured(found, dataset=source.name, split=split, command="train-language")
                trained(model, ", ".join(text.name for text in texts), said)
                zoo.save(model.cpu(), plan.out, metrics=metrics)
                corpus.remove()
    if plan.as_json:
        counts = {"texts": len(train.begins), "tokens": len(train), "measured": measured}
        output.emit(counts | {"taken_at": fitted.taken_at, "metrics": found, "folder": str(plan.out)})
        return
    if found:
        asked = "" if carry else f" (as zoo validate -o carry=false -o window={length})"
        click.echo(f"{measured} tokens that were not trained on: {training.said(found)}{asked}")
    click.echo(f'saved to {plan.out}; try: zoo generate {training.source(plan.out)} "Once"')


def _begun(
    name: str, start: str | None, seed: int, given: str | None, end: str | None, arguments: dict[str, Any]
) -> tuple[CausalLM, OwnTokenizer, dict[str, Any]]:
    """The model, its tokenizer, and what the saved weights say of it; a new model has as many ids as the tokenizer that
    is given."""
    from zoo.catalog import accepts, find

    from ._base import CausalLM
    from .tokenizer import ByteTokenizer, HubTokenizer, settings_of, tokenizer_of

    training.check_task(name, "text-generation")
    card, weights = find(name)
    size = {**card.config, **arguments}.get("vocab_size")
    model = None
    if start is not None:
        model = training.begun(name, start, seed, **arguments)
        weights, size = model.zoo_info.weights, model.vocab_size  # type: ignore[union-attr]
    said = {} if weights is None else dict(weights.preprocess)
    if given is None and not {"tokenizer", "tokenizer_json"} & set(said):
        if size != ByteTokenizer.size:
            raise click.UsageError(
                f"{name} names no tokenizer; give --tokenizer, a tokenizer.json or a folder that holds one, or 'bytes'"
            )
        given = "bytes"
    coding: OwnTokenizer
    if given is None:
        coding = tokenizer_of(said)
    else:
        place = Path(given)
        coding = ByteTokenizer() if given == "bytes" else HubTokenizer(place / FILE if place.is_dir() else place, end)
        said = settings_of(coding)
        if model is None and accepts(name, "vocab_size"):
            arguments = {"vocab_size": coding.size} | arguments
    if model is None:
        model = training.begun(name, None, seed, **arguments)
    if not isinstance(model, CausalLM):
        raise click.UsageError(f"{name} is a {type(model).__name__}, which is no language model of this plugin")
    if coding.size > model.vocab_size:
        raise click.UsageError(
            f"the tokenizer has {coding.size} tokens and {start or name} {model.vocab_size}; give the tokenizer of the "
            "weights, or a new model a larger vocabulary (--set vocab_size)"
        )
    return model, coding, said
