"""``zoo train-points``: a classifier of clouds, or a model that labels points, on the user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training
from zoo_registry import errors

if TYPE_CHECKING:
    from torch import Tensor, nn

AXES = ("x", "y", "z")
#: What is trained where no weights of the model say how its clouds are prepared.
SETTINGS = {"points": 1024, "normalize": "unit_sphere"}
#: Of the clouds, held out.
SHARE = 0.2


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@training.out_folder(file_okay=False)
@click.option("--points", type=click.IntRange(min=1), help="Points of each sample (default: the model's).")
@click.option("--voxel", type=click.FloatRange(min=0, min_open=True), help="Scenes, thinned to a point a cube so wide.")
@click.option("--features", help="What PCM reads at a point, of xyz,normal,color,height; none: the points alone.")
@click.option("--up", type=click.Choice(AXES), help="The axis that points upwards (default: the model's).")
@click.option(
    "--label-names", type=click.Path(exists=True, dir_okay=False), help="Names of labels 0, 1, 2, one a line."
)
@click.option("--ignore", multiple=True, type=int, help="A label of points to leave out (default: -1).")
@click.option("--scale", nargs=2, type=float, help="Least and most stretch (default: 0.667 1.5; scenes: 0.9 1.1).")
@click.option("--shift", type=click.FloatRange(min=0), help="Largest shift (default: 0.2; scenes: 0).")
@click.option("--turn", type=click.Choice(["none", "up", "any"]), help="Axis of turns (default: none; scenes: up).")
@click.option("--jitter", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Noise of coordinates.")
@click.option("--smoothing", default=0.2, show_default=True, type=click.FloatRange(0, 1, max_open=True))
@click.option("--invalid", default="error", show_default=True, type=click.Choice(["error", "drop"]))
@training.planned(steps=10_000, rate=5e-4, batch_size=32, of="Clouds.", least=2, share=SHARE, example="embed_dim=96")
def train_points(
    name: str,
    folder: Path,
    points: int | None,
    voxel: float | None,
    features: str | None,
    up: str | None,
    label_names: str | None,
    ignore: tuple[int, ...],
    scale: tuple[float, float] | None,
    shift: float | None,
    turn: str | None,
    jitter: float,
    smoothing: float,
    invalid: str,
    plan: training.Plan,
) -> None:
    """Train NAME on the labelled clouds of FOLDER.

    Of a classifier FOLDER holds a sub-folder for each class; otherwise clouds with a label for every point, objects in
    a sub-folder for each kind. The best weights on the held-out clouds are saved with the names of the classes.

    \b
        zoo train-points pointmamba_modelnet parts/ --out tuned --start ./pretrained --device cuda
        zoo train-points pcm_s3dis tiles/ --out ground --voxel 0.5 --features height --ignore 0 --ignore 1
    """
    import zoo
    from zoo.building import trained
    from zoo.files import read_text
    from zoo.training import Shuffled, fit

    from .datasets import Reading, read_classes, read_points
    from .pcm import PCM, PCMSegmentation
    from .pipelines import kinds_of, least_points, shapes_of
    from .pointmamba import PointMamba, PointMambaSegmentation
    from .training import Moves, cross_entropy

    arguments = _taken(name, plan.start) | (own := plan.arguments)
    if "num_classes" in own or "shapes" in own:
        raise click.UsageError("--set num_classes and shapes: they follow from the data; leave them out")
    shape: Any = zoo.create(name, device="meta", **arguments)
    if not isinstance(shape, (PCM, PointMamba, PCMSegmentation, PointMambaSegmentation)):
        raise click.UsageError(f"{name} is a {type(shape).__name__}; expected a model of PCM or PointMamba")
    classifies = isinstance(shape, (PCM, PointMamba))
    if voxel is not None and not isinstance(shape, PCMSegmentation):
        raise click.UsageError(f"--voxel is for scenes, and {name} takes objects; expected a PCM that labels points")
    if classifies and (label_names is not None or ignore):
        raise click.UsageError(
            f"--label-names and --ignore are for labels of points; {name} takes a folder for each class"
        )
    settings = _settings(name, plan.start, points, voxel, features, up)
    if isinstance(shape, (PCM, PCMSegmentation)):
        channels = _channels(settings) + 3 * shape.encoder.combine_pos
        if arguments.setdefault("in_chans", channels) != channels:
            read = ", ".join(settings.get("features", ())) or "x, y, z"
            raise click.UsageError(
                f"a point has {channels} numbers ({read}), and the model takes {arguments['in_chans']}: --features "
                "chooses them"
            )
    scene = bool(settings.get("voxel"))
    if scene and points is None:
        points = shape.test_crop or 24_576
    if plan.start is not None and not classifies and shapes_of(shape) and not _is_pretrained(plan.start):
        settings["kinds"] = kinds_of(settings)  # the weights know these, in this order
    if (size := points or int(settings["points"])) < least_points(shape):
        raise click.UsageError(f"{size} points are asked for; {name} needs at least {least_points(shape)}")
    moves = Moves(
        scale or ((0.9, 1.1) if scene else (2 / 3, 3 / 2)),
        shift if shift is not None else 0.0 if scene else 0.2,
        turn or ("up" if scene else "none"),
        jitter,
        int(settings.get("gravity", 2)),
    )
    reading = Reading(
        plan.share, plan.validation, plan.seed, invalid, least_points(shape), not plan.as_json and sys.stderr.isatty()
    )
    if classifies:
        data = read_classes(folder, settings, points, moves, reading)
    else:
        names = None if label_names is None else read_text(label_names).splitlines()
        data = read_points(
            folder, settings, points, moves, reading,
            shapes=shapes_of(shape) > 0, ignored=ignore or (-1,), names=names,
        )  # fmt: skip
    arguments["num_classes"] = len(data.names)
    if not classifies and shapes_of(shape):
        arguments["shapes"] = len(data.kinds)
    if scene:
        arguments["test_crop"] = points  # scenes are cut as they were trained on
    order = Shuffled(len(data.train), plan.batch_size, plan.seed)

    def batch(index: int) -> dict[str, Tensor]:
        return data.train(order(index), order.random(index))

    def score(model: nn.Module) -> float:
        return data.scores(model)["OA" if classifies else "mIoU" if scene else "instance mIoU"]

    with (
        training.processes(plan.device) as place,
        plan.run(clouds=len(data.train), rest=len(data.rest), classes=data.names) as run,
    ):
        model = _begun(name, plan.start, plan.seed, arguments)
        trained(model, folder.name, data.settings, data.names)
        found = fit(
            model.to(place.device), batch, cross_entropy(smoothing), plan.settings, run=run,
            report=plan.report(), score=score if data.rest else None,
            score_every=plan.score_every,
        )  # fmt: skip
        figures = data.scores(model)
        if place.first:
            measured = training.measured(
                figures, dataset=(plan.validation or folder).name, split="held out", command="train-points"
            )
            zoo.save(model.cpu(), plan.out, labels=data.names, metrics=measured)
    if plan.as_json:
        output.emit(
            {"figures": figures, "taken_at": found.taken_at, "steps": plan.settings.steps, "loss": found.losses[-1]}
            | {"clouds": len(data.train), "held_out": len(data.rest), "classes": data.names, "folder": str(plan.out)}
        )
        return
    if figures:
        click.echo(f"{len(data.rest)} held-out clouds: {training.said(figures)} (weights of step {found.taken_at})")
    then = "predict {} CLOUD" if classifies else "label-points {} CLOUD --out labelled"
    click.echo(f"saved to {plan.out}; try: zoo {then.format(training.source(plan.out))}")


def _settings(
    name: str,
    start: str | None,
    points: int | None,
    voxel: float | None,
    features: str | None,
    up: str | None,
) -> dict[str, Any]:
    """How clouds are prepared: as for the weights to begin with, or the published ones, and what the user changed."""
    from zoo.loading import locate

    from .training import FEATURES

    card = locate(name).card
    weights = locate(start).weights if start is not None and not _is_pretrained(start) else card.default_weights
    found: dict[str, Any] = dict(weights.preprocess if weights is not None else {}) or dict(SETTINGS)
    if voxel is not None:
        if not found.get("voxel"):
            found = {k: v for k, v in found.items() if k != "points"} | {"normalize": "floor"}
        found["voxel"] = voxel
    if points is not None and not found.get("voxel"):
        found["points"] = points
    if up is not None:
        found["gravity"] = AXES.index(up)
    if features is not None:
        if card.system != "pcm":
            raise click.UsageError(f"--features is for models of PCM; {name} reads the points alone")
        given = [] if features == "none" else [word.strip() for word in features.split(",")]
        if unknown := [word for word in given if word not in FEATURES]:
            raise click.UsageError(f"--features has {unknown[0]!r}; expected some of {', '.join(FEATURES)}, or none")
        found["features"] = given
    return found


def _channels(settings: dict[str, Any]) -> int:
    from .training import FEATURES

    return sum(FEATURES[name] for name in settings.get("features", ())) or FEATURES["xyz"]


def _is_pretrained(start: str) -> bool:
    """Whether ``start`` names a masked autoencoder, whose trunk is taken."""
    from zoo.loading import card_of

    return card_of(start).task == "point-cloud-pretraining"


def _taken(name: str, start: str | None) -> dict[str, Any]:
    """The model arguments that the weights to begin with decide: all of a model of its own, of a masked autoencoder
    those that its trunk fits. Raises BadArgument where NAME has no such trunk."""
    from zoo.loading import card_of, locate

    if start is None:
        return {}
    if not _is_pretrained(start):  # another model's are refused when they are loaded
        given = locate(start)
        return dict(given.config) if given.card.name == card_of(name).name else {}
    if card_of(name).system != "pointmamba":
        raise errors.BadArgument(f"--start {start} is a PointMamba, and {name} is to be trained; name a pointmamba_*")
    return {k: v for k, v in locate(start).config.items() if k in ("embed_dim", "depth", "rms_norm")}


def _begun(name: str, start: str | None, seed: int, arguments: dict[str, Any]) -> nn.Module:
    """The model to train, from random weights, weights of its own or a masked autoencoder's trunk."""
    import zoo

    from .pretraining import start_from

    if start is None or not _is_pretrained(start):
        return training.begun(name, start, seed, **arguments)
    model: Any = training.begun(name, None, seed, **arguments)
    pretrained: Any = zoo.load(start).float()
    try:
        start_from(model, pretrained)
    except ValueError as error:
        raise errors.BadArgument(f"--start {start}: {error}") from error
    model.zoo_info.weights = pretrained.zoo_info.weights  # whose licence goes on
    return model
