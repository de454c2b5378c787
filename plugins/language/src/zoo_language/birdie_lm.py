"""Birdie's language models, after the paper: Gated SSM and Hawk, reading a known prefix in both directions.

Paper: Blouir et al., arXiv 2411.01030, sections 2.1, 3.1, 3.4 and appendix A.4. The original's language models are not
public; what is, the objectives and the reward-driven mixture, is in :mod:`zoo_language.birdie`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Recomputed
from zoo_kernels import causal_conv1d, causal_conv1d_step, linear_scan, linear_scan_step

from ._base import CausalLM
from .state import LayerState

# ----------------------------------------------------------------------------------------


def two_way_scan(x: Tensor, decay: Tensor, prefix: Tensor, resets: Tensor | None) -> Tensor:
    """The first half of the channels left to right, the second right to left inside the prefix only.

    x, decay: (batch, length, channels); prefix: (batch, length) bool; resets: (batch, length) bool, first steps of
    packed samples. At generated positions the reverse half is its own input, so nothing flows back into or inside them;
    the prefix sees only the first of them, the start token. Paper, appendix A.4.
    """
    half = x.shape[-1] // 2
    forward, _ = linear_scan(x[..., :half], decay[..., :half], resets=resets)
    # Walking backwards, the state is dropped at rows that are generated, and at the last row of each sample.
    stop = ~prefix
    if resets is not None:
        stop = stop | F.pad(resets[:, 1:], (0, 1), value=True)
    back, _ = linear_scan(x[..., half:], decay[..., half:], reverse=True, resets=stop)
    return torch.cat([forward, back], dim=-1)


class GatedSSMBlock(Recomputed):
    """The paper's fused block: ``h = f h + i z``, ``y = W_out(gelu(W_o x) h)``, on a normed input, added to the
    stream.
    """

    def __init__(self, d_model: int, d_state: int, *, two_way: bool) -> None:
        super().__init__()
        self.d_state, self.two_way = d_state, two_way
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.in_proj = nn.Linear(d_model, 4 * d_state, bias=False)  # i, z, o, f
        self.out_proj = nn.Linear(d_state, d_model, bias=False)

    def init_state(self, batch: int) -> LayerState:
        return {"h": torch.zeros(batch, self.d_state, device=self.out_proj.weight.device)}

    def forward(self, x: Tensor, *, prefix: Tensor | None, resets: Tensor | None, state: LayerState | None, lengths):
        i, z, o, f = self.in_proj(self.norm(x)).chunk(4, dim=-1)
        value, decay = torch.sigmoid(i) * z, torch.sigmoid(f)
        if self.two_way:
            half = self.d_state // 2
            known = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if prefix is None else prefix
            if state is None:
                h = two_way_scan(value, decay, known, resets)
            else:
                h = two_way_scan(value, decay, known, None)
                first, end = linear_scan(
                    value[..., :half], decay[..., :half], initial_state=state["h"][:, :half], return_final_state=True,
                    lengths=lengths,
                )  # fmt: skip
                assert end is not None
                state["h"][:, :half] = end.detach()
                h = torch.cat([first, h[..., half:]], dim=-1)
        else:
            h, end = linear_scan(
                value, decay, resets=resets, lengths=lengths, return_final_state=state is not None,
                initial_state=None if state is None else state["h"],
            )  # fmt: skip
            if state is not None:
                assert end is not None
                state["h"].copy_(end.detach())
        return x + self.out_proj(F.gelu(o) * h)

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        i, z, o, f = self.in_proj(self.norm(x)).chunk(4, dim=-1)
        value, decay = torch.sigmoid(i) * z, torch.sigmoid(f)
        if self.two_way:
            half = self.d_state // 2
            kept = state["h"][:, :half].clone()
            first = linear_scan_step(value[:, :half], decay[:, :half], state=kept)
            state["h"][:, :half] = kept
            h = torch.cat([first, value[:, half:]], dim=-1)
        else:
            h = linear_scan_step(value, decay, state=state["h"])
        return x + self.out_proj(F.gelu(o) * h)


class HawkBlock(Recomputed):
    """Hawk: a gated branch with convolution and RG-LRU, then a gated MLP (De et al., arXiv 2402.19427, section 2).

    ``a = sigmoid(Lambda)^(8 r)``, ``h = a h + sqrt(1 - a^2) (i x)``. The paper leaves the layer's layout to De et
    al.; this is our reading of it.
    """

    def __init__(self, d_model: int, d_state: int, mlp_expansion: int = 3, d_conv: int = 4, *, two_way: bool) -> None:
        super().__init__()
        self.d_state, self.d_conv, self.two_way = d_state, d_conv, two_way
        self.norm, self.norm2 = nn.RMSNorm(d_model, eps=1e-6), nn.RMSNorm(d_model, eps=1e-6)
        self.in_proj = nn.Linear(d_model, 2 * d_state, bias=False)
        self.conv1d = nn.Conv1d(d_state, d_state, d_conv, groups=d_state)
        self.gates = nn.Linear(d_state, 2 * d_state)
        uniform = torch.empty(d_state).uniform_(0.9**2, 0.999**2)
        self.Lambda = nn.Parameter(torch.logit(uniform.sqrt() ** (1 / 8)))
        self.out_proj = nn.Linear(d_state, d_model, bias=False)
        self.mlp_in = nn.Linear(d_model, 2 * mlp_expansion * d_model, bias=False)
        self.mlp_out = nn.Linear(mlp_expansion * d_model, d_model, bias=False)

    def init_state(self, batch: int) -> LayerState:
        kind = {"device": self.Lambda.device}
        return {
            "h": torch.zeros(batch, self.d_state, **kind),
            "conv": torch.zeros(batch, self.d_conv, self.d_state, **kind),
        }

    def _recurrence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r, i = torch.sigmoid(self.gates(x)).chunk(2, dim=-1)
        log_a = 8 * r * F.logsigmoid(self.Lambda)
        return torch.exp(log_a), torch.sqrt(-torch.expm1(2 * log_a)) * (i * x)

    def _mlp(self, x: Tensor) -> Tensor:
        main, gate = self.mlp_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.mlp_out(F.gelu(gate) * main)

    def forward(self, x: Tensor, *, prefix: Tensor | None, resets: Tensor | None, state: LayerState | None, lengths):
        branch, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        branch, conv = causal_conv1d(
            branch, self.conv1d.weight.squeeze(1), self.conv1d.bias, resets=resets, lengths=lengths,
            initial_state=None if state is None else state["conv"], return_final_state=state is not None,
        )  # fmt: skip
        decay, value = self._recurrence(branch)
        half = self.d_state // 2 if self.two_way else self.d_state
        h, end = linear_scan(
            value[..., :half], decay[..., :half], resets=resets, lengths=lengths, return_final_state=state is not None,
            initial_state=None if state is None else state["h"][:, :half],
        )  # fmt: skip
        if self.two_way:
            known = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if prefix is None else prefix
            h = torch.cat([h, two_way_scan(value, decay, known, resets)[..., half:]], dim=-1)
        if state is not None:
            assert conv is not None
            assert end is not None
            state["conv"].copy_(conv.detach())
            state["h"][:, :half] = end.detach()
        return self._mlp(x + self.out_proj(F.gelu(gate) * h))

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        branch, gate = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        branch = causal_conv1d_step(branch, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"])
        decay, value = self._recurrence(branch)
        half = self.d_state // 2 if self.two_way else self.d_state
        kept = state["h"][:, :half].clone()
        h = linear_scan_step(value[:, :half], decay[:, :half], state=kept)
        state["h"][:, :half] = kept
        if self.two_way:
            h = torch.cat([h, value[:, half:]], dim=-1)
        return self._mlp(x + self.out_proj(F.gelu(gate) * h))


class BirdieLM(CausalLM):
    """A Gated SSM or Hawk language model; every other layer reads a known prefix in both directions.

    Arguments: ``vocab_size``; ``d_model``; ``d_state`` (width of the recurrence); ``n_layer``; ``kind`` "gated_ssm" or
    "hawk"; ``two_way``: whether layers 1, 3, 5 ... are bidirectional over the prefix (the paper alternates).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 2048,
        d_state: int = 2560,
        n_layer: int = 48,
        kind: str = "gated_ssm",
        two_way: bool = True,
    ) -> None:
        super().__init__()
        blocks: dict[str, Any] = {"gated_ssm": GatedSSMBlock, "hawk": HawkBlock}
        if kind not in blocks:
            raise ValueError(f"kind is {kind!r}; expected 'gated_ssm' or 'hawk'")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            blocks[kind](d_model, d_state, two_way=two_way and i % 2 == 1) for i in range(n_layer)
        )
        self.norm_f = nn.RMSNorm(d_model, eps=1e-6)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    takes_resets = True  #: texts that are packed into one row can be kept apart

    def backbone(self, input_ids, *, state=None, lengths=None, prefix=None, resets=None):
        self._check(input_ids, state, lengths)
        x = self.embed(input_ids)
        for i, layer in enumerate(self.layers):
            own = None if state is None else state.layers[i]
            x = layer(x, prefix=prefix, resets=resets, state=own, lengths=lengths)
        if state is not None:
            state.position = state.position + (input_ids.shape[1] if lengths is None else lengths)
        return self.norm_f(x)

    def forward(self, input_ids, *, state=None, lengths=None, attention_mask=None, segment_ids=None):
        """Logits (batch, length, vocabulary).

        attention_mask (batch, length): 1 where the text is given (read both ways), 3 where it is generated, 0 padding,
        as :class:`Packer` writes it; without one everything is read left to right. segment_ids: packed samples.
        """
        prefix = None if attention_mask is None else attention_mask == 1
        resets = None
        if segment_ids is not None:
            resets = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0))
        return self.head(self.backbone(input_ids, state=state, lengths=lengths, prefix=prefix, resets=resets))

    def no_weight_decay(self) -> set[str]:
        """The paper does not decay the forget gate; it shares in_proj with the rest here, so that is left out whole."""
        return {n for n, _ in self.named_parameters() if n.endswith(("in_proj.weight", "Lambda"))}
