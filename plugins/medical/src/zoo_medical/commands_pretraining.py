"""``zoo pretrain-volumes``: MambaMIM's masked autoencoder on scans without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training
from zoo_registry import errors

from .commands import intensities


@click.command("pretrain-volumes")
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@training.out
@click.option("--spacing", nargs=3, type=float, help="Millimetres of a voxel (default: the published weights').")
@click.option("--normalisation", help='"z-score" for MR, or LOW,HIGH (default: the published weights\', of CT).')
@training.planned(steps=20_000, rate=1e-4, batch_size=2, of="Cubes.", example="img_size=64")
def pretrain_volumes(
    name: str,
    folder: Path,
    spacing: tuple[float, float, float] | None,
    normalisation: str | None,
    plan: training.Plan,
) -> None:
    """Pre-train NAME (mambamim_pretrain) on the scans in FOLDER, which need no labels.

    FOLDER is searched for NIfTI files of one channel. The weights with the smallest loss on held-out scans are kept.

    \b
        zoo pretrain-volumes mambamim_pretrain ct-scans --out pretrained --device cuda
        zoo train-volumes mambamim_hybird Dataset002_BTCV --start ./pretrained --out btcv
    """
    import statistics

    import zoo
    from zoo import training as loop
    from zoo.building import trained

    from .cases import Cubes, reading
    from .plans import prepared
    from .rebuilding import VolumeRebuilding
    from .scans import read_scan

    training.check_task(name, "masked-pretraining")
    arguments = plan.arguments
    network = zoo.create(name, device="meta", **arguments) if plan.start is None else zoo.load(plan.start, **arguments)
    values = None if normalisation is None else intensities(normalisation)
    asked = VolumeRebuilding(network, spacing=spacing, normalisation=values)
    cases, held = find_scans(folder), [] if plan.validation is None else find_scans(plan.validation)
    kept_out = loop.held_out([None] * len(cases), plan.share, plan.seed)
    if plan.validation is None:
        cases, held = ([cases[i] for i in part] for part in kept_out)
    longest = 1.0
    with reading(len(cases) + len(held), plan.as_json) as advance:
        for scan in (*cases, *held):
            voxel = (asked.read(scan) if spacing is None else read_scan(scan, [1])).spacing
            longest = max(longest, max(voxel) / min(voxel))
            advance()
    facts: dict[str, Any] = {
        "orientation": asked.orientation,
        "spacing": list(asked.spacing or ()) or None,
        "normalisation": values or asked.preprocess.get("normalisation", "z-score"),
    }
    if longest > asked.anisotropy:  # whoever gave --spacing knows of the distance of slices
        facts["anisotropy"] = round(longest + 0.01, 2)
    counts: dict[str, Any] = {"scans": len(cases), "held_out": len(held)}
    with training.processes(plan.device) as place, plan.run(**counts) as run:
        model = training.begun(name, plan.start, plan.seed, **arguments).to(place.device)
        trained(model, folder.name, facts)
        if not plan.as_json:
            click.echo(f"{len(cases)} scans to train on, {len(held)} held out")
            click.echo(", ".join(f"{k} {v}" for k, v in facts.items()))

        def rebuilt(network: Any) -> float:
            pipe = VolumeRebuilding(network)
            return statistics.fmean(pipe(scan).loss for scan in held)

        with prepared(
            VolumeRebuilding(model), [(scan, None) for scan in cases], 0, plan.out / "prepared", plan.seed, place
        ) as kept:
            done = loop.fit(
                model,
                Cubes(kept, len(cases), int(model.img_size), plan.batch_size, plan.seed),  # type: ignore[arg-type]
                lambda network, cubes: network(cubes),
                plan.settings,
                run=run,
                report=plan.report(),
                score=(lambda network: -rebuilt(network)) if held else None,
                score_every=plan.score_every,
            )
        if not place.first:
            return
        figures, what = {"loss": rebuilt(model)} if held else {}, f"{len(held)} held-out scans"
        metrics = training.measured(
            figures, dataset=(plan.validation or folder).name, split=what, command="pretrain-volumes"
        )
        zoo.save(model.cpu(), plan.out, metrics=metrics)
    if plan.as_json:
        facts = counts | {"taken_at": done.taken_at, "preprocess": facts, "folder": str(plan.out)}
        output.emit({"metrics": figures} | facts)
        return
    if held:
        click.echo(f"{what}, weights of step {done.taken_at}: {training.said(figures)}")
    next_step = f"zoo train-volumes mambamim_hybird FOLDER --start {training.source(plan.out)} --out tuned"
    click.echo(f"saved to {plan.out}; try: {next_step}")


def find_scans(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, at any depth. Raises BadArgument where there is none."""
    from .scans import NIFTI

    found = sorted(f for f in folder.rglob("*") if f.name.lower().endswith(NIFTI) and f.name[0] != ".")
    if not found:
        raise errors.BadArgument(f"{folder} holds no .nii or .nii.gz file", argument="folder", accepted=list(NIFTI))
    return found
