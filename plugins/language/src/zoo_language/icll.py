"""In-context language learning: small language models around every mixer of the study, n-gram heads among them.

Paper: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973. Original:
berlino/seq_icl @ 9b9223d, Apache-2.0 (``simple_lm.py``). Differs: models without a recurrent form of their own keep the
text as their state and read it again for each token (the original has no cached decoding at all).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.layers import Recomputed
from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules, Tied

from ._base import Rereading
from .icll_convolutions import Hyena, HyenaFilter
from .icll_mixers import LSTM, Attention, Retention, RotaryAttention, mixer, ngram_weights
from .icll_task import Automaton, AutomatonSampler


class MLP(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(Recomputed):
    """``x + mixer(norm1 x)``, then ``x + mlp(norm2 x)``."""

    def __init__(self, d_model: int, inner: nn.Module, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.mixer, self.mlp = inner, MLP(d_model, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps), nn.LayerNorm(d_model, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, length, d_model) to the same, and the mixer's output."""
        mixed = _mixed(self.mixer, self.norm1(x), ids)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.norm2(x))), mixed


class InContextLM(Rereading):
    """A language model of the study.

    Arguments: ``d_model``; ``vocab_size``; ``layers``, one mapping a layer: ``{"mixer": name, ...its arguments}``,
    where "attention" takes ``num_heads``, ``linear`` and more; ``d_inner``, one for all layers or one each;
    ``max_positions`` (learnt positions; 0: none); ``embed_dropout``, ``resid_dropout``; ``norm_eps`` of every
    LayerNorm; ``blocks``: False for the study's form without norms, MLPs and residuals, where every mixer reads the
    embeddings and the last one alone is heard (the original's behaviour).
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        layers: Sequence[Mapping[str, Any]],
        d_inner: int | Sequence[int] = 0,
        max_positions: int = 0,
        embed_dropout: float = 0.1,
        resid_dropout: float = 0.0,
        blocks: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.vocab_size, self.blocks = vocab_size, blocks
        self.reference_prefix = "backbone." if blocks else ""  #: where the original keeps these keys
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_positions, d_model) if max_positions else None
        hidden = [d_inner] * len(layers) if isinstance(d_inner, int) else list(d_inner)
        self.embed_dropout = nn.Dropout(embed_dropout)
        mixers = [_mixer(d_model, layer) for layer in layers]
        self.layers = nn.ModuleList(
            [Block(d_model, m, h, resid_dropout, norm_eps) for m, h in zip(mixers, hidden, strict=True)]
            if blocks
            else mixers
        )
        self.norm_f = nn.LayerNorm(d_model, norm_eps) if blocks else nn.Identity()
        #: torch.compile does not take torch's LSTM whole
        self.not_compilable = any(isinstance(m, LSTM) for m in self.modules())
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(layers)))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def embed(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if self.positions is not None:
            if input_ids.shape[1] > self.positions.num_embeddings:
                raise ValueError(
                    f"the text has {input_ids.shape[1]} tokens, this model {self.positions.num_embeddings} positions"
                )
            x = x + self.positions.weight[: input_ids.shape[1]]
        return x

    def head(self, hidden: Tensor) -> Tensor:
        return placement.linear(hidden, self.embedding)

    def mix(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The last hidden states, and every mixer's output."""
        x = self.embed(input_ids)
        found: list[Tensor] = []
        if not self.blocks:
            for layer in self.layers:
                found.append(_mixed(layer, x, input_ids))
            return found[-1], found
        x = self.embed_dropout(x)
        for layer in self.layers:
            x, mixed = layer(x, input_ids)
            found.append(mixed)
        return self.norm_f(x), found

    def read(self, input_ids: Tensor) -> Tensor:
        return self.mix(input_ids)[0]


def _mixer(d_model: int, layer: Mapping[str, Any]) -> nn.Module:
    arguments = dict(layer)
    name = arguments.pop("mixer")
    return Attention(d_model, **arguments) if name == "attention" else mixer(name, d_model, **arguments)


# -- the original's format --------------------------------------------------------------------------------------------


#: Arguments of the original's models that change no numbers: how a fresh model starts, the residual's precision in
#: bfloat16, what else is returned, and placement.
IGNORED = {"initializer_cfg", "residual_in_fp32", "return_attention", "device", "dtype", "_name_"}


