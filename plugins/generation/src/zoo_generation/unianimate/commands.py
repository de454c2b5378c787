"""UniAnimate's verbs of the command line: ``animate``, ``train-animation``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zoo.cli import output, training


@click.command()
@click.argument("name")
@click.argument("picture", type=click.Path(exists=True, path_type=Path))
@click.argument("poses", type=click.Path(exists=True, path_type=Path))
@click.option("--out", default="animation.gif", show_default=True, type=click.Path(path_type=Path))
@click.option("--frames", type=click.IntRange(min=1), help="At most so many.")
@click.option(
    "--every", default=1, show_default=True, type=click.IntRange(min=1), help="One of so many poses is taken."
)
@click.option("--steps", type=click.IntRange(1, 1000), help="Of the sampling (default: the model's, 30).")
@click.option("--guidance", type=float, help="Default: the model's, 2.5.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--first-frame", is_flag=True, help="The video begins with the picture.")
@click.option("--unaligned", is_flag=True, help="Take the poses as they are, whoever they are of.")
@click.option("--autoencoder", type=click.Path(), help="Stable Diffusion 2.1's: v2-1_512-ema-pruned.ckpt or a folder.")
@click.option("--clip", type=click.Path(), help="OpenCLIP ViT-H/14: a folder in the format of transformers.")
@click.option("--detector", type=click.Path(), help="yolox_l.onnx, to find poses in pictures and videos.")
@click.option("--pose", type=click.Path(), help="dw-ll_ucoco_384.onnx, with --detector.")
@click.option("--scale", default=1, show_default=True, type=click.IntRange(min=1), help="Every pixel so many times.")
@click.option("--option", "-o", "choices", multiple=True, metavar="NAME=VALUE", help="Pipeline option, as overlap=4.")
@output.loading_options
@output.as_json
def animate(
    name: str,
    picture: Path,
    poses: Path,
    out: Path,
    unaligned: bool,
    scale: int,
    choices: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Make the person of PICTURE move as the POSES do, with the model NAME.

    POSES: key points (.npz, .json), a folder of drawn poses with ref_pose.jpg, or, with --detector and --pose, a video.

    \b
        zoo animate unianimate_micro.figures figure.png figure.npz --out figure.gif --scale 8
        zoo animate unianimate_unet person.jpg dance.json --checkpoint unianimate_16f_32f_non_ema_223000.pth
            --autoencoder v2-1_512-ema-pruned.ckpt --clip CLIP-ViT-H-14 --out dance.mp4 --device cuda --dtype float16
    """
    import zoo
    from zoo.files import check_place

    from .media import check_ending

    check_ending(out)
    check_place(out)
    own = ("frames", "every", "steps", "guidance", "seed", "first_frame", "autoencoder", "clip", "detector", "pose")
    given = {k: v for k in own if (v := options.pop(k)) is not None and v is not False}
    if unaligned:
        given["aligned"] = False
    arguments = output.loading(options) | given | output.pairs(choices, "--option")
    answer = zoo.pipeline(name, "human-animation", **arguments)((picture, poses))
    place = answer.save(out, scale)
    if as_json:
        output.emit(answer.to_dict() | {"file": str(place)})
    else:
        click.echo(f"{answer}  -> {place}")


@click.command()
@click.argument("name")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@training.out
@training.steps(10_000)
@training.batch_size(1)
@click.option("--frames", default=16, show_default=True, type=click.IntRange(min=1), help="Of a clip in a batch.")
@training.rate(5e-5)
@click.option("--average", type=click.FloatRange(0, 1, True, True), help="Decay of a moving average of the weights.")
@click.option("--first-frame", "first", default=0.5, show_default=True, type=click.FloatRange(0, 1))
@click.option("--unconditional", default=0.1, show_default=True, type=click.FloatRange(0, 1))
@click.option("--start", help="A model to start from: a name with its tag, or a saved folder.")
@click.option("--autoencoder", type=click.Path(), help="Stable Diffusion 2.1's, for models that need it.")
@click.option("--clip", type=click.Path(), help="OpenCLIP ViT-H/14, for models that need it.")
@training.run_options("temporal=mamba")
@training.resume
@click.option("--option", "-o", "more", multiple=True, metavar="NAME=VALUE", help="Pipeline option, as latents=patch.")
@output.as_json
def train_animation(
    name: str,
    folder: Path,
    out: Path,
    steps: int,
    batch_size: int,
    frames: int,
    rate: float,
    average: float | None,
    first: float,
    unconditional: float,
    start: str | None,
    autoencoder: str | None,
    clip: str | None,
    seed: int,
    device: str,
    choices: tuple[str, ...],
    resume: bool,
    more: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the model NAME on the clips of FOLDER: CLIP/frames.gif (or .mp4) and CLIP/poses.npz (or .json).

    --first-frame says how often a clip is shown with its own first frame instead of a reference, where the model has
    both conditions, --unconditional how often a batch has none, which guidance above 1 needs.

    \b
        zoo train-animation unianimate_micro clips/ --out tuned --start unianimate_micro.figures --steps 500
    """
    from dataclasses import replace

    import torch

    import zoo
    from zoo.building import describe

    from .data import Batches, read_clips
    from .pipeline import HumanAnimation
    from .training import Batch, train
    from .unet import UNet

    torch.manual_seed(seed)
    model = zoo.load(start) if start is not None else zoo.create(name, **output.pairs(choices, "--set"))
    if not isinstance(model, UNet):
        raise click.UsageError(f"{start or name} is a {type(model).__name__}; expected a UNet of UniAnimate")
    describe(model, replace(model.zoo_info, tag=None))  # figures of what it starts from will not be its own
    model.float().to(device)
    pipe = HumanAnimation(model, autoencoder=autoencoder, clip=clip, **output.pairs(more, "--option"))
    clips = read_clips(folder, pipe.video_size(), frames)
    kind: dict[str, Any] = {"pose_size": pipe.pose_size, "pose_width": pipe.pose_width}
    batches = Batches(model, pipe.latents, pipe.features, **kind)
    if pipe.features is not None:
        model.zero_y = pipe.features.prompt()

    def batch(r: Any) -> Batch:
        return batches.of([clips[i].cut(r, frames) for i in r.integers(0, len(clips), batch_size)])

    settings: dict[str, Any] = {"rate": rate, "average": average, "first_frame": first, "seed": seed}
    settings["unconditional"] = unconditional
    settings["report"] = training.reporter(steps, quiet=as_json)
    with training.run(out, resume, quiet=as_json, clips=len(clips)) as run:
        losses = train(model, batch, steps=steps, run=run, **settings)
        zoo.save(model.cpu(), out)
    if as_json:
        output.emit({"steps": steps, "clips": len(clips), "loss": losses[-1], "folder": str(out)})
        return
    click.echo(f"saved to {out}; try: zoo animate {training.source(out)} person.png poses.npz --out person.gif")
