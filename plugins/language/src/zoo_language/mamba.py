"""Mamba, Mamba-2, Mamba-3, their hybrids with attention, and the Transformer++ they are compared with: one language
model.

Papers: Gu and Dao, "Mamba", arXiv 2312.00752; Dao and Gu, "Transformers are SSMs", arXiv 2405.21060. Original:
state-spaces/mamba @ e9594ce, Apache-2.0 (``models/mixer_seq_simple.py``); transformers' MambaForCausalLM for the -hf
checkpoints. Differs from the original: one residual stream instead of two (the sums are the same), tied heads are one
tensor, and the state is a value (see :mod:`zoo_language.state`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Mamba, Mamba2, Mamba3, RMSNorm
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules, Tied
from zoo_kernels import linear_attention

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

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding if self.lm_head is None else self.lm_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the authors do not decay."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_log", ".D", "dt_bias"))}


# -- the originals' formats -------------------------------------------------------------------------------------------

RULES = Rules(
    Tied("backbone.embedding.weight", "lm_head.weight"),
    Rename("backbone.{rest:*}", "{rest:*}"),
)
RULES_UNTIED = Rules(Rename("backbone.{rest:*}", "{rest:*}"))
HF_RULES = Rules(
    Tied("backbone.embeddings.weight", "lm_head.weight"),
    Rename("backbone.embeddings.weight", "embedding.weight"),
    Rename("backbone.{rest:*}", "{rest:*}"),
)
HF_RULES_UNTIED = Rules(*HF_RULES.rules[1:])

#: Keys of the original's ssm_cfg that change speed only, or name the layer.
SSM_IGNORED = {
    "fuse_pregate_headwise_norm",
    "layer",
    "chunk_size",
    "use_mem_eff_path",
    "use_fast_path",
    "layer_idx",
    "process_group",
    "sequence_parallel",
}


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """MambaLM's arguments from a MambaConfig of the original. Unknown keys are an error that names them."""
    known = {
        "d_model", "n_layer", "vocab_size", "d_intermediate", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
        "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings", "norm_epsilon",
    }  # fmt: skip
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"mamba has no configuration key {unknown}; known: {sorted(known)}")
    ssm = dict(config.get("ssm_cfg") or {})
    return {
        "d_model": config.get("d_model", 2560),
        "n_layer": config.get("n_layer", 64),
        "vocab_size": config.get("vocab_size", 50277),
        "layer": ssm.get("layer", "Mamba1"),
        "ssm": {k: v for k, v in ssm.items() if k not in SSM_IGNORED},
        "attention_layers": tuple(config.get("attn_layer_idx") or ()),
        "attention": dict(config.get("attn_cfg") or {}),
        "d_intermediate": config.get("d_intermediate", 0),
        "rms_norm": config.get("rms_norm", True),
        "norm_eps": config.get("norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": config.get("pad_vocab_size_multiple", 8),
        "tie_embeddings": config.get("tie_embeddings", True),
    }


def hf_arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """MambaLM's arguments from a transformers MambaConfig (stale keys such as d_model are ignored, as there)."""
    hidden = config["hidden_size"]
    rank = config.get("time_step_rank", "auto")
    return {
        "d_model": hidden,
        "n_layer": config.get("num_hidden_layers", 32),
        "vocab_size": config.get("vocab_size", 50280),
        "ssm": {
            "d_state": config.get("state_size", 16),
            "d_conv": config.get("conv_kernel", 4),
            "expand": config.get("expand", 2),
            "dt_rank": rank,
            "bias": config.get("use_bias", False),
            "conv_bias": config.get("use_conv_bias", True),
        },
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


class MambaAdapter(ReferenceAdapter):
    """Reads state-spaces/mamba (language models, and Mamba-2's bare mixers) and transformers' Mamba checkpoints."""

    system = "mamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        kind = source.rpartition(":")[2]
        if kind == "ssd_minimal_discrete" or "block_len" in config:
            return MinimalSSD()
        if not any(k.startswith("backbone.") for k in state):
            return self.load(_bare_mixer(config, kind, state), state)
        hf = "hidden_size" in config
        model = MambaLM(**(hf_arguments_of(config) if hf else arguments_of(config)))
        model.hf_format = hf
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, BareMixer):
            return Rules(Rename("{rest:*}", "mixer.{rest:*}"))
        tied = model.lm_head is None if isinstance(model, MambaLM) else "lm_head.weight" not in state
        if "backbone.embeddings.weight" in state or getattr(model, "hf_format", False):
            return HF_RULES if tied else HF_RULES_UNTIED
        return RULES if tied else RULES_UNTIED

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, MinimalSSD):
            y, final = model(inputs["X"], inputs["A"], inputs["B"], inputs["C"])
            return {"Y": y, "final_state": final}
        if isinstance(model, BareMixer):
            return model.replay(inputs, steps=isinstance(call, Mapping) and bool(call.get("step")))
        assert isinstance(model, MambaLM)
        ids = inputs["input_ids"]
        found: dict[str, Tensor] = {}
        hooks = _record(model, found)
        try:
            found["logits"] = model(ids)
        finally:
            for hook in hooks:
                hook.remove()
        step, generated = _calls(call)
        if step is not None:
            found |= _teacher_forced(model, ids, step)
        if generated is not None:
            found["generated"] = _greedy(model, ids[:, : generated[0]], generated[1])
        return found


