"""MambaOut: gated CNN blocks, the control that Mamba is compared with (it holds no state-space model).

Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", arXiv 2405.07992. The model is timm's own
(``timm.models.mambaout``, Apache-2.0), which also adds the ``rw`` family; here are its builder and the reference
adapter for the original's files (yuweihao/MambaOut @ 9f2f234, ``models/mambaout.py``, Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm.models.mambaout
import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rename, Rules

from ._base import Habits, build, check_reference_config, takes


class MambaOut(Habits, timm.models.mambaout.MambaOut):
    """timm's MambaOut with the zoo's pyramids: maps (batch, C, H, W) of the four stages, strides 4, 8, 16, 32."""

    first_conv = "stem.conv1"
    classifier = "head.fc"


@takes(timm.models.mambaout.MambaOut)
def mambaout(**config: Any) -> MambaOut:
    """Builder of the cards: timm's arguments, and ``features_only``/``out_indices``."""
    return build(MambaOut, **config)


#: the original's keys (theirs: ours)
_ORIGINAL = Rules(
    Rename("downsample_layers.0.{rest:*}", "stem.{rest:*}"),
    Rename("downsample_layers.{i:d}.{rest:*}", "stages.{i:d}.downsample.{rest:*}"),
    Rename("stages.{i:d}.{j:d}.{rest:*}", "stages.{i:d}.blocks.{j:d}.{rest:*}"),
    Rename("norm.{rest}", "head.norm.{rest}"),
    Rename("head.fc1.{rest}", "head.pre_logits.fc.{rest}"),
    Rename("head.norm.{rest}", "head.pre_logits.norm.{rest}"),
    Rename("head.fc2.{rest}", "head.fc.{rest}"),
)
#: the original's arguments with their defaults; its layer classes are fixed
_DEFAULTS: dict[str, Any] = {
    "in_chans": 3, "num_classes": 1000, "depths": (3, 3, 9, 3), "dims": (96, 192, 384, 576), "conv_ratio": 1.0,
    "kernel_size": 7, "drop_path_rate": 0.0, "head_dropout": 0.0,
}  # fmt: skip
#: what timm's class takes beside those
_TIMM: dict[str, Any] = {
    "global_pool": "avg", "act_layer": "gelu", "expansion_ratio": 8 / 3, "stem_mid_norm": True, "ls_init_value": None,
    "downsample": "conv", "drop_rate": 0.0, "head_fn": "default",
}  # fmt: skip
_SWALLOWED = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype"}


class MambaOutAdapter(ReferenceAdapter):
    """The original's files, and timm's (whose keys are ours): told apart by their keys."""

    system = "mambaout"

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        """To the zoo: by the keys. Back: the original's format where it can hold the model, else timm's."""
        if any(k.startswith("downsample_layers.") for k in state):
            return _ORIGINAL
        if getattr(model, "read_as", None) == "timm" or not any(k.startswith("stem.") for k in state):
            return Rules()
        own = set(state) if model is None else set(model.state_dict())
        timm_only = any(".ls.gamma" in k for k in own) or "stem.norm1.weight" not in own
        ours = "head.norm.weight" in own and not timm_only
        return _ORIGINAL if ours and _is_ours(state) else Rules()

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = unwrapped(state)
        original = any(k.startswith("downsample_layers.") for k in state)
        known = _DEFAULTS if original else {k: v for k, v in _DEFAULTS.items() if k != "head_dropout"} | _TIMM
        theirs = check_reference_config("mambaout", config, known, _SWALLOWED)
        if original:
            theirs["drop_rate"] = theirs.pop("head_dropout")
        with torch.device("meta"):
            model = MambaOut(**theirs)
        model.read_as = "original" if original else "timm"
        return self.load(model, state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """logits; from the original's files features (pooled, normed) and channels-last mid maps, from timm's the
        stage maps (batch, C, H, W) as outputs."""
        assert isinstance(model, MambaOut)
        kept: dict[str, Tensor] = {}
        handles = [_keep(model.stem, kept, "mid/stem")]
        for i, stage in enumerate(model.stages):
            handles.append(_keep(stage, kept, f"mid/stage{i}"))
            for j, block in enumerate(stage.blocks):
                handles.append(_keep(block, kept, f"mid/stage{i}_block{j}"))
        try:
            body = model.forward_features(inputs["image"])
        finally:
            for handle in handles:
                handle.remove()
        out: dict[str, Tensor] = {"logits": model.forward_head(body)}
        if getattr(model, "read_as", "timm") == "original":
            out["features"] = model.head.norm(body.mean((1, 2)))
        else:
            out |= {f"stage{i}": kept[f"mid/stage{i}"].permute(0, 3, 1, 2) for i in range(len(model.stages))}
        return out | kept


def _keep(module: nn.Module, kept: dict[str, Tensor], name: str) -> Any:
    return module.register_forward_hook(lambda _m, _i, out: kept.update({name: out}))


def _is_ours(state: Mapping[str, Tensor]) -> bool:
    return any(".blocks." in k for k in state)
