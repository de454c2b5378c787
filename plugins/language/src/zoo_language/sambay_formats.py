"""The formats SambaY is published in: ArchScale's (training code) and the released Phi-4-mini-flash's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules, Split, Tied

from .sambay import Attention, SambaY, Shared

#: Switches of the original that are not built; another value is refused.
FIXED: dict[str, Any] = {
    "moe": False, "zero_mod": False, "sqrt_gate": False, "separate_qkv": True, "sc_attn": False, "sink_attn": False,
    "relu2": False, "full_swa_extend": False, "use_sigmoid": False, "scaling_factor": 1.0, "mlp": True,
    "oss_swiglu": False, "ffn_norm": False, "mlp_relu2": False, "attn_layer_pos": None, "jamba_norm": False,
    "post_norm": False, "decouple_postnorm": False, "skip_gain": False, "skip_weight_per_layer": -1, "no_skip": False,
    "lc": False, "lc_shared": False, "sum_skip": False, "share_per_layer": -1, "share_group": 1, "fa2": True,
    "use_cu_seqlen": False,
}  # fmt: skip
#: Keys that name things, change speed, training or initialisation only, or are read by nothing.
IGNORED = {
    "org", "name", "eos_token_id", "residual_in_fp32", "w_init_scale", "head_init_std", "use_muon", "lc_budget_tau",
    "lc_budget_lambda", "sparsity", "top_k", "aux_gamma", "aux_style", "share_expert", "fuse_sort_and_padding",
    "use_sonicmoe", "global_aux", "super_mup", "original_mup", "shadow_init", "compress", "sc_lc", "no_mlp_bias",
}  # fmt: skip
READ = {
    "vocab_size", "padding_multiple", "padded_vocab_size", "n_layer", "n_head", "n_embd", "ar", "mlp_expand",
    "intermediate_size", "head_dim", "n_query_groups", "tied_embed", "block_size", "local_window", "nope", "use_da",
    "rope_base", "attn_bias", "attn_out_bias", "rnn_per_layer", "rnn_type", "yoco", "gmu_yoco", "gmu_per_layer",
    "gmu_attn", "gmu_mlp", "yoco_window", "mup", "mup_d0", "mup_hd0", "use_muonh", "depth_scale", "_norm_class",
    "norm_eps", "full_per_layer", "ada_rope", "rotary_percentage", "yoco_nope", "gated_attn", "qk_norm", "attn_norm",
    "attn_scale", "da_const_lamb", "bias", "scale_embed",
}  # fmt: skip


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """SambaY's arguments from an ArchScale Config. Switches that are not built are refused by name."""
    for key, value in config.items():
        if key in FIXED and value != FIXED[key]:
            raise ValueError(f"sambay: {key}={value!r} is not built; only {FIXED[key]!r} is")
        if key not in FIXED and key not in IGNORED and key not in READ:
            raise ValueError(f"sambay has no configuration key {key!r}")
    norms = {"FusedRMSNorm": False, "RMSNorm": False, "LayerNorm": True}
    norm = config.get("_norm_class", "FusedRMSNorm")
    if norm not in norms:
        raise ValueError(f"sambay: _norm_class is {norm!r}; expected one of {sorted(norms)}")
    n = config.get("n_layer", 16)
    ar = config.get("ar")
    d = ar * n if ar is not None else config.get("n_embd", 4096)
    ff = config.get("mlp_expand", 4) * d
    if ar is None and config.get("intermediate_size") is not None:  # a width by aspect ratio sets it anew
        ff = config["intermediate_size"]
    heads = config.get("n_head", 32)
    window = config.get("local_window", -1)
    source = "mlp" if config.get("gmu_mlp") else ("attention" if config.get("gmu_attn") else "scan")
    period = config.get("full_per_layer", 1000000)
    padded = config.get("padded_vocab_size")
    return {
        "vocab_size": config.get("vocab_size", 50254),
        "padding_multiple": padded if padded is not None else config.get("padding_multiple", 512),
        "n_layer": n,
        "d_model": d,
        "heads": heads,
        "kv_heads": config.get("n_query_groups") or heads,
        "head_dim": config.get("head_dim") or d // heads,
        "ff": int(ff),
        "window": window if window > 0 else None,
        "rnn_per_layer": config.get("rnn_per_layer", -1),
        "rnn_type": config.get("rnn_type", "mamba"),
        "yoco": config.get("yoco", False),
        "gmu": config.get("gmu_yoco", False),
        "gmu_per_layer": config.get("gmu_per_layer", 2),
        "gmu_source": source,
        "differential": config.get("use_da", False),
        "rope_base": None if config.get("nope", False) else config.get("rope_base", 10000),
        "attn_bias": config.get("attn_bias", False),
        "attn_out_bias": config.get("attn_out_bias", False),
        "layer_norm": norms[norm],
        "norm_eps": config.get("norm_eps", 1e-5),
        "tied": config.get("tied_embed", False),
        "mup": config.get("mup", False),
        # the hyperball optimiser leaves the logits as they are: n / n
        "mup_d0": n if config.get("use_muonh") else config.get("mup_d0", 16),
        "mup_hd0": config.get("mup_hd0", 128),
        "depth_scale": config.get("depth_scale", False),
        "yoco_window": config.get("block_size", 4096) // 2 if config.get("yoco_window") else None,
        "full_per_layer": None if period >= n else period,
        "adaptive_rope": config.get("ada_rope", False),
        "rotary_share": config.get("rotary_percentage", 1.0),
        "yoco_nope": config.get("yoco_nope", False),
        "gated": config.get("gated_attn", False),
        "qk_norm": config.get("qk_norm", False),
        "attn_norm": config.get("attn_norm", False),
        "attn_scale": config.get("attn_scale"),
        "constant_lambda": config.get("da_const_lamb", False),
        "bias": config.get("bias", False),
        "scale_embed": config.get("scale_embed", False),
    }


