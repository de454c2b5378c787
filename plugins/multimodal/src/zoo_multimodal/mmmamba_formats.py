"""The original's formats of mmMamba: configurations, keys of the training and of the released form, golden files.

Original: hustvl/mmMamba @ 85143d0, MIT (``convert_weight.py``, ``src/trainer/distill_every_layer.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Concat, Rename, Rules, Split

from .mmmamba import MmMamba
from .mmmamba_distill import alignment_loss, alignment_pass
from .mmmamba_mixers import Mamba2Attention, SoftmaxAttention
from .mmmamba_parts import DecoderLayer

#: Layers of the embedding stack are numbered from 0, those of the language stack from here, whatever their number.
LANGUAGE_FROM = 8

MIXER_FLAGS = ("use_D", "use_qknorm", "use_conv", "use_gnorm", "use_A", "mimic_init")
#: of golden files: keys that change no number here
WITHOUT_EFFECT = frozenset(
    {
        *(
            "attn_implementation",
            "initializer_factor",
            "use_autoregressive_loss",
            "pretraining_tp",
            "initializer_range",
        ),
        *("use_img_start_end_tokens", "use_cache", "attention_dropout", "llm_hidden_size", "drop_path_rate"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_2d_sincos_pos_embed"),
        "mlp_bias",  # in the original's configuration, and read by nothing
    }
)
STACK = {
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
    "intermediate_size": "hidden", "rms_norm_eps": "eps", "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "max_position_embeddings": "max_positions", "hidden_act": "act",
}  # fmt: skip
#: each stack's name of "the attention has biases", and what it is where the configuration is silent
BIAS = {"embedding": ("attention_bias", False), "llm": ("bias", True)}
#: the constructors' defaults where a configuration is silent
DEFAULTS = {
    "embedding": {"layers": 32, "heads": 32, "hidden": 11008, "eps": 1e-5, "max_positions": 4096},
    "llm": {"layers": 32, "heads": 32, "hidden": 11008, "eps": 1e-6, "max_positions": 2048},
}
VISION = {
    "image_size": ("image_size", 224), "patch_size": ("patch_size", 14), "num_channels": ("in_chans", 3),
    "img_context_token_id": ("image_token", 92546), "downsample_ratio": ("downsample_ratio", 0.5),
    "llm_vocab_size": ("text_vocab_size", 92553),
}  # fmt: skip
OF_EMBEDDING = {*VISION, "hidden_size", "special_token_maps", "use_pixel_shuffle_proj", "pixel_shuffle_loc"}
REFUSED = {
    "use_ls": (False, "layer scales are not part of this decoder, in the original either"),
}


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """:class:`MmMamba`'s arguments from the golden files' configuration or a published ``config.json``.

    Softmax layers: ``softmax_attention`` or ``softmax_layers`` (language layers from 8), or each stack's
    ``layers_block_type``; without any of them a ``config.json`` of a teacher, all softmax.
    """
    published = "embedding_config" in config
    first = config["embedding_config" if published else "embedding"]
    second = config["llm_config" if published else "llm"]
    flags = dict(config.get("mamba2") or {})
    unknown = sorted(set(flags) - {*MIXER_FLAGS, "inherit_qkv"})
    if unknown:
        raise ValueError(f"mmmamba: mamba2 has no flag {', '.join(map(repr, unknown))}")
    mixer = {name: bool(flags[name]) for name in MIXER_FLAGS if name in flags}
    softmax = _softmax(config, first, second)
    shuffled = first.get("use_pixel_shuffle_proj", published)  # every published model has the projector
    found: dict[str, Any] = {
        "vocab_size": second["vocab_size"],
        "d_model": second["hidden_size"],
        "embedding": _stack(first, "embedding", softmax[0], mixer, strict=not published),
        "language": _stack(second, "llm", softmax[1], mixer, strict=not published),
        "normalize_embeddings": bool(config.get("normalize_encoder_output", False)),
        "special_tokens": len(first.get("special_token_maps") or {}),
        "shuffle": first.get("pixel_shuffle_loc", "pre") if shuffled else None,
    }
    if first.get("hidden_size", 4096) != second["hidden_size"]:
        raise ValueError(
            f"mmmamba: hidden_size is {first.get('hidden_size')} in the embedding model, {second['hidden_size']} in "
            "the language model; they are one width"
        )
    return found | {ours: first.get(theirs, default) for theirs, (ours, default) in VISION.items()}


def _completed(config: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what it is silent about and the weights show: ``use_conv``, whose default is another in
    the mixer than in every published model."""
    flags = dict(config.get("mamba2") or {})
    if "embedding_config" not in config and "use_conv" not in flags:
        flags["use_conv"] = any(k.endswith(".attention.conv1d.weight") for k in state)
    return {**config, "mamba2": flags}


