"""Options that the commands which train have in common, each said once, and what they do with the figures.

What is wrong with a value is found out before the work begins: that ``--out`` cannot be written, say, and not after
hours, when the weights would be lost. Options are given one by one, so that each command keeps their order::

    @click.command()
    @training.out
    @training.epochs(30)
    @training.batch_size(16, "Dialogues.")
    @training.rate(1e-3)
    @click.option("--ridge", ...)            # the command's own
    @training.run_options("dim=64")          # --seed, --device, --set
    @training.resume
    @output.as_json

and what the command does goes on after an interruption where its loop takes a :class:`zoo.runs.Run`::

    with training.run(out, resume, quiet=as_json, dialogues=len(train)) as run:
        fit(model, train, run=run)
        zoo.save(model, out)

Commands on the shared loop of :mod:`zoo.training` take its options at once, and train in several processes as well::

    @training.loop(steps=2000, rate=1e-3)    # --steps, --rate, --weight-decay, --warmup, ... into **options
    ...
    with training.processes(device) as place, training.run(out, resume, quiet=as_json, pictures=len(train)) as run:
        model = training.begun(name, start, seed, **arguments).to(place.device)
        fit(model, batch, loss, training.settings(options, seed), run=run, report=report)
        if place.first:
            zoo.save(model.cpu(), out)
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo_registry import errors

if TYPE_CHECKING:
    from torch import nn

    from zoo.runs import Run
    from zoo.training import Place, Settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _place(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """A folder that can be made or written to."""
    from zoo.files import check_place

    if value is None:
        return None
    if value.exists() and not value.is_dir():
        raise click.BadParameter(f"{str(value)!r} is a file; expected a folder, new or not", ctx, parameter)
    try:
        check_place(value)
    except errors.StoreError as error:
        raise click.BadParameter(str(error), ctx, parameter) from error
    return value


def _device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    if value != "cpu":
        from zoo.placement import checked_device

        try:
            checked_device(value)
        except errors.BadArgument as error:
            raise click.BadParameter(str(error), ctx, parameter) from error
    return value


def positive(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """A callback: finite and above 0."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value} is no rate; expected a number above 0, as 1e-3", ctx, parameter)
    return value


def out_folder(help: str = "Folder for the weights.", *, required: bool = True, **kind: Any) -> Decorator:
    """``--out``: a folder, refused at once where it cannot be written. ``kind``: of click.Path."""
    place = click.Path(path_type=Path, **kind)
    return click.option("--out", required=required, type=place, callback=_place, help=help)


#: ``--out FOLDER`` for the weights
out = out_folder()


def steps(default: int) -> Decorator:
    return click.option("--steps", default=default, show_default=True, type=click.IntRange(min=1))


def epochs(default: int) -> Decorator:
    return click.option("--epochs", default=default, show_default=True, type=click.IntRange(min=1))


def batch_size(default: int, of: str | None = None, *, least: int = 1) -> Decorator:
    """``--batch-size``; ``of``: what it counts ("Dialogues.")."""
    return click.option("--batch-size", default=default, show_default=True, type=click.IntRange(min=least), help=of)


def rate(default: float, help: str | None = None) -> Decorator:
    """``--rate``: the learning rate."""
    return click.option("--rate", default=default, show_default=True, type=float, callback=positive, help=help)


_STEPS, _RATE = steps, rate  # under names that arguments do not hide

#: ``--seed``
seed = click.option("--seed", default=0, show_default=True, type=int)
#: ``--device``: the CPU unless given, found out at once
device = click.option("--device", default="cpu", show_default=True, callback=_device)


#: ``--resume`` (the default) or ``--anew``, as ``resume``
resume = click.option(
    "--resume/--anew",
    default=True,
    show_default=True,
    help="Go on with an interrupted run that OUT holds, or start over.",
)
#: Where a run is kept, in the folder that ``--out`` names.
RUN = "training.run"
#: Options that change nothing in what is trained.
_APART = {"out", "resume", "as_json", "device"}


@contextlib.contextmanager
def run(out: Path, resume: bool, *, unit: str = "step", quiet: bool = False, **facts: Any) -> Iterator[Run]:
    """The run of the command that is being executed, kept in ``out`` until the block ends well.

    A run found there goes on if its command had the same arguments and options, and the same ``facts`` (how many
    samples there are, say, since files can change under one name). ``unit``: what the loop counts; ``quiet``: say
    nothing.
    """
    from zoo.runs import Run

    ctx = click.get_current_context()
    about = {"command": ctx.command.name} | {k: v for k, v in ctx.params.items() if k not in _APART} | facts
    told = None if quiet else lambda done: click.echo(f"going on after {unit} {done} of an interrupted run")
    kept = Run(out / RUN, about, on_resume=told)
    if not resume:
        kept.finish()
    try:
        yield kept
    except KeyboardInterrupt:
        if kept.kept:
            click.echo(
                f"stopped; {out} holds the run up to {unit} {kept.kept}: the same command goes on there", err=True
            )
        raise
    kept.finish()


def model_arguments(example: str | None = None) -> Decorator:
    """``--set NAME=VALUE`` as ``choices``, for :func:`zoo.cli.output.pairs`; ``example``: one for the help."""
    said = "Model argument." if example is None else f"Model argument, as {example}."
    return click.option("--set", "choices", multiple=True, metavar="NAME=VALUE", help=said)