def hub_arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """SambaY's arguments from the config.json of the released Phi-4-mini-flash (``model_type`` phi4flash).

    Raises ValueError for sizes of its Mamba layers other than the usual ones, which nothing released has.
    """
    d = config["hidden_size"]
    usual = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": math.ceil(d / 16)}
    other = sorted(k for k, v in usual.items() if config.get(k, v) not in (v, "auto"))
    if other or config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"sambay: {other or ['hidden_act']} is not as in Phi-4-mini-flash: {usual}, hidden_act silu")
    window = config.get("sliding_window", 512)
    if isinstance(window, list | tuple):  # one a layer, null where there is none
        window = max(w for w in window if w is not None)
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "padding_multiple": 1,
        "n_layer": config["num_hidden_layers"],
        "d_model": d,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": d // heads,
        "ff": config["intermediate_size"],
        "window": window,
        "rnn_per_layer": config.get("mb_per_layer", 2),
        "differential": True,
        "attn_bias": True,
        "attn_out_bias": True,
        "layer_norm": True,
        "norm_eps": config.get("layer_norm_eps", 1e-5),
        "tied": config.get("tie_word_embeddings", True),
    }


def archscale_rules(units: Iterable[int], tied: bool) -> Rules:
    """The training code's keys; ``units``: the layers that are GMUs."""
    tie = [Tied("lm_head.weight", "transformer.wte.weight"), Rename("lm_head.weight", "embedding.weight")]
    return Rules(
        *(tie if tied else []),
        Rename("transformer.wte.weight", "embedding.weight"),
        Rename("transformer.ln_f.{p}", "norm_f.{p}"),
        *(Rename(f"transformer.h.{i}.attn.gmu.{{rest:*}}", f"layers.{i}.mixer.{{rest:*}}") for i in units),
        Rename("transformer.h.{i:d}.attn.{rest:*}", "layers.{i:d}.mixer.{rest:*}"),
        Rename("transformer.h.{i:d}.{rest:*}", "layers.{i:d}.{rest:*}"),
    )


def _shown(state: Mapping[str, Tensor]) -> tuple[list[int], bool]:
    """What the keys of a state dict, ours or the training code's, show: which layers are GMUs, whether heads are tied.

    A GMU has the projections of a Mamba layer and no scan between them.
    """
    theirs, ours = (
        re.compile(r"transformer\.h\.(\d+)\.attn\.gmu\."),
        re.compile(r"layers\.(\d+)\.mixer\.in_proj\.weight"),
    )
    found = {int(m[1]) for k in state if (m := theirs.match(k))}
    found |= {int(m[1]) for k in state if (m := ours.fullmatch(k)) and f"layers.{m[1]}.mixer.A_log" not in state}
    head, words = state.get("lm_head.weight"), state.get("transformer.wte.weight")
    same = head is not None and words is not None and head.device.type != "meta" and torch.equal(head, words)
    return sorted(found), head is None or same


