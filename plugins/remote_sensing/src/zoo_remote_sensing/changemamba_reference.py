"""ChangeMamba in its original format: arguments, keys, intermediates and losses of ChenHongruixuan/MambaCD."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from zoo.reference import unwrapped
from zoo.rules import Rename, Rules

from . import losses
from ._replay import Losses, PathAdapter, Place, channels_first, same
from .changemamba import ARRANGEMENTS, LEVELS, MambaBCD, MambaBDA, MambaSCD
from .encoder import POINTWISE, PairModel, block_rules, encoder_rules, translate

#: decoders of the original -> ours, with their kind
DECODERS = {
    "decoder": ("change", "change"), "decoder_bcd": ("change", "change"), "decoder_damage": ("damage", "change"),
    "decoder_T1": ("before", "semantic"), "decoder_T2": ("after", "semantic"),
    "decoder_building": ("building", "semantic"),
}  # fmt: skip
_OWN = ("decoder_dim", "output_cd", "output_clf", "output_building", "output_damage")


def change_decoder_rules(theirs: str, ours: str, state: Mapping[str, Tensor]) -> Rules:
    """Level n of the original (4 deepest) is our level n - 1."""
    rules: list[Any] = []
    for i in range(LEVELS):
        for j, name in enumerate(ARRANGEMENTS, start=1):
            block, here = f"{theirs}.st_block_{i + 1}{j}.", f"{ours}.levels.{i}.{name}."
            rules.append(Rename(block + "0.weight", here + "proj.weight", POINTWISE))
            rules.append(Rename(block + "0.bias", here + "proj.bias"))
            rules.append(block_rules(block + "2.", here + "block.", state))
        rules.append(Rename(f"{theirs}.fuse_layer_{i + 1}.0.{{leaf}}", f"{ours}.levels.{i}.fuse.conv.{{leaf}}"))
        rules.append(Rename(f"{theirs}.fuse_layer_{i + 1}.1.{{leaf}}", f"{ours}.levels.{i}.fuse.norm.{{leaf}}"))
        rules.append(Rename(f"{theirs}.smooth_layer_{i + 1}.{{rest:*}}", f"{ours}.levels.{i}.smooth.{{rest:*}}"))
    return Rules(*rules)


def semantic_decoder_rules(theirs: str, ours: str, state: Mapping[str, Tensor]) -> Rules:
    deepest = f"{theirs}.st_block_{LEVELS}_semantic."
    rules: list[Any] = [
        Rename(deepest + "0.weight", f"{ours}.proj.weight", POINTWISE),
        Rename(deepest + "0.bias", f"{ours}.proj.bias"),
        block_rules(deepest + "2.", f"{ours}.block.", state),
        Rename(f"{theirs}.smooth_layer_0_semantic.{{rest:*}}", f"{ours}.smooth.{{rest:*}}"),
    ]
    for i in range(LEVELS - 1):
        here = f"{ours}.levels.{i}."
        rules += [
            block_rules(f"{theirs}.st_block_{i + 1}_semantic.1.", here + "block.", state),
            Rename(f"{theirs}.trans_layer_{i + 1}.0.{{leaf}}", here + "lateral.conv.{leaf}"),
            Rename(f"{theirs}.trans_layer_{i + 1}.1.{{leaf}}", here + "lateral.norm.{leaf}"),
            Rename(f"{theirs}.smooth_layer_{i + 1}_semantic.{{rest:*}}", here + "smooth.{rest:*}"),
        ]
    return Rules(*rules)


class ChangeMambaAdapter(PathAdapter):
    """``STMambaBCD``, ``STMambaSCD``, ``STMambaBDA``; inputs ``pre_data`` and ``post_data``."""

    system = "changemamba"
    loss_output = "bcd_total"
    mids: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder", "patch_embed": "encoder.patch_embed", "p1": "decoder", "bcd": "decoder_bcd",
        "t1": "decoder_T1", "t2": "decoder_T2", "damage": "decoder_damage", "building": "decoder_building",
        **{f"st{i}{j}": f"decoder.st_block_{i}{j}" for i in range(1, 5) for j in range(1, 4)},
        **{f"fuse{i}": f"decoder.fuse_layer_{i}" for i in range(1, 5)},
    }  # fmt: skip

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "lovasz" in source or (not state and "ignore_index" in config):
            return Losses(config).eval()
        state = unwrapped(state)  # what is built depends on its keys
        options = translate("ChangeMamba", config, _OWN)
        options["decoder_dim"] = config.get("decoder_dim", 128)
        model: PairModel
        if any(k.startswith("decoder_T1.") for k in state):
            classes = {"change_classes": config.get("output_cd", 2), "semantic_classes": config.get("output_clf", 7)}
            model = MambaSCD(**options, **classes)
        elif any(k.startswith("decoder_damage.") for k in state):
            classes = {
                "building_classes": config.get("output_building", 2),
                "damage_classes": config.get("output_damage", 5),
            }
            model = MambaBDA(**options, **classes)
        else:
            model = MambaBCD(**options)
        model.channels_first = str(config.get("norm_layer", "ln")).lower() != "ln"  # type: ignore[assignment]
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        kinds = {m for m in ("scd", "bda") if _shows(m, state, model)}
        rules: list[Any] = [encoder_rules(state)]
        for theirs, (ours, kind) in DECODERS.items():
            if theirs in _decoders_of(kinds):
                make = change_decoder_rules if kind == "change" else semantic_decoder_rules
                rules.append(make(theirs, ours, state))
        if "scd" in kinds:
            rules += [
                Rename("main_clf_cd.{leaf}", "change_head.{leaf}"),
                Rename("aux_clf.{leaf}", "semantic_head.{leaf}"),
            ]
        elif "bda" in kinds:
            rules += [Rename("main_clf.{leaf}", "damage_head.{leaf}"), Rename("aux_clf.{leaf}", "building_head.{leaf}")]
        else:
            rules.append(Rename("main_clf.{leaf}", "head.{leaf}"))
        return Rules(*rules)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Images to ``change_logits``, ``semantic_t1``, ``semantic_t2``, ``building_logits``, ``damage_logits``,
        whichever the model has; labels and logits to the losses."""
        if isinstance(model, Losses):
            return run_losses(inputs)
        out = model(inputs["pre_data"], inputs["post_data"])
        if isinstance(model, MambaSCD):
            return {"change_logits": out.change, "semantic_t1": out.before, "semantic_t2": out.after}
        if isinstance(model, MambaBDA):
            return {"building_logits": out.building, "damage_logits": out.damage}
        return {"change_logits": out}

    # -- intermediates

    def calls(self, model: nn.Module, path: str) -> int:
        return 2 if path.startswith("encoder") else 1

    def place(self, model: nn.Module, path: str) -> Place:
        first, _, rest = path.partition(".")
        if first == "encoder":
            return encoder_place(model, rest)
        if path in ("main_clf_cd", "main_clf", "aux_clf"):
            heads = {MambaSCD: {"main_clf_cd": "change_head", "aux_clf": "semantic_head"},
                     MambaBDA: {"main_clf": "damage_head", "aux_clf": "building_head"}}  # fmt: skip
            return heads.get(type(model), {"main_clf": "head"})[path], same
        if first in DECODERS:
            ours, kind = DECODERS[first]
            if not rest:
                return ours, same
            found = _in_change(rest) if kind == "change" else _in_semantic(rest)
            if found is not None:
                return f"{ours}.{found[0]}", found[1]
        return super().place(model, path)


