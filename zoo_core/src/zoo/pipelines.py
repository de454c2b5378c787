"""From files that people have to answers that they can read: the base of every task's pipeline.

A domain plugin subclasses :class:`Pipeline` (three short methods) and :class:`~zoo.results.Result` (a few fields), and
names the class in its ``zoo_pipelines`` hook. Everything else is here: files, folders and patterns, batching, device
and dtype, progress, errors that name the file::

    class Classify(Pipeline):
        task = "image-classification"
        extensions = (".png", ".jpg")

        def read(self, source): return open_image(source)            # a path, or an object in memory
        def prepare(self, sample): return self.transform(sample)     # -> tensors without a batch axis
        def finish(self, output, sample): return Labels(...)         # one sample's output -> Result

        # optional: forward(batch), collate(list), split(output, count), expand(inputs)
"""

from __future__ import annotations

import contextlib
import glob
import inspect
import numbers
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo_registry import errors, read_labels

from .building import ZooInfo, has_new_head, wrong_type
from .nests import map_tensors
from .placement import device_of
from .results import Failure, Result


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and every module's own mode again after it."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class _Sample:
    source: Any
    name: str
    raw: Any = None
    ready: Any = field(default=None, repr=False)


class Pipeline(ABC):
    """Raw input to answer, for one task. See the module's text for what a subclass writes.

    ``model``: a module, normally from ``zoo.load`` (its ``zoo_info`` brings preprocessing, labels and names).
    """

    task: ClassVar[str] = ""
    #: endings of the files that a folder is searched for; lower case, with the dot (".nii.gz" works)
    extensions: ClassVar[tuple[str, ...]] = ()
    #: strings are the input itself (text, SMILES, sequences); files are then given as ``Path``
    text_input: ClassVar[bool] = False
    #: how many files make one sample (two dates of one scene: 2)
    files_per_sample: ClassVar[int] = 1

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.info: ZooInfo | None = getattr(model, "zoo_info", None)

    # -- what a subclass writes

    @abstractmethod
    def read(self, source: Any) -> Any:
        """A path (or an object in memory) to one raw sample. With ``files_per_sample`` > 1 gets a tuple of them."""

    @abstractmethod
    def prepare(self, sample: Any) -> Any:
        """A raw sample to what the model takes: a tensor, or a dict or tuple of tensors, without a batch axis."""

    @abstractmethod
    def finish(self, output: Any, sample: Any) -> Result:
        """One sample's output (without a batch axis, on the CPU, floats as float32) to its Result."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Prepared samples of equal shapes to one batch: every tensor stacked on a new first axis."""
        return map_tensors(lambda *tensors: torch.stack(tensors), *samples)

    def forward(self, batch: Any) -> Any:
        """Call the model: ``model(**batch)`` for dicts, ``model(*batch)`` for tuples, ``model(batch)`` otherwise."""
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple) else self.model(batch)

    def split(self, output: Any, count: int) -> list[Any]:
        """A batch's output to ``count`` single outputs: every tensor indexed along its first axis."""
        return [map_tensors(lambda tensor: tensor[i], output) for i in range(count)]  # noqa: B023 - called at once

    # -- what it has for that

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def name(self) -> str:
        return self.info.name if self.info is not None else type(self.model).__name__

    @property
    def preprocess(self) -> dict[str, Any]:
        """The weights' own preprocessing settings (their card's ``preprocess``), {} when they have none."""
        if self.info is None:
            return {}
        if self.info.weights is not None:
            return dict(self.info.weights.preprocess)
        return dict((self.info.folder_config.get("pretrained_cfg") or {}).get("preprocess") or {})

    def companion(self, repo_id: str, filename: str, revision: str | None = None) -> Path:
        """A file in another repository that these weights need too, as their card's ``companions`` say: beside them in
        a folder of ``zoo.download``, else from the Hub, offline or with the cache that the model was loaded with."""
        from zoo_registry import store

        folder = None if self.info is None else self.info.folder
        if folder is not None and (carried := store.companion_in(folder, repo_id, filename)).is_file():
            return carried
        return store.hub_file(repo_id, filename, revision=revision, **({} if self.info is None else self.info.access))

    def labels(self) -> list[str] | None:
        """Class names of the weights, in the order of the outputs; None when the card names none, or for a new head."""
        if self.info is None or has_new_head(self.model):
            return None
        own = self.info.folder_config.get("labels")
        if own:
            return list(own)
        card, weights = self.info.card, self.info.weights
        if card is None or weights is None or weights.labels is None:
            return None
        found = read_labels(card, weights)
        return list(found) if found is not None else self.named_labels(weights.labels)

    def named_labels(self, name: str) -> list[str] | None:
        """A label set that the domain knows by name ("imagenet-1k"); plugins override this."""
        return None

    # -- running

    def __call__(
        self,
        inputs: Any,
        *,
        batch_size: int = 1,
        progress: bool | None = None,
        keep_going: bool = False,
    ) -> Any:
        """Answer one input (-> Result) or several (-> list of Results, in their order).

        ``inputs``: a file, a folder, a pattern ("scans/*.png"), an object in memory, or a list of these.
        ``progress``: show a bar (default: for more than 4 inputs on a terminal). ``keep_going``: an input that fails
        gives a :class:`Failure` instead of ending the run.
        """
        sources, single = self.expand(inputs)
        results = list(self._run(sources, batch_size, progress, keep_going))
        return results[0] if single else results

    def stream(self, inputs: Any, *, batch_size: int = 1, keep_going: bool = False) -> Iterator[Result]:
        """Like calling, but yields each Result as soon as its batch is done; holds one batch in memory."""
        sources, _ = self.expand(inputs)
        yield from self._run(sources, batch_size, False, keep_going)

    def expand(self, inputs: Any) -> tuple[list[Any], bool]:
        """(the single inputs, whether exactly one was given). Folders and patterns are searched here."""
        if isinstance(inputs, list):
            if self.files_per_sample > 1 and inputs and not isinstance(inputs[0], tuple):
                return self._grouped([item for one in inputs for item in self._found(one)[0]]), False
            return [item for one in inputs for item in self._found(one)[0]], False
        found, single = self._found(inputs)
        if self.files_per_sample > 1 and not isinstance(inputs, tuple):
            return self._grouped(found), False
        return found, single

    def argument(self, text: str) -> Any:
        """A command-line argument as an input: for text pipelines an existing file is read, all else is the text."""
        return Path(text) if self.text_input and _is_file(text) else text

    def _grouped(self, items: list[Any]) -> list[Any]:
        n = self.files_per_sample
        if len(items) % n:
            raise errors.BadArgument(
                f"{len(items)} files were given; {self.task} takes {n} for each sample, in order",
                argument="inputs",
                accepted=[],
            )
        return [tuple(items[i : i + n]) for i in range(0, len(items), n)]

    def _found(self, one: Any) -> tuple[list[Any], bool]:
        if isinstance(one, str) and self.text_input:
            return [one], True
        if not isinstance(one, (str, Path)):
            return [one], True
        text = str(one)
        if not text.strip():  # Path("") is the working directory
            raise errors.LocalFileMissing(f"an input is {text!r}; expected a file, a folder or a pattern", path=text)
        path = Path(os.path.expanduser(text))
        if path.is_file():
            return [path], True
        if path.is_dir():
            if path.name.lower().endswith(self.extensions):
                return [path], True  # formats that are folders
            files = sorted((f for f in path.rglob("*") if self._wanted(f)), key=_natural)
            if not files:
                raise errors.LocalFileMissing(
                    f"the folder {text!r} holds no file for {self.task}; expected {', '.join(self.extensions)}",
                    path=text,
                )
            return list(files), False
        if glob.has_magic(text):
            found = sorted((Path(p) for p in glob.glob(str(path), recursive=True)), key=_natural)
            files = [f for f in found if f.is_file()]
            if not files:
                raise errors.LocalFileMissing(f"no file matches {text!r} (in {Path.cwd()})", path=text)
            return list(files), False
        raise errors.LocalFileMissing(f"there is no file or folder {text!r} (in {Path.cwd()})", path=text)

    def _wanted(self, file: Path) -> bool:
        return file.is_file() and not file.name.startswith(".") and file.name.lower().endswith(self.extensions)

    def _run(self, sources: list[Any], batch_size: int, progress: bool | None, keep_going: bool) -> Iterator[Result]:
        if isinstance(batch_size, bool) or not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise errors.BadArgument(
                f"batch_size is {batch_size!r}; expected a whole number, 1 or more", argument="batch_size", accepted=[]
            )
        if progress is None:
            progress = len(sources) > 4 and sys.stderr.isatty()
        with progress_bar(progress, len(sources), self.name) as advance:
            batch: list[_Sample] = []
            for source in sources:
                sample = _Sample(source, describe_source(source))
                try:
                    sample.raw = self.read(source)
                    sample.ready = self.prepare(sample.raw)
                except Exception as error:
                    yield from self._flush(batch, keep_going, advance)  # the answers before it are not lost
                    batch = []
                    if not keep_going:
                        error.add_note(f"while reading {sample.name} for {self.name}")
                        raise
                    advance()
                    yield Failure(source=sample.name, model=self.name, error=error)
                    continue
                if batch and _signature(sample.ready) != _signature(batch[0].ready):
                    yield from self._flush(batch, keep_going, advance)
                    batch = []
                batch.append(sample)
                if len(batch) == batch_size:  # now, not when the next one has been read
                    yield from self._flush(batch, keep_going, advance)
                    batch = []
            yield from self._flush(batch, keep_going, advance)

    def _flush(self, batch: list[_Sample], keep_going: bool, advance: Any) -> Iterator[Result]:
        if not batch:
            return
        try:
            began = time.perf_counter()
            with torch.inference_mode(), evaluating(self.model):
                ready = map_tensors(self._to_model, self.collate([s.ready for s in batch]))
                outputs = self.split(map_tensors(_to_cpu, self.forward(ready)), len(batch))
            share = (time.perf_counter() - began) * 1000 / len(batch)
            results = []
            for sample, output in zip(batch, outputs, strict=True):
                result = self.finish(output, sample.raw)
                result.source, result.model = result.source or sample.name, result.model or self.name
                result.milliseconds = share
                results.append(result)
        except Exception as error:
            if keep_going and len(batch) > 1:  # one of them is at fault; the others have answers
                for sample in batch:
                    yield from self._flush([sample], keep_going, advance)
                return
            names = ", ".join(s.name for s in batch)
            if not keep_going:
                error.add_note(f"while answering {names} with {self.name}")
                raise
            results = [Failure(source=s.name, model=self.name, error=error) for s in batch]
        for result in results:
            advance()
            yield result

    def _to_model(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)


