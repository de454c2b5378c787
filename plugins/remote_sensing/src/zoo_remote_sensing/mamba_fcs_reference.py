"""Mamba-FCS in its original format: arguments, keys, intermediates and losses of Buddhi19/MambaFCS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.reference import unwrapped
from zoo.rules import Rename, Rules

from ._replay import Losses, PathAdapter, Place, channels_first, same
from .changemamba import LEVELS
from .changemamba_reference import encoder_place
from .encoder import block_rules, encoder_rules, translate
from .losses import SeKLoss, fcs_loss
from .mamba_fcs import MambaFCS, MambaFCSBinary

#: settings of the loss alone, which tell its files where nothing names the class
_LOSS = {"non_change_class", "beta", "gamma", "eps"}
_DECODERS = {"decoder": "change", "decoder_bcd": "change", "decoder_T1": "before", "decoder_T2": "after"}
_HEADS = {"main_clf_cd": "change_head", "aux_clf": "semantic_head", "main_clf": "head"}


def decoder_rules(theirs: str, ours: str, state: Mapping[str, Tensor]) -> Rules:
    """The original counts fusions and ``down_sample`` from the deepest level (1) up, all else from the finest (1)."""
    semantic = ours != "change"
    tail = "_semantic" if semantic else ""
    rules: list[Any] = []
    for i in range(LEVELS):
        here, from_deepest = f"{ours}.levels.{i}.", LEVELS - i
        block = f"{theirs}.st_block_{i + 1}{tail or 1}.1."
        rules.append(block_rules(block, here + "block.", state))
        rules.append(Rename(f"{theirs}.smooth_layer_{i + 1}{tail}.{{rest:*}}", here + "smooth.{rest:*}"))
        rules.append(Rename(f"{theirs}.down_sample_{from_deepest}.{{rest:*}}", here + "down.{rest:*}"))
        rules.append(Rename(f"{theirs}.fuse_layer_{from_deepest}.{{rest:*}}", here + "fuse.{rest:*}"))
    if semantic:
        rules.append(Rename(f"{theirs}.smooth_layer_0_semantic.{{rest:*}}", f"{ours}.smooth.{{rest:*}}"))
    return Rules(*rules)


class MambaFCSAdapter(PathAdapter):
    """``STMambaSCD`` and ``STMambaBCD`` of Mamba-FCS; inputs ``pre_data`` and ``post_data``."""

    system = "mamba_fcs"
    loss_output = "sek_first_call"
    mids: ClassVar[Mapping[str, str]] = {
        "encoder": "encoder", "patch_embed": "encoder.patch_embed", "bcd": "decoder_bcd", "t1": "decoder_T1",
        "t2": "decoder_T2", **{f"fuse{i}": f"decoder_bcd.fuse_layer_{i}" for i in range(1, 5)},
        **{f"down{i}": f"decoder_bcd.down_sample_{i}" for i in range(1, 4)},
    }  # fmt: skip

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "SeK_Loss" in source or (not state and not _LOSS.isdisjoint(config)):
            return Losses(config).eval()
        state = unwrapped(state)  # what is built depends on its keys
        options = translate("Mamba-FCS", config, ("output_cd", "output_clf"))
        if any(k.startswith("decoder_T1.") for k in state):
            model: nn.Module = MambaFCS(
                **options, change_classes=config.get("output_cd", 2), semantic_classes=config.get("output_clf", 7)
            )
        else:
            model = MambaFCSBinary(**options)
        model.channels_first = str(config.get("norm_layer", "ln")).lower() != "ln"  # type: ignore[assignment]
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        marks = ("decoder_T1.", "semantic_head.")
        semantic = isinstance(model, MambaFCS) if model is not None else any(k.startswith(marks) for k in state)
        names = ("decoder_bcd", "decoder_T1", "decoder_T2") if semantic else ("decoder",)
        heads = ("main_clf_cd", "aux_clf") if semantic else ("main_clf",)
        return Rules(
            encoder_rules(state),
            *(decoder_rules(name, _DECODERS[name], state) for name in names),
            *(Rename(f"{name}.{{rest:*}}", f"{_HEADS[name]}.{{rest:*}}") for name in heads),
        )

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Images to ``change_logits`` (and ``semantic_t1``, ``semantic_t2``); logits and labels to the SeK losses."""
        if isinstance(model, Losses):
            return _run_losses(model.settings, inputs)
        out = model(inputs["pre_data"], inputs["post_data"])
        if isinstance(model, MambaFCS):
            return {"change_logits": out.change, "semantic_t1": out.before, "semantic_t2": out.after}
        return {"change_logits": out}

    def calls(self, model: nn.Module, path: str) -> int:
        return 2 if path.startswith("encoder") else 1

    def place(self, model: nn.Module, path: str) -> Place:
        first, _, rest = path.partition(".")
        if first == "encoder":
            return encoder_place(model, rest)
        if first in _HEADS:
            return ".".join(filter(None, (_HEADS[first], rest))), same
        if first in _DECODERS:
            ours = _DECODERS[first]
            if not rest:
                return ours, same
            if match := re.fullmatch(r"smooth_layer_0_semantic(?:\.(.+))?", rest):
                return ".".join(filter(None, (f"{ours}.smooth", match[1]))), same
            match = re.fullmatch(r"(fuse_layer|down_sample|smooth_layer|st_block)_(\d)(1|_semantic)?(?:\.(.+))?", rest)
            if match:
                part = {"fuse_layer": "fuse", "down_sample": "down", "smooth_layer": "smooth", "st_block": "block"}
                name, number = part[match[1]], int(match[2])
                level = LEVELS - number if name in ("fuse", "down") else number - 1
                where = ".".join(filter(None, (f"{ours}.levels.{level}.{name}", match[4])))
                return where, channels_first if name == "block" else same
        return super().place(model, path)


def _run_losses(settings: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The recorded calls, in their order: the object changes its own eps during the first."""
    loss = SeKLoss(  # the original has an argument for the number of classes too, but counts them in the logits
        inputs["semantic_t1"].shape[1], settings.get("non_change_class", 0), settings.get("beta", 1.5),
        settings.get("gamma", 0.5), settings.get("eps", 1e-7),
    )  # fmt: skip
    arguments = [inputs[k] for k in ("semantic_t1", "semantic_t2", "label_t1", "label_t2")]
    mask = inputs["change_mask"]
    first = loss(*arguments, mask)
    later = loss(*arguments, mask)
    empty = loss(*arguments, torch.zeros_like(mask))
    total = fcs_loss(
        inputs["change_logits"], inputs["semantic_t1"], inputs["semantic_t2"],
        inputs["label_change"], inputs["label_t1"], inputs["label_t2"], loss,
    )  # fmt: skip
    found = {"sek_first_call": first, "sek_later_calls": later, "sek_empty_mask": empty, "total": total}
    return {k: v.reshape(1) for k, v in found.items()}