def _softmax(
    config: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Indices of softmax layers in each stack."""
    named = next((config[k] for k in ("softmax_attention", "softmax_layers") if k in config), None)
    if named is not None:
        count = first.get("num_hidden_layers", DEFAULTS["embedding"]["layers"])
        return [i for i in named if i < min(LANGUAGE_FROM, count)], [
            i - LANGUAGE_FROM for i in named if i >= LANGUAGE_FROM
        ]
    if "layers_block_type" not in first and "layers_block_type" not in second:
        return list(range(first["num_hidden_layers"])), list(range(second["num_hidden_layers"]))
    found = []
    for stack in (first, second):
        kinds = stack["layers_block_type"]
        wrong = sorted(set(kinds) - {"mamba2", "mha"})
        if wrong:
            raise ValueError(f"mmmamba: layers_block_type holds {wrong}; expected 'mamba2' or 'mha'")
        found.append([i for i, kind in enumerate(kinds) if kind == "mha"])
    return found[0], found[1]


def _stack(
    config: Mapping[str, Any], which: str, softmax: list[int], mixer: Mapping[str, Any], *, strict: bool
) -> dict[str, Any]:
    for name, (value, why) in REFUSED.items():
        if config.get(name, value) != value:
            raise ValueError(f"mmmamba: {name} is {config[name]!r}; expected {value!r}: {why}")
    if strict:
        known = {*STACK, *WITHOUT_EFFECT, *REFUSED, BIAS[which][0], "hidden_size", "layers_block_type"}
        unknown = sorted(set(config) - known - (OF_EMBEDDING if which == "embedding" else {"vocab_size"}))
        if unknown:
            raise ValueError(f"mmmamba: the {which} configuration has no key {', '.join(map(repr, unknown))}")
    found = DEFAULTS[which] | {ours: config[theirs] for theirs, ours in STACK.items() if theirs in config}
    found["kv_heads"] = found.get("kv_heads") or found["heads"]
    name, default = BIAS[which]
    if config.get(name, default):
        found["bias"] = True
    return {**found, "softmax": softmax, "mixer": dict(mixer)}


# -- keys


def _layer_rules(layer: DecoderLayer, theirs: str, ours: str, released: bool) -> list[Any]:
    """Of one layer whose names differ; all others keep theirs."""
    mixer = layer.attention
    if isinstance(mixer, SoftmaxAttention):
        return []
    rules: list[Any] = []
    v, k, q = mixer.sizes
    if released:
        cut = ["vkq_proj", "g_proj", "dt_proj"]
        sizes = [v + k + q, mixer.heads * mixer.head_dim, mixer.heads]
        rules.append(Split(f"{theirs}.wvkqgdt.weight", [f"{ours}.{n}.weight" for n in cut], sizes=sizes))
        rules.append(Rename(f"{theirs}.g_norm_swish_gate.weight", f"{ours}.g_norm"))
    else:
        parts = [f"{theirs}.{n}_proj.weight" for n in "vkq"]
        rules.append(Concat(parts, f"{ours}.vkq_proj.weight", sizes=[v, k, q]))
        rules.append(Rename(f"{theirs}.in_proj.weight", f"{ours}.dt_proj.weight"))
        rules.append(Rename(f"{theirs}.g_norm.weight", f"{ours}.g_norm"))
    shadow = [f"{theirs}.{n}_proj_shadow.weight" for n in "vkq"]
    rules.append(Concat(shadow, f"{ours}.shadow_proj.weight", sizes=[v, k, q]))
    return rules


def rules_of(model: MmMamba, *, released: bool) -> Rules:
    """The key table of a model: ``wvkqgdt`` in the released form, a matrix for each projection in the training form."""
    rules: list[Any] = []
    for stack, theirs, ours in (
        (model.embedding, "embedding_model.encoder", "embedding.layers"),
        (model.language, "language_model.model.layers", "language.layers"),
    ):
        for i, layer in enumerate(stack.layers):
            assert isinstance(layer, DecoderLayer)
            rules += _layer_rules(layer, f"{theirs}.{i}.attention", f"{ours}.{i}.attention", released)
        rules.append(Rename(f"{theirs}.{{i:d}}.{{rest:*}}", f"{ours}.{{i:d}}.{{rest:*}}"))
    return Rules(
        *rules,
        Rename("embedding_model.llm_text_embeddings.weight", "text_embeddings.weight"),
        Rename("embedding_model.special_text_embeddings.weight", "special_embeddings.weight"),
        Rename("embedding_model.pixel_shuffle_proj.{rest:*}", "projector.{rest:*}"),
        Rename("embedding_model.vision_embeddings.{rest:*}", "vision_embeddings.{rest:*}"),
        Rename("language_model.model.tok_embeddings.weight", "tok_embeddings.weight"),
        Rename("language_model.model.norm.weight", "norm.weight"),
        Rename("language_model.output.weight", "output.weight"),
    )


class MmMambaAdapter(ReferenceAdapter):
    """Reads hustvl/mmMamba: training and released checkpoints, and its teacher HoVLE (all layers softmax)."""

    system = "mmmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        arguments = arguments_of(_completed(config, state))
        if any(k.endswith("q_proj_shadow.weight") for k in state):
            for stack in ("embedding", "language"):
                arguments[stack]["mixer"]["shadow"] = True
        model = MmMamba(**arguments)
        model.reference_form = "released" if _is_released(state) else "training"
        return self.load(model, state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return arguments_of(config)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if not isinstance(model, MmMamba):
            raise ValueError("mmmamba: give model=, ours: where its softmax layers lie decides the table")
        theirs = any(k.startswith(("embedding_model.", "language_model.")) for k in state)
        return rules_of(model, released=_is_released(state) if theirs else model.reference_form == "released")

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, MmMamba)
        if "input_ids" not in inputs:
            raise ValueError(f"mmmamba: inputs hold {sorted(inputs)}; expected input_ids (and pixel_values)")
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        padding = None if mask is None or bool(mask.all()) else mask
        pixels, hd, at, hd_at = (
            inputs.get(k) for k in ("pixel_values", "hd_input_ids", "position_ids", "hd_position_ids")
        )
        between: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        if _runs(model):  # without a convolution and with fewer kv heads only the distillation pass exists
            hidden = model.hidden(ids, pixels, hd, at, hd_at, found=between, padding=padding)
            found["logits"] = model.output(model.norm(hidden))
            found |= {f"mid/{name}": value for name, value in between.items()}
        if any(isinstance(m, Mamba2Attention) for m in model.modules()):
            aligned = alignment_pass(model, ids, pixels, hd, at, hd_at, padding)
            for n, pair in enumerate(_numbered(aligned.pairs, len(model.embedding.layers))):
                if pair is not None:  # (batch, H, length, P) in the original
                    found[f"distill.{n}.student"], found[f"distill.{n}.teacher"] = (t.transpose(1, 2) for t in pair)
            found["distill.loss"] = alignment_loss(aligned.pairs)
            found["distill.logits"] = aligned.logits
        return found | _fused(model)


def _is_released(state: Mapping[str, Any]) -> bool:
    return any(k.endswith(".wvkqgdt.weight") for k in state)


def _runs(model: MmMamba) -> bool:
    mixers = [m for m in model.modules() if isinstance(m, Mamba2Attention)]
    return all(m.conv1d is not None or m.heads == m.kv_heads for m in mixers)


def _numbered(pairs: list[Any], embedding_layers: int) -> list[Any]:
    """The original's list: softmax layers of the embedding stack leave no entry, those of the language stack do."""
    return [pair for i, pair in enumerate(pairs) if pair is not None or i >= embedding_layers]


def _fused(model: MmMamba) -> dict[str, Tensor]:
    """The released form's matrix and norm of the first Mamba layer, where it has them."""
    first = next((m for m in model.modules() if isinstance(m, Mamba2Attention)), None)
    if first is None or first.g_proj is None:
        return {}
    weights = [first.vkq_proj.weight, first.g_proj.weight, first.dt_proj.weight]
    name = "fused.first_mamba_layer"
    assert first.g_norm is not None
    return {f"{name}.wvkqgdt": torch.cat(weights), f"{name}.g_norm_swish_gate": first.g_norm}