def pipeline(model: str | Path | nn.Module, task: str | None = None, **options: Any) -> Pipeline:
    """The pipeline that turns raw input into answers with this model.

    ``model``: whatever ``zoo.load`` takes, or a loaded model. ``task``: only needed for models of your own, or to use a
    model for another task than its card's. ``options``: those that the pipeline class has (``top_k=3``) go to it, all
    others (``device=``, ``checkpoint=``, ``num_classes=`` ...) to ``zoo.load``.

    Raises ``zoo.errors.UnknownTask`` when no installed plugin answers the task.
    """
    from . import catalog
    from .loading import card_of, load

    if isinstance(model, nn.Module):
        info = getattr(model, "zoo_info", None)
        own = info.card.task if info is not None and info.card is not None else None
        cls = catalog.pipeline_class(task_of(task or own, model))
        _check_types(cls, options)
        return cls(model, **options)
    card = card_of(model)
    cls = catalog.pipeline_class(task_of(task or card.task, model))
    accepted = inspect.signature(cls).parameters
    mine = {k: v for k, v in options.items() if k in accepted and k != "model"}
    _check_types(cls, mine)
    rest = {k: v for k, v in options.items() if k not in mine}
    try:
        loaded = load(model, **rest)
    except errors.BadArgument as error:
        asked = getattr(error, "argument", None)
        if asked in rest and asked not in inspect.signature(load).parameters:  # it may be meant for the pipeline
            error.add_note(f"the pipeline's own options: {', '.join(k for k in accepted if k != 'model') or 'none'}")
        raise
    return cls(loaded, **mine)


