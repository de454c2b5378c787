"""What the verbs that train share: which network, how scans come to it, and scans on disk as it reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zoo.cli import training
from zoo_registry import errors

from .commands import intensities

if TYPE_CHECKING:
    from torch import nn

    from zoo.training import Place

    from .cases import Case, Survey
    from .pipelines import VolumePipeline


@dataclasses.dataclass
class Trainee:
    """A network that is to be trained: ``network`` of it without memory, the arguments that are settled before the data
    are read, and how the weights that it starts from read scans (``base``)."""

    name: str
    start: str | None
    network: nn.Module
    given: dict[str, Any]
    base: dict[str, Any]
    patch: list[int] | None
    pretrained: bool = False  #: whether ``start`` is a masked autoencoder, whose encoder is taken

    def asked(
        self, spacing: tuple[float, ...] | None, normalisation: str | None, crop: bool | None, fit: bool | None
    ) -> dict[str, Any]:
        """Options of the pipeline, those of the command first and those of the weights next."""
        wanted = {
            "patch": self.patch, "spacing": spacing, "crop": crop, "fit": fit,
            "normalisation": None if normalisation is None else intensities(normalisation),
        }  # fmt: skip
        found = {k: self.base.get(k) if v is None else v for k, v in wanted.items()}
        return {k: v for k, v in found.items() if v is not None} | {"orientation": self.base.get("orientation", "RAS")}

    def channels_of(self, case: Case) -> Sequence[int]:
        """Numbers of channels that cases may have: pictures have what the network takes, volumes any."""
        from .scans import is_picture

        return self.accepted if is_picture(case[0][0] if isinstance(case[0], tuple) else case[0]) else range(1, 1000)

    @property
    def accepted(self) -> list[int]:
        return list(getattr(self.network, "accepted_channels", None) or [int(self.network.in_chans)])  # type: ignore[arg-type]

    def facts(self, pipe: Any, found: Survey, asked: dict[str, Any], channels: list[str] | None) -> dict[str, Any]:
        """What a pipeline must know to read scans as training does."""
        low, high = (round(v, 4) for v in found.window)
        of_ct = channels is not None and all(c.upper() == "CT" for c in channels) and low < high
        normalisation: Any = asked.get("normalisation") or ([low, high] if of_ct else "z-score")
        facts: dict[str, Any] = {
            "orientation": pipe.orientation,
            "normalisation": normalisation if isinstance(normalisation, str) else list(normalisation),
            "patch": pipe.patch,
        }
        if not found.flat:
            dims = len(pipe.patch)  # slices keep their distance
            facts["spacing"] = [float(s) for s in asked.get("spacing") or found.spacing[:dims]]
            if found.anisotropy > pipe.anisotropy:  # scans like these are no surprise then
                facts["anisotropy"] = round(found.anisotropy + 0.01, 2)
        facts |= {k: True for k, v in (("crop", pipe.crop), ("fit", pipe.fit)) if v}
        return facts | ({} if channels is None else {"channels": channels})

    def arguments(self, classes: int, channels: int) -> dict[str, Any]:
        """The builder's arguments, with what follows from the data."""
        found = dict(self.given)
        one = classes <= 2 and getattr(self.network, "gives_probability", False)
        if int(found.setdefault("num_classes", 1 if one else classes)) < (1 if one else classes):
            raise click.UsageError(f"--set num_classes={found['num_classes']}; the data have {classes} labels")
        if channels not in self.accepted:
            found.setdefault("in_chans", channels)
        if hasattr(self.network, "deep_supervision"):
            found.setdefault("deep_supervision", True)
        return found

    def begun(self, seed: int, arguments: dict[str, Any]) -> nn.Module:
        """The network with its first weights."""
        if not self.pretrained:
            return training.begun(self.name, self.start, seed, **arguments)
        import zoo

        from .mambamim_pretrain import MambaMIM, encoder_state

        model = training.begun(self.name, None, seed, **arguments)
        autoencoder = zoo.load(str(self.start))
        assert isinstance(autoencoder, MambaMIM)
        try:
            model.load_state_dict(encoder_state(autoencoder), strict=False)
        except RuntimeError as error:
            raise errors.BadArgument(
                f"--start {self.start} has an encoder of other sizes than {self.name} with {arguments}; leave out "
                "--patch and --set, or pre-train with them",
                argument="start", accepted=[],
            ) from error  # fmt: skip
        return model


def trainee_of(name: str, start: str | None, given: dict[str, Any], patch: list[int] | None) -> Trainee:
    """What a command trains. Raises click.UsageError for a model of another task."""
    import zoo
    from zoo.loading import card_of, locate

    training.check_task(name, "medical-segmentation")
    card = card_of(name)
    given, base, pretrained = dict(given), {}, False
    settled: dict[str, Any] = {}
    if start is not None:
        located = locate(start)
        base = dict(located.weights.preprocess) if located.weights is not None else {}
        settled = dict(located.config)
        pretrained = located.card.task == "masked-pretraining" and located.card.system == card.system
        if pretrained:  # its encoder's sizes are the network's
            kept = ("img_size", "channels", "depths", "kernels", "expansion", "depth")
            sizes = {**located.card.config, **settled}
            given = {k: sizes[k] for k in kept if k in sizes} | given
            settled = {}
    network = zoo.create(name, device="meta", **{**settled, **given})
    base = dict(getattr(network, "preparation", {})) | base
    if patch is not None and getattr(network, "input_size", None) is not None:
        given["input_size"] = patch
    elif patch is not None and hasattr(network, "img_size"):
        if len(set(patch)) != 1 or len(patch) != 3:
            raise click.UsageError(f"--patch is {patch}; {name} takes cubes, as 96,96,96")
        given["img_size"] = patch[0]
    elif patch is None and getattr(network, "input_size", None) is None and not hasattr(network, "img_size"):
        patch = base.get("patch")
    network = zoo.create(name, device="meta", **{**settled, **given})
    base.pop("patch", None)
    return Trainee(name, start, network, given, base, patch, pretrained)


# -- scans as the network reads them ---------------------------------------------------------------------------------


@contextlib.contextmanager
def prepared(
    pipe: VolumePipeline, cases: Sequence[Any], classes: int, folder: Path, seed: int, place: Place
) -> Iterator[Path]:
    """``folder`` with the cases on the network's grid, for as long as the block lasts; processes that train together
    prepare a share each."""
    import torch.distributed as dist

    from zoo.files import unwritable

    from .cases import prepare

    def together() -> None:
        if place.world > 1:
            dist.barrier()

    try:
        try:
            if place.first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            together()
            for number in range(place.rank, len(cases), place.world):
                prepare(pipe, cases[number], classes, folder, number, seed)
            together()
        except OSError as error:
            raise unwritable(folder, error) from error
        yield folder
    finally:
        if place.first:
            shutil.rmtree(folder, ignore_errors=True)
