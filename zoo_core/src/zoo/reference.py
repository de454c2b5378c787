"""Reference adapters: from an original's own arguments and weights to our model, and back.

One adapter per published system. It is how published checkpoints are read, how a user brings a checkpoint
trained with the original code, and how parity with the original is tested::

    adapter = zoo.reference("vim")
    model = adapter.build(config, state)          # the original constructor's arguments and state dict
    outputs = adapter.run(model, {"image": x})    # {"features": ..., "logits": ...}
    outputs = adapter.replay("vim__midclstok_v2.safetensors")   # {"out/logits": ..., "mid/patch_embed": ...}
"""

from __future__ import annotations

import contextlib
import inspect
import json
import lzma
import re
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .rules import Rules


@dataclass(frozen=True)
class Golden:
    """One file of golden vectors, read. Names are without their ``in/``, ``out/`` ... prefix."""

    system: str
    source: str
    config: dict[str, Any]
    call: Any
    notes: str
    mids_of: dict[str, str]  # where the original's intermediates come from: name to its submodule
    state: dict[str, Tensor] = field(repr=False)
    inputs: dict[str, Tensor] = field(repr=False)
    outputs: dict[str, Tensor] = field(repr=False)
    mids: dict[str, Tensor] = field(repr=False)
    grads: dict[str, Tensor] = field(repr=False)

    @property
    def source_class(self) -> str:
        """What was run in the original, the part of ``source`` after the last colon ("VisionMamba")."""
        return self.source.rpartition(":")[2]


def read_golden(path: str | Path) -> Golden:
    """Read a golden file: safetensors, or the same compressed (``path`` or ``path`` with ``.xz`` behind it).

    Keys that end in ``::complex`` become complex tensors.
    """
    groups: dict[str, dict[str, Tensor]] = {"state": {}, "in": {}, "out": {}, "mid": {}, "grad": {}}
    meta, tensors = _read_safetensors(Path(path))
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        if group not in groups:
            raise ValueError(f"{path}: tensor {key!r} is in no known group; expected one of {sorted(groups)}")
        if name.endswith("::complex"):
            # a copy: complex numbers of 16 bytes must be aligned to them, and a mapped file is to 8
            name, tensor = name.removesuffix("::complex"), torch.view_as_complex(tensor.clone())
        groups[group][name] = tensor
    call = meta.get("call", "")
    with contextlib.suppress(ValueError):  # a plain sentence, not JSON
        call = json.loads(call)
    return Golden(
        system=meta.get("system", "").partition(" ")[0],
        source=meta.get("source", ""),
        config=json.loads(meta.get("config", "{}") or "{}"),
        call=call,
        notes=meta.get("notes", ""),
        mids_of=json.loads(meta.get("mids", "{}") or "{}"),
        state=groups["state"],
        inputs=groups["in"],
        outputs=groups["out"],
        mids=groups["mid"],
        grads=groups["grad"],
    )


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    from safetensors import safe_open
    from safetensors.torch import load

    packed = path if path.suffix == ".xz" else path.with_name(f"{path.name}.xz")
    if path != packed and (path.exists() or not packed.exists()):
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    with lzma.open(packed) as file:
        data = file.read()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the format: length, JSON, numbers
    tensors = load(data)
    return header.pop("__metadata__", {}), {key: tensors[key] for key in header}