def encoder_place(model: nn.Module, rest: str) -> Place:
    """The encoder is one in all change detectors; ``rest`` is the path below it."""
    layout = channels_first if getattr(model, "channels_first", False) else same
    if not rest:
        return "encoder", same
    if rest == "patch_embed":
        return "encoder.patch_embed", layout
    rest = re.sub(r"^layers\.(\d)", r"stages.\1", rest)
    rest = re.sub(r"^outnorm(\d)", r"out_norms.\1", rest)
    return f"encoder.{rest}", layout


def _in_change(rest: str) -> Place | None:
    if match := re.fullmatch(r"st_block_(\d)(\d)", rest):
        return f"levels.{int(match[1]) - 1}.{ARRANGEMENTS[int(match[2]) - 1]}.block", channels_first
    if match := re.fullmatch(r"(fuse|smooth)_layer_(\d)", rest):
        return f"levels.{int(match[2]) - 1}.{match[1]}", same
    return None


def _in_semantic(rest: str) -> Place | None:
    if rest == f"st_block_{LEVELS}_semantic":
        return "block", channels_first
    if rest == "smooth_layer_0_semantic":
        return "smooth", same
    if match := re.fullmatch(r"st_block_(\d)_semantic", rest):
        return f"levels.{int(match[1]) - 1}.block", channels_first
    if match := re.fullmatch(r"(trans_layer|smooth_layer)_(\d)(_semantic)?", rest):
        return f"levels.{int(match[2]) - 1}.{'lateral' if match[1] == 'trans_layer' else 'smooth'}", same
    return None


def _decoders_of(kinds: set[str]) -> tuple[str, ...]:
    if "scd" in kinds:
        return ("decoder_bcd", "decoder_T1", "decoder_T2")
    if "bda" in kinds:
        return ("decoder_damage", "decoder_building")
    return ("decoder",)


def _shows(kind: str, state: Mapping[str, Tensor], model: nn.Module | None) -> bool:
    if model is not None:
        return isinstance(model, MambaSCD if kind == "scd" else MambaBDA)
    marks = {"scd": ("decoder_T1.", "semantic_head."), "bda": ("decoder_damage.", "damage_head.")}
    return any(k.startswith(marks[kind]) for k in state)


def run_losses(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every loss of the three training scripts, each of shape (1,). The damage loss reads the dates' semantic logits as
    localisation and damage, as the recorded file does."""
    change, t1, t2 = inputs["change_logits"], inputs["semantic_t1"], inputs["semantic_t2"]
    label, label1, label2 = inputs["label_change"], inputs["label_t1"], inputs["label_t2"]
    found = {
        "ce_cd": losses.cross_entropy(change, label),
        "lovasz_cd": losses.lovasz_softmax(change, label),
        "similarity": losses.similarity(t1, t2, losses.without_unchanged(label1)),
        "bcd_total": losses.bcd_loss(change, label),
        "scd_total": losses.scd_loss(change, t1, t2, label, label1, label2),
        "bda_total": losses.bda_loss(t1, t2, label1, label2),
    }
    return {k: v.reshape(1) for k, v in found.items()}
