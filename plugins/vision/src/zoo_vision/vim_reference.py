"""Vim's original arguments and keys: how published checkpoints are read, and parity with the original is tested.

Three classes of hustvl/Vim @ dd0358a: ``VisionMamba`` (classification), ``VisionMambaSeg`` and ``VisionMambaDet``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Drop, Rename, Rules, Squeeze, Stack, Unsqueeze

from ._base import check_reference_config
from .vim import Vim, VimTrunk
from .vim_dense import VimDet, VimSeg
from .vim_parts import rotary_table

_M = "layers.{i}.mixer."
#: ours: theirs, once for each direction ("v2": the second under the _b names)
_SCAN = {
    "scan.x_proj": "x_proj{b}.weight",
    "scan.dt_proj": "dt_proj{b}.weight",
    "scan.dt_bias": "dt_proj{b}.bias",
    "scan.A_log": "A{b}_log",
    "scan.D": "D{b}",
}
_CONV = {"conv_weight": "conv1d{b}.weight", "conv_bias": "conv1d{b}.bias"}


def _table(kind: str) -> Rules:
    rules: list[Any] = []
    for ours, theirs in {**_CONV, **_SCAN}.items():
        squeeze = [Squeeze(1)] if ours == "conv_weight" else []  # (E, 1, width) there
        both = kind == "v2" or (kind == "v1" and ours == "scan.A_log")
        names = [_M + theirs.replace("{b}", b) for b in (("", "_b") if both else ("",))]
        if both:
            rules.append(Stack(names, _M + ours, *squeeze))
        else:
            rules.append(Rename(names[0], _M + ours, *squeeze, Unsqueeze(0)))
    return Rules(*rules)


_TABLES = {kind: _table(kind) for kind in ("v2", "v1", "none")}

#: the original's arguments and defaults (``VisionMamba.__init__``)
_DEFAULTS: dict[str, Any] = {
    "img_size": 224, "patch_size": 16, "stride": 16, "depth": 24, "embed_dim": 192, "d_state": 16, "channels": 3,
    "num_classes": 1000, "ssm_cfg": None, "drop_rate": 0.0, "drop_path_rate": 0.1, "norm_epsilon": 1e-5,
    "rms_norm": True, "initializer_cfg": None, "fused_add_norm": True, "residual_in_fp32": True, "device": None,
    "dtype": None, "ft_seq_len": None, "pt_hw_seq_len": 14, "if_bidirectional": False, "final_pool_type": "none",
    "if_abs_pos_embed": True, "if_rope": False, "if_rope_residual": False, "flip_img_sequences_ratio": -1.0,
    "if_bimamba": False, "bimamba_type": "v2", "if_cls_token": True, "if_divide_out": True, "init_layer_scale": None,
    "use_double_cls_token": False, "use_middle_cls_token": True,
}  # fmt: skip
#: swallowed by its ``**kwargs``: timm's bookkeeping, and the base factory's misspelling (the default applies)
_SWALLOWED = {"if_devide_out", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "drop_block_rate"}
_DENSE = {"in_chans": 3, "num_classes": 80, "use_checkpoint": False, "pretrained": None, "if_fpn": True}
_SEG = _DENSE | {"out_indices": [3, 5, 7, 11], "use_residual_as_feature": False, "last_layer_process": "none"}
_DET = _DENSE | {"last_layer_process": "none", "out_feature": "last_feat"}
_POOLS = {"none": "last", "mean": "mean", "max": "max", "all": "all"}
#: ``ssm_cfg`` of the mixers: those that change the layers, and those that only initialise them
_SSM = {"d_conv", "expand", "dt_rank", "conv_bias", "bias"}
_SSM_INIT = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor"}


class VimAdapter(ReferenceAdapter):
    """hustvl/Vim: ``VisionMamba``, ``VisionMambaSeg``, ``VisionMambaDet``."""

    system = "vim"

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        table = _TABLES[_kind(state)]
        if not isinstance(model, VimTrunk) or not model.rope:
            return table + Rules(Drop("rope.freqs_cos"), Drop("rope.freqs_sin"))
        tables = rotary_table(model.grid_size, model.embed_dim, model.rope_length, torch.device("cpu"))
        restore = [
            Drop(f"rope.freqs_{name}", once="patch_embed.proj.bias", restore=_always(value))
            for name, value in zip(("cos", "sin"), tables, strict=True)
        ]
        return table + Rules(*restore)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        return super().to_zoo(_backbone(unwrapped(state)), model=model)

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = _backbone(unwrapped(state))
        name = source.rpartition(":")[2]
        if name not in ("VisionMambaSeg", "VisionMambaDet"):
            name = _guess_class(config, state)
        with torch.device("meta"):
            if name == "VisionMambaSeg":
                model: VimTrunk = _segmentation(config)
            elif name == "VisionMambaDet":
                model = _detection(config)
            else:
                model = Vim(**_arguments(check_reference_config("vim", config, _DEFAULTS, _SWALLOWED)))
        if _slow(config):  # made, and never read
            state = {k: v for k, v in state.items() if not _BACKWARD.search(k)}
        return self.load(model, state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """features and logits (or last_feat, feat0 ... of the dense backbones), and every layer's mid tensors.

        A recorded permutation of the tokens is read from the input ``shuffle_indices``, a recorded class-token
        position from ``token_position`` (the originals' names).
        """
        assert isinstance(model, VimTrunk)
        mids: dict[str, Tensor] = {}
        handles = [model.patch_embed.register_forward_hook(lambda _m, _i, out: mids.update({"mid/patch_embed": out}))]
        for i, layer in enumerate(model.layers):
            handles.append(layer.register_forward_hook(_recorder(mids, i)))
        try:
            if isinstance(model, VimDet):
                return {model.out_feature: model.forward_features(inputs["image"]), **mids}
            if isinstance(model, VimSeg):
                maps = model.forward_features(inputs["image"])
                return {f"feat{i}": m for i, m in enumerate(maps)} | mids
            assert isinstance(model, Vim)
            order, position = inputs.get("shuffle_indices"), inputs.get("token_position")
            at = None if position is None else int(position)
            tokens = model.forward_features(inputs["image"], cls_position=at, order=order)
            features = model.pool_tokens(tokens, at)
            logits = model.head(features)
            if model.pool == "max":  # always over axis 1; of a class token's logits these are the classes
                logits = logits.amax(dim=1)
            return {"features": features, "logits": logits, **mids}
        finally:
            for handle in handles:
                handle.remove()


def _always(value: Tensor) -> Any:
    return lambda _state, _fields: value


def _recorder(mids: dict[str, Tensor], i: int) -> Any:
    def record(_module: nn.Module, _inputs: Any, out: tuple[Tensor, Tensor]) -> None:
        mids[f"mid/layer{i}_hidden"] = mids[f"mid/layer{i}_mixer"] = out[0]
        mids[f"mid/layer{i}_residual"] = out[1]

    return record


def _kind(state: Mapping[str, Tensor]) -> str:
    """ "v2", "v1" or "none", from the keys of either format."""
    if any(k.endswith("mixer.x_proj_b.weight") for k in state):
        return "v2"
    if any(k.endswith("mixer.A_b_log") for k in state):
        return "v1"
    A_log = next((v for k, v in state.items() if k.endswith("mixer.scan.A_log")), None)
    D = next((v for k, v in state.items() if k.endswith("mixer.scan.D")), None)
    if A_log is None or D is None or A_log.shape[0] == 1:
        return "none"
    if A_log.shape[0] > 2:
        raise ValueError(f"a mixer with {A_log.shape[0]} scan paths; the original's format holds one or two")
    return "v2" if D.shape[0] == 2 else "v1"


def _backbone(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Of a segmentor's state dict (keys below ``backbone.``) or a detector's (``backbone.net.``, a pyramid beside it)
    the backbone's, else all of it."""
    for prefix in ("backbone.net.", "backbone."):
        if found := {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}:
            return found
    return state


#: parameters of the backward direction
_BACKWARD = re.compile(r"\.mixer\.(A_b_log|D_b|(conv1d|x_proj|dt_proj)_b\.(weight|bias))$")


def _slow(config: Mapping[str, Any]) -> bool:
    """Whether the mixers take their own slow path, which walks forwards alone, whatever ``bimamba_type`` says."""
    return not (config.get("ssm_cfg") or {}).get("use_fast_path", True)


def _guess_class(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    if "out_feature" in config:
        return "VisionMambaDet"
    if {"out_indices", "if_fpn", "use_residual_as_feature"} & set(config) or any(k.startswith("fpn1.") for k in state):
        return "VisionMambaSeg"
    if state and "head.weight" not in state and config.get("num_classes") != 0:
        return "VisionMambaSeg" if "norm_f.weight" in state else "VisionMambaDet"
    return "VisionMamba"


def _arguments(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments from a full set of ``VisionMamba``'s."""
    ssm = dict(theirs["ssm_cfg"] or {})
    known = _SSM | _SSM_INIT | {"use_fast_path"}
    if unknown := sorted(set(ssm) - known):
        raise ValueError(f"ssm_cfg has {', '.join(unknown)}; the vim adapter reads {', '.join(sorted(known))}")
    ssm = {k: v for k, v in ssm.items() if k in _SSM and not (k == "dt_rank" and v == "auto")}
    if theirs["final_pool_type"] not in _POOLS:
        raise ValueError(f"final_pool_type is {theirs['final_pool_type']!r}; expected one of {', '.join(_POOLS)}")
    cls = "none"
    if theirs["if_cls_token"]:
        cls = "middle" if theirs["use_middle_cls_token"] else "head"
        cls = "double" if theirs["use_double_cls_token"] else cls
    return {
        "img_size": theirs["img_size"],
        "patch_size": theirs["patch_size"],
        "stride": theirs["stride"],
        "in_chans": theirs["channels"],
        "num_classes": theirs["num_classes"],
        "embed_dim": theirs["embed_dim"],
        "depth": theirs["depth"],
        "d_state": theirs["d_state"],
        "mixer": "none" if _slow(theirs) else "v1" if theirs["if_bimamba"] else theirs["bimamba_type"],
        "cls_token": cls,
        "pool": _POOLS[theirs["final_pool_type"]],
        "pos_embed": theirs["if_abs_pos_embed"],
        "rope": theirs["if_rope"],
        "rope_residual": theirs["if_rope_residual"],
        "rope_length": theirs["pt_hw_seq_len"],
        "rms_norm": theirs["rms_norm"],
        "norm_eps": theirs["norm_epsilon"],
        "residual_in_fp32": theirs["residual_in_fp32"],
        "divide_out": theirs["if_divide_out"],
        "layer_scale": theirs["init_layer_scale"],
        "paired_layers": theirs["if_bidirectional"],
        "flip_ratio": theirs["flip_img_sequences_ratio"],
        "ssm": ssm,
        "drop_rate": theirs["drop_rate"],
        "drop_path_rate": theirs["drop_path_rate"],
    }


def _segmentation(config: Mapping[str, Any]) -> VimSeg:
    """At this commit ``in_chans`` and ``num_classes`` land in d_state and in the image channels (see the sheet)."""
    if "d_state" in config or "channels" in config:
        raise ValueError(
            "VisionMambaSeg takes no d_state or channels: in_chans is its d_state, num_classes its channels"
        )
    theirs = check_reference_config("vim", config, {**_DEFAULTS, **_SEG}, _SWALLOWED)
    ours = _arguments({**theirs, "d_state": theirs["in_chans"], "channels": theirs["num_classes"], "num_classes": 0})
    taps = list(theirs["out_indices"])
    model = VimSeg(
        **_without_class_token(ours),
        out_indices=[i for i in taps if i < theirs["depth"]],
        fpn=theirs["if_fpn"],
        residual_features=theirs["use_residual_as_feature"],
        last_layer=theirs["last_layer_process"],
    )
    model.taps = taps  # blocks that do not exist give nothing there, as in the default list for 12 blocks
    return model


def _detection(config: Mapping[str, Any]) -> VimDet:
    theirs = check_reference_config("vim", config, {**_DEFAULTS, **_DET}, _SWALLOWED)
    ours = _arguments({**theirs, "channels": theirs["in_chans"], "num_classes": 0})
    model = VimDet(**_without_class_token(ours), last_layer=theirs["last_layer_process"])
    model.out_feature = theirs["out_feature"]
    return model


def _without_class_token(ours: dict[str, Any]) -> dict[str, Any]:
    """The dense classes delete the class token and its position, and never reverse the tokens at random."""
    dropped = ("num_classes", "pool")
    return {k: v for k, v in ours.items() if k not in dropped} | {"cls_token": "none", "flip_ratio": -1.0}
