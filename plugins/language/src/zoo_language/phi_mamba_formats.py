"""The format of Phi-Mamba's original, and of the pairs of teacher and student that MOHAWK trains.

Original: goombalab/phi-mamba @ b2e405f (``utils/config.py``, ``modules/lm_head.py``, ``assets/mohawk_stage1.py``,
``assets/mohawk_stage2.py``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from .phi_mamba import PhiAttention, PhiMambaLM

logger = logging.getLogger("zoo")

#: Keys of a Phi teacher as the MOHAWK golden files hold it.
TEACHER_RULES = Rules(
    Rename("embed_tokens.weight", "embedding.weight"),
    Rename("final_layernorm.{p}", "norm_f.{p}"),
    Rename("layers.{i:d}.self_attn.{rest:*}", "layers.{i:d}.mixer.{rest:*}"),
)

ACTIVATIONS = {"identity": None, "silu": "silu", "swish": "silu"}


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """PhiMambaLM's arguments from the original's nested configuration.

    Raises ValueError for kinds of blocks, mixers, norms and activations that the original does not have, and where the
    blocks are not as many as ``n_layer``.
    """
    blocks: list[str] = []
    mixers: list[dict[str, Any] | None] = []
    for name in (k for k in config if k.startswith("Block")):
        entry = config[name]
        kind = entry["CoreType"].rpartition(".")[2]
        if kind not in ("phi_attention", "discrete_mamba2") or not entry["BlockType"].endswith("phi_block"):
            raise ValueError(
                f"phi_mamba: {name} is {entry['BlockType']} of {entry['CoreType']}; expected modules.phi_block of "
                "modules.mixers.discrete_mamba2 or modules.mixers.phi_attention"
            )
        own = None if kind == "phi_attention" else _mixer_arguments(entry["core_input"])
        blocks += ["attention" if own is None else "mamba"] * entry["n_layers"]
        mixers += [own] * entry["n_layers"]
    language, body = config["LanguageModel"]["input"], config["MixerModel"]["input"]
    if body.get("n_layer", len(blocks)) != len(blocks):
        raise ValueError(f"phi_mamba: n_layer is {body['n_layer']}, the blocks have {len(blocks)} layers")
    if body.get("lm_head_prenorm", "layer") != "layer":
        raise ValueError(f"phi_mamba: lm_head_prenorm is {body['lm_head_prenorm']!r}; the original has 'layer' only")
    of_mixers = [m for m in mixers if m is not None]
    one = not of_mixers or all(m == of_mixers[0] for m in of_mixers)
    return {
        "vocab_size": language["vocab_size"],
        "pad_vocab_size_multiple": language.get("pad_vocab_size_multiple", 8),
        "d_model": body["d_model"],
        "blocks": blocks,
        "mixer": ((of_mixers or [{}])[0] if one else mixers),
        "heads": of_mixers[0]["v_heads"] if of_mixers else 32,
    }


def _mixer_arguments(core: Mapping[str, Any]) -> dict[str, Any]:
    """DiscreteMamba2's arguments from the settings of one group of blocks."""
    names = {
        "d_state": ("d_state", 64),
        "n_v_heads": ("v_heads", 32),
        "n_qk_heads": ("qk_heads", 32),
        "d_conv": ("d_conv", 4),
        "conv_bias": ("conv_bias", True),
        "expand": ("expand", 1),
        "bias": ("bias", False),
    }
    activation = core.get("activation", "identity")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {sorted(ACTIVATIONS)}")
    # the original's mixer swallows what it does not know; chunk_size changes speed only
    unknown = sorted(set(core) - set(names) - {"activation", "chunk_size", "layer_idx"})
    if unknown:
        logger.warning("phi_mamba: the mixer settings %s change nothing; the original ignores them too", unknown)
    return {ours: core.get(theirs, default) for theirs, (ours, default) in names.items()} | {
        "activation": ACTIVATIONS[activation]
    }


