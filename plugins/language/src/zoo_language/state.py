"""What a language model remembers, as a value: save it, load it elsewhere, fork it, batch several, go on from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from zoo.files import existing, unreadable, whole
from zoo_registry import errors

#: One layer's part of a state. Recurrent parts have a fixed size; a key-value cache ("k", "v") grows with the text.
LayerState = dict[str, Tensor]

FORMAT = "1"


class State:
    """The memory of one or several texts that a model has read.

    ``layers``: a dictionary of tensors a layer, batch first. ``position``: (batch,) tokens read so far.
    ``logits``: (batch, vocabulary) for the next token, None before anything was read. ``model``: what made it.
    A model's ``step`` and ``forward`` move a state on in place: :meth:`fork` first to keep it.
    """

    def __init__(
        self, layers: list[LayerState], position: Tensor, logits: Tensor | None = None, model: str = ""
    ) -> None:
        self.layers, self.position, self.logits, self.model = layers, position, logits, model

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def fork(self, copies: int = 1) -> State:
        """An independent copy, each text ``copies`` times in a row (to continue one prompt in several ways).

        Raises ValueError for fewer than one.
        """
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected 1 or more")
        return self._map(lambda t: t.repeat_interleave(copies, dim=0) if copies > 1 else t.clone())

    def select(self, rows: int | Sequence[int] | Tensor) -> State:
        """The state of some of the texts, in the given order; a single row keeps its batch axis."""
        index = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self.position.device)
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    @staticmethod
    def stack(states: Sequence[State]) -> State:
        """Several states as one batch, which then moves on together. Texts may have different lengths."""
        if not states:
            raise ValueError("stack needs at least one state")
        if len({s.model for s in states}) > 1:
            raise ValueError(f"states of different models: {sorted({s.model for s in states})}")
        layers = []
        for parts in zip(*(s.layers for s in states), strict=True):
            layers.append({key: _cat([p[key] for p in parts]) for key in parts[0]})
        logits = [s.logits for s in states]
        return State(
            layers,
            torch.cat([s.position for s in states]),
            None if any(x is None for x in logits) else torch.cat([x for x in logits if x is not None]),
            states[0].model,
        )

    def to(self, *args, **kwargs) -> State:
        """Like ``Tensor.to`` for every floating tensor, and the device for the others."""
        return self._map(
            lambda t: t.to(*args, **kwargs) if t.is_floating_point() else t.to(_device_of(args, kwargs, t))
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; folders above it are made. Raises StoreError."""
        from safetensors.torch import save_file

        tensors = {
            f"layers.{i}.{key}": value.detach().contiguous()
            for i, layer in enumerate(self.layers)
            for key, value in layer.items()
        }
        tensors["position"] = self.position
        if self.logits is not None:
            tensors["logits"] = self.logits.detach().contiguous()
        path = Path(path)
        meta = {"zoo_state": FORMAT, "model": self.model, "layers": json.dumps(len(self.layers))}
        with whole(path) as work:
            save_file(tensors, work, metadata=meta)
        return path

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> State:
        """Read what :meth:`save` wrote. Raises BadFile (a ValueError) for files that are no states, and
        LocalFileMissing."""
        from safetensors import SafetensorError, safe_open

        path = existing(path, "a state file")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                meta = file.metadata() or {}
                if meta.get("zoo_state") != FORMAT:
                    raise errors.BadFile(
                        f"{path} is no state file of format {FORMAT} (its header says {meta.get('zoo_state')!r}); "
                        "expected a file that State.save wrote",
                        path=str(path),
                    )
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise errors.BadFile(f"{path} is no safetensors file: {error}", path=str(path)) from error
        except OSError as error:
            raise unreadable(path, error) from error
        layers: list[LayerState] = [{} for _ in range(json.loads(meta["layers"]))]
        for key, value in tensors.items():
            if key.startswith("layers."):
                _, index, name = key.split(".", 2)
                layers[int(index)][name] = value
        return cls(layers, tensors["position"], tensors.get("logits"), meta.get("model", ""))

    def check(self, model: str) -> None:
        """Raise BadArgument (a ValueError) when another model made this state."""
        if self.model and model and self.model != model:
            raise errors.BadArgument(
                f"this state was made by {self.model}, not by {model}: a state means nothing elsewhere",
                argument="state",
                accepted=[],
            )

    def _map(self, function) -> State:
        return State(
            [{key: function(value) for key, value in layer.items()} for layer in self.layers],
            function(self.position),
            None if self.logits is None else function(self.logits),
            self.model,
        )

    def __repr__(self) -> str:
        tokens = self.position.tolist()
        return f"State({self.model or 'unnamed'}, tokens read {tokens}, {self.nbytes / 1024:.0f} kB)"


def _cat(parts: list[Tensor]) -> Tensor:
    """Rows end to end; growing axes (a cache's length) are padded to the longest."""
    longest = max(p.shape[1] for p in parts) if parts[0].dim() > 1 else 0
    padded = [
        torch.nn.functional.pad(p, (0, 0) * (p.dim() - 2) + (0, longest - p.shape[1]))
        if p.dim() > 1 and p.shape[1] < longest
        else p
        for p in parts
    ]
    return torch.cat(padded)


def _device_of(args: tuple, kwargs: dict, tensor: Tensor) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, str | torch.device):
            return torch.device(value)
    return tensor.device
