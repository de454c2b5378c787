"""BDH, the Dragon Hatchling: one set of sparse weights used at every level, and attention that is a matrix of synapses.

Paper: "The Dragon Hatchling: The Missing Link between the Transformer and Models of the Brain", arXiv 2509.26507.
Original: pathwaycom/bdh @ 714bc80, MIT text (bdh.py). Differs: attention is computed as the recurrence that it is, so a
text is a state of fixed size (the synapses); the original recomputes the whole text for every token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import recompute
from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules
from zoo_kernels import linear_attention

from ._base import CausalLM
from .state import State

THETA = 2.0**16


def frequencies(neurons: int, device: torch.device | str | None = None) -> Tensor:
    """Turns per position of each pair of neurons, (neurons / 2).

    Always float32 and in the original's order of operations: a phase is taken modulo one turn, so a rounding here
    grows with the position.
    """
    pair = torch.arange(0, neurons, 2, device=device, dtype=torch.float32)
    return 1.0 / THETA ** (pair / neurons) / (2 * math.pi)


class BDH(CausalLM):
    """``levels`` passes through the same three matrices.

    At each level, with ln a LayerNorm without parameters and rotation by position::

        x_sparse = relu(x E)                              (heads, neurons)
        y        = ln(sum over s < t of (R_t x_sparse_t . R_s x_sparse_s) x_s)
        x        = ln(x + ln((x_sparse * relu(y E_v)) D))

    Arguments: ``vocab_size``, ``levels``, ``d_model`` D, ``heads``, ``multiplier`` (neurons per head: multiplier * D //
    heads, an even number), ``dropout`` (on the product of the two sparse vectors, in training).
    Parameters: ``encoder``, ``encoder_v`` (heads, D, neurons), ``decoder`` (heads * neurons, D), ``embedding``,
    ``lm_head`` (D, vocabulary).
    """

    def __init__(
        self,
        vocab_size: int = 256,
        levels: int = 6,
        d_model: int = 256,
        heads: int = 4,
        multiplier: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.vocab_size, self.levels, self.d_model, self.heads = vocab_size, levels, d_model, heads
        self.neurons = multiplier * d_model // heads  # rounded down, as in the original: what is left over is unused
        if self.neurons < 2 or self.neurons % 2:
            raise ValueError(
                f"multiplier * d_model // heads = {self.neurons} neurons a head; rotation turns pairs of them: "
                "choose sizes that give an even number"
            )
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.encoder = nn.Parameter(torch.empty(heads, d_model, self.neurons))
        self.encoder_v = nn.Parameter(torch.empty(heads, d_model, self.neurons))
        self.decoder = nn.Parameter(torch.empty(heads * self.neurons, d_model))
        self.lm_head = nn.Parameter(torch.empty(d_model, vocab_size))
        self.dropout = nn.Dropout(dropout)
        self.grad_checkpointing = False
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.d_model,))

    def rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Turn neighbouring neurons of x (batch, length, heads, neurons) by ``position`` (batch, length)."""
        turns = position[..., None].float() * frequencies(self.neurons, x.device)
        phase = (turns % 1)[:, :, None] * (2 * math.pi)
        cos, sin = phase.cos(), phase.sin()
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.lm_head

    def init_state(self, batch: int = 1) -> State:
        shape = (batch, self.heads, self.d_model, self.neurons)
        layers = [{"synapses": torch.zeros(shape, device=self.device)} for _ in range(self.levels)]
        return State(layers, torch.zeros(batch, dtype=torch.long, device=self.device), None, self.state_name)

    def level(
        self, x: Tensor, position: Tensor, synapses: Tensor | None, lengths: Tensor | None, keep: bool,
        found: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One pass: x (batch, length, D) to the same, and the synapses after it. ``found`` is given what happened
        inside."""
        sparse = F.relu(torch.einsum("bld,hdn->blhn", x, self.encoder))
        turned = self.rotate(sparse, position)
        raw, after = linear_attention(
            turned,
            turned,
            x[:, :, None].expand(-1, -1, self.heads, -1),
            strict=True,
            initial_state=synapses,
            return_final_state=keep,
            lengths=lengths,
        )
        y = F.relu(torch.einsum("blhd,hdn->blhn", self._norm(raw), self.encoder_v))
        joint = self.dropout(sparse * y).flatten(-2)  # head-major
        x = self._norm(x + self._norm(joint @ self.decoder))
        assert after is None or isinstance(after, Tensor)
        if found is not None:
            found |= {"x_sparse": sparse, "attn_raw": raw}
        return x, after

    def backbone(
        self, input_ids: Tensor, *, state: State | None = None, lengths: Tensor | None = None,
        inside: list[dict[str, Tensor]] | None = None,
    ) -> Tensor:  # fmt: skip
        """As of every language model. ``inside`` is given what happened in every level."""
        self._check(input_ids, state, lengths)
        start = torch.zeros(input_ids.shape[0], dtype=torch.long, device=self.device)
        if state is not None:
            start = state.position
        position = start[:, None] + torch.arange(input_ids.shape[1], device=self.device)
        x = self._norm(self.embedding(input_ids))
        again = self.grad_checkpointing and torch.is_grad_enabled() and state is None and inside is None
        level = partial(recompute, self.level) if again else self.level
        for i in range(self.levels):
            found: dict[str, Tensor] | None = None if inside is None else {}
            synapses = None if state is None else state.layers[i]["synapses"]
            x, after = level(x, position, synapses, lengths, state is not None, found)
            if state is not None:
                assert after is not None
                state.layers[i]["synapses"] = after.detach()
            if inside is not None and found is not None:
                inside.append(found)
        if state is not None:
            state.position = state.position + (input_ids.shape[1] if lengths is None else lengths)
        return x

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> Tensor:
        state.logits = self.head(self.backbone(token[:, None], state=state))[:, 0]
        return state.logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable


# -- the original's format --------------------------------------------------------------------------------------------

RULES = Rules(
    Drop(
        "attn.freqs",
        once="encoder",
        restore=lambda state, _: frequencies(state["encoder"].shape[-1]).repeat_interleave(2).view(1, 1, 1, -1),
    ),
    Rename("embed.weight", "embedding.weight"),
)


class BDHAdapter(ReferenceAdapter):
    """Reads pathwaycom/bdh."""

    system = "bdh"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        names = {
            "n_layer": "levels",
            "n_embd": "d_model",
            "n_head": "heads",
            "mlp_internal_dim_multiplier": "multiplier",
            "vocab_size": "vocab_size",
            "dropout": "dropout",
        }
        unknown = sorted(set(config) - set(names))
        if unknown:
            raise ValueError(f"bdh has no configuration key {unknown}; known: {sorted(names)}")
        return self.load(BDH(**{names[k]: v for k, v in config.items()}), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return RULES

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, BDH)
        ids = inputs["input_ids"]
        inside: list[dict[str, Tensor]] = []
        logits = model.head(model.backbone(ids, inside=inside))
        found = {"logits": logits}
        for i, level in enumerate(inside):
            found |= {f"mid/layer{i}_{name}": tensor.transpose(1, 2) for name, tensor in level.items()}
        found["mid/last_attn_raw"] = found[f"mid/layer{len(inside) - 1}_attn_raw"]
        if "targets" in inputs:
            found["loss"] = F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten())
        greedy = re.search(r"from the first (\d+) tokens to total length (\d+)", str(call))
        if greedy:
            from .generation import generate

            prompt, total = int(greedy.group(1)), int(greedy.group(2))
            texts, _ = generate(model, ids[:, :prompt].tolist(), max_new_tokens=total - prompt)
            found["generated"] = torch.cat(
                [ids[:, :prompt], torch.tensor([t.tokens for t in texts], device=ids.device)], dim=1
            )
        return found
