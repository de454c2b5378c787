"""What the models and the adapters of this plugin share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import Golden, ReferenceAdapter, read_golden


class MedicalAdapter(ReferenceAdapter):
    """Replays golden files whose intermediates are outputs of named submodules of the original.

    A file's metadata ``mids`` maps each name to the original's submodule; ``name.i`` is the i-th element of a list
    output. Our modules stand where the original's do, up to :meth:`our_path`.
    """

    _watch: Mapping[str, str] = MappingProxyType({})

    def our_path(self, path: str) -> str:
        """The dotted name of our module that does what the original's submodule ``path`` does."""
        return path

    def replay(self, path: str | Path, *, grad: bool = False, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        self._watch = {k: self.our_path(v) for k, v in read_golden(path).mids_of.items() if not k.startswith("_")}
        try:
            return super().replay(path, grad=grad, device=device)
        finally:
            self._watch = {}

    def call(self, model: nn.Module, *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
        """``model(*inputs)``, and the watched intermediates as ``mid/<name>``."""
        found: dict[str, Tensor] = {}

        def keep(name: str):
            calls = 0

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal calls
                calls += 1
                full = f"mid/{name}" if calls == 1 else f"mid/{name}#{calls}"
                if isinstance(output, list | tuple):
                    found.update({f"{full}.{i}": t for i, t in enumerate(output)})
                else:
                    found[full] = output

            return hook

        handles = [model.get_submodule(p).register_forward_hook(keep(n)) for n, p in self._watch.items()]
        try:
            output = model(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return output, found

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``image`` to ``logits``, or with deep supervision to ``seg0`` (full resolution), ``seg1``, ..."""
        output, mids = self.call(model, inputs["image"])
        if isinstance(output, Tensor):
            return {"logits": output, **mids}
        return {**{f"seg{i}": t for i, t in enumerate(output)}, **mids}

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        """The sum over all outputs of mean(output^2)."""
        return sum((v.float().pow(2).mean() for k, v in named.items() if k.startswith("out/")), start=Tensor([0.0])[0])


class Undecayed:
    """Networks whose position tables, mask tokens, and A, D and biases of every scan no weight decay pulls to zero."""

    def no_weight_decay(self) -> set[str]:
        ends = ("A_log", "A_b_log", ".D", "dt_bias", "conv_bias", "pos_embed", "mask_token")
        named = self.named_parameters()  # type: ignore[attr-defined]
        return {name for name, _ in named if name.endswith(ends) or "mask_tokens." in name}


def take(
    system: str,
    config: Mapping[str, Any],
    names: Mapping[str, str],
    ignored: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The original's arguments under our names. ``ignored`` have no effect there; ``fixed`` have one value only."""
    fixed = fixed or {}
    unknown = sorted(set(config) - set(names) - set(ignored) - set(fixed))
    if unknown:
        known = ", ".join(sorted([*names, *ignored, *fixed]))
        raise ValueError(f"{system} has no argument {', '.join(map(repr, unknown))}; known: {known}")
    for key, value in fixed.items():
        if key in config and config[key] != value:
            raise ValueError(f"{system}: {key} is {config[key]!r}; only {value!r} is built here")
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def check_input(system: str, x: Tensor, channels: int | Sequence[int], dims: int, multiple: int = 1) -> Tensor:
    """x, as a plain tensor where it is MONAI's ``MetaTensor``: the operators know torch's own tensors only.

    Raises ValueError unless x is (batch, channels, *size), with ``dims`` sides that are multiples of ``multiple``.
    """
    allowed = [channels] if isinstance(channels, int) else list(channels)
    if x.dim() != dims + 2 or x.shape[1] not in allowed:
        axes = ", ".join(["height", "width"] if dims == 2 else ["x", "y", "z"])
        raise ValueError(
            f"{system}: the input has shape {tuple(x.shape)}; expected (batch, "
            f"{' or '.join(map(str, allowed))} channels, {axes})"
        )
    if any(s % multiple for s in x.shape[2:]):
        raise ValueError(
            f"{system}: the input has sides {tuple(x.shape[2:])}; each must be a multiple of {multiple}. Pad it, or "
            "use the pipeline, which does"
        )
    return x.as_tensor() if hasattr(x, "as_tensor") else x
