"""Adaptive embedding and adaptive softmax: rare tokens get narrower vectors.

Source: Baevski and Auli, arXiv 1809.10853; Grave et al., arXiv 1609.04309; in the layout of Transformer-XL that
state-spaces/s4 uses (``AdaptiveEmbedding``, ``ProjectedAdaptiveLogSoftmax``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _ends(vocab_size: int, cutoffs: Sequence[int]) -> list[int]:
    ends = [0, *cutoffs, vocab_size]
    if any(b <= a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"cutoffs {list(cutoffs)} must rise within 1 .. {vocab_size - 1} (vocab_size {vocab_size})")
    return ends


class AdaptiveEmbedding(nn.Module):
    """Row of ``emb_layers.{i}`` (size_i, d_i) times ``emb_projs.{i}`` (d_model, d_i) transposed, times sqrt(d_model).

    Cluster i holds the tokens between two cutoffs and has width d_i = d_model / div_val^i.
    """

    def __init__(self, vocab_size: int, d_model: int, cutoffs: Sequence[int], div_val: int = 1) -> None:
        super().__init__()
        self.ends, self.d_model = _ends(vocab_size, cutoffs), d_model
        widths = [d_model // div_val**i for i in range(len(self.ends) - 1)]
        self.emb_layers = nn.ModuleList(
            nn.Embedding(self.ends[i + 1] - self.ends[i], width) for i, width in enumerate(widths)
        )
        self.emb_projs = nn.ParameterList(nn.Parameter(torch.empty(d_model, width)) for width in widths)
        for layer, projection, width in zip(self.emb_layers, self.emb_projs, widths, strict=True):
            nn.init.normal_(layer.weight, std=width**-0.5)  # type: ignore[arg-type]
            nn.init.normal_(projection, std=d_model**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 to (..., d_model)."""
        total: Tensor | None = None
        for i, (layer, projection) in enumerate(zip(self.emb_layers, self.emb_projs, strict=True)):
            inside = (tokens >= self.ends[i]) & (tokens < self.ends[i + 1])
            rows = layer(torch.where(inside, tokens - self.ends[i], 0))
            part = F.linear(rows, projection).masked_fill(~inside[..., None], 0)
            total = part if total is None else total + part
        assert total is not None
        return total * self.d_model**0.5


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities over clusters: the head scores the first cluster and, from the end, one entry for each other.

    ``logits_i = (h proj_i) W_i^T + out_layers_biases.{i}``; W_i is the embedding's (``tie_weights``) or
    ``out_layers_weights.{i}``; proj_0 is ``out_projs.0`` (d_model, d_model), the others the embedding's
    (``tie_projs[i - 1]``) or ``out_projs.{i}``. ``cluster_weight`` (clusters - 1, d_model), ``cluster_bias``.
    """

    def __init__(
        self, embedding: AdaptiveEmbedding, *, tie_weights: bool = True, tie_projs: Sequence[bool] | None = None
    ) -> None:
        super().__init__()
        self.ends, d_model = embedding.ends, embedding.d_model
        clusters = len(self.ends) - 1
        ties = [True] * (clusters - 1) if tie_projs is None else list(tie_projs)
        if len(ties) == clusters:  # one for each cluster: the first has no partner to be tied to
            ties = ties[1:]
        if len(ties) != clusters - 1:
            raise ValueError(f"tie_projs has {len(ties)} entries; expected {clusters - 1}, one for each cutoff")
        self.cluster_weight = nn.Parameter(torch.zeros(clusters - 1, d_model))
        self.cluster_bias = nn.Parameter(torch.zeros(clusters - 1))
        sizes = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        self.out_layers_biases = nn.ParameterList(nn.Parameter(torch.zeros(n)) for n in sizes)
        widths = [layer.weight.shape[1] for layer in embedding.emb_layers]
        self.out_layers_weights = nn.ParameterList()
        if not tie_weights:
            for n, width in zip(sizes, widths, strict=True):
                self.out_layers_weights.append(nn.Parameter(torch.randn(n, int(width)) * int(width) ** -0.5))
        own = [True, *(not tie for tie in ties)]
        self.out_projs = nn.ParameterDict(
            {str(i): nn.Parameter(torch.randn(d_model, int(w)) * d_model**-0.5) for i, w in enumerate(widths) if own[i]}
        )
        # Held without being registered: the weights belong to the embedding and appear once in the state dict.
        object.__setattr__(self, "_embedding", embedding)

    def _cluster(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        embedding: AdaptiveEmbedding = self._embedding  # type: ignore[assignment]
        weight = self.out_layers_weights[i] if len(self.out_layers_weights) else embedding.emb_layers[i].weight
        projection = self.out_projs[str(i)] if str(i) in self.out_projs else embedding.emb_projs[i]
        return weight, self.out_layers_biases[i], projection  # type: ignore[return-value]

    def _head(self, h: Tensor) -> Tensor:
        weight, bias, projection = self._cluster(0)
        weight = torch.cat([weight, self.cluster_weight])
        return torch.log_softmax(F.linear(h @ projection, weight, torch.cat([bias, self.cluster_bias])).float(), -1)

    def _tail(self, h: Tensor, i: int) -> Tensor:
        weight, bias, projection = self._cluster(i)
        return torch.log_softmax(F.linear(h @ projection, weight, bias).float(), -1)

    def log_probabilities(self, h: Tensor) -> Tensor:
        """(..., d_model) to (..., vocab_size)."""
        head = self._head(h)
        parts = [head[..., : self.ends[1]]]
        parts += [head[..., -i, None] + self._tail(h, i) for i in range(1, len(self.ends) - 1)]
        return torch.cat(parts, -1)

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood of each target, in nats: (..., d_model) and (...) to (...)."""
        flat, wanted = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        head = self._head(flat)
        found = head.gather(1, wanted.clamp(max=self.ends[1] - 1)[:, None])[:, 0]
        for i in range(1, len(self.ends) - 1):
            at = torch.nonzero((wanted >= self.ends[i]) & (wanted < self.ends[i + 1]))[:, 0]
            tail = self._tail(flat[at], i).gather(1, (wanted[at] - self.ends[i])[:, None])[:, 0]
            found = found.index_put((at,), head[at, -i] + tail)
        return -found.reshape(targets.shape)
