"""What the plugin's pipelines share: a file, or a string, is one input, and its answer holds all of its sequences."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.pipelines import Pipeline, Result
from zoo_registry import errors


class SequencePipeline(Pipeline):
    """Subclasses have :meth:`read`, and :meth:`answer` for one sample; :meth:`complete` may add what it needs of it.

    A string that names a file is the file, one with a slash that names a folder is the folder, one that ends as
    sequence files do and is none is an error; every other string is a sequence itself.
    """

    text_input = True

    def prepare(self, sample: Any) -> dict[str, Any]:
        return {"sample": sample}

    def collate(self, samples: Sequence[Any]) -> Any:
        return list(samples)

    def forward(self, batch: Any) -> list[Any]:
        return [self.answer(entry["sample"]) for entry in batch]

    def split(self, output: Any, count: int) -> list[Any]:
        return list(output)

    def finish(self, output: Any, sample: Any) -> Any:
        return output

    def answer(self, sample: Any) -> Result:
        raise NotImplementedError

    def _found(self, one: Any) -> tuple[list[Any], bool]:
        if isinstance(one, str):
            given = self.argument(one)
            if isinstance(given, str) and _is_folder(given):
                given = Path(given)
            if isinstance(given, str) and given.lower().endswith(self.extensions):
                raise errors.LocalFileMissing(f"there is no file {one!r} (in {Path.cwd()})", path=one)
            one = given
        return super()._found(one)


def _is_folder(text: str) -> bool:
    try:
        return any(mark in text for mark in ("/", os.sep)) and Path(text).expanduser().is_dir()
    except OSError:  # longer than a name may be
        return False


def at_least_one(**values: int) -> None:
    """Raise BadArgument naming an option that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise errors.BadArgument(f"{name} is {value}; expected at least 1", argument=name, accepted=[])
