"""From the originals' configurations to our arguments: NX-AI's and Prot-xLSTM's dataclasses, DNA-xLSTM's flat one.

A key that no original has, and the two settings of NX-AI/xlstm that none of the three systems uses (the sLSTM's
``function = "lstm"`` and ``group_norm_weight = false``), are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Config = Mapping[str, Any]

STACK = {
    "mlstm_block", "slstm_block", "context_length", "num_blocks", "embedding_dim", "add_post_blocks_norm", "bias",
    "dropout", "slstm_at", "vocab_size", "tie_weights", "weight_decay_on_embedding", "add_embedding_dropout",
}  # fmt: skip
POSITIONS = {"position_embeddings", "max_position_embeddings", "max_seq_position_embeddings", "rope_base_frequency"}
#: Of Prot-xLSTM's stack, beside :data:`STACK` and :data:`POSITIONS`.
PROTEIN = POSITIONS | {"checkpoint_blocks"}
#: Of DNA-xLSTM's stack, beside :data:`STACK`.
DNA_STACK = {
    "bidirectional", "bidirectional_alternating", "m_backend_bidirectional", "m_position_embeddings",
    "s_position_embeddings", "complement_map", "rcps",
}  # fmt: skip
DNA = {
    "d_model", "n_layer", "tie_weights", "max_length", "vocab_size", "pad_vocab_size_multiple", "m_conv1d_kernel_size",
    "m_conv1d_causal", "m_qkv_proj_blocksize", "m_num_heads", "m_proj_factor", "m_backend", "m_chunk_size", "m_bias",
    "s_num_heads", "s_conv1d_kernel_size", "s_conv1d_causal", "s_lstm_at", "s_proj_factor", "s_round_proj_up_dim_up",
    "s_round_proj_up_to_multiple_of", "dropout",
} | (DNA_STACK)  # fmt: skip
MLSTM = {
    "conv1d_kernel_size": "conv_width",
    "conv1d_causal": "conv_causal",
    "qkv_proj_blocksize": "block_size",
    "num_heads": "num_heads",
    "proj_factor": "proj_factor",
    "round_proj_up_dim_up": "round_up",
    "round_proj_up_to_multiple_of": "multiple",
}
SLSTM = {
    "conv1d_kernel_size": "conv_width",
    "conv1d_causal": "conv_causal",
    "num_heads": "num_heads",
    "bias_init": "bias_init",
}
FEED_FORWARD = {
    "proj_factor": "proj_factor",
    "act_fn": "act",
    "bias": "bias",
    "dropout": "dropout",
    "round_proj_up_dim_up": "round_up",
    "round_proj_up_to_multiple_of": "multiple",
}
#: Settings of a layer that the stack overrides, or that change how and not what is computed.
SPEED = {
    "backend", "chunk_size", "return_last_state", "embedding_dim", "bias", "dropout", "context_length", "dtype",
    "dtype_b", "dtype_r", "dtype_w", "dtype_g", "dtype_s", "dtype_a", "hidden_size", "batch_size", "num_states",
    "num_gates", "enable_automatic_mixed_precision", "recurrent_weight_init", "initial_val", "constants", "ff_type",
    "function", "group_norm_weight", "rcps",
}  # fmt: skip
#: What else must hold for those that would change numbers.
ONLY = {"function": "slstm", "group_norm_weight": True, "ff_type": "ffn_gated"}


def unknown(config: Config, known: set[str], what: str) -> None:
    """Raise ValueError naming keys that ``what`` does not have; those that start with _ are the originals' own."""
    more = sorted(k for k in config if k not in known and not k.startswith("_"))
    if more:
        raise ValueError(f"{what} has no configuration key {', '.join(more)}; known: {', '.join(sorted(known))}")


def _layer(config: Config, names: Mapping[str, str], what: str) -> dict[str, Any]:
    unknown(config, set(names) | SPEED, what)
    for key, only in ONLY.items():
        if config.get(key, only) != only:
            raise ValueError(f"{what}: {key} = {config[key]!r} is not built; expected {only!r}")
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def stack(config: Config) -> dict[str, Any]:
    """The arguments that the three networks share, from a configuration of nested blocks."""
    m, s = config.get("mlstm_block"), config.get("slstm_block")
    at: Sequence[int] | str = config.get("slstm_at") or ()
    if m is None:
        at = "all"
    found: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "d_model": config.get("embedding_dim", 128),
        "num_blocks": config.get("num_blocks", 1),
        "mlstm": _layer((m or {}).get("mlstm") or {}, MLSTM, "an mLSTM layer"),
        "bias": config.get("bias", False),
        "dropout": config.get("dropout", 0.0),
        "final_norm": config.get("add_post_blocks_norm", True),
        "tie_weights": config.get("tie_weights", False),
        "embedding_dropout": config.get("add_embedding_dropout", False),
        "slstm_at": at if isinstance(at, str) else tuple(at),
        "slstm": _layer((s or {}).get("slstm") or {}, SLSTM, "an sLSTM layer"),
    }
    feed = (s or {}).get("feedforward", {})
    found["ffn"] = None if feed is None else _layer(feed, FEED_FORWARD, "a feed-forward layer")
    return found


