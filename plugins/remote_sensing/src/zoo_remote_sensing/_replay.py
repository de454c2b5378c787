"""What the adapters of this plugin share: intermediates by the original's module paths, and files of losses."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.reference import Golden, ReferenceAdapter, read_golden

logger = logging.getLogger(__name__)

#: an original's module path -> ours, and the layout of its output; see :meth:`PathAdapter.paths`
Place = tuple[str, Callable[[Any], Any]]


def same(x: Any) -> Any:
    return x


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


class Losses(nn.Module):
    """Stands for an original's loss functions where an adapter must return a module: no parameters, settings only."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)


class PathAdapter(ReferenceAdapter):
    """An adapter that finds a file's intermediates by the module paths that the file names (its ``mids``)."""

    #: names of intermediates in the system's files -> the original's modules; :meth:`run` returns those there are
    mids: ClassVar[Mapping[str, str]] = {}
    #: the input whose gradients a file of losses holds come from this output
    loss_output: str = ""

    def place(self, model: nn.Module, path: str) -> Place:
        """Where our model computes what the original's module at ``path`` puts out. Raises ValueError if nowhere."""
        raise ValueError(f"{self.system}: no module of ours computes what the original's {path!r} does")

    def calls(self, model: nn.Module, path: str) -> int:
        """How many calls of the original one call of ours makes (two dates in one batch: 2)."""
        return 1

    def intermediate(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the original's module puts out where ours (called with ``args``) puts out something else."""
        return output

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        """The sum over all outputs of mean(output^2), as these files say."""
        return torch.stack([v.float().pow(2).mean() for k, v in named.items() if k.startswith("out/")]).sum()

    @abstractmethod
    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`run` returns, without intermediates."""

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """:meth:`outputs`, and under ``mid/`` the intermediates of :attr:`mids` that this model has."""
        seen: dict[str, list[Any]] = {}
        with self._watch(model, {n: p for n, p in self.mids.items() if self._has(model, p)}, seen):
            found = self.outputs(model, inputs)
        for name, done in seen.items():
            if isinstance(done[-1], list):
                found |= {f"mid/{name}.{i}": element for i, element in enumerate(done[-1])}
            else:
                found |= {f"mid/{name}#{n}" if n > 1 else f"mid/{name}": one for n, one in enumerate(done, start=1)}
        return found

    def replay(self, path: str | Path, *, grad: bool = False, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        golden = read_golden(path)
        golden = replace(golden, inputs={name: tensor.to(device) for name, tensor in golden.inputs.items()})
        model = self.build(golden.config, golden.state, source=golden.source).to(device)
        if isinstance(model, Losses):
            return self._replay_losses(golden, model, grad=grad)
        wanted = {n: p for n, p in golden.mids_of.items() if any(_parts(k)[0] == n for k in golden.mids)}
        seen: dict[str, list[Any]] = {}
        with torch.set_grad_enabled(grad):
            with self._watch(model, wanted, seen):
                named = {f"out/{k}": v for k, v in self.outputs(model, golden.inputs).items()}
            if grad:
                self.loss(golden, named).backward()
                gradients = self.gradients(model)
                named.update({f"grad/{k}": gradients[k] for k in golden.grads if k in gradients})
        named |= {f"mid/{k}": mid for k in golden.mids if (mid := _pick(seen, k)) is not None}
        return {k: v.detach().cpu() for k, v in named.items()}

    def _replay_losses(self, golden: Golden, model: nn.Module, *, grad: bool) -> dict[str, Tensor]:
        """Losses have no parameters: the gradients of such a file are those of ``loss_output`` for the inputs."""
        inputs = {k: v.clone().requires_grad_(grad and k in golden.grads) for k, v in golden.inputs.items()}
        named = {f"out/{k}": v for k, v in self.outputs(model, inputs).items()}
        if grad and golden.grads:
            named[f"out/{self.loss_output}"].sum().backward()
            named.update({f"grad/{k}": g for k in golden.grads if (g := inputs[k].grad) is not None})
        return {k: v.detach().cpu() for k, v in named.items()}

    def _has(self, model: nn.Module, path: str) -> bool:
        try:
            model.get_submodule(self.place(model, path)[0])
        except (ValueError, AttributeError):
            return False
        return True

    @contextmanager
    def _watch(self, model: nn.Module, wanted: Mapping[str, str], seen: dict[str, list[Any]]) -> Iterator[None]:
        """While the model runs, add to ``seen`` what the original's module ``wanted[name]`` puts out, call by call."""
        handles = []
        for name, original in wanted.items():
            try:
                where, layout = self.place(model, original)
                module = model.get_submodule(where)
            except (ValueError, AttributeError) as reason:  # all else of the file can still be compared
                logger.warning("mid/%s is left out: %s", name, reason)
                continue
            parts = self.calls(model, original)

            def keep(module: nn.Module, args: Any, output: Any, name=name, layout=layout, parts=parts) -> None:
                output = layout(self.intermediate(module, args, output))
                many = isinstance(output, (list, tuple))
                pieces = [[t.chunk(parts)[i] for t in output] if many else output.chunk(parts)[i] for i in range(parts)]
                seen.setdefault(name, []).extend(pieces)

            handles.append(module.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pick(seen: Mapping[str, list[Any]], key: str) -> Tensor | None:
    """The intermediate of a file's ``key``: a name, then ``.i`` for element i of a list (of the last call) and ``#n``
    for the n-th call."""
    name, element, call = _parts(key)
    done = seen.get(name, [])
    number = call if call is not None else (len(done) if element is not None else 1)
    if not 1 <= number <= len(done):
        return None
    return done[number - 1] if element is None else done[number - 1][element]


def _parts(key: str) -> tuple[str, int | None, int | None]:
    match = re.fullmatch(r"(.+?)(?:\.(\d+))?(?:#(\d+))?(?:\.(\d+))?", key)
    assert match is not None
    element = match[2] or match[4]
    return match[1], None if element is None else int(element), None if match[3] is None else int(match[3])
