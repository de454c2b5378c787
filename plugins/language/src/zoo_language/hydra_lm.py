"""Hydra's language model: a state-space path, sparse global attention, experts a chunk and two memories, side by side.

Paper: arXiv 2508.15099 (see :mod:`zoo_language.hydra_parts`). The 1.6B model of the paper is a blueprint without
weights. Not the bidirectional Hydra of quasiseparable mixers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Mamba, Mamba2, Recomputed, RMSNorm

from ._base import Rereading, normed
from .hydra_parts import ChunkExperts, ProductKeys, SparseGlobalAttention, Workspace


class HydraBlock(Recomputed):
    """``x + g1 SSM(n) + g2 SGA(n) + g3 MoE(n) + g4 workspace(n) + g5 PKM(n)`` with n = norm(x), all in parallel.

    The gates are learnt numbers, ``gates`` in this order: 1 for the state-space path, ``small`` for the others at first
    (our reading), so a new model is nearly a stack of SSM blocks.
    """

    def __init__(self, d_model: int, ssm: nn.Module, parts: Mapping[str, nn.Module], small: float) -> None:
        super().__init__()
        self.norm, self.ssm = RMSNorm(d_model), ssm
        self.names = ("ssm", *parts)
        for name, part in parts.items():
            setattr(self, name, part)
        self.gates = nn.Parameter(torch.tensor([1.0] + [small] * len(parts)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(batch, length, d_model) to the same, and the router's logits where there are experts."""
        n = normed(self.norm, x)
        y, logits = x, None
        for gate, name in zip(self.gates, self.names, strict=True):
            found = getattr(self, name)(n)
            if name == "moe":
                found, logits = found
            elif name == "workspace":
                found = found[0]
            y = y + gate * found
        return y, logits


class HydraLM(Rereading):
    """Embedding, Hydra blocks, norm; the head is the embedding.

    Arguments: ``d_model``; ``n_layer``; ``vocab_size``; ``layer`` "Mamba1" or "Mamba2" with its arguments in ``ssm``;
    ``heads``, ``window``, ``chunk``, ``summary``, ``attention_every`` (every k-th block has sparse global attention; 0:
    none); ``d_ff``, ``experts``, ``top_k``, ``routing`` (``experts=0``: no mixture); ``slots`` (0: no workspace);
    ``memory_layers`` (blocks with product keys, none by default), ``memory_keys``, ``memory_heads``, ``memory_top_k``;
    ``small_gate``. The chunked parts have no step of their own here: the state is the text, read again for each token.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        layer: str = "Mamba1",
        ssm: Mapping[str, Any] | None = None,
        heads: int = 8,
        window: int = 256,
        chunk: int = 64,
        summary: str = "mean",
        attention_every: int = 4,
        d_ff: int | None = None,
        experts: int = 8,
        top_k: int = 2,
        routing: str = "previous",
        slots: int = 32,
        memory_layers: Sequence[int] = (),
        memory_keys: int = 256,
        memory_heads: int = 4,
        memory_top_k: int = 16,
        small_gate: float = 1e-2,
    ) -> None:
        super().__init__()
        mixers: dict[str, Any] = {"Mamba1": Mamba, "Mamba2": Mamba2}
        if layer not in mixers:
            raise ValueError(f"layer is {layer!r}; expected one of {', '.join(mixers)}")
        if attention_every < 0 or experts < 0 or slots < 0:
            raise ValueError("attention_every, experts and slots must be 0 (without that part) or more")
        outside = [i for i in memory_layers if not 0 <= i < n_layer]
        if outside:
            raise ValueError(f"memory_layers {outside} are outside of the {n_layer} blocks")
        self.vocab_size, self.chunk = vocab_size, chunk
        self.embedding = nn.Embedding(vocab_size, d_model)
        blocks = []
        for i in range(n_layer):
            parts: dict[str, nn.Module] = {}
            if attention_every and (i + 1) % attention_every == 0:
                parts["sga"] = SparseGlobalAttention(d_model, heads, window, chunk, summary)
            if experts:
                parts["moe"] = ChunkExperts(d_model, d_ff or 2 * d_model, experts, top_k, chunk, routing)
            if slots:
                parts["workspace"] = Workspace(d_model, slots, chunk)
            if i in set(memory_layers):
                parts["pkm"] = ProductKeys(d_model, memory_keys, memory_heads, memory_top_k)
            blocks.append(HydraBlock(d_model, mixers[layer](d_model, **(ssm or {})), parts, small_gate))
        self.layers = nn.ModuleList(blocks)
        self.norm_f = RMSNorm(d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding)

    def read(self, input_ids: Tensor) -> Tensor:
        return self.routed(input_ids)[0]

    def routed(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Hidden states, and the routers' logits of each block with experts, (batch, chunks, experts) each."""
        x = self.embed(input_ids)
        found: list[Tensor] = []
        for block in self.layers:
            x, logits = block(x)
            if logits is not None:
                found.append(logits)
        return normed(self.norm_f, x), found

    def training_loss(self, input_ids: Tensor, *, balance: float = 1e-2, z: float = 1e-3) -> Tensor:
        """Cross-entropy of the next tokens, plus the routers' balancing and z losses with these weights."""
        hidden, more = self.learn(input_ids, balance=balance, z=z)
        logits = self.head(hidden[:, :-1]).float()
        return more + nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())

    def learn(self, input_ids: Tensor, *, balance: float = 1e-2, z: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Hidden states, and the routers' balancing and z losses with these weights (see :mod:`.training`)."""
        hidden, routers = self.routed(input_ids)
        more = hidden.new_zeros((), dtype=torch.float32)
        for block, router in zip((b for b in self.layers if "moe" in b.names), routers, strict=True):
            own = block.moe.losses(router)
            more = more + balance * own[0] + z * own[1]
        return hidden, more

    @torch.no_grad()
    def statistics(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Which experts each chunk takes, ``experts`` (blocks, batch, chunks, top_k), and how many different values
        each product-key memory reads, ``values`` (blocks,)."""
        hidden = self.embed(input_ids)
        taken, values = [], []
        for block in self.layers:
            if "pkm" in block.names:
                values.append(block.pkm.select(normed(block.norm, hidden))[1].unique().numel())
            hidden, logits = block(hidden)
            if logits is not None:
                taken.append(logits.topk(block.moe.top_k, dim=-1).indices)
        none = torch.empty(0, dtype=torch.long)
        return {"experts": torch.stack(taken) if taken else none, "values": torch.tensor(values, dtype=torch.long)}
