"""``zoo train-audio``: a model of sound on recordings of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command("train-audio")
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@training.out
@click.option("--length", type=click.IntRange(min=2), help="Samples of a window (default: the model's, as 16000).")
@training.planned(
    steps=20_000,
    rate=4e-3,
    weight_decay=0.0,
    batch_size=8,
    of="Windows.",
    validation="path",
    example="sample_rate=8000",
)
def train_audio(
    name: str,
    folder: Path,
    length: int | None,
    plan: training.Plan,
) -> None:
    """Train NAME, a SaShiMi, on the recordings in FOLDER (audio files at any depth, of any rate).

    Samples are 8-bit mu-law; the loss is the likelihood of each after those before it. The weights that need the fewest
    bits a sample on held-out recordings are kept.

    \b
        zoo train-audio sashimi_youtubemix piano/ --length 65536 --batch-size 1 --out piano_model --device cuda
    """
    import zoo
    from zoo import training as loop
    from zoo.building import trained
    from zoo.pipelines import progress_bar

    from .sounds import Sounds, bits, default_length, find_audio, likelihood, read_tokens, sound_model

    training.check_task(name, "audio-generation")
    files, held_files = find_audio(folder), [] if plan.validation is None else find_audio(plan.validation)
    if plan.validation is None:
        kept, rest = loop.held_out([None] * len(files), plan.share, plan.seed)
        files, held_files = [files[i] for i in kept], [files[i] for i in rest]
    model = sound_model(training.begun(name, plan.start, plan.seed, **plan.arguments))
    window = length or default_length(model)
    with progress_bar(not plan.as_json and sys.stderr.isatty(), len(files) + len(held_files), "reading") as advance:

        def read(path: Path) -> Any:
            found = read_tokens(path, model.sample_rate)
            advance()
            return found

        sounds, held = [read(path) for path in files], [read(path) for path in held_files]
    counts: dict[str, Any] = {"recordings": len(sounds), "held_out": len(held), "samples": sum(map(len, sounds))}
    with training.processes(plan.device) as place, plan.run(**counts) as run:
        model = model.to(place.device)
        facts = {"sample_rate": model.sample_rate, "bits": 8, "encoding": "mu-law", "length": window}
        trained(model, folder.name, facts)
        if not plan.as_json:
            seconds = counts["samples"] / model.sample_rate
            click.echo(f"{len(sounds)} recordings ({seconds:.1f} s), {len(held)} held out, windows of {window} samples")
        done = loop.fit(
            model,
            Sounds(sounds, window, plan.batch_size, plan.seed),
            likelihood,
            plan.settings,
            run=run,
            report=plan.report(),
            score=(lambda network: -bits(network, held, window)) if held else None,
            score_every=plan.score_every,
        )
        if not place.first:
            return
        figures = {"bits per sample": bits(model, held, window)} if held else {}
        where, what = (plan.validation or folder).name, f"{len(held)} held-out recordings"
        metrics = training.measured(figures, dataset=where, split=what, command="train-audio")
        zoo.save(model.cpu(), plan.out, metrics=metrics)
    if plan.as_json:
        output.emit({"metrics": figures} | counts | {"taken_at": done.taken_at, "folder": str(plan.out)})
        return
    if held:
        click.echo(f"{what}, weights of step {done.taken_at}: {training.said(figures)}")
    click.echo(f"saved to {plan.out}; try: zoo generate-audio {training.source(plan.out)} --seconds 1 --out sound.wav")
