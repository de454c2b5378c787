"""The quasi-LSTM of the framework's study: gates of the input alone, a linear cell.

Original: IntelligentControlSystems/dsf-mqar @ 7c5aff8 (``zoology/mixers/lstm.py``), Apache-2.0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Linear
from zoo_kernels import causal_conv1d, linear_scan

from .formulas import reversed_sigmoid


class QLSTM(nn.Module):
    """``output(gelu(gate) * sigmoid(o) * h)`` with ``h = decay h + sigmoid(i) x``; x passes a short convolution.

    ``reversed``: decay = sigmoid(-f)^relu(alpha), which behaves like an S6 with one state a channel; else sigmoid(f).
    Arguments (the original's): ``d_model``, ``expansion_factor``, ``kernel_size``, ``reversed``.
    """

    def __init__(
        self, d_model: int, expansion_factor: float = 2, kernel_size: int = 4, reversed: bool = True, alpha: bool = True
    ) -> None:
        super().__init__()
        hidden = int(d_model * expansion_factor)
        self.reversed = reversed
        self.alpha = nn.Parameter(torch.ones(())) if reversed or alpha else None
        self.input = Linear(d_model, 2 * hidden, bias=False)
        self.conv = nn.Conv1d(hidden, hidden, kernel_size, groups=hidden)
        self.gates = Linear(hidden, 3 * hidden)
        self.output = Linear(hidden, d_model, bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """gate, the cell's input, decay, write gate, read gate: (batch, length, hidden) each."""
        gate, x = self.input(x).chunk(2, dim=-1)
        x, _ = causal_conv1d(x, self.conv.weight.squeeze(1), self.conv.bias)
        forget, write, read = self.gates(x).chunk(3, dim=-1)
        if self.reversed:
            assert self.alpha is not None
            decay = reversed_sigmoid(forget, F.relu(self.alpha))
        else:
            decay = torch.sigmoid(forget)
        return gate, x, decay, torch.sigmoid(write), torch.sigmoid(read)

    def eigenvalues(self, x: Tensor) -> Tensor:
        """The decays, (batch, length, hidden)."""
        return self.parts(x)[2]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, d_model) to the same."""
        gate, x, decay, write, read = self.parts(x)
        h, _ = linear_scan(write * x, decay)
        return self.output(F.gelu(gate) * (read * h))