def chemistry(config: Config) -> dict[str, Any]:
    """XLSTMLM's arguments from an xLSTMLMModelConfig of NX-AI/xlstm."""
    unknown(config, STACK, "an xLSTM language model")
    return stack(config)


def protein(config: Config) -> dict[str, Any]:
    """ProtXLSTM's arguments from an xLSTMLMModelConfig of Prot-xLSTM (also its published config.json)."""
    unknown(config, STACK | PROTEIN, "Prot-xLSTM")
    if config.get("slstm_at"):
        raise ValueError("Prot-xLSTM has mLSTM blocks alone; its configuration names slstm_at")
    names = ("slstm_at", "slstm", "ffn")
    return {k: v for k, v in stack(config).items() if k not in names} | {
        "positions": config.get("position_embeddings", "none"),
        "max_positions": config.get("max_position_embeddings", 2048),
        "max_sequences": config.get("max_seq_position_embeddings", 512),
        "rope_base": config.get("rope_base_frequency", 10000),
    }


def dna(config: Config) -> dict[str, Any]:
    """DNAXLSTM's arguments from DNA-xLSTM's flat xLSTMConfig, or from the nested one of its inner model."""
    if "d_model" not in config and "n_layer" not in config:
        unknown(config, STACK | DNA_STACK, "DNA-xLSTM's inner model")
        nested = stack(config)
        nested["mlstm"] = {"round_up": False, **nested["mlstm"]} if "mlstm" in nested else {}
        backend = ((config.get("mlstm_block") or {}).get("mlstm") or {}).get("backend", "parallel")
        if nested.pop("tie_weights") and not config.get("rcps"):
            raise ValueError("DNA-xLSTM's inner model with tie_weights is not built: its published form never ties")
        return nested | _reading(config, backend, config.get("s_position_embeddings", True))
    unknown(config, DNA, "DNA-xLSTM")
    at = config.get("s_lstm_at") or ()
    return {
        "vocab_size": config.get("vocab_size", 16),
        "d_model": config.get("d_model", 256),
        "num_blocks": config.get("n_layer", 4),
        "slstm_at": at if isinstance(at, str) else tuple(at),
        "mlstm": {
            "conv_width": config.get("m_conv1d_kernel_size", 4),
            "conv_causal": config.get("m_conv1d_causal", True),
            "block_size": config.get("m_qkv_proj_blocksize", 4),
            "num_heads": config.get("m_num_heads", 4),
            "proj_factor": config.get("m_proj_factor", 2.0),
            "round_up": False,
        },
        "slstm": {
            "num_heads": config.get("s_num_heads", 4),
            "conv_width": config.get("s_conv1d_kernel_size", 4),
            "conv_causal": config.get("s_conv1d_causal", True),
        },
        "ffn": {
            "proj_factor": config.get("s_proj_factor", 1.3),
            "round_up": config.get("s_round_proj_up_dim_up", True),
            "multiple": config.get("s_round_proj_up_to_multiple_of", 64),
        },
        "bias": config.get("m_bias", False),
        "dropout": config.get("dropout", 0.0),
    } | _reading(config, config.get("m_backend", "parallel"), config.get("s_position_embeddings", False))


def _reading(config: Config, backend: str, sinusoids: bool) -> dict[str, Any]:
    if backend not in ("parallel", "chunkwise"):
        raise ValueError(f"DNA-xLSTM's m_backend is {backend!r}; expected parallel or chunkwise")
    given = config.get("complement_map")
    return {
        "bidirectional": config.get("bidirectional", False),
        "alternating": config.get("bidirectional_alternating", False),
        "native": config.get("m_backend_bidirectional", False),
        "native_causal": backend == "chunkwise",
        "rcps": config.get("rcps", False),
        "complement": tuple(given.values()) if isinstance(given, Mapping) and given else None,
        "sinusoidal_positions": sinusoids,
        "rotary_positions": config.get("m_position_embeddings", False),
    }
