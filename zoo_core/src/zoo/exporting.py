"""``zoo.export``: a model as one file that runs without Python (ONNX) or with torch alone (torch.export).

The operators of the zoo are written out as torch's own (the back end ``export``), so that neither file needs the zoo.
The file is loaded again in its runtime and compared with the model before it takes its place.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zoo_kernels
from zoo_registry import errors
from zoo_registry.extras import optional

from . import __version__, catalog
from .example_inputs import Inputs
from .files import check_place, unwritable, whole
from .pipelines import evaluating
from .placement import device_of
from .saving import describe_model, unwrapped

logger = logging.getLogger("zoo")

#: ending -> format
FORMATS = {".onnx": "onnx", ".pt2": "pt2"}
#: The ONNX operator set that is written, unless another is asked for.
OPSET = 20
#: Largest difference of an output over its largest value: what two orders of float32 operations give.
TOLERANCE = 1e-4
OPERATORS = ("plain", "kernels")
#: Of a file that adds up rows of one index: seen in onnxruntime 1.32, whose threads do so without waiting for another.
UNSAFE = "it adds up rows of one index, which onnxruntime does reliably with one thread alone (intra_op_num_threads=1)"
Answer = Callable[[Mapping[str, Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Port:
    """One input or output of an exported file; a size that may differ from run to run is a name, as "batch"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(str(size) for size in self.shape)})"


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote; ``print`` it, or take ``to_dict()``."""

    path: Path
    format: str
    model: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dynamic: tuple[str, ...]  #: sizes that may differ from run to run
    difference: float  #: largest difference from the model, over the output's largest value
    compared: tuple[str, ...]  #: the inputs on which file and model were compared
    size: int  #: bytes, external data included
    facts: dict[str, Any] = field(repr=False)  #: what the file says about itself
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, ready for JSON."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        rows = [
            ("file", f"{self.path} ({self.format}, {self.size / 1e6:.1f} MB)"),
            ("model", self.model),
            *(("input", port) for port in self.inputs),
            *(("output", port) for port in self.outputs),
            ("any size", ", ".join(self.dynamic) or "none: every size is fixed"),
            ("compared", f"{'; '.join(self.compared)}: differs by at most {self.difference:.1e} of the largest value"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{title:<10}{text}" for title, text in rows)


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    inputs: Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor] | None = None,
    dynamic: Collection[str] | None = None,
    format: str | None = None,
    operators: str = "plain",
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a model's forward pass in evaluation mode to a file, compare that with the model, and say what it takes.

    model: a module on the CPU, or what ``zoo.load`` takes. What a model carries from call to call (``step``,
    generation) is not in the file.
    path: ``.onnx`` (onnxruntime; needs ``ssm-zoo[onnx]``; weights above 2 GB lie beside it in ``<path>.data``) or
    ``.pt2`` (``torch.export.load(path).module()``). ``format``: "onnx" or "pt2" for a name with another ending.
    inputs: an example of what ``forward`` takes, a tensor (or several) by position or a mapping by keyword, each with
    its batch axis; by default drawn as the model's card describes them.
    dynamic: sizes that may differ from run to run, of "batch" (the first axis) and "length" (the second, of sequences);
    () fixes all. By default those that the model's computation leaves open: what it fixes is in the result's ``notes``.
    operators: "plain" writes torch's operators alone. "kernels" (only .pt2) keeps the zoo's, which are faster and need
    ``import zoo_kernels`` before the file is loaded.
    opset: of ONNX, 18 or later; by default 20. tolerance: the largest difference that is taken, relative to the largest
    value of an output (halves need more than the default 1e-4, which is for float32).

    Outputs are named by their place in what ``forward`` returns ("output"; keys, fields or "output.0" of a nest, joined
    by dots); None is left out. File and model are compared on the example and on fresh inputs of other sizes. Only then
    the file appears; it says which model it holds, the licence of its weights, its classes and its preprocessing.

    Raises NotExportable where the model cannot be traced, has an operator that ONNX lacks or answers differently,
    BadArgument for arguments that do not fit, MissingExtra, StoreError. Nothing is left behind then.
    """
    path = Path(path).expanduser()
    kind, runtime = check(path, format=format, operators=operators, opset=opset, tolerance=tolerance)
    if not isinstance(model, nn.Module):
        from .loading import load

        model = load(model)
    model = unwrapped(model)
    _check_model(model, kind)
    examples = Inputs(model, inputs, dynamic)
    plans = [tuple(dynamic)] if dynamic is not None else examples.plans()
    notes: list[str] = []
    with evaluating(model), torch.random.fork_rng(devices=[]), torch.no_grad():
        facts = describe(model, examples)
        _check_answers(model, examples, kind)
        for plan in plans:
            try:
                draft = _Draft(model, examples, plan, operators)
                if dynamic is not None and (fixed := [name for name in plan if name not in draft.dynamic]):
                    raise errors.NotExportable(
                        f"{' and '.join(fixed)} cannot differ from run to run: the computation of {_name(model)} fixes "
                        "it; leave it out of dynamic",
                        format=kind,
                    )
                return _write(draft, path, kind, facts, notes, tolerance, opset or OPSET, runtime)
            except errors.NotExportable as error:
                if plan == plans[-1] or not getattr(error, "sizes", True):
                    raise
                note = f"{plan[-1]} is fixed: {error}"
                logger.warning("%s: %s", _name(model), note)
                notes.append(note)
    raise AssertionError("unreachable: the last plan returns or raises")


