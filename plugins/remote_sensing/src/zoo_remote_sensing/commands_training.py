"""``zoo train-change`` and ``zoo train-pixels``: change detectors and classifiers of pixels on the user's own data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training

from .commands import CHANGE_TASKS, numbers

if TYPE_CHECKING:
    from torch import nn

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
#: Of the pairs, held out.
SHARE = 0.2
#: The figure that the kept weights have the best of, by kind of model.
BEST = {"binary": "F1", "semantic": "SeK", "damage": "F1"}


@click.command()
@click.argument("name")
@click.argument("folder", type=FOLDER)
@training.out_folder(file_okay=False)
@click.option("--crop", default=256, show_default=True, type=click.IntRange(min=32), help="Pixels a side.")
@click.option("--bands", help="Bands that the model reads, as 3,2,1; the first three otherwise.")
@click.option("--value-range", nargs=2, type=float, help="The values that become black and white, where not uint8.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False), help="Names of the classes, one a line.")
@training.planned(
    steps=20_000,
    rate=1e-4,
    weight_decay=5e-4,
    batch_size=16,
    of="Crops.",
    least=2,
    share=SHARE,
    example="decoder_dim=64",
)
def train_change(
    name: str,
    folder: Path,
    crop: int,
    bands: str | None,
    value_range: tuple[float, float] | None,
    labels: str | None,
    plan: training.Plan,
) -> None:
    """Train NAME on the labelled pairs of FOLDER, laid out as `zoo validate NAME` says.

    The best weights on the held-out pairs are saved, with the bands, the values' range and the names of the classes.

    \b
        zoo train-change changemamba_bcd_tiny LEVIR-CD/train --validation LEVIR-CD/val --out levir --device cuda
        zoo train-change changemamba_scd_tiny pairs/ --out cover --labels cover.txt --bands 3,2,1 --value-range 0 3000
    """
    import zoo
    from zoo.building import trained
    from zoo.training import Shuffled, fit
    from zoo_registry import errors

    from .labelled import labelled_pairs
    from .metrics import require_torchmetrics
    from .pipelines import ChangeDetection
    from .training import Crops, begun, check_samples, loss_of
    from .validation import SCORES, known

    task = training.check_task(name, *CHANGE_TASKS)
    require_torchmetrics()
    arguments = plan.arguments
    chosen_bands = None if bands is None else numbers(bands)
    if chosen_bands is not None:
        arguments.setdefault("in_chans", len(chosen_bands))
    if (names := _names(labels)) is not None:
        if task != "semantic-change-detection":
            raise click.UsageError(f"--labels names land cover, and {name} is for {task}; leave it out")
        arguments.setdefault("semantic_classes", len(names))
    model: Any = begun(name, plan.start, plan.seed, **arguments)
    pipe = ChangeDetection(model, bands=chosen_bands, value_range=value_range, class_names=names)
    settings = {"mean": pipe.mean.flatten().tolist(), "std": pipe.std.flatten().tolist()}
    settings |= {k: list(pipe.reading[k]) for k in ("bands", "value_range") if pipe.reading[k] is not None}
    class_names = pipe.layers.get("after", pipe.layers["changed"])
    pairs = labelled_pairs(folder, pipe.kind)
    try:
        kept, others = zoo.training.held_out([0] * len(pairs), plan.share, plan.seed)
    except ValueError as error:
        raise errors.BadArgument(f"{folder}: {error}, or another folder to measure on (--validation)") from error
    train, rest = [pairs[i] for i in kept], [pairs[i] for i in others]
    rest = rest if plan.validation is None else labelled_pairs(plan.validation, pipe.kind)
    bar = not plan.as_json and sys.stderr.isatty()
    check_samples(pipe, train, crop, progress=bar)
    check_samples(pipe, rest, 1, progress=bar)
    crops, order = Crops(pipe, train, crop), Shuffled(len(train), plan.batch_size, plan.seed)

    def scores(model: nn.Module) -> dict[str, float]:
        if not rest:
            return {}
        found = known(SCORES[pipe.kind](ChangeDetection(model, class_names=names), rest).compute())
        return {name: value for name, value in found.items() if value is not None}

    with (
        training.processes(plan.device) as place,
        plan.run(pairs=len(train), measured=len(rest)) as run,
    ):
        trained(model, folder.name, settings, class_names)
        found = fit(
            model.to(place.device), lambda index: crops(order(index), order.random(index)), loss_of(model),
            plan.settings, run=run, report=plan.report(),
            score=(lambda model: scores(model).get(BEST[pipe.kind], 0.0)) if rest else None,
            score_every=plan.score_every,
        )  # fmt: skip
        figures = scores(model)
        if place.first:
            measured = training.measured(
                figures, dataset=(plan.validation or folder).name, split="held out", command="train-change"
            )
            zoo.save(model.cpu(), plan.out, labels=class_names, metrics=measured)
    if plan.as_json:
        output.emit(
            {"figures": figures, "taken_at": found.taken_at, "steps": plan.settings.steps, "loss": found.losses[-1]}
            | {"pairs": len(train), "held_out": len(rest), "folder": str(plan.out)}
        )
        return
    if figures:
        click.echo(f"{len(rest)} held-out pairs: {training.said(figures)} (weights of step {found.taken_at})")
    click.echo(f"saved to {plan.out}; try: zoo change {training.source(plan.out)} BEFORE AFTER --picture change.png")


@click.command()
@click.argument("name")
@click.argument("data", type=FOLDER)
@training.out_folder(file_okay=False)
@click.option(
    "--held-out",
    default=0.75,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of each class's pixels that is not trained on, but measured.",
)
@click.option("--labels", type=click.Path(exists=True, dir_okay=False), help="Names of the classes, one a line.")
@training.planned(
    steps=1000, rate=1e-3, weight_decay=0.0, batch_size=256, of="Pixels.", least=2, share=None, example="bands=9"
)
def train_pixels(
    name: str,
    data: Path,
    held_out: float,
    labels: str | None,
    plan: training.Plan,
) -> None:
    """Train NAME on the labelled pixels of DATA, a folder with a hyperspectral cube and its labels.

    The best weights on the pixels that are held out are saved with the names of the classes.

    \b
        zoo train-pixels morpmamba_houston houston/ --out mine --held-out 0.9
        zoo map-pixels ./mine houston/scene.hdr --map classes.tif
    """
    import zoo
    from zoo.building import trained
    from zoo.training import Shuffled, fit
    from zoo_registry import errors

    from .hyperspectral import PixelClassification, cube_files, labelled_scene
    from .metrics import IGNORE, require_torchmetrics
    from .pixels import Pixels, pixel_loss

    training.check_task(name, "pixel-classification")
    require_torchmetrics()
    cube, truth = labelled_scene(data)
    found = truth[truth != IGNORE]
    count, names = (int(found.max()) + 1 if found.size else 0), _names(labels)
    if len(set(found.tolist())) < 2 or found.min() < 0:
        raise errors.BadArgument(
            f"the labels of {data} are {sorted(set((found + 1).tolist()))[:9]}; expected 0 for unlabelled pixels, and "
            "two classes or more, from 1 on"
        )
    if names is not None and len(names) < count:
        raise errors.BadArgument(f"{labels} has {len(names)} names, and {data} {count} classes; expected one for each")
    arguments = plan.arguments | {"num_classes": count if names is None else len(names)}
    model: Any = training.begun(name, plan.start, plan.seed, **arguments)
    names = PixelClassification(model, class_names=names).class_names
    pixels = Pixels(cube, truth, model.bands, model.window)
    try:
        kept, rest = zoo.training.held_out(pixels.classes.tolist(), held_out, plan.seed)
    except ValueError as error:
        raise errors.BadArgument(f"{data}: {error}") from error
    order = Shuffled(len(kept), plan.batch_size, plan.seed)
    with (
        training.processes(plan.device) as place,
        plan.run(pixels=len(kept), measured=len(rest)) as run,
    ):
        trained(model, data.name, {}, names)
        fitted = fit(
            model.to(place.device), lambda index: pixels([kept[i] for i in order(index)]), pixel_loss, plan.settings,
            run=run, report=plan.report(),
            score=lambda model: pixels.score(model, rest, names).compute()["OA"],
            score_every=plan.score_every,
        )  # fmt: skip
        figures = pixels.score(model, rest, names).compute()
        if place.first:
            measured = training.measured(figures, dataset=data.name, split="held out", command="train-pixels")
            zoo.save(model.cpu(), plan.out, labels=names, metrics=measured)
    if plan.as_json:
        output.emit(
            {"figures": figures, "taken_at": fitted.taken_at, "steps": plan.settings.steps, "loss": fitted.losses[-1]}
            | {"pixels": len(kept), "held_out": len(rest), "classes": names, "folder": str(plan.out)}
        )
        return
    click.echo(f"{len(rest)} held-out pixels: {training.said(figures)} (weights of step {fitted.taken_at})")
    cube_place = cube_files(data)[0]
    click.echo(f"saved to {plan.out}; try: zoo map-pixels {training.source(plan.out)} {cube_place} --map classes.png")


def _names(labels: str | None) -> list[str] | None:
    """The lines of the file that ``--labels`` names."""
    from zoo.files import read_text

    return None if labels is None else [line.strip() for line in read_text(labels).splitlines() if line.strip()]