def run_options(example: str | None = None) -> Decorator:
    """``--seed``, ``--device`` and ``--set``."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return seed(device(model_arguments(example)(command)))

    return add


#: ``--start NAME`` for :func:`begun`
start = click.option("--start", help="Weights to begin with: a name with its tag, or a saved folder.")


def check_task(name: str, *tasks: str) -> str:
    """The task of a model, which must be one of ``tasks``. Raises UsageError."""
    from zoo.loading import card_of

    task = card_of(name).task
    if task not in tasks:
        command = click.get_current_context().command.name
        raise click.UsageError(
            f"{name} is for {task}; zoo {command} trains models for {' and '.join(tasks)} (zoo list --task {tasks[0]})"
        )
    return task


def begun(name: str, start: str | None, seed: int, **arguments: Any) -> nn.Module:
    """The model that a command trains: NAME with random weights from ``seed``, or the weights that ``start`` names, in
    float32. Raises BadArgument where these are another model's, and for a NAME with a tag: its weights are ``start``'s
    to name."""
    import torch

    import zoo
    from zoo import catalog
    from zoo.loading import card_of
    from zoo_registry import ModelName, parse

    card, _ = catalog.find(name)
    if isinstance(given := parse(name), ModelName) and given.tag is not None:
        raise errors.BadArgument(
            f"{name} names weights, and training begins with random ones; give the model as {card.name}, and "
            f"--start {name} to begin with these"
        )
    torch.manual_seed(seed)
    if start is None:
        return zoo.create(name, **arguments)
    if (theirs := card_of(start).name) != card.name:
        raise errors.BadArgument(
            f"--start {start} is a {theirs}, and {name} is to be trained; name that one, or weights of {name} (zoo "
            f"info {name} lists them)"
        )
    return zoo.load(start, **arguments).float()


def measuring(*, share: float = 0.1, of: str = "folder") -> Decorator:
    """``--held-out``, ``--validation`` and ``--score-every``: what is not trained on, but measured; see
    :func:`held_out_share`. share: the default; of: what ``--validation`` takes, "folder", "file" or "path"."""
    place = click.Path(exists=True, file_okay=of != "folder", dir_okay=of != "file", path_type=Path)
    kind = click.FloatRange(0, 1, max_open=True)
    options = [
        click.option("--held-out", type=kind, help=f"Share that is measured, and not trained on (default: {share:g})."),
        click.option("--validation", type=place, help="Data of the same form to measure on instead."),
        click.option(
            "--score-every", type=click.IntRange(min=1), help="Steps between scores (default: a tenth of all)."
        ),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda done, option: option(done), reversed(options), command)

    return add


def held_out_share(held_out: float | None, validation: object, default: float = 0.1) -> float:
    """The share to hold out of the data: none where there are others to measure on. Raises UsageError for both."""
    if held_out is not None and validation:
        raise click.UsageError("--held-out and --validation: give one, a share of the data or other data")
    return 0.0 if validation else default if held_out is None else held_out


def loop(*, steps: int, rate: float, weight_decay: float = 0.05) -> Decorator:
    """The options of :class:`zoo.training.Settings`, for :func:`settings`; the arguments are their defaults."""
    from_zero = click.FloatRange(min=0)
    shown: dict[str, Any] = {"show_default": True}
    options = [
        _STEPS(steps),
        _RATE(rate, "Learning rate of AdamW, which falls along half a cosine."),
        click.option("--weight-decay", default=weight_decay, type=from_zero, **shown),
        click.option("--warmup", type=click.IntRange(min=0), help="Steps of a rising rate (default: a twentieth)."),
        click.option("--clip", default=1.0, type=from_zero, help="Largest norm of the gradient; 0: any.", **shown),
        click.option(
            "--average",
            default=0.0,
            type=click.FloatRange(0, 1, max_open=True),
            help="Keep the moving average of the weights, with this decay.",
            **shown,
        ),
        click.option(
            "--accumulate",
            default=1,
            type=click.IntRange(min=1),
            help="Batches whose gradients make up one step.",
            **shown,
        ),
        click.option("--precision", default="float32", type=click.Choice(["float32", "bfloat16"]), **shown),
        click.option("--recompute", is_flag=True, help="Compute activations twice instead of keeping them in memory."),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda done, option: option(done), reversed(options), command)

    return add


def settings(options: Mapping[str, Any], seed: int) -> Settings:
    """:class:`zoo.training.Settings` of what :func:`loop` gave a command."""
    from zoo.training import Settings

    return Settings(**options, seed=seed)


@contextlib.contextmanager
def processes(device: str) -> Iterator[Place]:
    """:func:`zoo.training.processes`: this process alone, or one of those that torchrun started. What comes after the
    block is the first one's to do; the others end with it."""
    from zoo.training import processes

    with processes(device) as place:
        yield place
    if not place.first:
        raise click.exceptions.Exit(0)


def measured(found: Mapping[str, float], *, dataset: str, split: str, command: str) -> list[dict[str, Any]]:
    """Figures as ``zoo.save(metrics=)`` takes them; ``command``: who measured. ``dataset``: the name of a file or
    folder, which "." does not have."""
    facts = {"dataset": dataset or ".", "split": split, "source": f"measured by zoo {command}"}
    return [{"name": name, "value": value} | facts for name, value in found.items()]


def said(found: Mapping[str, float]) -> str:
    """Figures in a line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def source(folder: Path) -> str:
    """A folder as commands and ``zoo.load`` take it, for the command that a message proposes."""
    text = str(folder) if folder.is_absolute() or str(folder).startswith((".", "~")) else f"./{folder}"
    return shlex.quote(text)


def reporter(steps: int, *, quiet: bool = False) -> Callable[[int, float], None]:
    """``report(step, loss)`` with steps from 0: prints the mean loss of every twentieth of ``steps``."""
    every = max(steps // 20, 1)
    recent: list[float] = []

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if (step + 1) % every == 0:
            if not quiet:
                click.echo(f"step {step + 1} loss {sum(recent) / len(recent):.4f}")
            recent.clear()

    return report