def arguments_of(config: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """InContextLM's arguments from those of the original's class ``kind``.

    ``kind``: "SimpleLMHeadModel", "SimpleLMHeadModelNoFFN" or "HybridLMHeadModel"; any other text: from the keys.
    Raises ValueError for a key that none of them has.
    """
    known = {
        "d_model", "n_layer", "d_inner", "vocab_size", "resid_dropout", "embed_dropout", "layer", "layers", "attn_cfg",
        "attn_layer_idx", "max_position_embeddings", "linear_attention", "pad_vocab_size_multiple",
        "layer_norm_epsilon",
    }  # fmt: skip
    unknown = sorted(set(config) - known - IGNORED)
    if unknown:
        raise ValueError(f"icll has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if "layers" in config:  # the hybrid; its other arguments are the common ones
        entries = list(config["layers"].values())
        d_inner = [_hidden(config, entry.get("d_inner")) for entry in entries]
        return _common(config, padded=False) | {
            "layers": [_layer(entry["mixer_layer"]) for entry in entries],
            "d_inner": d_inner,
        }
    common = _common(config) | {"max_positions": max(0, config.get("max_position_embeddings", 0) or 0)}
    if kind == "SimpleLMHeadModelNoFFN" or (kind != "SimpleLMHeadModel" and "d_inner" not in config):
        return common | {"layers": [_layer(config["layer"])] * config.get("n_layer", 1), "blocks": False}
    attention = dict(config.get("attn_cfg") or {})
    indices = set(config.get("attn_layer_idx") or ())
    layers = []
    for i in range(config["n_layer"]):
        if i in indices:
            # The original takes "causal" out of the mapping that all layers share: the first such layer has it alone.
            causal = attention.pop("causal", True)
            linear = bool(config.get("linear_attention", False))
            layers.append({"mixer": "attention", **attention, "causal": causal, "linear": linear})
        else:
            layers.append(_layer(config["layer"]) | attention)
    return common | {
        "layers": layers,
        "d_inner": _hidden(config, config.get("d_inner")),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
    }


def _common(config: Mapping[str, Any], *, padded: bool = True) -> dict[str, Any]:
    multiple = (config.get("pad_vocab_size_multiple") or 1) if padded else 1
    return {
        "d_model": config["d_model"],
        "vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "embed_dropout": config.get("embed_dropout", 0.1),
        "resid_dropout": config.get("resid_dropout", 0.0),
    }


def _hidden(config: Mapping[str, Any], d_inner: int | None) -> int:
    return 4 * config["d_model"] if d_inner is None else d_inner


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"mixer": entry["_name_"], **{k: v for k, v in entry.items() if k != "_name_"}}


#: The original's classes of bare mixers, for files that hold one.
CLASSES = {
    "GILRLayer": "gilr", "LRULayer": "lru", "RWKVLayer": "rwkv", "LSTMLayer": "lstm", "MambaLayer": "mamba",
    "GatedLinearAttention": "gla", "MultiScaleRetention": "retention", "MultiHeadAttentionWithRope": "mha-rope",
    "H3": "h3", "S4D": "s4d", "HyenaOperator": "hyena", "Ngram": "ngram",
}  # fmt: skip


class NGramReplay(nn.Module):
    """The n-gram head alone, orders 1 to 4."""

    def forward(self, ids: Tensor, hidden: Tensor, shift: int = 1) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for n in range(1, 5):
            weights = ngram_weights(ids, n, shift).to(hidden.dtype)
            found |= {f"weights_n{n}": weights, f"out_n{n}": weights @ hidden}
        return found


class TaskReplay(nn.Module):
    """The task generator alone: transitions, words, acceptance and minimal sizes of a sampler's first automata."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)

    def forward(self, probes: Tensor) -> dict[str, Tensor]:
        c = self.config
        alphabet = c["alphabet"]
        index = {s: i for i, s in enumerate(alphabet)}
        sampler = AutomatonSampler(c["num_nodes"], alphabet, c["max_outgoing_edge"], c["seed"])
        automata: list[Automaton] = []
        words = []
        for _ in range(c["automata"]):
            automaton = sampler.sample()
            automata.append(automaton)
            words.append([automaton.sample(c["word_length"]) for _ in range(c["words_per_automaton"])])
        table = [
            [[automaton.edges[node].get(s, -1) for s in alphabet] for node in range(c["num_nodes"])]
            for automaton in automata
        ]
        accepted = [
            [int(automaton.accepts([alphabet[int(i)] for i in word])) for word in probes[a]]
            for a, automaton in enumerate(automata)
        ]
        return {
            "transitions": torch.tensor(table),
            "sampled_words": torch.tensor([[[index[s] for s in word] for word in group] for group in words]),
            "probe_accepted": torch.tensor(accepted),
            "minimized_states": torch.tensor([len(automaton.minimized().edges) for automaton in automata]),
        }


class ICLLAdapter(ReferenceAdapter):
    """Reads berlino/seq_icl: language models, bare mixers, the n-gram head, the task generator."""

    system = "icll"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "max_outgoing_edge" in config:
            return TaskReplay(config)
        if not config and not state:
            return NGramReplay()
        kind = source.rpartition(":")[2]
        if "vocab_size" not in config:
            name = CLASSES.get(kind, "lru" if "nu_log" in state else "gilr")
            return self.load(mixer(name, **config), state)
        arguments = arguments_of(config, kind)
        model = InContextLM(**arguments)
        if "layers" in config:
            model.reference_prefix = ""  # the hybrid has no backbone of its own
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if not isinstance(model, InContextLM):
            return _mixer_rules(model, "")
        theirs = model.reference_prefix
        layer = theirs + ("layers.{i:d}." if model.blocks else "mixer.{i:d}.")
        inner = layer + ("mixer." if model.blocks else "")
        ours = "layers.{i:d}.mixer." if model.blocks else "layers.{i:d}."
        mixers = [m.mixer if isinstance(m, Block) else m for m in model.layers]
        return Rules(
            Tied(theirs + "embeddings.word_embeddings.weight", "lm_head.weight"),
            *(_mixer_rules(m, inner.replace("{i:d}", str(i))) for i, m in enumerate(mixers)),
            Rename(theirs + "embeddings.word_embeddings.weight", "embedding.weight"),
            Rename(theirs + "embeddings.position_embeddings.weight", "positions.weight"),
            Rename(theirs + "ln_f.{p}", "norm_f.{p}"),
            Rename(inner + "{rest:*}", ours + "{rest:*}"),
            Rename(layer + "{rest:*}", "layers.{i:d}.{rest:*}"),
        )

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        ours = super().to_zoo(state, model=model)
        # One parameter under several names: torch lists each place of a shared module.
        for prefix, module in model.named_modules() if model is not None else ():
            if isinstance(module, HyenaFilter):
                for name in module.shared_names():
                    first = f"{prefix}.implicit_filter.1.freq"
                    if first in ours:
                        ours[f"{prefix}.{name}"] = ours[first]
        return ours

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, TaskReplay):
            return model(inputs["probe_words"])
        if isinstance(model, NGramReplay):
            shift = re.search(r"shift_step=(\d+)", str(call))
            return model(inputs["input_ids"], inputs["hidden"], int(shift.group(1)) if shift else 1)
        if not isinstance(model, InContextLM):
            return {"y": _mixed(model, inputs["x"], inputs.get("input_ids"))}
        hidden, mixed = model.mix(inputs["input_ids"])
        return {"logits": model.head(hidden)} | {f"mid/mixer{i}": m for i, m in enumerate(mixed)}


def _mixer_rules(inner: nn.Module | None, prefix: str) -> Rules:
    """What a mixer's keys need below ``prefix``: buffers that follow from its sizes, and shared parameters."""
    if isinstance(inner, Retention):
        return Rules(
            Drop(prefix + "xpos.angle", once=prefix + "g_proj.weight", restore=lambda *_: inner.angles()),
            Drop(prefix + "xpos.decay", once=prefix + "g_proj.weight", restore=lambda *_: inner.decays()),
        )
    if isinstance(inner, RotaryAttention):
        return Rules(Drop(prefix + "rope.freqs", once=prefix + "att_qkv.weight", restore=lambda *_: inner.angles()))
    if isinstance(inner, Hyena):
        first = prefix + "filter_fn.implicit_filter.1.freq"
        return Rules(*(Tied(first, f"{prefix}filter_fn.{name}") for name in inner.filter_fn.shared_names()))
    return Rules()


def _mixed(inner: nn.Module, x: Tensor, ids: Tensor | None) -> Tensor:
    return inner(x, ids) if getattr(inner, "needs_ids", False) else inner(x)
