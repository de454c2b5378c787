"""Mamba, Mamba-2, Mamba-3, their hybrids with attention, and the Transformer++ they are compared with: one language
model.

Papers: Gu and Dao, "Mamba", arXiv 2312.00752; Dao and Gu, "Transformers are SSMs", arXiv 2405.21060. Original:
state-spaces/mamba @ e9594ce, Apache-2.0 (``models/mixer_seq_simple.py``); transformers' MambaForCausalLM for the -hf
checkpoints. Differs from the original: one residual stream instead of two (the sums are the same), tied heads are one
tensor, and the state is a value (see :mod:`zoo_language.state`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Mamba, Mamba2, Mamba3, RMSNorm

from ._base import Block, CausalLM
from .attention import MultiHeadAttention
from .state import State


class GatedMLP(nn.Module):
    """``fc2(y * silu(gate))`` with ``y, gate = fc1(x)``; the hidden size is rounded up to a multiple of 128."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        hidden = math.ceil(hidden / 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class MambaLM(CausalLM):
    """Embedding, ``n_layer`` blocks, norm, head.

    Arguments: ``d_model``; ``n_layer``; ``vocab_size``, padded up to ``pad_vocab_size_multiple``; ``layer`` "Mamba1",
    "Mamba2" or "Mamba3" with the mixer's own arguments in ``ssm``; ``attention_layers`` (indices whose mixer is
    attention, with its arguments in ``attention``); ``d_intermediate`` (a gated MLP behind every mixer; 0: none);
    ``rms_norm`` (else LayerNorm); ``norm_eps``; ``residual_in_fp32``; ``tie_embeddings``.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        layer: str = "Mamba1",
        ssm: Mapping[str, Any] | None = None,
        attention_layers: Sequence[int] = (),
        attention: Mapping[str, Any] | None = None,
        d_intermediate: int = 0,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        pad_vocab_size_multiple: int = 8,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        mixers = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}
        if layer not in mixers:
            raise ValueError(f"layer is {layer!r}; expected one of {sorted(mixers)}")
        outside = [i for i in attention_layers if not 0 <= i < n_layer]
        if outside:
            raise ValueError(f"attention_layers {outside} are outside of the {n_layer} layers")
        self.d_model, self.vocab_size, self.layer_type = d_model, vocab_size, layer
        self.hf_format = False  #: which of the two published key formats to_reference writes
        self.n_layer, self.has_mlp = n_layer, d_intermediate > 0
        padded = math.ceil(vocab_size / pad_vocab_size_multiple) * pad_vocab_size_multiple
        self.embedding = nn.Embedding(padded, d_model)

        def norm() -> nn.Module:
            return RMSNorm(d_model, norm_eps) if rms_norm else nn.LayerNorm(d_model, eps=norm_eps)

        def block(i: int) -> Block:
            mixer = (
                MultiHeadAttention(d_model, **(attention or {}))
                if i in set(attention_layers)
                else mixers[layer](d_model, **(ssm or {}))
            )
            mlp = (norm(), GatedMLP(d_model, d_intermediate)) if self.has_mlp else (None, None)
            return Block(norm(), mixer, *mlp, residual_in_fp32=residual_in_fp32)

        self.layers = nn.ModuleList(block(i) for i in range(n_layer))
        self.norm_f = norm()
        self.lm_head = None if tie_embeddings else nn.Linear(d_model, padded, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal embeddings (std 0.02), zero biases, projections back to the stream divided by sqrt(n_layer)."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.layers.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.bias is not None and not name.endswith("dt_proj"):
                nn.init.zeros_(module.bias)
            if name.endswith(("out_proj", "fc2")):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.weight /= math.sqrt(self.n_layer)

    def backbone(
        self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`CausalLM.backbone`; ``resets`` as in :meth:`forward`."""
        return self._through(input_ids, state, lengths, **({} if resets is None else {"resets": resets}))

    def forward(
        self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As :meth:`CausalLM.forward`; ``resets`` (batch, length) bool: True where another text begins, so that texts
        packed into one row do not see each other. Attention has no such thing: ValueError."""
        return self.head(self.backbone(input_ids, state=state, lengths=lengths, resets=resets))

    @property
    def takes_resets(self) -> bool:
        """Whether texts that are packed into one row can be kept apart: where there is no attention."""
        return not any(isinstance(layer.mixer, MultiHeadAttention) for layer in self.layers)

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding if self.lm_head is None else self.lm_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors do not decay."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_log", ".D", "dt_bias"))}
