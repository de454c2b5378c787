"""The vision plugin's commands that train: classifiers, segmentors and detectors."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training

if TYPE_CHECKING:
    from torch import nn

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

_CHANGING = training.together(
    click.option("--flip/--no-flip", default=True, show_default=True, help="Show half of them from right to left."),
    click.option(
        "--jitter",
        default=0.2,
        show_default=True,
        type=click.FloatRange(0, 1),
        help="Brightness, contrast and saturation change by up to so much.",
    ),
)


def _with(arguments: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """A model's ``arguments``, and those of --set, which cannot be the same."""
    if both := sorted(set(arguments) & set(chosen)):
        raise click.UsageError(f"--set {both[0]}: it is {arguments[both[0]]} already, from the data or another option")
    return arguments | chosen


def _finished(
    model: nn.Module,
    out: Path,
    labels: list[str],
    found: Mapping[str, float | None],
    facts: Mapping[str, Any],
    *,
    data: Path,
    measured_on: Path | None,
    command: str,
    next_command: str,
    example: str | Path,
    as_json: bool,
) -> None:
    """Save the model with its figures, and say what there is. ``measured_on`` None: a part of ``data``."""
    import zoo

    figures = {name: value for name, value in found.items() if value is not None}
    source = measured_on or data
    metrics = training.measured(
        figures, dataset=source.name, split="validation" if measured_on else "held out", command=command
    )
    zoo.save(model.cpu(), out, labels=labels, metrics=metrics)
    if as_json:
        output.emit(dict(facts) | {"metrics": figures, "folder": str(out)})
        return
    if figures:
        click.echo(f"{facts['measured']} pictures that were not trained on: {training.said(figures)}")
    click.echo(f"saved to {out}; try: zoo {next_command} {training.source(out)} {shlex.quote(str(example))}")