# -- what is asked for -----------------------------------------------------------------------------------------------


def check(
    path: Path,
    *,
    format: str | None = None,
    operators: str = "plain",
    opset: int | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[str, Any]:
    """What can be said before a model is loaded: (format, onnxruntime where it is needed). Raises as :func:`export`."""
    kind = _format(path, format)
    _check_choices(kind, operators, opset, tolerance)
    runtime = _needed() if kind == "onnx" else None
    check_place(path)
    if path.is_dir():
        raise unwritable(path, IsADirectoryError(None, "it is a folder", str(path)))
    return kind, runtime


def _format(path: Path, format: str | None) -> str:
    if format is None:
        if path.suffix.lower() not in FORMATS:
            raise errors.BadArgument(
                f"{path} ends in {path.suffix!r}; expected .onnx (onnxruntime) or .pt2 (torch.export), or format=",
                argument="path",
                accepted=sorted(FORMATS),
            )
        return FORMATS[path.suffix.lower()]
    return _one_of("format", format, tuple(FORMATS.values()))


def _one_of(argument: str, value: Any, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise errors.BadArgument(
            f"{argument} is {value!r}; expected {' or '.join(map(repr, accepted))}",
            argument=argument,
            accepted=accepted,
        )
    return value


def _check_choices(kind: str, operators: str, opset: int | None, tolerance: float) -> None:
    _one_of("operators", operators, OPERATORS)
    if operators == "kernels" and kind == "onnx":
        raise errors.BadArgument(
            "operators is 'kernels', which ONNX does not have; expected 'plain', or a path that ends in .pt2",
            argument="operators",
            accepted=["plain"],
        )
    if opset is not None and (kind != "onnx" or not isinstance(opset, int) or opset < 18):
        raise errors.BadArgument(
            f"opset is {opset!r}; expected an ONNX operator set, 18 or later, with a path that ends in .onnx",
            argument="opset",
            accepted=[],
        )
    if not 0 <= tolerance < 1:
        raise errors.BadArgument(
            f"tolerance is {tolerance!r}; expected a share of the outputs' largest value, from 0 to 1",
            argument="tolerance",
            accepted=[],
        )


def _needed() -> Any:
    """onnxruntime, and the packages that write ONNX. Raises MissingExtra."""
    for module in ("onnx", "onnxscript"):
        optional(module, "writing ONNX", "ssm-zoo[onnx]")
    return optional("onnxruntime", "comparing an ONNX file with its model", "ssm-zoo[onnx]")


def _check_model(model: nn.Module, kind: str) -> None:
    if (place := device_of(model)).type != "cpu":
        raise errors.BadArgument(
            f"the model is on {place}; expected the CPU, where file and model are compared: model.cpu()",
            argument="model",
            accepted=["cpu"],
        )
    if kind == "onnx" and any(p.dtype is torch.bfloat16 for p in model.parameters()):
        raise errors.BadArgument(
            "the model's weights are bfloat16, which onnxruntime does not compute on a CPU; expected float32: "
            "model.float()",
            argument="model",
            accepted=["float32"],
        )
    if reason := getattr(model, "not_exportable", None):
        raise errors.NotExportable(f"{_name(model)} cannot be exported: {reason}", format=kind)


def _name(model: nn.Module) -> str:
    info = getattr(model, "zoo_info", None)
    return type(model).__name__ if info is None else info.name


# -- the facts in the file -------------------------------------------------------------------------------------------


def describe(model: nn.Module, examples: Inputs) -> dict[str, Any]:
    """What a file says about the model in it; unknown facts are left out."""
    info = getattr(model, "zoo_info", None)
    facts: dict[str, Any] = {"model": _name(model), "zoo_version": __version__}
    if info is None or info.card is None:
        return facts
    from .model_card import published

    table = describe_model(model, {})
    own = table["pretrained_cfg"]
    facts |= {
        "task": info.card.task,
        "weights": published(info.source),
        "licence": own.get("licence"),
        "labels": _labels(model, table),
        "preprocess": own.get("preprocess"),
        "input": examples.described,
        "plugin": table["plugin"]["name"],
    }
    return {key: value for key, value in facts.items() if value}


def _labels(model: nn.Module, table: Mapping[str, Any]) -> list[str] | None:
    """Names of a classifier's classes in the order of its outputs; None where nobody names them."""
    info = model.zoo_info
    if table.get("labels"):
        return list(table["labels"])
    if not table["pretrained_cfg"].get("labels"):
        return None
    try:
        return catalog.pipeline_class(info.card.task)(model).labels()
    except (errors.UnknownTask, errors.MissingExtra) as error:
        logger.warning("%s: the names of its classes are not in the file: %s", info.name, error)
        return None


def _check_answers(model: nn.Module, examples: Inputs, kind: str) -> None:
    """Raise NotExportable where there is nothing that a file could be compared with."""
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        runs.append(outputs(examples.call(model, examples.values)))
    if not runs[0]:
        raise errors.NotExportable(f"{_name(model)} returns no tensor, so there is nothing to export", format=kind)
    if not all(torch.equal(first, second) for first, second in zip(*(run.values() for run in runs), strict=True)):
        raise errors.NotExportable(
            f"{_name(model)} draws random numbers in its forward pass, so that no file can be compared with it",
            format=kind,
        )


# -- from a model to a program ---------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """``model`` with outputs that every format has: one tensor, or a dict of tensors by their names."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor | dict[str, Tensor]:
            found = outputs(model(*args, **kwargs), names)
            return found["output"] if list(found) == ["output"] else found

        # torch.export calls arguments, and what it asserts about their sizes, by the names of a signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        self.forward = forward


def outputs(value: Any, taken: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors in what a model returned, by names that fit a file, of which its inputs have ``taken`` some."""
    from .testing.cases import tensors

    found = tensors(value)
    return {f"output.{name}" if name[:1].isdigit() or name in taken else name: found[name] for name in found}


class _Draft:
    """A traced model: the program, its sizes by name, and pairs of inputs and the model's own answers."""

    def __init__(self, model: nn.Module, examples: Inputs, plan: tuple[str, ...], operators: str) -> None:
        self.model, self.examples, self.operators = model, examples, operators
        self.name = _name(model)
        self.example = example = examples.traced(plan)
        self.output_names = list(outputs(examples.call(model, example), examples.names))
        self.program = self._trace(example, plan)
        self._check_program()
        nodes = {node.name: node for node in self.program.graph.nodes}
        given = [nodes[name].meta["val"] for name in self.program.graph_signature.user_inputs]
        self.symbols: dict[str, str] = {}
        for tensor, axes in zip(given, examples.axes(plan).values(), strict=True):
            for axis, name in axes.items():
                if not (size := str(tensor.shape[axis])).isdigit():  # a SymInt may be a number
                    self.symbols.setdefault(size, name)
        self.dynamic = tuple(name for name in plan if name in self.symbols.values())
        self.inputs = tuple(self._port(name, t) for name, t in zip(examples.names, given, strict=True))
        last = [nodes[name].meta["val"] for name in self.program.graph_signature.user_outputs]
        self.outputs = tuple(self._port(name, t) for name, t in zip(self.output_names, last, strict=True))

    def _trace(self, example: Mapping[str, Tensor], plan: tuple[str, ...]) -> Any:
        plainly = zoo_kernels.backend("export") if self.operators == "plain" else zoo_kernels.backend("auto")
        try:
            with _quietly(), plainly:
                return self.traced(_Flat(self.model, self.examples.names), example, plan)
        except Exception as error:  # torch, and any layer that meets a tensor without values
            raise errors.NotExportable(
                f"{self.name} cannot be traced by torch.export: {_first_line(error)}", format=None
            ) from error

    def traced(self, module: nn.Module, example: Mapping[str, Tensor], plan: tuple[str, ...]) -> Any:
        args, kwargs = self.examples.arguments(example)
        shapes = {
            name: dict.fromkeys(axes, torch.export.Dim.AUTO) or None for name, axes in self.examples.axes(plan).items()
        }
        by_position, by_name = self.examples.arguments(shapes)
        return torch.export.export(module, args, kwargs, dynamic_shapes=by_position or by_name, strict=False)

    def _check_program(self) -> None:
        targets = [n.target for n in self.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
        own = sorted({str(t) for t in targets if t.namespace == "zoo_kernels"})
        if own and self.operators == "plain":
            raise errors.NotExportable(
                f"{self.name} uses {', '.join(own)}, which has no form in plain torch operators; "
                "operators='kernels' writes a .pt2 that keeps it",
                format=None,
                sizes=False,
            )

    def _port(self, name: str, tensor: Any) -> Port:
        return Port(name, tuple(self._size(size) for size in tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def _size(self, size: Any) -> int | str:
        return int(text) if (text := str(size)).isdigit() else self.named(text)

    def named(self, expression: str) -> str:
        """An expression of torch's symbols with our names for them."""
        return re.sub(r"\b[su]\d+\b", lambda found: self.symbols.get(found[0], found[0]), expression)

    def limits(self) -> Iterator[str]:
        """A sentence for each size that is not free."""
        for symbol, values in self.program.range_constraints.items():
            name, low, high = self.symbols.get(str(symbol)), values.lower, values.upper
            if name is not None and (low > 2 or high < 2**31):
                yield f"{name} must be {low} or more" + (f", at most {high}" if high < 2**31 else "")


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # torch's exporters say in the outermost which step of theirs it was
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch and onnxscript say about their own insides."""
    names = ("onnxscript", "torch.onnx", "onnx_ir", "torch.export", "torch._export")
    loggers = [logging.getLogger(name) for name in names]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


# -- from a program to a file ----------------------------------------------------------------------------------------


def _write(
    draft: _Draft,
    path: Path,
    kind: str,
    facts: dict[str, Any],
    notes: list[str],
    tolerance: float,
    opset: int,
    runtime: Any,
) -> Exported:
    facts = facts | {"operators": f"ONNX opset {opset}" if kind == "onnx" else draft.operators}
    program = _onnx_program(draft, opset) if kind == "onnx" else None
    if program is not None and _adds_up(program):
        notes = [*notes, UNSAFE]
    with whole(path) as work, tempfile.TemporaryDirectory(prefix=".zoo.", dir=path.parent) as folder:
        file = Path(folder) / path.name  # its own name, by which an ONNX file finds its data
        if program is not None:
            for key, value in facts.items():
                program.model.metadata_props[f"zoo.{key}"] = value if isinstance(value, str) else json.dumps(value)
            program.save(file)
            del program
            answer = _onnx_answer(draft, file, runtime)
        else:
            answer = _program_answer(draft, file, facts)
        difference, compared = _compare(draft, answer, kind, tolerance)
        size = sum(part.stat().st_size for part in Path(folder).iterdir())
        data = file.with_name(file.name + ".data")
        if data.exists():
            with whole(path.with_name(data.name)) as beside:
                os.replace(data, beside)
        os.replace(file, work)
    return Exported(
        path,
        kind,
        draft.name,
        draft.inputs,
        draft.outputs,
        draft.dynamic,
        difference,
        compared,
        size,
        facts,
        (*notes, *draft.examples.fixed(draft.dynamic), *draft.limits()),
    )


def _onnx_program(draft: _Draft, opset: int) -> Any:
    from .onnx_forms import complex_constants, has_complex_numbers, table

    complex_ = False
    try:
        with _quietly():
            program = draft.program
            if complex_ := has_complex_numbers(program):
                # Traced once more, without them.
                program = draft.traced(complex_constants(program), draft.example, draft.dynamic)
            found = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(draft.examples.names),
                output_names=draft.output_names,
                custom_translation_table=table(),
            )
    except Exception as error:  # each translation of torch's has its own
        lacking = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", str(error))
        said = f"ONNX has no form of {lacking[1]}.{lacking[2]}" if lacking else _first_line(error)
        raise errors.NotExportable(
            f"{draft.name} cannot be written as ONNX: {said}", format="onnx", sizes=complex_ or lacking is None
        ) from error
    assert found is not None
    for value in (*found.model.graph.inputs, *found.model.graph.outputs):
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int) and size.value is not None:
                    value.shape[axis] = draft.named(str(size.value))
    return found


def _adds_up(program: Any) -> bool:
    """Whether rows of one index are added up (ScatterND, ScatterElements)."""
    kinds = [node.attributes.get("reduction") for node in program.model.graph]
    return any(kind is not None and kind.as_string() != "none" for kind in kinds)


def _onnx_answer(draft: _Draft, file: Path, runtime: Any) -> Answer:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's kinds are not one family
        raise errors.NotExportable(
            f"onnxruntime does not load {draft.name}: {_first_line(error)}", format="onnx"
        ) from error
    taken = {one.name for one in session.get_inputs()}

    def answer(given: Mapping[str, Tensor]) -> list[Tensor]:
        named = zip(draft.examples.names, given.values(), strict=True)
        feed = {name: tensor.numpy() for name, tensor in named if name in taken}
        return [torch.from_numpy(found) for found in session.run(draft.output_names, feed)]

    return answer


def _program_answer(draft: _Draft, file: Path, facts: Mapping[str, Any]) -> Answer:
    try:
        with _quietly():
            torch.export.save(draft.program, file, extra_files={"zoo.json": json.dumps(facts)})
            module = torch.export.load(file).module()
    except OSError:
        raise
    except Exception as error:  # of torch's serialisation, whose kinds are not one family
        raise errors.NotExportable(
            f"{draft.name} cannot be written by torch.export.save: {_first_line(error)}", format="pt2"
        ) from error

    def answer(given: Mapping[str, Tensor]) -> list[Tensor]:
        return list(outputs(draft.examples.call(module, given)).values())

    return answer


def _compare(draft: _Draft, answer: Answer, kind: str, tolerance: float) -> tuple[float, tuple[str, ...]]:
    """The largest difference between file and model, and on which inputs. Raises NotExportable above ``tolerance``."""
    worst, compared = 0.0, []
    for words, given in draft.examples.samples(draft.model, draft.dynamic):
        expected = outputs(draft.examples.call(draft.model, given))
        try:
            found = answer(given)
        except Exception as error:  # of the runtime, whose kinds are not one family
            raise errors.NotExportable(
                f"the {kind} file of {draft.name} does not run on {words}: {_first_line(error)}", format=kind
            ) from error
        for (name, wanted), one in zip(expected.items(), found, strict=True):
            difference = _difference(one, wanted)
            if not difference <= tolerance:
                raise errors.NotExportable(
                    f"the {kind} file of {draft.name} answers differently on {words}: {name} by {difference:.3g} of "
                    f"its largest value, allowed {tolerance:g}; no file was written",
                    format=kind,
                    difference=difference,
                )
            worst = max(worst, difference)
        compared.append(words)
    return worst, tuple(compared)


def _difference(found: Tensor, expected: Tensor) -> float:
    from .testing.compare import relative_error

    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    if expected.is_floating_point() or expected.is_complex():
        return relative_error(found, expected)
    return 0.0 if torch.equal(found, expected) else float("inf")