def phi4_rules(model: SambaY) -> Rules:
    """The released Phi-4-mini-flash: fused Wqkv (all q, then k, then v), other names, a copy of the tied head.

    The rows of Wqkv.bias that belong to k exist there but cannot change any output: without positions a key bias
    moves all scores of a query alike. They are dropped, and written back as zeros.
    """
    rules: list[Any] = [Tied("model.embed_tokens.weight", "lm_head.weight")]
    for i, layer in enumerate(model.layers):
        theirs, ours = f"model.layers.{i}.attn.", f"layers.{i}.mixer."
        if layer.role == "gmu":
            continue
        if isinstance(layer.mixer, Attention):
            q = layer.mixer.heads * layer.mixer.head_dim
            kv = layer.mixer.kv_heads * layer.mixer.head_dim
            if layer.mixer.cross:
                rules.append(Rename(theirs + "Wqkv.{p}", ours + "q_proj.{p}"))
            else:
                rules.append(
                    Split(
                        theirs + "Wqkv.weight",
                        [ours + "q_proj.weight", ours + "k_proj.weight", ours + "v_proj.weight"],
                        sizes=[q, kv, kv],
                    )
                )
                rules.append(_SplitBias(theirs + "Wqkv.bias", ours, q, kv))
            rules += [
                Rename(theirs + "out_proj.{p}", ours + "proj.{p}"),
                Rename(theirs + "inner_cross_attn.{rest:*}", ours + "da.{rest:*}"),
                Rename(theirs + "subln.{p}", ours + "da.subln.{p}"),  # some copies lack the prefix
                Rename(theirs + "{name}", ours + "da.{name}"),
            ]
    rules += [
        Rename("model.embed_tokens.weight", "embedding.weight"),
        Rename("model.final_layernorm.{p}", "norm_f.{p}"),
        Rename("model.layers.{i:d}.input_layernorm.{p}", "layers.{i:d}.norm_1.{p}"),
        Rename("model.layers.{i:d}.post_attention_layernorm.{p}", "layers.{i:d}.norm_2.{p}"),
        Rename("model.layers.{i:d}.mlp.fc1.{p}", "layers.{i:d}.mlp.w1.{p}"),
        Rename("model.layers.{i:d}.mlp.fc2.{p}", "layers.{i:d}.mlp.w3.{p}"),
        Rename("model.layers.{i:d}.attn.{rest:*}", "layers.{i:d}.mixer.{rest:*}"),
    ]
    return Rules(*rules)


class _SplitBias(Split):
    """Wqkv.bias to the q and v biases; the k rows, which change nothing, are left out and come back as zeros."""

    def __init__(self, theirs: str, ours: str, q: int, kv: int) -> None:
        super().__init__(theirs, [ours + "q_proj.bias", ours + "v_proj.bias"])
        self.q, self.kv = q, kv

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0][: self.q], parts[0][self.q + self.kv :]]

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat([parts[0], parts[0].new_zeros(self.kv), parts[1]])]


class SambaYAdapter(ReferenceAdapter):
    """Reads microsoft/ArchScale's GPT and the released Phi-4-mini-flash."""

    system = "sambay"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(SambaY(**self.arguments(config)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return hub_arguments_of(config) if "num_hidden_layers" in config else arguments_of(config)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        hub = any(k.startswith("model.") for k in state)
        if isinstance(model, SambaY):
            units = [i for i, layer in enumerate(model.layers) if layer.role == "gmu"]
            return phi4_rules(model) if hub else archscale_rules(units, model.lm_head is None)
        if hub:
            raise ValueError(
                "the released Phi-4-mini-flash joins q, k and v; where to cut them, the model says: model="
            )
        return archscale_rules(*_shown(state))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, SambaY)
        found: dict[str, Tensor] = {}
        shared = Shared()
        x = model.embed(inputs["input_ids"])
        last: Tensor | None = None
        middle = model.layers[model.n_layer // 2]
        replaced = any(layer.memory == "mlp" for layer in model.layers) and middle.role in ("mamba", "mamba2")
        for i, layer in enumerate(model.layers):
            if replaced and layer is middle:  # the original keeps its scan as well, until an MLP's values replace it
                layer.memory = "scan"
            x = layer(x, shared, None, None, None)
            if replaced and layer is middle:
                layer.memory = None
            found[f"mid/block{i}"] = x
            if shared.memory is not None and shared.memory is not last:
                found[f"mid/gmu_memory{i}"] = last = shared.memory
            if layer.role == "full" and shared.k is not None:
                assert shared.v is not None
                found |= {"mid/shared_k": shared.k, "mid/shared_v": shared.v}
        return {"logits": model.head(model.norm_f(x)), **found}