def unwrapped(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state`` without the prefix ``module.`` of parallel training, where every key has it."""
    if state and all(k.startswith("module.") for k in state):
        return {k.removeprefix("module."): v for k, v in state.items()}
    return state


class ReferenceAdapter(ABC):
    """Reads one original system. Subclasses set ``system`` and implement :meth:`build` and :meth:`run`."""

    system: str = ""

    @abstractmethod
    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        """Our model in eval mode, holding the original's weights.

        ``config`` are the original constructor's arguments, ``state`` its state dict under its own keys,
        ``source`` (optional) names what was built ("repo@commit file:Class") where one system has several
        classes; without it the class follows from the arguments and keys. Raises ValueError for an argument that
        the system does not have, and KeyError-like ``zoo.errors.KeysDoNotMatch`` for missing or unexpected keys.
        """

    @abstractmethod
    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """Outputs (and the intermediate tensors the system's golden files name) by name, without ``out/``.

        Intermediates are returned under ``mid/<name>`` keys; outputs under their bare names. ``call`` is the
        golden file's description of what was called, for files that need it. An adapter that can compute more than
        it should by default takes ``wanted`` as well, the names to compute; :meth:`replay` passes those of the file.
        """

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our builder's arguments from the original's configuration, for checkpoints that are published with one and
        whose cards name it (``config_file``). Raises ValueError or KeyError for one that it cannot read."""
        raise ValueError(f"the adapter {type(self).__name__} reads no configuration files")

    def replay(self, path: str | Path, *, grad: bool = False, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """Recompute every ``out/`` and ``mid/`` tensor of a golden file, under the same names.

        With ``grad=True`` also ``grad/<key>``: gradients of :meth:`loss` with respect to the original's keys.
        ``device``: where the model runs; results come back to the CPU.
        """
        golden = read_golden(path)
        model = self.build(golden.config, golden.state, source=golden.source).to(device)
        inputs = {name: tensor.to(device) for name, tensor in golden.inputs.items()}
        more: dict[str, Any] = {}
        if "wanted" in inspect.signature(self.run).parameters:
            more["wanted"] = [*golden.outputs, *(f"mid/{k}" for k in golden.mids)]
        with torch.enable_grad() if grad else torch.no_grad():
            found = self.run(model, inputs, call=golden.call, **more)
            named = {k if k.startswith(("mid/", "out/")) else f"out/{k}": v for k, v in found.items()}
            if grad:
                self.loss(golden, named).backward()
                gradients = self.gradients(model)
                named.update({f"grad/{k}": gradients[k] for k in golden.grads if k in gradients})
        return {k: v.detach().cpu() for k, v in named.items()}

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        """The scalar whose gradients the golden file holds: mean(output^2) of the output that its notes name, as
        ``mean(float(out/logits)^2)``, else of the first."""
        said = re.search(r"mean\(float\((out/[^)]+)\)\^2\)", golden.notes)
        name = said.group(1) if said else next(k for k in named if k.startswith("out/"))
        return named[name].float().pow(2).mean()

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter gradients under the original's keys; by default through :meth:`to_reference`."""
        ours = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        return self.to_reference(ours, model=model)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        """The key table of this system (see :mod:`zoo.rules`), for the variant that ``state`` and ``model`` show.

        ``state`` is the state dict to convert, in either format; ``model`` our model where there is one (perhaps on
        the meta device: configuration only). Most systems ignore both and return one constant table.
        """
        raise NotImplementedError(f"the {self.system} adapter has no key table")

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Our keys and layouts from the original's state dict. It is how published checkpoints are read.

        Give ``model`` (our model, also on the meta device) where it exists; systems whose table depends on the
        variant need it. The prefix ``module.`` of parallel training is taken off.
        """
        state = unwrapped(state)
        return self.rules(state, model=model).to_zoo(state)

    def to_reference(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Our state dict under the original's keys (the inverse of :meth:`to_zoo`)."""
        return self.rules(state, model=model).to_reference(state)

    def load(self, model: nn.Module, state: Mapping[str, Tensor], *, what: str = "the given state dict") -> nn.Module:
        """Put the original's ``state`` into our ``model``, strictly, in place, and switch it to eval mode.

        The usual last line of :meth:`build`. Raises ``zoo.errors.KeysDoNotMatch``; keys are named in our format.
        """
        from .building import fill

        ours = self.to_zoo(state, model=model)
        return fill(model, ours, what=f"{what}, read as {self.system}").eval()


def adapter(system: str) -> ReferenceAdapter:
    """The reference adapter of a published system, by its id; also spelled ``zoo.reference(system)``.

    Raises ``zoo.errors.UnknownSystem`` naming the nearest ids, and says which plugin failed if its import did.
    """
    from . import catalog

    return catalog.adapter(system)


class _CallableModule(types.ModuleType):
    """``zoo.reference`` is this module, and calling it is :func:`adapter`: one name for the verb and its classes."""

    def __call__(self, system: str) -> ReferenceAdapter:
        return adapter(system)


sys.modules[__name__].__class__ = _CallableModule