class PhiMambaAdapter(ReferenceAdapter):
    """Reads goombalab/phi-mamba: language models, and pairs of teacher and student for the MOHAWK losses."""

    system = "phi_mamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "teacher" in config:
            return self._pair(config, state)
        return self.load(PhiMambaLM(**arguments_of(config)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return arguments_of(config)

    def _pair(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
        teacher = config["teacher"]
        pair = nn.ModuleDict()
        pair["student"] = self.load(PhiMambaLM(**arguments_of(config["student"])), _below(state, "student."))
        pair["teacher"] = PhiMambaLM(
            vocab_size=teacher["vocab"],
            d_model=teacher["hidden"],
            blocks=["attention"] * teacher["layers"],
            heads=teacher["heads"],
            rope_theta=teacher.get("rope_theta", 10000.0),
            rotary_share=teacher.get("partial_rotary_factor", 0.5),
            pad_vocab_size_multiple=1,
        )
        from zoo.building import fill

        fill(pair["teacher"], TEACHER_RULES.to_zoo(_below(state, "teacher.")), what="the teacher")
        return pair.eval()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, PhiMambaLM):
            return rules_of(model)
        attention = {k.split(".")[2] for k in state if ".mixer.self_attn." in k}
        return _rules(sorted(int(i) for i in attention))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, nn.ModuleDict):
            return self._losses(model, inputs["input_ids"])
        assert isinstance(model, PhiMambaLM)
        ids = inputs["input_ids"]
        hidden = model.hidden_states(ids)
        found = {f"mid/hidden{i}": h for i, h in enumerate(hidden)}
        for i, layer in enumerate(model.layers):
            n = layer.input_layernorm(hidden[i])  # type: ignore[operator]
            found[f"mid/matrix{i}"] = layer.mixer.mixing_matrix(n)  # type: ignore[union-attr, operator]
            found[f"mid/mixer_out{i}"] = layer.mixer(n)  # type: ignore[operator]
        found["logits"] = model.head(model.norm_f(hidden[-1]))
        step = re.search(r"prefill (\d+) tokens", str(call))
        greedy = re.search(r"from the first (\d+) tokens to total length (\d+)", str(call))
        if step:
            with torch.no_grad():
                state = model.init_state(ids.shape[0])
                logits = [model(ids[:, : int(step.group(1))], state=state)]
                logits += [model.step(ids[:, t], state)[:, None] for t in range(int(step.group(1)), ids.shape[1])]
            found["step_logits"] = torch.cat(logits, dim=1)
        if greedy:
            from .generation import generate

            prompt, total = int(greedy.group(1)), int(greedy.group(2))
            texts, _ = generate(model, ids[:, :prompt].tolist(), max_new_tokens=total - prompt)
            found["generated"] = torch.cat(
                [ids[:, :prompt], torch.tensor([t.tokens for t in texts], device=ids.device)], dim=1
            )
        return found

    def _losses(self, pair: nn.ModuleDict, ids: Tensor) -> dict[str, Tensor]:
        from .mohawk import hidden_state_loss, matrix_loss

        teacher, student = pair["teacher"], pair["student"]
        assert isinstance(teacher, PhiMambaLM)
        assert isinstance(student, PhiMambaLM)
        hidden = teacher.hidden_states(ids)
        found = {f"mid/teacher_hidden{i}": h for i, h in enumerate(hidden)}
        for i, (theirs, ours) in enumerate(zip(teacher.layers, student.layers, strict=True)):
            n, own = theirs.input_layernorm(hidden[i]), ours.input_layernorm(hidden[i])  # type: ignore[operator]
            attention = theirs.mixer.mixing_matrix(n)  # type: ignore[union-attr, operator]
            mixed = theirs.mixer(n)  # type: ignore[operator]
            matrix = ours.mixer.mixing_matrix(own)  # type: ignore[union-attr, operator]
            found |= {
                f"mid/teacher_attn{i}": attention,
                f"mid/teacher_attn_out{i}": mixed,
                f"stage1_matrix{i}": matrix,
                f"stage1_loss{i}": matrix_loss(matrix, attention),
                f"stage2_loss_mixer{i}": hidden_state_loss(ours.mixer(own), mixed),  # type: ignore[operator]
                f"stage2_loss_block{i}": hidden_state_loss(ours(hidden[i]), hidden[i + 1]),
            }
        found["student_logits"], found["teacher_logits"] = student(ids), teacher(ids)
        return found

    def replay(self, path, *, grad: bool = False, device="cpu") -> dict[str, Tensor]:
        from zoo.reference import read_golden

        golden = read_golden(path)
        if not grad or "teacher" not in golden.config:
            return super().replay(path, grad=grad, device=device)
        found = super().replay(path, device=device)
        for stage, loss in (("stage1", "stage1_loss"), ("stage2", "stage2_loss_mixer")):
            pair = self._pair(golden.config, golden.state)
            losses = self._losses(pair, golden.inputs["input_ids"])
            total = torch.stack([v for k, v in losses.items() if k.startswith(loss)]).sum()
            student = pair["student"]
            total.backward()
            ours = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
            theirs = self.to_reference(ours, model=student)
            found |= {f"grad/{stage}/{k}": v for k, v in theirs.items()}
        return found


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _rules(attention: Sequence[int]) -> Rules:
    """The key table for a model whose layers ``attention`` hold attention."""
    return Rules(
        Rename("backbone.final_layernorm.{p}", "norm_f.{p}"),
        *(Rename(f"backbone.layers.{i}.mixer.self_attn.{{rest:*}}", f"layers.{i}.mixer.{{rest:*}}") for i in attention),
        Rename("lm_head.{p}", "lm_head.{p}"),
        Rename("backbone.{rest:*}", "{rest:*}"),
    )


def rules_of(model: PhiMambaLM) -> Rules:
    return _rules([i for i, layer in enumerate(model.layers) if isinstance(layer.mixer, PhiAttention)])
