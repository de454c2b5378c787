"""The audio plugin's verbs of the command line: ``zoo transcribe``, ``zoo generate-audio``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output


def decoding_options(command: Any) -> Any:
    """The options of every verb that writes text: beam, head, tokenizer."""
    heads = click.Choice(["ctc", "decoder"])
    own = click.Path(exists=True, dir_okay=False)
    for option in (
        click.option("--beam", default=1, show_default=True, type=click.IntRange(min=1), help="Beam width."),
        click.option("--decoding", type=heads, help="Which head writes the text."),
        click.option("--tokenizer", type=own, help="A tokenizer.json instead of the weights' own."),
    ):
        command = option(command)
    return command


def _pipeline(name: str, options: dict[str, Any], **chosen: Any) -> Any:
    import zoo

    given = {k: v for k, v in chosen.items() if v is not None}
    return zoo.pipeline(name, "speech-recognition", **output.loading(options), **given)


@click.command()
@click.argument("name")
@click.argument("inputs", nargs=-1, required=True)
@click.option("--stream", is_flag=True, help="Read in pieces as from a microphone; print text as it comes, and speed.")
@click.option("--piece", default=0.32, show_default=True, help="Seconds of audio a piece, with --stream.")
@click.option("--times", is_flag=True, help="One word a line, with its seconds.")
@click.option("--pictures", type=click.Path(file_okay=False), help="Draw waveforms with words into this folder.")
@click.option("--keep-going", is_flag=True, help="Go on after a file that cannot be read.")
@decoding_options
@output.loading_options
@output.as_json
def transcribe(
    name: str, inputs: tuple[str, ...], stream: bool, piece: float, times: bool, pictures: str | None,
    keep_going: bool, decoding: str | None, beam: int, tokenizer: str | None, as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Write down what is said in INPUTS (audio files, folders, patterns) with the model NAME.

    \b
        zoo transcribe samba_asr_micro call.wav --times
        zoo transcribe samba_asr_micro talk.mp3 --stream
    """
    from zoo.cli.predict import picture_name
    from zoo.files import check_place
    from zoo.pipelines import Failure

    if not 0 < piece < float("inf"):
        raise click.UsageError(f"--piece is {piece}; expected a positive number of seconds")
    if stream and (beam > 1 or pictures is not None):
        refused = "--beam" if beam > 1 else "--pictures"
        raise click.UsageError(f"{refused} needs the whole recording; leave it out, or leave out --stream")
    if pictures is not None:
        check_place(pictures)
    pipe = _pipeline(name, options, decoding=decoding, beam=beam, tokenizer=tokenizer)
    if stream:
        return _streamed(pipe, list(inputs), piece, times=times, keep_going=keep_going, as_json=as_json)
    rows, failed = [], False
    for i, result in enumerate(pipe.stream(list(inputs), keep_going=keep_going)):
        row = result.to_dict()
        failed = failed or isinstance(result, Failure)
        if pictures is not None and result.has_picture:
            row["picture"] = str(result.save_picture(Path(pictures) / picture_name(result.source, i)))
        rows.append(row)
        if as_json:
            continue
        click.echo(str(result) + (f"  -> {row['picture']}" if "picture" in row else ""))
        if isinstance(result, Failure):
            continue
        if times:
            _show_times(result.words)
        speed = result.real_time_factor
        factor = "" if speed is None else f", real-time factor {speed:.4f}"
        click.echo(f"{result.seconds:.1f} s of audio{factor}", err=True)
    if as_json:
        output.emit(rows)
    return 1 if failed else 0


def _show_times(words: Any) -> None:
    for word in words:
        when = "" if word.start is None else f"{word.start:8.2f} {word.end:8.2f}"
        click.echo(f"{when}  {word.text}")


def _streamed(
    pipe: Any, inputs: list[str], piece: float, *, times: bool, keep_going: bool, as_json: bool
) -> int:  # fmt: skip
    """Text as it comes; the levels and the speed after each recording."""
    from zoo.results import Failure, plain

    found, failed = [], False
    for source in pipe.expand(inputs)[0]:
        try:
            found.append(_stream_one(pipe, source, piece, times, as_json))
        except Exception as error:
            if not keep_going:
                raise
            failure = Failure(source=str(source), model=pipe.name, error=error)
            failed = True
            found.append(failure.to_dict())
            if not as_json:
                click.echo(str(failure))
    if as_json:
        output.emit(plain(found))
    return 1 if failed else 0


