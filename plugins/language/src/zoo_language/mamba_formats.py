"""The formats that Mamba 1 to 3 and their hybrids are published in: the authors', and transformers' of Mamba 1 and 2.

Originals: state-spaces/mamba @ e9594ce (``models/mixer_seq_simple.py`` and the mixers of ``modules/``), transformers'
``MambaForCausalLM`` and ``Mamba2ForCausalLM``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import Mamba, Mamba2, Mamba3
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules, Tied
from zoo_kernels import linear_attention

from ._base import Block
from .attention import MultiHeadAttention
from .mamba import MambaLM

#: The head first: a key of ours that no rule names would get the backbone's prefix on the way back.
_HEAD = Rename("lm_head.{p}", "lm_head.{p}")
RULES_UNTIED = Rules(_HEAD, Rename("backbone.{rest:*}", "{rest:*}"))
RULES = Rules(Tied("backbone.embedding.weight", "lm_head.weight"), RULES_UNTIED)
HF_RULES_UNTIED = Rules(_HEAD, Rename("backbone.embeddings.weight", "embedding.weight"), *RULES_UNTIED.rules[1:])
HF_RULES = Rules(Tied("backbone.embeddings.weight", "lm_head.weight"), HF_RULES_UNTIED)

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
#: The original's mixers by its names, of language models and alone.
MIXERS: dict[str, type[nn.Module]] = {
    "Mamba1": Mamba, "Mamba": Mamba, "Mamba2": Mamba2, "Mamba2Simple": Mamba2, "Mamba3": Mamba3,
    "MHA": MultiHeadAttention,
}  # fmt: skip
#: What the original's Mamba-3 takes besides and does not use.
MAMBA3_ABSORBED = {"dropout", "n_layer"}


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
    layer = ssm.get("layer", "Mamba1")
    n_layer = config.get("n_layer", 64)
    # the original asks each of its layers whether it is listed: an index that no layer has says nothing
    attention_layers = tuple(i for i in config.get("attn_layer_idx") or () if 0 <= i < n_layer)
    attention = _mixer_arguments("MHA", config.get("attn_cfg") or {})
    if attention_layers and "num_heads" not in attention:
        raise ValueError(f"mamba: layers {list(attention_layers)} are attention, and attn_cfg has no num_heads")
    return {
        "d_model": config.get("d_model", 2560),
        "n_layer": n_layer,
        "vocab_size": config.get("vocab_size", 50277),
        "layer": layer,
        "ssm": _mixer_arguments(layer, ssm),
        "attention_layers": attention_layers,
        "attention": attention,
        "d_intermediate": config.get("d_intermediate", 0),
        "rms_norm": config.get("rms_norm", True),
        "norm_eps": config.get("norm_epsilon", 1e-5),
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": config.get("pad_vocab_size_multiple", 8),
        "tie_embeddings": config.get("tie_embeddings", True),
    }


def _mixer_arguments(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A mixer's arguments, without those that change nothing. Raises ValueError for those that it does not have."""
    ignored = SSM_IGNORED | MAMBA3_ABSORBED if kind == "Mamba3" else SSM_IGNORED
    found = {k: v for k, v in config.items() if k not in ignored}
    if kind in MIXERS:
        known = set(inspect.signature(MIXERS[kind]).parameters) - {"device", "dtype"}
        known |= {"activation"} if kind == "Mamba2Simple" else {"embed_dim"} if kind == "MHA" else set()
        unknown = sorted(set(found) - known)
        if unknown:
            raise ValueError(f"mamba: {kind} has no argument {unknown}; known: {sorted(known)}")
    return found


