"""Labelled windows of EEG from folders: one folder a class, or recordings with TUEV's annotations beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .preparation import Preparation, window_starts, windows_at
from .recordings import RECORDINGS, Recording, read_events, read_recording

#: TUEV's codes 1 to 6.
TUEV_CLASSES = ("spsw", "gped", "pled", "eyem", "artf", "bckg")
#: Seconds of a window before an annotated event begins.
BEFORE = 2.0
#: The authors' seed and share for setting subjects aside.
SPLIT_SEED, SPLIT_SHARE = 4523, 0.2
Reader = Callable[[Path], Recording]


@dataclass
class WindowSet:
    """Windows, their classes, and whose they are."""

    x: np.ndarray  #: (n, channels, samples) float32
    labels: np.ndarray  #: (n,) int64
    classes: list[str]
    subjects: np.ndarray  #: (n,) of strings

    def __len__(self) -> int:
        return len(self.x)

    def chosen(self, rows: np.ndarray) -> WindowSet:
        return WindowSet(self.x[rows], self.labels[rows], self.classes, self.subjects[rows])


def subject_of(path: Path) -> str:
    """Whose recording it is: the file's name up to its first underscore, as in TUEV ("aaaaaaar_00000001.edf")."""
    return path.name.split(".")[0].split("_")[0]


def files_in(folder: str | Path) -> list[Path]:
    """Recordings anywhere below ``folder`` (or the file itself), sorted."""
    folder = Path(folder)
    if folder.is_file():
        return [folder]
    return sorted(p for p in folder.rglob("*") if p.name.lower().endswith(RECORDINGS) and p.is_file())


def windows(
    recording: Recording,
    preparation: Preparation,
    ids: Sequence[int] | None = None,
    *,
    step: float | None = None,
    starts: Sequence[float] | None = None,
    missing: str = "error",
    filtered: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """All windows of a recording, (n, channels, samples), and where they begin, (n,) seconds.

    ``step``: seconds between windows (a window's length unless given); ``starts``: where windows begin instead, in
    seconds; a window that reaches beyond the recording goes on at its other end, as the authors' do.
    """
    signal, sfreq = preparation.continuous(recording, ids, missing=missing, filtered=filtered)
    size = round(preparation.seconds * sfreq)
    if starts is not None:
        # the first sample at or after the second, as the authors look it up
        places = [int(np.ceil(round(s * sfreq, 6))) for s in starts]
    else:
        wanted = preparation.seconds if step is None else step
        if not 0 < wanted < np.inf:
            raise ValueError(f"step is {step} seconds; expected a positive number")
        places = window_starts(signal.shape[1], size, max(1, round(wanted * sfreq)))
    cut = [preparation.window(w) for w in windows_at(signal, size, places)]
    found = np.stack(cut) if cut else np.zeros((0, len(signal), preparation.samples), np.float32)
    return found, np.array(places) / sfreq


def read_labelled(
    folder: str | Path,
    preparation: Preparation,
    ids: Sequence[int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    step: float | None = None,
    missing: str = "error",
    filtered: bool = False,
    read: Reader = read_recording,
) -> WindowSet:
    """FOLDER/CLASS/RECORDINGS, cut into windows; or FOLDER/**/NAME.edf with NAME.rec beside it, a window an annotation.

    Classes are the subfolders in sorted order (or in that of ``classes``), or TUEV's six. Raises ValueError for a
    folder without labelled recordings and for a class that ``classes`` does not name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; expected FOLDER/CLASS/RECORDINGS, or files with .rec")
    files = files_in(folder)
    annotated = [p for p in files if p.with_suffix(".rec").is_file()]
    if annotated:
        names = list(classes or TUEV_CLASSES)
    else:
        found = sorted({p.relative_to(folder).parts[0] for p in files if len(p.relative_to(folder).parts) > 1})
        if not found:
            raise ValueError(
                f"{folder} has no subfolder with recordings and no recording with a .rec file; expected "
                f"{folder}/CLASS/RECORDING ({', '.join(RECORDINGS)})"
            )
        names = list(found if classes is None else classes)
        if unknown := [name for name in found if name not in names]:
            raise ValueError(f"{folder} has the class {unknown[0]!r}, which is none of {', '.join(names)}")
    x, labels, subjects = [], [], []
    for path in annotated or [p for p in files if len(p.relative_to(folder).parts) > 1]:
        starts = codes = None
        if annotated:
            events = read_events(path.with_suffix(".rec"))
            if bad := [e.code for e in events if not 1 <= e.code <= len(names)]:
                raise ValueError(f"{path.with_suffix('.rec')} has the code {bad[0]}; expected 1 to {len(names)}")
            starts, codes = [e.start - BEFORE for e in events], [e.code - 1 for e in events]
        own, _ = windows(read(path), preparation, ids, step=step, starts=starts, missing=missing, filtered=filtered)
        x.append(own)
        label = names.index(path.relative_to(folder).parts[0]) if codes is None else 0
        labels.append(np.full(len(own), label, np.int64) if codes is None else np.array(codes, np.int64))
        subjects += [subject_of(path)] * len(own)
    return WindowSet(np.concatenate(x), np.concatenate(labels), names, np.array(subjects))


def split_subjects(whole: WindowSet, share: float = SPLIT_SHARE, seed: int = SPLIT_SEED) -> tuple[WindowSet, WindowSet]:
    """(the rest, ``share`` of the subjects): nobody is in both. Raises ValueError for a single subject."""
    names = sorted(set(whole.subjects.tolist()))
    if len(names) < 2:
        raise ValueError(
            f"all recordings are of {names[0] if names else 'nobody'}: names begin with the subject, as S01_a.edf; "
            "two subjects or more are needed to set some aside"
        )
    aside = np.random.RandomState(seed).choice(names, size=max(1, int(len(names) * share)), replace=False)
    held = np.isin(whole.subjects, aside)
    return whole.chosen(np.flatnonzero(~held)), whole.chosen(np.flatnonzero(held))