@click.command()
@click.argument("name")
@click.argument("folder", type=_FOLDER)
@training.out
@click.option("--size", type=click.IntRange(min=1), help="Pixels a side (default: as the weights, or the model's own).")
@click.option(
    "--crop",
    "least",
    default=0.35,
    show_default=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Least share of a picture that is shown at a time.",
)
@_CHANGING
@click.option(
    "--mixup", default=0.0, show_default=True, type=click.FloatRange(0), help="Blend pictures, as beta(A, A)."
)
@click.option("--smoothing", default=0.1, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--freeze", "frozen", is_flag=True, help="Train the last layer alone.")
@training.planned(steps=1000, rate=5e-4, batch_size=32, of="Pictures.", example="in_chans=1")
def train_classifier(
    name: str,
    folder: Path,
    size: int | None,
    least: float,
    flip: bool,
    jitter: float,
    mixup: float,
    smoothing: float,
    frozen: bool,
    plan: training.Plan,
) -> None:
    """Train the classifier NAME on FOLDER, pictures in a sub-folder for each class.

    A part of each class is held out and measured as `zoo validate` measures; the weights of the best measure are kept.
    A run that was interrupted goes on when the same command is given again.

    \b
        zoo train-classifier vim_tiny flowers/ --out flowers_vim --start vim_tiny.in1k --steps 2000
        zoo train-classifier vmamba_micro scans/ --out scans_vmamba --no-flip --set in_chans=1
    """
    from zoo.building import trained
    from zoo.catalog import accepts
    from zoo.training import fit
    from zoo.training import held_out as apart

    from .pipelines import ImageClassification
    from .training import classify
    from .training.common import check_files
    from .validation import accuracies

    command = "train-classifier"
    training.check_task(name, "image-classification")
    if frozen and plan.start is None:
        raise click.UsageError("--freeze trains the last layer on what the others know: give their weights as --start")
    classes = classify.classes_in(folder)
    arguments: dict[str, Any] = {"num_classes": len(classes)}
    if size is not None and accepts(name, "img_size"):
        arguments["img_size"] = size
    model = training.begun(name, plan.start, plan.seed, **_with(arguments, plan.arguments))
    settings = ImageClassification(model).settings
    if size is not None:
        settings["input_size"] = (settings["input_size"][0], size, size)
    trained(model, folder.name, settings | {"upright": True}, classes)
    pipe = ImageClassification(model)
    every = classify.labelled(folder, classes, pipe.in_chans)
    kept, held = apart([label for _, label in every.samples], plan.share, plan.seed)
    train = every.part(kept)
    test = every.part(held) if plan.validation is None else classify.labelled(plan.validation, classes, pipe.in_chans)
    check_files(Path(file) for file, _ in train.samples + test.samples)
    if frozen:
        classify.freeze(model)
    said = f"{len(train)} pictures of {len(classes)} classes to train on, {len(test)} to measure on"

    def measure(model: nn.Module) -> dict[str, float | None]:
        return accuracies(ImageClassification(model), test, batch_size=plan.batch_size) if len(test) else {}

    with (
        training.processes(plan.device) as place,
        plan.run(pictures=len(train), measured=len(test), classes=classes) as run,
    ):
        if not plan.as_json:
            click.echo(said)
        batches = classify.Batches(
            train, pipe, len(classes), batch_size=plan.batch_size, seed=plan.seed, least=least, flip=flip,
            jitter=jitter, mixup=mixup,
        )  # fmt: skip
        fitted = fit(
            model.to(place.device), batches, classify.Loss(smoothing, frozen), plan.settings, run=run,
            report=plan.report(),
            score=(lambda m: measure(m)["top1"] or 0.0) if len(test) else None,
            score_every=plan.score_every,
        )  # fmt: skip
        if place.first:
            facts = {"classes": classes, "pictures": len(train), "measured": len(test), "taken_at": fitted.taken_at}
            _finished(
                model, plan.out, classes, measure(model), facts, data=folder, measured_on=plan.validation,
                command=command, next_command="classify", example=(test.samples or train.samples)[0][0],
                as_json=plan.as_json,
            )  # fmt: skip


def _scales(ctx: click.Context, parameter: click.Parameter, value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] < float("inf"):
        raise click.BadParameter(
            f"{value[0]} {value[1]}; expected two numbers above 0, the smaller first", ctx, parameter
        )
    return value


def _scale(least: float, most: float) -> Callable[..., Any]:
    return click.option(
        "--scale",
        default=(least, most),
        show_default=True,
        nargs=2,
        type=float,
        callback=_scales,
        help="Least and largest enlargement of a picture.",
    )


@click.command()
@click.argument("name")
@click.argument("folder", type=_FOLDER)
@training.out
@click.option("--maps", type=_FOLDER, help="Folder of the label maps; FOLDER is then that of the pictures.")
@click.option(
    "--names",
    "names_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Names of the classes, one a line (default: FOLDER/labels.txt, else the values in the label maps).",
)
@click.option("--ignore", multiple=True, type=int, default=(255,), show_default=True, help="A value that is no class.")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    help="Pixels of crops, and of the shorter side (default: as the weights, or 512).",
)
@_scale(0.5, 2.0)
@_CHANGING
@training.planned(steps=4000, rate=2e-4, batch_size=8, of="Pictures.", least=2, example="backbone=a2mamba_tiny")
def train_segmenter(
    name: str,
    folder: Path,
    maps: Path | None,
    names_file: Path | None,
    ignore: tuple[int, ...],
    size: int | None,
    scale: tuple[float, float],
    flip: bool,
    jitter: float,
    plan: training.Plan,
) -> None:
    """Train the segmentor NAME on FOLDER: pictures in FOLDER/images, and in FOLDER/labels a PNG of the same name for
    each, with the number of the class at every pixel.

    --start names weights of NAME, or of a classifier for its backbone. A part is held out and measured as zoo validate
    measures (mIoU); the weights of the best measure are kept. An interrupted run goes on when the same command is given
    again.

    \b
        zoo train-segmenter upernet fields/ --out fields_upernet --start vmamba_tiny.in1k
        zoo train-segmenter upernet streets/ --out streets --set backbone=efficientvim_m1 --ignore 0 --ignore 255
    """
    from zoo.building import trained
    from zoo.training import fit
    from zoo.training import held_out as apart

    from .labelled_scenes import check_sizes, confusion, pairs, read_names, scores
    from .pipelines import transform_settings
    from .scenes import SemanticSegmentation
    from .training import segment
    from .training.common import begun_on, preprocess_of

    command = "train-segmenter"
    training.check_task(name, "semantic-segmentation")
    if names_file is None and (folder / "labels.txt").is_file():
        names_file = folder / "labels.txt"
    every = pairs(folder, maps)
    other = [] if plan.validation is None else pairs(plan.validation)
    values, names = segment.classes_of(
        check_sizes(every), None if names_file is None else read_names(names_file), ignore
    )
    for pair in other:
        values.read(pair.labels)
    check_sizes(other)
    model = begun_on(name, plan.start, plan.seed, **_with({"num_classes": len(names)}, plan.arguments))
    before = preprocess_of(model)
    settings: dict[str, Any] = {k: v for k, v in transform_settings(model, before).items() if k in ("mean", "std")}
    short_side = size or before.get("short_side", 512)
    settings |= {"short_side": short_side, "long_side": 4 * short_side}
    known = {"label_values": values.classes, "ignored_values": values.ignored}
    trained(model, folder.name, settings | known, names)
    pipe = SemanticSegmentation(model)
    kept, held = apart([0] * len(every), plan.share, plan.seed)
    train = [every[i] for i in kept]
    test = [every[i] for i in held] if plan.validation is None else other

    def measure(model: nn.Module) -> dict[str, float | None]:
        return scores(confusion(SemanticSegmentation(model), test, values), names)[0] if test else {}

    with (
        training.processes(plan.device) as place,
        plan.run(pictures=len(train), measured=len(test), classes=names) as run,
    ):
        if not plan.as_json:
            click.echo(f"{len(train)} pictures of {len(names)} classes to train on, {len(test)} to measure on")
        batches = segment.Batches(
            train, values, pipe, batch_size=plan.batch_size, seed=plan.seed, scales=scale, flip=flip, jitter=jitter
        )
        fitted = fit(
            model.to(place.device), batches, segment.loss, plan.settings, run=run,
            report=plan.report(),
            score=(lambda m: measure(m)["mIoU"] or 0.0) if test else None,
            score_every=plan.score_every,
        )  # fmt: skip
        if place.first:
            facts = {"classes": names, "pictures": len(train), "measured": len(test), "taken_at": fitted.taken_at}
            _finished(
                model, plan.out, names, measure(model), facts, data=folder, measured_on=plan.validation,
                command=command, next_command="segment-images --out classes", example=(test or train)[0].picture,
                as_json=plan.as_json,
            )  # fmt: skip


