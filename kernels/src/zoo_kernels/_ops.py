"""How an operator is put together: a schema, a fake, and one module for each back end.

To add an operator ``foo``, make a folder ``ops/foo`` and put into its ``__init__.py``::

    _foo = Operator(
        "foo",
        package=__name__,
        arguments="Tensor x, Tensor? gate, Tensor? path, bool[] reverse",   # torch schema types
        outputs=("y", "final"),          # differentiable results, always tensors (shape (0,) where absent)
        saved=("borders",),              # what forward keeps for backward; shape (0,) unless ``save``
        differentiable=("x", "gate"),    # the tensor arguments that may receive gradients
        backends={"reference": ".reference", "native": ".native", "triton": ".gpu"},
        fake=_fake,                      # (*arguments, save) -> empty tensors in the order outputs + saved
        validate=_validate,              # (*arguments): looks at values (rows of a path) when a call runs    [optional]
        cases=_cases,                    # (device, dtype) -> small argument tuples for zoo_kernels.self_check()
    )

    def foo(x, gate=None, *, path=None, reverse=False):
        '''Shapes, units, errors, source.'''
        ...checks from _checks, then the canonical arguments...
        if _foo.exporting():
            from .export import foo_export
            return foo_export(...)
        y, final = _foo(x, gate, path, flags)

add its names to ``_LAZY`` in ``zoo_kernels/__init__.py``, and write the modules that ``backends`` names. Each has

    forward(*arguments, save) -> tuple of tensors, outputs + saved, with exactly the fake's shapes, dtypes, strides
    backward(grads, arguments, saved, needs) -> list with one gradient (or None) for each name in ``differentiable``
        ``grads``: one tensor for each output; ``needs``: one bool for each name in ``differentiable``
    unavailable() -> None, or why it can never run here (no compiler at build time, no triton)       [optional]
    unsupported(*arguments) -> None, or why it cannot serve this call (dtype, device, a limit)       [optional]

``reference.py`` may leave ``backward`` out: autograd through its ``forward`` serves (a recomputation). A module that
does not exist is reported as not written. Modules are imported on first use, so that one broken by a Triton release
costs only itself.

Every operator is a ``torch.library`` custom operator ``zoo_kernels::foo`` with an explicit backward operator
``zoo_kernels::foo_backward``: opaque to torch.compile and torch.export, with the back end chosen when it runs. Second
derivatives and forward mode (``create_graph=True``, ``torch.func.jvp``) come from torch, through the definition.
Autocast does not reach inside: operators take mixed dtypes and accumulate in float32 or better by themselves.

An operator that updates an argument in place (a decoding step) names it in ``mutates`` and has no backward.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import _backends
from ._backends import BackendError

OPERATORS: dict[str, Operator] = {}


def results_only(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call with these may go past torch's dispatcher, which takes 40 microseconds: plain tensors of numbers
    in eager mode that no gradient, trace, profiler, dispatch mode or transform of functions looks at."""
    grad = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if (type(x) is not Tensor and type(x) is not Parameter) or x.is_meta or (grad and x.requires_grad):
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()  # which shows operators by their names
        or forward_ad._current_level >= 0
    )


