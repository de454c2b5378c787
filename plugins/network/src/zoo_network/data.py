"""Labelled flows from folders: captures or the authors' 40 x 40 pictures, one subfolder a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from zoo.files import read_text
from zoo_registry import errors

from .captures import read_capture
from .flows import FlowBytes, split_flows

CAPTURES = (".pcap", ".pcapng", ".cap")
PICTURES = (".png",)
SPLITS = ("train", "valid", "test")


@dataclass
class FlowSet:
    """Flows and their classes."""

    flows: np.ndarray  #: (n, bytes) uint8
    labels: np.ndarray  #: (n,) int64
    classes: list[str]

    def __len__(self) -> int:
        return len(self.flows)

    def chosen(self, rows: np.ndarray) -> FlowSet:
        return FlowSet(self.flows[rows], self.labels[rows], self.classes)

    def counts(self) -> np.ndarray:
        """Flows of each class."""
        return np.bincount(self.labels, minlength=len(self.classes))


def label_set(name: str | Path) -> list[str]:
    """Class names by the name of a published data set (ciciot2022, iscxvpn2016, iscxtor2016, ustc_tfc2016; sorted as
    the authors' loader sorts them), or from a text file with a name a line."""
    own = resources.files("zoo_network") / "labels"
    known = sorted(p.name.removesuffix(".txt") for p in own.iterdir() if p.name.endswith(".txt"))
    if str(name) in known:
        text = (own / f"{name}.txt").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_text(name)
    else:
        raise ValueError(f"labels is {str(name)!r}; expected one of {', '.join(known)}, or a text file, a name a line")
    return [line.strip() for line in text.splitlines() if line.strip()]


def representation_for(byte_length: int, settings: dict[str, int]) -> FlowBytes:
    """The bytes of a flow for a model of ``byte_length``, by ``settings`` (packets, header_bytes, payload_bytes).

    Raises ValueError where these do not give ``byte_length`` bytes (only the published form, 5 x (80 + 240), needs
    no settings).
    """
    found = FlowBytes(**settings)  # type: ignore[arg-type]
    if found.size != byte_length:
        raise ValueError(
            f"{found.packets} packets of {found.header_bytes} + {found.payload_bytes} bytes are {found.size}, but "
            f"the model reads {byte_length}; give packets=, header_bytes= and payload_bytes= as it was trained"
        )
    return found


def read_flows(
    path: Path, representation: FlowBytes, *, augment: bool = False, bidirectional: bool = False
) -> np.ndarray:
    """(n, bytes) uint8 of one file: a capture, split into its flows, or a picture, which holds one flow.

    augment: every run of neighbouring packets of a flow instead of its first ones. Flows of IPv6, of which the
    representation has no bytes, are left out.
    """
    if path.suffix.lower() in PICTURES:
        from zoo.images import open_image

        flow = np.asarray(open_image(path, 1), dtype=np.uint8).reshape(1, -1)
        if flow.shape[1] != representation.size:
            raise ValueError(f"{path} holds {flow.shape[1]} bytes; expected {representation.size}, a byte a pixel")
        return flow
    keep = 0 if augment else representation.packets
    flows = split_flows(read_capture(path).packets, keep=keep, bidirectional=bidirectional)
    found = [
        representation.windows(flow.kept) if augment else representation(flow.kept)[None]
        for flow in flows
        if flow.version == 4
    ]
    return np.concatenate(found) if found else np.zeros((0, representation.size), np.uint8)


def files_in(folder: str | Path) -> list[Path]:
    """Captures and pictures anywhere below ``folder`` (or the file itself), sorted; hidden ones (.name) are none.

    Raises LocalFileMissing where there is nothing of that name.
    """
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise errors.LocalFileMissing(f"there is no file or folder {str(folder)!r} (in {Path.cwd()})", path=str(folder))
    found = (p for p in folder.rglob("*") if p.suffix.lower() in CAPTURES + PICTURES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_folder(
    folder: str | Path,
    representation: FlowBytes,
    *,
    classes: Sequence[str] | None = None,
    augment: bool = False,
    bidirectional: bool = False,
) -> FlowSet:
    """FOLDER/CLASS/FILES, classes in sorted order or in that of ``classes``.

    Raises ValueError for a folder without labelled files and for a class that ``classes`` does not name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected FOLDER/CLASS/FILES ({', '.join(CAPTURES + PICTURES)})")
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and files_in(p))
    if not found:
        raise ValueError(
            f"{folder} has no subfolder with captures or pictures; expected {folder}/CLASS/FILE "
            f"({', '.join(CAPTURES + PICTURES)})"
        )
    names = list(classes) if classes is not None else found
    if unknown := [name for name in found if name not in names]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, which is none of {', '.join(names)}")
    flows, labels = [], []
    for name in found:
        for path in files_in(folder / name):
            own = read_flows(path, representation, augment=augment, bidirectional=bidirectional)
            flows.append(own)
            labels.append(np.full(len(own), names.index(name), np.int64))
    return FlowSet(np.concatenate(flows), np.concatenate(labels), names)


def read_splits(
    folder: str | Path,
    representation: FlowBytes,
    *,
    seed: int = 0,
    augment: bool = False,
    bidirectional: bool = False,
) -> tuple[FlowSet, FlowSet, FlowSet]:
    """(train, valid, test): FOLDER/train/CLASS ... as the authors ship their data, else 80, 10 and 10 % of
    FOLDER/CLASS at random by ``seed``, as their script splits it."""
    folder = Path(folder)
    kind = {"augment": augment, "bidirectional": bidirectional}
    if all((folder / name).is_dir() for name in SPLITS):
        train = read_folder(folder / "train", representation, **kind)  # type: ignore[arg-type]
        rest = [read_folder(folder / n, representation, classes=train.classes, **kind) for n in SPLITS[1:]]  # type: ignore[arg-type]
        for name, part in zip(SPLITS, (train, *rest), strict=True):
            if not len(part):
                raise ValueError(f"{folder / name} holds no flows of IPv4; expected some to train, validate and test")
        return train, rest[0], rest[1]
    whole = read_folder(folder, representation, **kind)  # type: ignore[arg-type]
    order = np.random.default_rng(seed).permutation(len(whole))
    first, second = int(0.8 * len(order)), int(0.8 * len(order)) + int(0.1 * len(order))
    if first == 0 or second == first:
        raise ValueError(f"{folder} holds {len(whole)} flows; at least 10 are needed to train, validate and test")
    return whole.chosen(order[:first]), whole.chosen(order[first:second]), whole.chosen(order[second:])
