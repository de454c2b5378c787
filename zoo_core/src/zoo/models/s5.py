"""Classifiers of S5 layers. Source: Smith et al., arXiv 2208.04933; lindermanlab/S5 ``seq_model.py``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing
from zoo.layers.s5 import S5Layer


class S5Classifier(GradCheckpointing, nn.Module):
    """Linear encoder, ``n_layers`` :class:`~zoo.layers.s5.S5Layer`, pooling, linear decoder, log-softmax.

    ``mode``: "pool" (mean over time, over the first ``lengths`` positions where given) or "last". ``retrieval``: the
    batch holds first documents, then second ones; features a, b give [a, b, a - b, a * b], linear, GELU, linear.
    ``step_rescale``: the time step, relative to the learned one. Further arguments: S5Layer and S5.
    """

    def __init__(
        self,
        d_input: int = 1,
        num_classes: int = 10,
        d_model: int = 128,
        ssm_size: int = 64,
        n_layers: int = 4,
        *,
        mode: str = "pool",
        retrieval: bool = False,
        vocab: bool = False,
        step_rescale: float = 1.0,
        **layer: Any,
    ) -> None:
        super().__init__()
        if mode not in ("pool", "last"):
            raise ValueError(f"mode is {mode!r}; expected 'pool' or 'last'")
        self.mode, self.retrieval, self.num_classes, self.num_features = mode, retrieval, num_classes, d_model
        self.vocab, self.d_input, self.mixes_batch = vocab, d_input, retrieval
        self.step_rescale = step_rescale
        self.encoder = nn.Linear(d_input, d_model)
        self.layers = nn.ModuleList(S5Layer(d_model, ssm_size, **layer) for _ in range(n_layers))
        self.decoder: nn.Module
        if retrieval:
            self.decoder = nn.Sequential(
                nn.Linear(4 * d_model, d_model), nn.GELU(approximate="tanh"), nn.Linear(d_model, num_classes)
            )
        else:
            self.decoder = nn.Linear(d_model, num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None, *, step_rescale: float | None = None) -> Tensor:
        """(batch, length, d_input), or with ``vocab`` (batch, length), to (batch, num_classes) log-probabilities.

        lengths: (batch,) positions that count in the mean; as in the original, scans and norms still see what follows.
        step_rescale: None for the model's own.
        """
        if self.vocab:
            x = F.one_hot(x.long(), self.d_input).to(self.encoder.weight.dtype)
        x = self.encoder(x)
        for layer in self.layers:
            x = layer(x, step_rescale=self.step_rescale if step_rescale is None else step_rescale)
        if self.mode == "last":
            if lengths is not None:
                raise ValueError("mode 'last' has no padded form in S5; lengths must be None")
            x = x[:, -1]
        elif lengths is None:
            x = x.mean(1)
        else:
            seen = torch.arange(x.shape[1], device=x.device)[None, :, None] < lengths[:, None, None]
            x = torch.where(seen, x, torch.zeros_like(x)).sum(1) / lengths[:, None].to(x.dtype)
        if self.retrieval:
            a, b = x.chunk(2)
            x = torch.cat([a, b, a - b, a * b], -1)
        return torch.log_softmax(self.decoder(x), -1)
