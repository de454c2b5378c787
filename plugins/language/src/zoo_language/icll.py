"""In-context language learning: small language models around every mixer of the study, n-gram heads among them.

Paper: Akyürek et al., "In-Context Language Learning: Architectures and Algorithms", arXiv 2401.12973. Original:
berlino/seq_icl @ 9b9223d, Apache-2.0 (``simple_lm.py``). Differs: models without a recurrent form of their own keep the
text as their state and read it again for each token (the original has no cached decoding at all).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import placement
from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules, Tied

from ._base import Rereading
from .icll_mixers import GILR, LRU, LSTM, Attention, HyenaFilter, mixer, ngram_weights
from .icll_task import Automaton, AutomatonSampler


class MLP(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """``x + mixer(norm1 x)``, then ``x + mlp(norm2 x)``."""

    def __init__(self, d_model: int, inner: nn.Module, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mixer, self.mlp = inner, MLP(d_model, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def mix(self, x: Tensor, ids: Tensor) -> Tensor:
        n = self.norm1(x)
        return self.mixer(n, ids) if getattr(self.mixer, "needs_ids", False) else self.mixer(n)

    def close(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.norm2(x)))


class InContextLM(Rereading):
    """A language model of the study.

    Arguments: ``d_model``; ``vocab_size``; ``layers``, one mapping a layer: ``{"mixer": name, ...its arguments}``,
    where "attention" takes ``num_heads``, ``dropout``, ``linear``; ``d_inner``, one for all layers or one each;
    ``max_positions`` (learnt positions; 0: none); ``embed_dropout``, ``resid_dropout``; ``blocks``: False for the
    study's form without norms, MLPs and residuals, where every mixer reads the embeddings and the last one alone is
    heard (the original's behaviour).
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
            [Block(d_model, m, h, resid_dropout) for m, h in zip(mixers, hidden, strict=True)] if blocks else mixers
        )
        self.norm_f = nn.LayerNorm(d_model) if blocks else nn.Identity()
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
                found.append(layer(x, input_ids) if getattr(layer, "needs_ids", False) else layer(x))
            return found[-1], found
        x = self.embed_dropout(x)
        for layer in self.layers:
            assert isinstance(layer, Block)
            found.append(layer.mix(x, input_ids))
            x = layer.close(x, found[-1])
        return self.norm_f(x), found

    def read(self, input_ids: Tensor) -> Tensor:
        return self.mix(input_ids)[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        raise NotImplementedError("the models of the study are small; there is no checkpointing")


def _mixer(d_model: int, layer: Mapping[str, Any]) -> nn.Module:
    arguments = dict(layer)
    name = arguments.pop("mixer")
    return Attention(d_model, **arguments) if name == "attention" else mixer(name, d_model, **arguments)


# -- the original's format --------------------------------------------------------------------------------------------


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """InContextLM's arguments from the configuration of SimpleLMHeadModel, its NoFFN form or HybridLMHeadModel."""
    known = {
        "d_model", "n_layer", "d_inner", "vocab_size", "resid_dropout", "embed_dropout", "layer", "layers", "attn_cfg",
        "attn_layer_idx", "max_position_embeddings", "linear_attention", "pad_vocab_size_multiple",
    }  # fmt: skip
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"icll has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    multiple = config.get("pad_vocab_size_multiple", 1) or 1
    common = {
        "d_model": config["d_model"],
        "vocab_size": math.ceil(config["vocab_size"] / multiple) * multiple,
        "embed_dropout": config.get("embed_dropout", 0.1),
        "resid_dropout": config.get("resid_dropout", 0.0),
    }
    if "layers" in config:
        entries = list(config["layers"].values())
        layers = [_layer(entry["mixer_layer"]) for entry in entries]
        return common | {"layers": layers, "d_inner": [entry["d_inner"] for entry in entries]}
    attention = dict(config.get("attn_cfg") or {})
    softmax = {
        "mixer": "attention",
        "num_heads": attention.get("num_heads", 1),
        "dropout": attention.get("dropout", 0.0),
    }
    softmax["linear"] = bool(config.get("linear_attention", False))
    indices = set(config.get("attn_layer_idx") or ())
    layers = [
        softmax if i in indices else _layer(config["layer"]) | {k: v for k, v in attention.items() if k != "dropout"}
        for i in range(config["n_layer"])
    ]
    inner = config.get("d_inner") or 0
    return common | {
        "layers": layers,
        "d_inner": inner,
        "max_positions": config.get("max_position_embeddings", 0) or 0,
        "blocks": inner > 0,
    }


def _layer(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"mixer": entry["_name_"], **{k: v for k, v in entry.items() if k != "_name_"}}


class NGramReplay(nn.Module):
    """The n-gram head alone, orders 1 and 2."""

    def forward(self, ids: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for n in (1, 2):
            weights = ngram_weights(ids, n)
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
    """Reads berlino/seq_icl: language models, bare GILR and LRU mixers, the n-gram head, the task generator."""

    system = "icll"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "max_outgoing_edge" in config:
            return TaskReplay(config)
        if not config and not state:
            return NGramReplay()
        if "vocab_size" not in config:
            build = LRU if "nu_log" in state else GILR
            return self.load(build(**config), state)
        arguments = arguments_of(config)
        if "NoFFN" in source:
            arguments["blocks"] = False
        model = InContextLM(**arguments)
        if "layers" in config:
            model.reference_prefix = ""  # the hybrid has no backbone of its own
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if not isinstance(model, InContextLM):
            return Rules()
        theirs = model.reference_prefix
        layer = theirs + ("layers.{i:d}." if model.blocks else "mixer.{i:d}.")
        inner = layer + ("mixer." if model.blocks else "")
        ours = "layers.{i:d}.mixer." if model.blocks else "layers.{i:d}."
        has_filter = any(isinstance(m, HyenaFilter) for m in model.modules())
        filters = [
            Tied(inner + "filter_fn.implicit_filter.1.freq", inner + f"filter_fn.implicit_filter.{j}.freq")
            for j in (3, 5)
        ]
        doubles = [
            Drop(inner + name)
            for name in (
                "xpos.angle", "xpos.decay", "rope.freqs", "filter_fn.modulation.deltas", "filter_fn.pos_emb.t",
                "filter_fn.pos_emb.z",
            )
        ]  # fmt: skip
        return Rules(
            Tied(theirs + "embeddings.word_embeddings.weight", "lm_head.weight"),
            *doubles,
            *(filters if has_filter else []),
            Rename(theirs + "embeddings.word_embeddings.weight", "embedding.weight"),
            Rename(theirs + "embeddings.position_embeddings.weight", "positions.weight"),
            Rename(theirs + "ln_f.{p}", "norm_f.{p}"),
            Rename(inner + "{rest:*}", ours + "{rest:*}"),
            Rename(layer + "{rest:*}", "layers.{i:d}.{rest:*}"),
        )

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        ours = super().to_zoo(state, model=model)
        # One parameter under three names: torch lists each place of a shared module.
        for key in [k for k in ours if k.endswith("implicit_filter.1.freq")]:
            for j in (3, 5):
                ours[key.replace("filter.1.", f"filter.{j}.")] = ours[key]
        return ours

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, TaskReplay):
            return model(inputs["probe_words"])
        if isinstance(model, NGramReplay):
            return model(inputs["input_ids"], inputs["hidden"])
        if not isinstance(model, InContextLM):
            return {"y": model(inputs["x"])}
        hidden, mixed = model.mix(inputs["input_ids"])
        return {"logits": model.head(hidden)} | {f"mid/mixer{i}": m for i, m in enumerate(mixed)}
