"""``zoo train-volumes``: a segmentation network on labelled scans or pictures of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import output, training

from .commands import grid_options

if TYPE_CHECKING:
    from torch import Tensor, nn


@click.command("train-volumes")
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@training.out
@grid_options
@click.option("--fit/--no-fit", default=None, help="Resize slices and pictures to the window of a 2D network.")
@click.option("--augment/--no-augment", default=True, show_default=True)
@click.option("--flips/--no-flips", default=None, help="Default: flips, unless labels are called left or right.")
@training.planned(
    steps=10_000,
    rate=5e-4,
    weight_decay=0.01,
    batch_size=2,
    of="Patches.",
    share=0.2,
    example="features=[16,32,64,128]",
)
def train_volumes(
    name: str,
    folder: Path,
    patch: list[int] | None,
    spacing: tuple[float, float, float] | None,
    normalisation: str | None,
    crop: bool | None,
    fit: bool | None,
    augment: bool,
    flips: bool | None,
    plan: training.Plan,
) -> None:
    """Train the segmentation network NAME on the labelled scans or pictures in FOLDER.

    FOLDER is laid out as nnU-Net's raw data (imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz, dataset.json) or as
    images/ and labels/ with equal names. Dice and cross-entropy, deeply supervised where the network can; the weights
    with the best mean Dice on held-out cases are kept. For research; not for clinical use.

    \b
        zoo train-volumes umamba_enc_3d Dataset001_Liver --patch 40,224,192 --out liver --device cuda
        zoo train-volumes vm_unet_isic lesions --out lesions_vm_unet
        zoo train-volumes mambamim_hybird Dataset002_BTCV --start ./pretrained --out btcv
    """
    import zoo
    from zoo import training as loop
    from zoo.building import trained

    from .cases import Patches, labelled
    from .pipelines import MedicalSegmentation
    from .plans import prepared, trainee_of
    from .validation import measure

    trainee = trainee_of(name, plan.start, plan.arguments, patch)
    asked = trainee.asked(spacing, normalisation, crop, fit)
    grid = MedicalSegmentation(trainee.network, **asked)  # which refuses what does not fit
    data = labelled(
        folder, plan.validation, plan.share, plan.seed, trainee.channels_of, grid.orientation, quiet=plan.as_json
    )
    if data.found.flat and spacing is not None:
        raise click.UsageError("--spacing is for scans; these are pictures")
    facts = trainee.facts(grid, data.found, asked, data.channels)
    arguments = trainee.arguments(len(data.names), data.found.channels)
    if flips is None:
        flips = not any(side in label.lower() for label in data.names for side in ("left", "right"))
    counts: dict[str, Any] = {"cases": len(data.train), "held_out": len(data.held)}
    with training.processes(plan.device) as place, plan.run(**counts) as run:
        model = trainee.begun(plan.seed, arguments).to(place.device)
        trained(model, folder.name, facts, data.names)
        if not plan.as_json:
            click.echo(
                f"{len(data.train)} cases to train on, {len(data.held)} held out; labels: {', '.join(data.names)}"
            )
            click.echo(", ".join(f"{k} {v}" for k, v in facts.items()))
            click.echo(f"patches are {'flipped along every axis' if flips and augment else 'not flipped'}")

        def score(network: nn.Module) -> float:
            return measure(MedicalSegmentation(network), data.held, distances=False)[0]["mean_dice"] or 0.0

        grid = MedicalSegmentation(model)
        with prepared(grid, data.train, len(data.names), plan.out / "prepared", plan.seed, place) as kept:
            done = loop.fit(
                model,
                Patches(kept, len(data.train), grid.patch, plan.batch_size, plan.seed, augment, flips),
                objective,
                plan.settings,
                run=run,
                report=plan.report(),
                score=score if data.held else None,
                score_every=plan.score_every,
            )
        if not place.first:
            return
        plain_output(model)
        figures, per_class = measure(grid, data.held) if data.held else ({}, {})
        known = {k: v for k, v in figures.items() if v is not None}
        what, where = f"{len(data.held)} held-out cases", (plan.validation or folder).name
        metrics = training.measured(known, dataset=where, split=what, command="train-volumes")
        zoo.save(model.cpu(), plan.out, metrics=metrics)
    if plan.as_json:
        facts = counts | {"taken_at": done.taken_at, "preprocess": facts, "folder": str(plan.out)}
        output.emit({"metrics": figures, "per_class": per_class} | facts)
        return
    for label, row in per_class.items():
        click.echo(f"{label}: {training.said({k: v for k, v in row.items() if k != 'cases'})}")
    if data.held:
        click.echo(f"{what}, weights of step {done.taken_at}: {training.said(known)}")
    scans = "picture.png" if data.found.flat else "scan.nii.gz"
    if isinstance(data.train[0][0], tuple):
        scans = f"{' '.join(path.name for path in data.train[0][0])} --channels-together"
    click.echo(
        f"saved to {plan.out}; try: zoo segment-volume {training.source(plan.out)} {scans} --out labels --pictures"
    )


def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Dice and cross-entropy of patches (images, labels) for every network of this plugin."""
    from .losses import DiceCE, ProbabilityLoss

    images, labels = batch
    answer = model(images)
    if getattr(model, "gives_probability", False):
        return ProbabilityLoss()(answer, labels)
    outputs = [answer] if not isinstance(answer, (list, tuple)) else list(answer)
    outputs = [one.float() for one in outputs]
    return DiceCE(len(outputs))(outputs if len(outputs) > 1 else outputs[0], labels)


def plain_output(model: nn.Module) -> None:
    """A trained network answers at full size alone; its weights are the same."""
    if getattr(model, "deep_supervision", False):
        model.deep_supervision = False
        model.zoo_info.config["deep_supervision"] = False  # type: ignore[union-attr, index]
