"""Language models with B'MOJO layers, and what reads the original's layer.

Paper: arXiv 2407.06324; the primed models: awslabs/hybrid-model-factory @ 04b6242, Apache-2.0, where some attention
layers of a Transformer (Qwen3) become B'MOJO-F layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Linear, Recomputed, RMSNorm
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from ._base import CausalLM, normed
from .bmojo import BMojoLayer, FullAttention, phases
from .state import LayerState


class SwiGLU(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(d_model, hidden, bias=False), Linear(d_model, hidden, bias=False)
        self.down_proj = Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BMojoBlock(Recomputed):
    """``x + mixer(norm x)``, then ``x + mlp(norm2 x)``."""

    def __init__(self, d_model: int, mixer: nn.Module, hidden: int, norm_eps: float, rope_base: float) -> None:
        super().__init__()
        self.norm, self.norm2 = RMSNorm(d_model, norm_eps), RMSNorm(d_model, norm_eps)
        self.mixer, self.mlp = mixer, SwiGLU(d_model, hidden)
        self.rope_base = rope_base

    def init_state(self, batch: int) -> LayerState:
        return self.mixer.init_state(batch)  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        *,
        state: LayerState | None = None,
        position: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        start = torch.zeros(1, dtype=torch.long, device=x.device) if position is None else position
        at = start[:, None] + torch.arange(x.shape[1], device=x.device)
        turn = phases(at, self.mixer.head_dim, self.rope_base)  # type: ignore[arg-type]
        mixed = self.mixer(normed(self.norm, x), turn, state=state, position=position, lengths=lengths)
        x = x + mixed
        return x + self.mlp(normed(self.norm2, x))

    def step(self, x: Tensor, state: LayerState, position: Tensor) -> Tensor:
        return self(x[:, None], state=state, position=position)[:, 0]


class BMojoLM(CausalLM):
    """A decoder whose layers ``bmojo_layers`` are :class:`~zoo_language.bmojo.BMojoLayer`, the others full attention.

    Arguments: ``d_model``; ``n_layer``; ``vocab_size``; ``heads``, ``kv_heads``, ``head_dim``; ``d_ff``;
    ``bmojo_layers`` (None: all); ``window``, ``ssm``, ``ssm_config``, ``tie``, ``eidetic``, ``fading`` of the B'MOJO
    layers; ``qk_norm``; ``qkv_bias``; ``norm_eps``; ``rope_base``; ``tie_embeddings``.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        d_ff: int,
        bmojo_layers: Sequence[int] | None = None,
        window: int = 2048,
        ssm: str = "mamba2",
        ssm_config: Mapping[str, Any] | None = None,
        tie: bool = True,
        eidetic: int = 0,
        fading: bool = True,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        norm_eps: float = 1e-6,
        rope_base: float = 10000.0,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        chosen = set(range(n_layer) if bmojo_layers is None else bmojo_layers)
        if not chosen <= set(range(n_layer)):
            raise ValueError(f"bmojo_layers {sorted(chosen)} are not all among the {n_layer} layers")
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model)

        def mixer(i: int) -> nn.Module:
            if i not in chosen:
                return FullAttention(
                    d_model, heads, kv_heads, head_dim, qk_norm=qk_norm, bias=qkv_bias, norm_eps=norm_eps
                )
            return BMojoLayer(
                d_model, heads, kv_heads, head_dim, window, ssm, ssm_config, tie, qk_norm, qkv_bias, False, norm_eps,
                eidetic=eidetic, fading=fading,
            )  # fmt: skip

        self.layers = nn.ModuleList(BMojoBlock(d_model, mixer(i), d_ff, norm_eps, rope_base) for i in range(n_layer))
        self.norm_f = RMSNorm(d_model, norm_eps)
        self.lm_head = None if tie_embeddings else Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding if self.lm_head is None else self.lm_head)

    def no_weight_decay(self) -> set[str]:
        """Parameters of the recurrences that are not decayed."""
        return {n for n, _ in self.named_parameters() if n.endswith(("A_log", ".D", "dt_bias"))}


# -- the original's layer ---------------------------------------------------------------------------------------------

