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

Commands on the shared loop of :mod:`zoo.training` take all of these at once, as one argument, and train in several
processes as well::

    @click.command()
    @training.out
    @click.option("--size", ...)             # the command's own
    @training.planned(steps=2000, rate=1e-3, batch_size=16, of="Pictures.", example="in_chans=1")
    def train_pictures(name, folder, size, plan: training.Plan):
        with training.processes(plan.device) as place, plan.run(pictures=len(train)) as run:
            model = training.begun(name, plan.start, plan.seed, **plan.arguments).to(place.device)
            fit(model, batch, loss, plan.settings, run=run, report=plan.report(), score=score,
                score_every=plan.score_every)
            if place.first:
                zoo.save(model.cpu(), plan.out)
"""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo_registry import errors

if TYPE_CHECKING:
    from torch import nn

    from zoo.runs import Run
    from zoo.training import Place, Settings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*options: Decorator) -> Decorator:
    """Several options as one, in this order."""
    return lambda command: functools.reduce(lambda done, option: option(done), reversed(options), command)


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


_STEPS, _RATE, _BATCH_SIZE = steps, rate, batch_size  # under names that arguments do not hide

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


def _measuring(share: float, of: str) -> Decorator:
    """``--held-out`` and ``--validation``: what is not trained on, but measured."""
    place = click.Path(exists=True, file_okay=of != "folder", dir_okay=of != "file", path_type=Path)
    kind = click.FloatRange(0, 1, max_open=True)
    options = [
        click.option("--held-out", type=kind, help=f"Share that is measured, and not trained on (default: {share:g})."),
        click.option("--validation", type=place, help="Data of the same form to measure on instead."),
    ]

    return together(*options)


#: ``--score-every``
score_every = click.option("--score-every", type=click.IntRange(min=1), help="Steps between scores (default: a tenth).")


def _share(held_out: float | None, validation: object, default: float) -> float:
    """The share to hold out of the data: none where there are others to measure on. Raises UsageError for both."""
    if held_out is not None and validation:
        raise click.UsageError("--held-out and --validation: give one, a share of the data or other data")
    return 0.0 if validation else default if held_out is None else held_out


def _loop(steps: int, rate: float, weight_decay: float) -> Decorator:
    """The options of :class:`zoo.training.Settings`; the arguments are their defaults."""
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

    return together(*options)


@dataclass(frozen=True)
class Plan:
    """What :func:`planned` read from the command line.

    share: of the data to hold out, 0 where there is a ``validation`` set (None, a path, or as the command takes it).
    start: weights to begin with. arguments: of the model, as --set says. settings: of the loop. score_every: steps
    between scores (None: ten times in all).
    """

    out: Path
    share: float
    validation: Any
    start: str | None
    arguments: dict[str, Any]
    settings: Settings
    batch_size: int
    score_every: int | None
    seed: int
    device: str
    resume: bool
    as_json: bool

    def run(self, **facts: Any) -> contextlib.AbstractContextManager[Run]:
        """:func:`run` of this training; ``facts``: what else it depends on."""
        return run(self.out, self.resume, quiet=self.as_json, **facts)

    def report(self) -> Callable[[int, float], None]:
        """:func:`reporter` of this training."""
        return reporter(self.settings.steps, quiet=self.as_json)


def planned(
    *,
    steps: int,
    rate: float,
    batch_size: int,
    of: str,
    weight_decay: float = 0.05,
    least: int = 1,
    share: float | None = 0.1,
    validation: str = "folder",
    example: str | None = None,
) -> Decorator:
    """The options of a command on the shared loop, given to it as ``plan``, a :class:`Plan`; ``--out`` stands apart, in
    front of the command's own.

    steps, rate, weight_decay, batch_size: defaults. of: what a batch holds ("Pictures."), ``least`` or more. share: the
    default of what is held out; None leaves that, and ``validation``, to the command. validation: what --validation
    takes, "folder", "file" or "path". example: of --set.
    """
    from . import output

    parts = [*([] if share is None else [_measuring(share, validation)]), score_every, start]
    parts += [_loop(steps, rate, weight_decay), _BATCH_SIZE(batch_size, of, least=least)]
    parts += [run_options(example), resume, output.as_json]
    own = ("out", "start", "batch_size", "score_every", "seed", "device", "resume", "as_json")
    of_loop = ("steps", "rate", "weight_decay", "warmup", "clip", "average", "accumulate", "precision", "recompute")

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_plan(**given: Any) -> Any:
            from zoo.training import Settings

            settings = Settings(**{name: given.pop(name) for name in of_loop}, seed=given["seed"])
            others = None if share is None else given.pop("validation")
            plan = Plan(
                **{name: given.pop(name) for name in own},
                share=0.0 if share is None else _share(given.pop("held_out"), others, share),
                validation=others,
                arguments=output.pairs(given.pop("choices"), "--set"),
                settings=settings,
            )
            return command(**given, plan=plan)

        return together(*parts)(with_plan)

    return add


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