class Mamba2Adapter(MambaAdapter):
    """The same code published Mamba-2, its hybrids and the Transformer++ baseline."""

    system = "mamba2"


class Mamba3Adapter(MambaAdapter):
    """The same code published Mamba-3."""

    system = "mamba3"


class MinimalSSD(nn.Module):
    """The paper's listing 1 as a module: SSD on inputs that are discretised already."""

    def forward(self, X: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        """X (batch, length, heads, P), A (batch, length, heads) log decays, B, C (batch, length, heads, N)."""
        y, state = linear_attention(C, B, X, A, return_final_state=True)
        assert isinstance(state, Tensor)
        return y, state


class BareMixer(nn.Module):
    """A Mamba-2 or Mamba-3 mixer alone, as some golden files hold it."""

    def __init__(self, mixer: Mamba2 | Mamba3) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        resets = None
        if seq_idx is not None:
            resets = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        return self.mixer(u, resets=resets)

    def replay(self, inputs: Mapping[str, Tensor], *, steps: bool) -> dict[str, Tensor]:
        u = inputs["u"]
        found = {"y": self(u, inputs.get("seq_idx"))}
        if steps:
            state = self.mixer.init_state(u.shape[0])
            found["step_y"] = torch.stack([self.mixer.step(u[:, t], state) for t in range(u.shape[1])], dim=1)
            if isinstance(self.mixer, Mamba3):
                found |= {f"{part}_state": state[part] for part in ("angle", "ssm", "k", "v")}
            else:
                found |= {"conv_state": state["conv"].transpose(1, 2), "ssm_state": state["ssm"]}
        return found


def _bare_mixer(config: Mapping[str, Any], kind: str, state: Mapping[str, Tensor]) -> BareMixer:
    arguments = {k: v for k, v in config.items() if k not in SSM_IGNORED}
    if kind == "Mamba3" or "B_bias" in state:
        return BareMixer(Mamba3(**arguments))
    simple = kind == "Mamba2Simple" or "learnable_init_states" in arguments
    if simple:
        arguments = {"d_state": 64, "headdim": 128} | arguments
    mixer = Mamba2(**arguments)
    if simple and mixer.norm is not None:
        mixer.norm.groups = 1  # its module norm has one group over all channels, whatever ngroups
    mixer.conv_resets = not simple
    return BareMixer(mixer)


# -- replaying the language models' golden files -----------------------------------------------------------------------


def _record(model: MambaLM, found: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep the intermediate tensors under the golden files' names."""

    def keep(name: str, which: int | None = None):
        def hook(module, args, output):
            found[f"mid/{name}"] = output if which is None else args[which]

        return hook

    hooks = [model.embedding.register_forward_hook(keep("embed"))]
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        # The original returns (last branch's output, stream before it was added).
        branch, norm = (layer.mlp, layer.norm2) if layer.mlp is not None else (layer.mixer, layer.norm)
        assert branch is not None
        assert norm is not None
        hooks.append(branch.register_forward_hook(keep(f"layer{i}_hidden")))
        hooks.append(norm.register_forward_hook(keep(f"layer{i}_residual", 0)))
    return hooks


def _calls(call: Any) -> tuple[int | None, tuple[int, int] | None]:
    """(prompt tokens before teacher forcing, (prompt tokens, total length) of the greedy run) from the file's words."""
    import re

    text = json.dumps(call) if not isinstance(call, str) else call
    step = re.search(r"prefill the first (\d+) tokens", text)
    greedy = re.search(r"input_ids\[:, :(\d+)\], max_length=(\d+)", text) or re.search(
        r"from the first (\d+) tokens to total length (\d+)", text
    )
    return (
        int(step.group(1)) if step else None,
        (int(greedy.group(1)), int(greedy.group(2))) if greedy else None,
    )


class _QuirkyCaches:
    """While active, attention keeps what the original keeps in its convolution cache at prefill."""

    def __init__(self, model: nn.Module) -> None:
        self.attention = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]

    def __enter__(self) -> None:
        for module in self.attention:
            module.keep_conv_quirk = True

    def __exit__(self, *_: object) -> None:
        for module in self.attention:
            module.keep_conv_quirk = False


def _teacher_forced(model: MambaLM, ids: Tensor, prompt: int) -> dict[str, Tensor]:
    state = model.init_state(ids.shape[0])
    with _QuirkyCaches(model), torch.no_grad():
        logits = [model(ids[:, :prompt], state=state)]
        logits += [model.step(ids[:, t], state)[:, None] for t in range(prompt, ids.shape[1])]
    found = {"step_logits": torch.cat(logits, dim=1)}
    for i, layer in enumerate(state.layers):
        conv = layer["conv"].transpose(1, 2) if "conv" in layer else None
        if "k" not in layer:
            assert conv is not None
            found |= {f"cache{i}_a": conv, f"cache{i}_b": layer["ssm"]}
            continue
        kv = torch.stack([layer["k"], layer["v"]], dim=2)[:, : ids.shape[1]]
        found |= {f"cache{i}_kv": kv} if conv is None else {f"cache{i}_a": kv, f"cache{i}_b": conv}
    return found


@torch.no_grad()
def _greedy(model: MambaLM, ids: Tensor, length: int) -> Tensor:
    with _QuirkyCaches(model):
        state = State.stack([model.init_state(1) for _ in range(ids.shape[0])])
        logits = model(ids, state=state)[:, -1]
    while ids.shape[1] < length:
        token = logits.argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        if ids.shape[1] < length:
            logits = model.step(token, state)
    return ids