def _stream_one(pipe: Any, source: Any, piece: float, times: bool, as_json: bool) -> dict[str, Any]:
    audio = pipe.read(source)
    recogniser, notes = pipe.recogniser(), ["no samples"]
    if not as_json:
        click.echo(f"{audio.name}: ", nl=False)

    def show(tokens: list[Any]) -> None:
        if not as_json:
            click.echo("".join(t.text for t in tokens).replace("\N{LOWER ONE EIGHTH BLOCK}", " "), nl=False)

    try:
        for samples, levels in audio.pieces(pipe.asr.sample_rate, piece):
            show(recogniser.push(samples))
            notes = levels.notes()
        show(recogniser.finish())
    finally:
        if not as_json:
            click.echo("")
    speed = recogniser.speed
    if not as_json:
        if times:
            _show_times(recogniser.words)
        click.echo("; ".join([str(speed), *notes]), err=True)
    return {
        "source": audio.name, "text": recogniser.text, "words": recogniser.words, "notes": notes,
        "seconds": speed.audio, "latency": speed.lookahead + speed.longest, "lookahead": speed.lookahead,
        "real_time_factor": speed.real_time_factor,
    }  # fmt: skip


@click.command("generate-audio")
@click.argument("name")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="Audio file; a number is added if several.")
@click.option("--seconds", default=1.0, show_default=True, help="Length of each recording.")
@click.option("--count", default=1, show_default=True, type=click.IntRange(min=1), help="Recordings, likeliest first.")
@click.option("--temperature", default=1.0, show_default=True, help="0: always the most likely sample.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest samples of this probability.")
@click.option("--seed", default=0, show_default=True)
@click.option("--picture/--no-picture", default=True, show_default=True, help="Draw the waveform beside each file.")
@output.loading_options
@output.as_json
def generate_audio(
    name: str, out: str, seconds: float, count: int, temperature: float, top_p: float, seed: int, picture: bool,
    as_json: bool, **options: Any,
) -> int:  # fmt: skip
    """Generate sound with NAME, a SaShiMi, and write it with a picture of its waveform.

    \b
        zoo generate-audio sashimi_sc09 --seconds 0.5 --count 2 --out digits.wav
    """
    import zoo
    from zoo.files import whole

    from .files import check_target, write_audio
    from .generation import generate
    from .pictures import waveform
    from .sashimi import SashimiLM

    if not 0 < seconds < float("inf"):
        raise click.UsageError(f"--seconds is {seconds}; expected a positive number")
    check_target(out)
    model = zoo.load(name, **output.loading(options))
    if not isinstance(model, SashimiLM):
        raise click.UsageError(f"{name} is a {type(model).__name__}; zoo generate-audio needs a SaShiMi language model")
    samples = round(seconds * model.sample_rate)
    if samples < 1:
        raise click.UsageError(f"--seconds is {seconds}; expected at least one sample, {1 / model.sample_rate:g} s")
    sound = generate(model, samples, count, temperature=temperature, top_p=top_p, seed=seed)
    target, made = Path(out), []
    for i, recording in enumerate(sound.samples):
        path = target if count == 1 else target.with_stem(f"{target.stem}_{i + 1}")
        write_audio(path, recording, sound.rate)
        entry = {"file": str(path), "bits_per_sample": -float(sound.log_likelihood[i]) / samples / 0.6931471805599453}
        if picture:
            drawn = path.with_suffix(".png")
            with whole(drawn) as work:
                waveform(recording, sound.rate).save(work)
            entry["picture"] = str(drawn)
        made.append(entry)
    if as_json:
        output.emit({"model": name, "rate": sound.rate, "samples_per_second": sound.per_second, "files": made})
    else:
        for entry in made:
            click.echo(f"{entry['file']}: {entry['bits_per_sample']:.2f} bits a sample under the model")
            if picture:
                click.echo(f"picture: {entry['picture']}")
        click.echo(f"{samples * count} samples, {sound.per_second:.0f} a second", err=True)
    return 0