def _check_types(cls: type[Pipeline], options: Mapping[str, Any]) -> None:
    """Raise BadArgument for an option of another type than the class says, before anything is loaded."""
    if (wrong := wrong_type(cls, options)) is not None:
        raise errors.BadArgument(wrong[1], argument=wrong[0], accepted=[])


def task_of(task: str | None, model: Any) -> str:
    """``task``, which must be known by now. Raises ``zoo.errors.UnknownTask``."""
    if task is None:
        raise errors.UnknownTask(
            f"what {model!r:.80} is for is not known: it was not built by the zoo; give task=", task=""
        )
    return task


# -- small helpers ---------------------------------------------------------------------------------------------------


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None)


def _signature(ready: Any) -> Any:
    shapes: list[Any] = []
    map_tensors(lambda t: shapes.append((tuple(t.shape), t.dtype)), ready)
    return shapes


def describe_source(source: Any) -> str:
    """An input in a few words: a path as given, text cut short, an object by its type and size."""
    if isinstance(source, tuple):
        return " + ".join(describe_source(s) for s in source)
    if isinstance(source, (str, Path)):
        text = str(source)
        return text if len(text) <= 60 or isinstance(source, Path) else text[:57] + "..."
    size = getattr(source, "shape", None) or getattr(source, "size", None)
    return f"{type(source).__name__}{tuple(size)}" if isinstance(size, (tuple, torch.Size)) else type(source).__name__


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file name may be
        return False


class progress_bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, show: bool, total: int, text: str) -> None:
        self.progress = None
        if show:
            from rich.console import Console
            from rich.progress import Progress

            self.progress = Progress(console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task(text, total=total)

    def __enter__(self) -> Any:
        if self.progress is not None:
            self.progress.start()
        return self.advance

    def __exit__(self, *_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)
