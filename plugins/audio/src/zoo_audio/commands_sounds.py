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
@training.measuring(of="path")
@training.start
@click.option("--length", type=click.IntRange(min=2), help="Samples of a window (default: the model's, as 16000).")
@training.loop(steps=20_000, rate=4e-3, weight_decay=0.0)
@training.batch_size(8, "Windows.")
@training.run_options("sample_rate=8000")
@training.resume
@output.as_json
def train_audio(
    name: str,
    folder: Path,
    out: Path,
    held_out: float | None,
    validation: Path | None,
    start: str | None,
    length: int | None,
    batch_size: int,
    score_every: int | None,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **options: Any,
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

    settings = training.settings(options, seed)
    training.check_task(name, "audio-generation")
    share = training.held_out_share(held_out, validation)
    files, held_files = find_audio(folder), [] if validation is None else find_audio(validation)
    if validation is None:
        kept, rest = loop.held_out([None] * len(files), share, seed)
        files, held_files = [files[i] for i in kept], [files[i] for i in rest]
    model = sound_model(training.begun(name, start, seed, **output.pairs(choices, "--set")))
    window = length or default_length(model)
    with progress_bar(not as_json and sys.stderr.isatty(), len(files) + len(held_files), "reading") as advance:

        def read(path: Path) -> Any:
            found = read_tokens(path, model.sample_rate)
            advance()
            return found

        sounds, held = [read(path) for path in files], [read(path) for path in held_files]
    counts: dict[str, Any] = {"recordings": len(sounds), "held_out": len(held), "samples": sum(map(len, sounds))}
    with training.processes(device) as place, training.run(out, resume, quiet=as_json, **counts) as run:
        model = model.to(place.device)
        facts = {"sample_rate": model.sample_rate, "bits": 8, "encoding": "mu-law", "length": window}
        trained(model, folder.name, facts)
        if not as_json:
            seconds = counts["samples"] / model.sample_rate
            click.echo(f"{len(sounds)} recordings ({seconds:.1f} s), {len(held)} held out, windows of {window} samples")
        done = loop.fit(
            model,
            Sounds(sounds, window, batch_size, seed),
            likelihood,
            settings,
            run=run,
            report=training.reporter(settings.steps, quiet=as_json),
            score=(lambda network: -bits(network, held, window)) if held else None,
            score_every=score_every,
        )
        if not place.first:
            return
        figures = {"bits per sample": bits(model, held, window)} if held else {}
        where, what = (validation or folder).name, f"{len(held)} held-out recordings"
        metrics = training.measured(figures, dataset=where, split=what, command="train-audio")
        zoo.save(model.cpu(), out, metrics=metrics)
    if as_json:
        output.emit({"metrics": figures} | counts | {"taken_at": done.taken_at, "folder": str(out)})
        return
    if held:
        click.echo(f"{what}, weights of step {done.taken_at}: {training.said(figures)}")
    click.echo(f"saved to {out}; try: zoo generate-audio {training.source(out)} --seconds 1 --out sound.wav")