#: Our name of the recurrence under each of the original's, with the key prefix and the configuration's name.
_MIXERS = {
    "mamba2": ("mamba2", "mamba", "mamba2_config"),
    "gdn": ("gdn", "gdn", "gdn_config"),
    "gated_deltanet": ("gdn", "gdn", "gdn_config"),
    "gka": ("gka", "gka", "gka_config"),
    "gated_kalmanet": ("gka", "gka", "gka_config"),
}
#: Of the recurrences' configurations: kernels and parallelism only.
_SILENT = {"use_state_passing_sp", "chunk_size", "solver_type", "layer_idx"}
_KNOWN = {
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias",
    "attention_dropout", "bmojo_config", "qk_norm", "mamba2_config", "gdn_config", "gka_config", "rope_theta",
    "max_position_embeddings",
}  # fmt: skip
#: Of the Transformer around the layer.
_AROUND = {
    "num_hidden_layers", "intermediate_size", "hidden_act", "vocab_size", "model_type", "initializer_range",
    "use_cache", "tie_word_embeddings", "rope_scaling", "architectures", "torch_dtype", "transformers_version",
    "bos_token_id", "eos_token_id", "pad_token_id", "hybrid_override_pattern",
}  # fmt: skip


def layer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """BMojoLayer's arguments from the original's configuration (with ``qk_norm``: whether a norm class is passed).

    Raises ValueError for keys that the original does not have.
    """
    unknown = sorted(set(config) - _KNOWN - _AROUND)
    if unknown:
        raise ValueError(f"bmojo has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")
    own = dict(config.get("bmojo_config") or {})
    strange = sorted(set(own) - {"window_size", "tie_attn_weights", "ssm_mixer"})
    if strange:
        raise ValueError(
            f"bmojo_config has no key {', '.join(strange)}; known: window_size, tie_attn_weights, ssm_mixer"
        )
    named = str(own.get("ssm_mixer", "mamba2")).lower()
    if named not in _MIXERS:
        raise ValueError(f"ssm_mixer is {named!r}; expected one of {', '.join(_MIXERS)}")
    ssm, _, group = _MIXERS[named]
    qk_norm = bool(config.get("qk_norm", True))
    given = {k: v for k, v in (config.get(group) or {}).items() if k not in _SILENT}
    if ssm == "mamba2":
        wrong = sorted(set(given) - {"use_qk_norm", "use_pos_emb"})
        if wrong:
            raise ValueError(f"mamba2_config has no key {', '.join(wrong)}; known: use_qk_norm, use_pos_emb")
        given = {
            "bc_norm": qk_norm and given.get("use_qk_norm", True),
            "bc_rotary": given.get("use_pos_emb", False),
        }
    heads = config["num_attention_heads"]
    return {
        "d_model": config["hidden_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim"),
        "window": own.get("window_size", 2048),
        "ssm": ssm,
        "ssm_config": given,
        "tie": own.get("tie_attn_weights", True),
        "qk_norm": qk_norm,
        "qkv_bias": config.get("attention_bias", True),
        "o_bias": config.get("attention_bias", False),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "dropout": config.get("attention_dropout", 0.0),
    }


class BMojoAdapter(ReferenceAdapter):
    """Reads B'MOJO-F layers of awslabs/hybrid-model-factory, with each of its three recurrences."""

    system = "bmojo"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(BMojoLayer(**layer_arguments(config)), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        kinds = {"GroupedMamba2": "mamba", "GatedDeltaNet": "gdn", "GatedKalmaNet": "gka"}
        name = kinds.get(type(getattr(model, "ssm", None)).__name__, "mamba")
        return Rules(
            Rename(name + ".{rest:*}", "ssm.{rest:*}"),
            Rename("bmojo_attn.{rest:*}", "{rest:*}"),
        )

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, BMojoLayer)
        found: dict[str, Tensor] = {}
        hooks = []
        if model.ssm is not None:
            keep = lambda _, __, out: found.__setitem__("mid/fading_tokens", out)  # noqa: E731
            hooks.append(model.ssm.register_forward_hook(keep))
        try:
            found["y"] = model(inputs["hidden_states"], (inputs["cos"], inputs["sin"]))
        finally:
            for hook in hooks:
                hook.remove()
        return found