@click.command()
@click.argument("name")
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@training.out
@click.option("--images", type=_FOLDER, help="Folder of the pictures (default: that of DATA).")
@click.option(
    "--size", type=click.IntRange(min=32), help="Pixels of the shorter side (default: as the weights, or 800)."
)
@_scale(0.75, 1.25)
@_CHANGING
@click.option("--boxes", is_flag=True, help="Learn boxes alone, also where there are masks.")
@training.planned(
    steps=4000, rate=1e-4, batch_size=4, of="Pictures.", validation="path", example="backbone=a2mamba_tiny"
)
def train_detector(
    name: str,
    data: Path,
    images: Path | None,
    size: int | None,
    scale: tuple[float, float],
    flip: bool,
    jitter: float,
    boxes: bool,
    plan: training.Plan,
) -> None:
    """Train the detector NAME on DATA, a .json of COCO's format, or a folder with one and its pictures.

    --start names weights of NAME, or of a classifier for its backbone. A part of the pictures is held out and measured
    as zoo validate measures (COCO's AP of boxes decides); the weights of the best measure are kept. An interrupted run
    goes on when the same command is given again.

    \b
        zoo train-detector mask_rcnn bees.json --images photos --out bees_mask_rcnn --start vmamba_tiny.in1k
        zoo train-detector retinanet bees/ --out bees_retinanet --set backbone=efficientvim_m1
    """
    from zoo.building import trained
    from zoo.training import fit
    from zoo.training import held_out as apart

    from .coco import pycocotools
    from .objects import ObjectDetection
    from .pipelines import transform_settings
    from .training import detect
    from .training.common import preprocess_of
    from .validation import precisions

    command = "train-detector"
    training.check_task(name, "object-detection")
    pycocotools("cocoeval")  # or say what lacks, before hours of work
    path, folder = detect.annotations_of(data, images)
    every = detect.Annotations(path, folder)
    source = every
    if plan.validation is not None:
        path, folder = detect.annotations_of(plan.validation, images)
        source = detect.Annotations(path, folder, every.names)
    masks = not boxes and every.has_masks()
    model = detect.begun_detector(
        name, plan.start, plan.seed, boxes=not masks, **_with({"num_classes": len(every.names)}, plan.arguments)
    )
    before, masks = preprocess_of(model), masks and bool(model.has_masks)
    settings: dict[str, Any] = {k: v for k, v in transform_settings(model, before).items() if k in ("mean", "std")}
    short_side = size or before.get("short_side", 800)
    settings |= {"short_side": short_side, "long_side": short_side * 1333 // 800}
    trained(model, data.name, settings, every.names)
    pipe = ObjectDetection(model)
    kept, held = apart([0] * len(every.pictures), plan.share, plan.seed)
    train = [every.pictures[i] for i in kept]
    test = source.pictures if plan.validation is not None else [every.pictures[i] for i in held]
    ids = {index: category for category, index in source.classes.items()}
    measure_masks = masks and source.has_masks()

    def measure(model: nn.Module) -> dict[str, float | None]:
        if not test:
            return {}
        own = ObjectDetection(model, min_score=0.0)
        return precisions(own, source.table, [p.entry for p in test], folder, ids, masks=measure_masks)

    with (
        training.processes(plan.device) as place,
        plan.run(pictures=len(train), measured=len(test), classes=every.names) as run,
    ):
        if not plan.as_json:
            objects = sum(len(p.labels) for p in train)
            click.echo(
                f"{len(train)} pictures with {objects} objects of {len(every.names)} classes to train on, {len(test)} "
                f"to measure on" + (f"; {every.left_out} crowds and empty boxes left out" if every.left_out else "")
            )
        batches = detect.Batches(
            train, pipe, masks=masks, batch_size=plan.batch_size, seed=plan.seed, scales=scale, flip=flip, jitter=jitter
        )
        fitted = fit(
            model.to(place.device), batches, detect.loss, plan.settings, run=run,
            report=plan.report(),
            score=(lambda m: measure(m)["box AP"] or 0.0) if test else None,
            score_every=plan.score_every,
        )  # fmt: skip
        if place.first:
            facts = {"classes": every.names, "pictures": len(train), "measured": len(test), "masks": masks}
            _finished(
                model, plan.out, every.names, measure(model), facts | {"taken_at": fitted.taken_at}, data=data,
                measured_on=plan.validation, command=command, next_command="detect",
                example=(test or train)[0].file, as_json=plan.as_json,
            )  # fmt: skip
