"""``zoo train-speech``: a recogniser on recordings of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training
from zoo_registry import errors, optional

if TYPE_CHECKING:
    from torch import Tensor

    from .samba_asr import SambaASR
    from .text import Tokenizer

#: So many of the recordings that are left out are named.
NAMED = 5


@click.command("train-speech")
@click.argument("name")
@click.argument("manifest", type=click.Path(exists=True, path_type=Path))
@training.out
@click.option("--vocabulary", help='"characters" (default), a number of pieces, or a tokenizer.json.')
@click.option("--ctc-weight", default=1.0, show_default=True, type=click.FloatRange(min=0), help="Of the CTC head.")
@click.option(
    "--smoothing", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="Of the decoder's labels."
)
@click.option("--augment/--no-augment", default=True, show_default=True, help="SpecAugment.")
@training.planned(
    steps=20_000, rate=1e-3, weight_decay=0.01, batch_size=16, of="Recordings.", validation="path", example="n_enc=6"
)
def train_speech(
    name: str,
    manifest: Path,
    vocabulary: str | None,
    ctc_weight: float,
    smoothing: float,
    augment: bool,
    plan: training.Plan,
) -> None:
    """Train the speech recogniser NAME on the recordings in MANIFEST.

    MANIFEST is a folder of recordings with texts beside them (a.wav, a.txt), a folder as LibriSpeech's, a file of lines
    "AUDIO FILE<tab>TEXT", a .tsv or .csv file with columns audio and text, or a .jsonl file with such keys. The weights
    with the lowest word error rate on held-out recordings are kept.

    \b
        zoo train-speech samba_asr_base LibriSpeech/train-clean-100 --validation LibriSpeech/dev-clean \\
            --vocabulary 1000 --out asr --device cuda
        zoo train-speech samba_asr_micro commands.tsv --start samba_asr_micro.commands --out mine
    """
    import zoo
    from zoo import training as loop
    from zoo.building import trained
    from zoo.pipelines import progress_bar

    from .features import LogMel
    from .manifests import read_manifest
    from .pipelines import SpeechRecognition
    from .recordings import Spoken, survey
    from .validation import measure

    if plan.share or plan.validation is not None:
        optional("jiwer", "counting errors of transcripts", "ssm-zoo-audio[metrics]")
    pairs, held = read_manifest(manifest), [] if plan.validation is None else read_manifest(plan.validation)
    if plan.validation is None:
        kept, rest = loop.held_out([None] * len(pairs), plan.share, plan.seed)
        pairs, held = [pairs[i] for i in kept], [pairs[i] for i in rest]
    model, tokenizer = _begun(name, plan.start, vocabulary, [text for _, text in pairs], plan.seed, plan.arguments)
    with progress_bar(not plan.as_json and sys.stderr.isatty(), len(pairs) + len(held), "headers") as advance:
        recordings, refused = survey(pairs, model, tokenizer, advance)
        spoken, _ = survey(held, model, tokenizer, advance)
    _name(refused)
    if not recordings:
        raise errors.BadArgument(f"no recording of {manifest} is left", argument="manifest", accepted=[])
    if held and not spoken:
        raise errors.BadArgument("nothing is said in the held-out recordings", argument="held_out", accepted=[])
    counts: dict[str, Any] = {"recordings": len(recordings), "held_out": len(held)}
    with training.processes(plan.device) as place, plan.run(**counts) as run:
        model = model.to(place.device)
        facts = {"sample_rate": model.sample_rate, "tokenizer_json": tokenizer.text}
        trained(model, manifest.name, facts)
        if not plan.as_json:
            hours = sum(recording.seconds for recording in recordings) / 3600
            click.echo(f"{len(recordings)} recordings ({hours:.2f} h), {len(held)} held out, {len(tokenizer)} tokens")

        def rates(network: Any) -> dict[str, float]:
            found = measure(SpeechRecognition(network), held)[0]
            return {"WER": found.wer, "CER": found.cer}

        def loss(network: Any, batch: Any) -> Tensor:
            return network.loss(*batch, ctc_weight=ctc_weight, label_smoothing=smoothing)

        mel = LogMel(model.n_mels, rate=model.sample_rate, scaling=model.scaling)
        done = loop.fit(
            model,
            Spoken(recordings, mel, plan.batch_size, plan.seed, augment),
            loss,
            plan.settings,
            run=run,
            report=plan.report(),
            score=(lambda network: -rates(network)["WER"]) if held else None,
            score_every=plan.score_every,
        )
        if not place.first:
            return
        figures, what = rates(model) if held else {}, f"{len(held)} held-out recordings"
        where = (plan.validation or manifest).name
        metrics = training.measured(figures, dataset=where, split=what, command="train-speech")
        zoo.save(model.cpu(), plan.out, metrics=metrics)
    if plan.as_json:
        more = {"left_out": len(refused), "taken_at": done.taken_at, "folder": str(plan.out)}
        output.emit({"metrics": figures} | counts | more)
        return
    if held:
        click.echo(f"{what}, weights of step {done.taken_at}: {training.said(figures)}")
    click.echo(f"saved to {plan.out}; try: zoo transcribe {training.source(plan.out)} recording.wav")


def _begun(
    name: str, start: str | None, vocabulary: str | None, texts: list[str], seed: int, arguments: dict[str, Any]
) -> tuple[SambaASR, Tokenizer]:
    """The model with its first weights, and its tokenizer: of ``start``, or made for ``texts``."""
    from .pipelines import SpeechRecognition
    from .samba_asr import SambaASR

    training.check_task(name, "speech-recognition")
    tokenizer = None if start is not None and vocabulary is None else _tokenizer(vocabulary or "characters", texts)
    if start is None:
        assert tokenizer is not None
        arguments = {"vocab_size": len(tokenizer)} | arguments
    model = training.begun(name, start, seed, **arguments)
    assert isinstance(model, SambaASR)
    if start is not None:  # the pipeline says which tokenizer fits, and what is wrong with another
        return model, SpeechRecognition(model, tokenizer=tokenizer).tokenizer
    assert tokenizer is not None
    if model.vocab_size < len(tokenizer):
        raise click.UsageError(f"--set vocab_size={model.vocab_size}; the vocabulary has {len(tokenizer)} tokens")
    return model, tokenizer


def _tokenizer(vocabulary: str, texts: list[str]) -> Tokenizer:
    from .text import Tokenizer, train_tokenizer

    if vocabulary == "characters" or vocabulary.isdecimal():
        size = 1 if vocabulary == "characters" else int(vocabulary)
        found = train_tokenizer(texts, size)
        if size > 1 and len(found) > size:
            raise click.UsageError(
                f"--vocabulary is {size}; the texts have {len(found) - 3} different characters, give at least "
                f"{len(found)}"
            )
        return found
    if not Path(vocabulary).is_file():
        raise click.UsageError(
            f"--vocabulary is {vocabulary!r}; expected 'characters', a number of pieces, or a tokenizer.json"
        )
    return Tokenizer(vocabulary)


def _name(refused: list[str]) -> None:
    """Say which recordings are left out, to people and not to machines."""
    for sentence in refused[:NAMED]:
        click.echo(f"left out: {sentence}", err=True)
    if len(refused) > NAMED:
        click.echo(f"left out: {len(refused) - NAMED} more", err=True)
