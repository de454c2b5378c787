"""What a causal model remembers of the sequences that it has read: of a fixed size, however long they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class State:
    """``layers``: a dictionary of tensors a block, batch first. ``position``: (batch,) tokens read so far.

    A model's ``step`` and ``forward`` move a state on in place: :meth:`fork` first to keep it.
    """

    layers: list[dict[str, Tensor]]
    position: Tensor

    @classmethod
    def of(cls, blocks: Iterable, batch: int, device: torch.device) -> State:
        """The state of ``batch`` empty sequences."""
        layers = [block.mixer.init_state(batch) for block in blocks]
        return cls(layers, torch.zeros(batch, dtype=torch.long, device=device))

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors hold."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def fork(self, copies: int = 1) -> State:
        """An independent copy, each sequence ``copies`` times in a row."""
        return self.select(torch.arange(self.batch, device=self.position.device).repeat_interleave(copies))

    def select(self, rows: Tensor) -> State:
        """An independent state of the given sequences, (n,) indices."""
        layers = [{key: t.index_select(0, rows) for key, t in layer.items()} for layer in self.layers]
        return State(layers, self.position.index_select(0, rows))