class Operator:
    """See the module docstring."""

    def __init__(
        self,
        name: str,
        *,
        package: str,
        arguments: str,
        outputs: Sequence[str],
        backends: dict[str, str],
        fake: Callable[..., tuple[Tensor, ...]],
        saved: Sequence[str] = (),
        differentiable: Sequence[str] = (),
        mutates: Sequence[str] = (),
        cases: Callable[[torch.device, torch.dtype], Iterable[tuple[Any, ...]]] | None = None,
        validate: Callable[..., None] | None = None,
    ) -> None:
        self.name, self.package, self.backends = name, package, backends
        self.cases, self.validate = cases, validate
        self.outputs, self.saved, self.mutates = tuple(outputs), tuple(saved), tuple(mutates)
        declared = [part.strip().rsplit(" ", 1) for part in arguments.split(",")]
        self.arguments = [argument for _, argument in declared]
        self.tensors = [i for i, (kind, _) in enumerate(declared) if kind.startswith("Tensor")]
        self.differentiable = [self.arguments.index(argument) for argument in differentiable]
        self._modules: dict[str, ModuleType | str] = {}  # a string is the reason why there is none
        self._reasons: dict[str, str | None] = {}
        results = ", ".join(["Tensor"] * len(self.outputs + self.saved))
        tail = "bool save, str backend"
        marked = ", ".join(
            f"{k.replace('Tensor', f'Tensor(a{i}!)') if a in mutates else k} {a}" for i, (k, a) in enumerate(declared)
        )
        self.op = torch.library.custom_op(
            f"zoo_kernels::{name}", self._run, mutates_args=self.mutates, schema=f"({marked}, {tail}) -> ({results})"
        )
        self.op.register_fake(lambda *args: self._tuple(fake(*args[:-2], save=args[-2])))
        if differentiable:
            grads = ", ".join(f"Tensor grad_{output}" for output in self.outputs)
            kept = "".join(f", Tensor saved_{part}" for part in self.saved)
            self.backward_op = torch.library.custom_op(
                f"zoo_kernels::{name}_backward",
                self._run_backward,
                mutates_args=(),
                schema=f"({grads}, {arguments}{kept}, bool[] needs, str backend) -> Tensor[]",
            )
            self.backward_op.register_fake(self._fake_backward)
            self.op.register_autograd(self._autograd, setup_context=self._setup)
        OPERATORS[name] = self

    # -- calling ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """The outputs (without what is saved): one tensor, or a tuple."""
        if results_only([args[i] for i in self.tensors]):
            result = self._run(*args, False, _backends.forced())
            if len(self.outputs) == 1:
                return result[0] if self.saved else result
            return result[: len(self.outputs)]
        if forward_ad._current_level >= 0 and any(_has_tangent(args[i]) for i in self.tensors):
            return self._plainly(args)
        save = (
            bool(self.saved)
            and torch.is_grad_enabled()
            and any(args[i] is not None and args[i].requires_grad for i in self.differentiable)
        )
        result = self.op(*args, save, _backends.forced())
        if len(self.outputs + self.saved) == 1:
            return result
        return result[0] if len(self.outputs) == 1 else result[: len(self.outputs)]

    def _plainly(self, args: Sequence[Any]) -> Any:
        """The definition in torch's own operators, which torch differentiates in every mode."""
        module = self.module("reference")
        assert isinstance(module, ModuleType)
        result = module.forward(*args, save=False)
        if isinstance(result, Tensor):
            return result
        return result[0] if len(self.outputs) == 1 else result[: len(self.outputs)]

    def exporting(self) -> bool:
        return _backends.exporting()

    def forced(self) -> bool:
        return _backends.forced() != ""

    # -- choosing --------------------------------------------------------------------------------------------------

    def module(self, name: str) -> ModuleType | str:
        """The module of back end ``name``, or the reason why there is none."""
        if name not in self._modules:
            self._modules[name] = self._import(name)
        return self._modules[name]

    def _import(self, name: str) -> ModuleType | str:
        if name not in self.backends:
            return f"{self.name} has no {name} implementation"
        path = importlib.util.resolve_name(self.backends[name], self.package)
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name == path:
                return f"{self.name} has no {name} implementation"
            return f"{error}"
        except Exception as error:  # a Triton release may break a kernel in any way: the others must go on
            return f"its module does not import: {type(error).__name__}: {error}"

    def unavailable(self, name: str) -> str | None:
        """Why back end ``name`` can never run here, or None."""
        if name not in self._reasons:
            module = self.module(name)
            if isinstance(module, str):
                reason: str | None = module
            else:
                reason = module.unavailable() if hasattr(module, "unavailable") else None
            self._reasons[name] = reason
        return self._reasons[name]

    def refusal(self, name: str, args: Sequence[Any]) -> str | None:
        """Why back end ``name`` cannot serve a call with these arguments, or None."""
        reason = self.unavailable(name)
        module = self.module(name)
        if reason is None and not isinstance(module, str) and hasattr(module, "unsupported"):
            reason = module.unsupported(*args)
        return reason

    def choose(self, args: Sequence[Any], wanted: str) -> Any:
        """The module that serves a call; ``wanted`` is a forced back end or ''."""
        if wanted == "export":
            wanted = "reference"
        device = args[self.tensors[0]].device.type
        if wanted:
            reason = self.refusal(wanted, args)
            if reason is not None:
                raise BackendError(
                    f"{self.name}: the back end {wanted!r} was asked for and cannot serve this call: {reason}. "
                    "Use zoo_kernels.backend('auto') to let another one serve."
                )
            return self.module(wanted)
        for name in _backends.AUTOMATIC.get(device, ("reference",)):
            if name == "reference":
                break
            reason = self.refusal(name, args)
            if reason is None:
                return self.module(name)
            _backends.passed_over(self.name, name, reason)
        return self.module("reference")

    # -- what the custom operators call ----------------------------------------------------------------------------

    @staticmethod
    def _tuple(result: Any) -> Any:
        if isinstance(result, tuple) and len(result) == 1:
            return result[0]
        return result

    def _run(self, *args: Any) -> Any:
        *args, save, wanted = args  # type: ignore[assignment]
        if self.validate is not None:
            self.validate(*args)
        module = self.choose(args, wanted)
        kind = args[self.tensors[0]].device.type
        if not torch.is_autocast_enabled(kind):
            return self._tuple(module.forward(*args, save=save))
        with torch.autocast(kind, enabled=False):
            return self._tuple(module.forward(*args, save=save))

    def _split(self, args: Sequence[Any]) -> tuple[Any, Any, Any]:
        first, last = len(self.outputs), len(self.outputs) + len(self.arguments)
        return args[:first], args[first:last], args[last : last + len(self.saved)]

    def _run_backward(self, *args: Any) -> list[Tensor]:
        *args, needs, wanted = args  # type: ignore[assignment]
        grads, arguments, saved = self._split(args)
        module = self.choose(arguments, wanted)
        backward = getattr(module, "backward", None)
        with torch.autocast(arguments[self.tensors[0]].device.type, enabled=False):
            if backward is not None:
                found = backward(grads, arguments, saved, needs)
            else:
                found = self._recompute(module, grads, arguments, needs)
        out: list[Tensor] = []
        # torch allows no result of a custom operator to share memory with an argument or with another result.
        shared = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for gradient, need, i in zip(found, needs, self.differentiable, strict=True):
            like = arguments[i]
            if not need:
                out.append(self._absent(arguments))
            elif gradient is None:
                out.append(torch.zeros_like(like, memory_format=torch.contiguous_format))
            else:
                gradient = gradient.to(like.dtype).contiguous()
                if gradient.untyped_storage().data_ptr() in shared or gradient.numel() == 0:
                    gradient = gradient.clone()
                shared.add(gradient.untyped_storage().data_ptr())
                out.append(gradient)
        return out

    def _absent(self, arguments: Sequence[Any]) -> Tensor:
        return arguments[self.tensors[0]].new_empty(0)

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        *args, needs, _ = args  # type: ignore[assignment]
        _, arguments, _ = self._split(args)
        return [
            torch.empty_like(arguments[i], memory_format=torch.contiguous_format) if need else self._absent(arguments)
            for need, i in zip(needs, self.differentiable, strict=True)
        ]

    def _recompute(
        self, module: Any, grads: Sequence[Tensor], arguments: Sequence[Any], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Autograd through ``module.forward``."""
        wanted = [i for i, need in zip(self.differentiable, needs, strict=True) if need]
        values = list(arguments)
        for i in wanted:
            values[i] = values[i].detach().requires_grad_()
        found: Sequence[Tensor | None] = [None] * len(wanted)
        with _autograd_inside_an_operator():
            outputs = module.forward(*values, save=False)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=False) if o.requires_grad and o.numel()]
            if pairs:
                found = torch.autograd.grad(
                    [o for o, _ in pairs], [values[i] for i in wanted], [g for _, g in pairs], allow_unused=True
                )
        given = dict(zip(wanted, found, strict=True))
        return [given.get(i) for i in self.differentiable]

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *args, _, ctx.backend = inputs
        output = output if isinstance(output, tuple) else (output,)
        kept = output[len(self.outputs) :]
        if kept:
            ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*(args[i] for i in self.tensors), *kept)
        ctx.plain = [None if i in self.tensors else value for i, value in enumerate(args)]

    def _autograd(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        args = list(ctx.plain)
        for i, value in zip(self.tensors, stored, strict=False):
            args[i] = value
        kept = stored[len(self.tensors) :]
        needs = [args[i] is not None and ctx.needs_input_grad[i] for i in self.differentiable]
        grads = grads[: len(self.outputs)]
        found: Sequence[Tensor | None]
        if _wants_second_derivatives():
            found = self._differentiably(args, grads, needs)
        else:
            found = self.backward_op(*grads, *args, *kept, needs, ctx.backend)
        out: list[Tensor | None] = [None] * (len(self.arguments) + 2)
        for gradient, need, i in zip(found, needs, self.differentiable, strict=True):
            out[i] = gradient if need else None
        return tuple(out)

    def _differentiably(
        self, args: Sequence[Any], grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients that can be differentiated again: autograd through the definition, its graph kept."""
        wanted = [i for i, need in zip(self.differentiable, needs, strict=True) if need]
        # Another name for each argument: gradients end here, and what is computed from them leads on to the arguments.
        values = list(args)
        for i in wanted:
            values[i] = values[i].view_as(values[i])
        outputs = self._plainly(values)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and o.numel()]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [values[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=True,
            )
        given = dict(zip(wanted, found, strict=True))
        return [given.get(i) for i in self.differentiable]


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _wants_second_derivatives() -> bool:
    """Whether a backward pass keeps its graph (``create_graph=True``). torch.func always does, so it is not asked; nor
    is compilation."""
    return (
        torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.compiler.is_compiling()
    )


@contextlib.contextmanager
def _autograd_inside_an_operator() -> Iterator[None]:
    """Autograd records again, though torch leaves its dispatch keys out while a custom operator runs.

    In this very thread: a backward pass on a GPU runs in the one thread that torch's engine has for the device, and a
    second thread's pass would wait for it for ever. torch offers no public way.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
