"""Labelled and unlabelled pairs as data sets lay them out: a folder for each date, files of equal names in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .rasters import EXTENSIONS, bad_input

#: names of the folders: ChangeMamba's own, LEVIR's and Mamba-FCS's, SECOND's
BEFORE, AFTER = ("T1", "A", "im1"), ("T2", "B", "im2")


def find_folder(data: Path, names: Sequence[str], *, needed: bool = True) -> Path | None:
    """The first folder of these names in ``data``. Raises BadArgument where it is ``needed`` and not there."""
    for name in names:
        if (data / name).is_dir():
            return data / name
    if not needed:
        return None
    part = next((f"; give its part {data / name}" for name in ("train", "val", "test") if (data / name).is_dir()), "")
    raise bad_input(f"{data} has no folder {' or '.join(names)}{part}", "data")


def files_of(folder: Path) -> dict[str, Path]:
    """The rasters of a folder by their names without ending. Raises BadArgument where two have one name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and path.name[0] != ".":
            if path.stem in found:
                raise bad_input(f"{folder} holds {found[path.stem].name} and {path.name}; expected one of them", "data")
            found[path.stem] = path
    return found


def together(folders: Sequence[Path], limit: int | None = None) -> list[tuple[str, list[Path]]]:
    """(name, its file in every folder). Raises BadArgument for files that are missing in a folder."""
    found = [files_of(folder) for folder in folders]
    if not found[0]:
        raise bad_input(f"{folders[0]} holds no images; expected {', '.join(EXTENSIONS)}", "data")
    for folder, files in zip(folders[1:], found[1:], strict=True):
        missing = sorted(found[0].keys() - files.keys())
        if missing:
            raise bad_input(f"{folder} has no file for {len(missing)} of {folders[0].name}'s, as {missing[0]}", "data")
    return [(name, [files[name] for files in found]) for name in list(found[0])[:limit]]


def two_dates(data: Path) -> list[Path]:
    """The folders of the earlier and the later images in ``data``. Raises BadArgument where there are none."""
    dates = list(zip(BEFORE, AFTER, strict=True))
    for names in dates:
        if all((data / name).is_dir() for name in names):
            return [data / name for name in names]
    raise bad_input(
        f"{data} is a folder, which does not say which of its files are the earlier ones; give the files in order "
        f"(before, after, before, after), or a folder that holds {' or '.join(' and '.join(names) for names in dates)}"
    )