def hf_arguments_of(config: Mapping[str, Any], *, second: bool = False) -> dict[str, Any]:
    """MambaLM's arguments from a transformers MambaConfig, or with ``second`` from a Mamba2Config.

    Stale keys such as d_model are ignored, as there. Raises ValueError for an activation other than SiLU, which no
    checkpoint has.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"mamba: hidden_act is {activation!r}; only 'silu' is built, as every checkpoint has it")
    eps = config.get("layer_norm_epsilon", 1e-5)
    width = config.get("hidden_size", 4096 if second else 768)
    ssm = {
        "d_state": config.get("state_size", 128 if second else 16),
        "d_conv": config.get("conv_kernel", 4),
        "expand": config.get("expand", 2),
        "bias": config.get("use_bias", False),
        "conv_bias": config.get("use_conv_bias", True),
    }
    if second:
        heads, size = config.get("num_heads", 128), config.get("head_dim", 64)
        if heads * size != ssm["expand"] * width:
            raise ValueError(f"mamba2: num_heads {heads} times head_dim {size} is not expand times hidden_size {width}")
        limit = tuple(float(v) for v in config.get("time_step_limit", (0.0, "inf")))
        ssm |= {"headdim": size, "ngroups": config.get("n_groups", 8), "dt_limit": limit, "norm_eps": eps}
    else:
        ssm["dt_rank"] = config.get("time_step_rank", "auto")
    return {
        "d_model": width,
        "n_layer": config.get("num_hidden_layers", 64 if second else 32),
        "vocab_size": config.get("vocab_size", 32768 if second else 50280),
        "layer": "Mamba2" if second else "Mamba1",
        "ssm": ssm,
        "norm_eps": eps,
        "residual_in_fp32": config.get("residual_in_fp32", True),
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.get("tie_word_embeddings", not second),
    }


class MambaAdapter(ReferenceAdapter):
    """Reads state-spaces/mamba (language models and single mixers) and transformers' Mamba and Mamba-2 checkpoints."""

    system = "mamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        kind = source.rpartition(":")[2].partition(" ")[0]
        if kind == "ssd_minimal_discrete" or "block_len" in config:
            return MinimalSSD()
        whole = {"vocab_size", "hidden_size", "ssm_cfg"} & set(config) or any(k.startswith("backbone.") for k in state)
        if not whole:
            return self.load(_bare_mixer(config, kind, state), state)
        hf = "hidden_size" in config or "backbone.embeddings.weight" in state
        second = any(k.endswith("mixer.dt_bias") for k in state)
        model = MambaLM(**(hf_arguments_of(config, second=second) if hf else arguments_of(config)))
        model.hf_format = hf
        return self.load(model, state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if "hidden_size" not in config:
            return arguments_of(config)
        return hf_arguments_of(config, second=config.get("model_type") == "mamba2")

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        bare = not any(k.startswith(("backbone.", "embedding.", "layers.")) for k in state)
        if isinstance(model, BareMixer) or (model is None and bare):
            return Rules(Rename("{rest:*}", "mixer.{rest:*}"))
        tied = model.lm_head is None if isinstance(model, MambaLM) else "lm_head.weight" not in state
        if "backbone.embeddings.weight" in state or getattr(model, "hf_format", False):
            return HF_RULES if tied else HF_RULES_UNTIED
        return RULES if tied else RULES_UNTIED

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, MinimalSSD):
            y, final = model(*(inputs[name] for name in "XABC"), inputs.get("initial_states"))
            return {"Y": y, "final_state": final}
        if isinstance(model, BareMixer):
            return model.replay(inputs, steps=isinstance(call, Mapping) and bool(call.get("step")))
        assert isinstance(model, MambaLM)
        ids = inputs["input_ids"]
        found: dict[str, Tensor] = {}
        hooks = _record(model, found)
        mixer = type(model.layers[0].mixer)
        resets = _begins(mixer, inputs.get("seq_idx"), inputs.get("cu_seqlens"), ids.shape[1])
        try:
            found["logits"] = model(ids, resets=resets)
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

    def forward(
        self, X: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """X (batch, length, heads, P), A (batch, length, heads) log decays, B, C (batch, length, heads, N), first
        state (batch, 1, heads, P, N) to what X is, and the last state (batch, heads, P, N)."""
        first = None if initial_states is None else initial_states.squeeze(1)
        y, state = linear_attention(C, B, X, A, initial_state=first, return_final_state=True)
        assert isinstance(state, Tensor)
        return y, state


# -- single mixers -----------------------------------------------------------------------------------------------------


class BareMixer(nn.Module):
    """One mixer alone, as some golden files hold it."""

    def __init__(self, mixer: Mamba | Mamba2 | Mamba3 | MultiHeadAttention) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, u: Tensor, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """u: (batch, length, D) to the same.

        Packed sequences come in the originals' two ways, and each mixer looks at its own only: Mamba-2 at ``seq_idx``
        (batch, length), which sequence a row is of; Mamba-3 at ``cu_seqlens``, where each begins, and the end.
        """
        resets = _begins(type(self.mixer), seq_idx, cu_seqlens, u.shape[1])
        return self.mixer(u) if resets is None else self.mixer(u, resets=resets)

    def replay(self, inputs: Mapping[str, Tensor], *, steps: bool) -> dict[str, Tensor]:
        """``y``, and with ``steps`` also ``step_y``, u token by token from rest, and the state after it."""
        u = inputs["u"]
        found = {"y": self(u, inputs.get("seq_idx"), inputs.get("cu_seqlens"))}
        if not steps:
            return found
        state = self.mixer.init_state(u.shape[0])
        with decoding_as_published(self.mixer):
            tokens = [self._step(u[:, t], state, t) for t in range(u.shape[1])]
        found["step_y"] = torch.stack(tokens, dim=1)
        if isinstance(self.mixer, Mamba3):
            found |= {f"{part}_state": state[part] for part in ("angle", "ssm", "k", "v")}
        elif not isinstance(self.mixer, MultiHeadAttention):
            found |= {"conv_state": state["conv"].transpose(1, 2), "ssm_state": state["ssm"]}
        return found

    def _step(self, u: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
        if not isinstance(self.mixer, MultiHeadAttention):
            return self.mixer.step(u, state)
        position = torch.full((u.shape[0],), t, device=u.device)
        if t == 0:  # the original takes the first token for a prompt
            with _prefill_as_published(self.mixer):
                return self.mixer(u[:, None], state=state, position=position)[:, 0]
        return self.mixer.step(u, state, position)


def _begins(mixer: type, seq_idx: Tensor | None, cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Where packed sequences begin, (batch, length) bool, by what this kind of mixer looks at."""
    if mixer is Mamba2 and seq_idx is not None:
        return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    if mixer is Mamba3 and cu_seqlens is not None:
        begins = torch.zeros(1, length, dtype=torch.bool, device=cu_seqlens.device)
        begins[:, cu_seqlens[:-1].long()] = True
        return begins
    return None


def _bare_mixer(config: Mapping[str, Any], kind: str, state: Mapping[str, Tensor]) -> BareMixer:
    """The mixer that the source names or, without one, that the keys show."""
    if kind not in MIXERS:
        kind = (
            "Mamba3" if "B_bias" in state
            else "Mamba2" if "dt_bias" in state
            else "Mamba" if "x_proj.weight" in state
            else "MHA"
        )  # fmt: skip
        if kind == "Mamba2" and ("learnable_init_states" in config or "activation" in config):
            kind = "Mamba2Simple"
    arguments = _mixer_arguments(kind, config)
    if kind == "Mamba":
        return BareMixer(Mamba(**arguments))
    if kind == "Mamba3":
        return BareMixer(Mamba3(**arguments))
    if kind == "MHA":
        return BareMixer(MultiHeadAttention(d_model=arguments.pop("embed_dim"), **arguments))
    if kind == "Mamba2":
        return BareMixer(Mamba2(**arguments))
    activation = arguments.pop("activation", "swish")
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation is {activation!r}; Mamba2Simple knows 'silu' and 'swish', which are one")
    mixer = Mamba2(**{"d_state": 64, "headdim": 128} | arguments)
    assert mixer.norm is not None
    mixer.norm.groups = 1  # its norm has one group over all channels, whatever ngroups
    mixer.conv_resets = False
    return BareMixer(mixer)


# -- what the original does otherwise in decoding ----------------------------------------------------------------------


@contextmanager
def _prefill_as_published(model: nn.Module) -> Iterator[None]:
    """While active, attention keeps what the original keeps in its convolution cache at prefill: the outputs."""
    attention = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    for module in attention:
        module.keep_conv_quirk = True
    try:
        yield
    finally:
        for module in attention:
            module.keep_conv_quirk = False


@contextmanager
def decoding_as_published(model: nn.Module) -> Iterator[None]:
    """While active, steps of Mamba-2 leave dt without limits, as the original's do (its whole passes limit it)."""
    limits = {m: m.dt_limit for m in model.modules() if isinstance(m, Mamba2)}
    for module in limits:
        module.dt_limit = (0.0, float("inf"))
    try:
        yield
    finally:
        for module, limit in limits.items():
            module.dt_limit = limit


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
    text = json.dumps(call) if not isinstance(call, str) else call
    step = re.search(r"prefill (?:the first )?(\d+) tokens", text)
    greedy = re.search(r"input_ids\[:, :(\d+)\], max_length=(\d+)", text) or re.search(
        r"from the first (\d+) tokens to total length (\d+)", text
    )
    return (
        int(step.group(1)) if step else None,
        (int(greedy.group(1)), int(greedy.group(2))) if greedy else None,
    )


def _teacher_forced(model: MambaLM, ids: Tensor, prompt: int) -> dict[str, Tensor]:
    state = model.init_state(ids.shape[0])
    with torch.no_grad():
        with _prefill_as_published(model):
            logits = [model(ids[:, :prompt], state=state)]
        with decoding_as_published(model):
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
    state = model.init_state(ids.shape[0])
    with _prefill_as_published(model):
        logits = model(ids, state=state)[:, -1]
    with decoding_as_published(model):
        while ids.shape[1] < length:
            token = logits.argmax(-1)
            ids = torch.cat([ids, token[:, None]], dim=1)
            if ids.shape[1] < length:
                logits = model.step(token, state)
    return ids
