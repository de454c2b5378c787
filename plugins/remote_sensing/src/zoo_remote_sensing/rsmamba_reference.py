"""RSMamba in its original format: arguments and keys of KyanChen/RSMamba, an MMPretrain classifier."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.reference import unwrapped
from zoo.rules import Rename, Rules

from ._replay import PathAdapter, Place, same
from .rsmamba import ARCHITECTURES, Layer, RSMamba

_ARCHS = {name[0]: name for name in ARCHITECTURES} | {name: name for name in ARCHITECTURES}
_DEFAULTS: dict[str, Any] = {
    "arch": "base", "img_size": 224, "patch_size": 16, "in_channels": 3, "out_indices": -1, "drop_rate": 0.0,
    "final_norm": True, "out_type": "avg_featmap", "cls_position": "none", "pe_type": "learnable",
    "path_type": "forward_reverse_shuffle_gate", "patch_cfg": {}, "layer_cfgs": {},
    "norm_cfg": {"type": "LN", "eps": 1e-6},
}  # fmt: skip
#: arguments that change no number: what kind of module it is, and how it is initialised or frozen
_IGNORED = ("type", "init_cfg", "frozen_stages", "interpolate_mode")
_MIXER = {
    "state_size": "state", "conv_kernel": "conv", "time_step_rank": "dt_rank", "intermediate_size": "hidden",
    "use_conv_bias": "conv_bias", "use_bias": "bias", "hidden_act": "act",
}  # fmt: skip
#: of a whole classifier, as MMPretrain writes them; only the first two are read
_CLASSIFIER = ("backbone", "num_classes", "type", "neck", "head", "train_cfg", "data_preprocessor", "init_cfg")
_PATCH = ("in_channels", "kernel_size", "stride", "padding", "dilation", "bias", "norm_cfg", "conv_type")
_RULES = Rules(
    Rename("backbone.patch_embed.projection.{leaf}", "patch_embed.proj.{leaf}"),
    Rename("backbone.patch_embed.norm.{leaf}", "patch_embed.norm.{leaf}"),
    Rename("backbone.gate_layers.{i}.{rest:*}", "layers.{i}.gate.{rest:*}"),
    Rename("backbone.layers.{i}.{rest:*}", "layers.{i}.mixer.{rest:*}"),
    Rename("backbone.ln1.{leaf}", "final_norm.{leaf}"),
    Rename("backbone.ln2.{leaf}", "out_norm.{leaf}"),
    Rename("backbone.pre_norm.{leaf}", "pre_norm.{leaf}"),
    Rename("backbone.pos_embed", "pos_embed"),
    Rename("backbone.cls_token", "cls_token"),
    Rename("head.fc.{leaf}", "head.{leaf}"),
)


def _known(what: str, given: Mapping[str, Any], known: Any) -> None:
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"the original RSMamba's {what} has no {key!r} that is known here (received {value!r}); expected some "
                f"of {', '.join(known)}"
            )


def layer_norm_eps(what: str, table: Mapping[str, Any]) -> float:
    """The eps of a LayerNorm's table; where it names none, MMPretrain and mmcv take 1e-5."""
    if table.get("type") != "LN" or set(table) - {"type", "eps", "requires_grad"}:
        raise ValueError(f"{what} is {dict(table)!r}; expected a LayerNorm's, such as {{'type': 'LN', 'eps': 1e-6}}")
    return table.get("eps", 1e-5)


def translate(config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Our arguments for those of the original's backbone."""
    _known("backbone", config, (*_DEFAULTS, *_IGNORED))
    c = {**_DEFAULTS, **config}
    arch = c["arch"].lower() if isinstance(c["arch"], str) else c["arch"]
    if isinstance(arch, Mapping):
        sizes = {"arch": None, "dim": arch["embed_dims"], "depth": arch["num_layers"],
                 "hidden": arch["feedforward_channels"]}  # fmt: skip
    elif arch in _ARCHS:
        sizes = {"arch": _ARCHS[arch]}
    else:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(_ARCHS)}, or a table of its sizes")
    patch = {"kernel_size": c["patch_size"], "in_channels": c["in_channels"], **c["patch_cfg"]}
    _known("patch_cfg", patch, _PATCH)
    if patch.get("conv_type", "Conv2d") not in ("Conv2d", "Conv", None):
        raise ValueError(f"patch_cfg conv_type is {patch['conv_type']!r}; expected Conv2d")
    more = {k: patch[k] for k in ("padding", "dilation", "bias") if k in patch}
    if patch.get("norm_cfg") is not None:
        more["norm_eps"] = layer_norm_eps("patch_cfg norm_cfg", patch["norm_cfg"])
    tables = c["layer_cfgs"] if isinstance(c["layer_cfgs"], (list, tuple)) else [c["layer_cfgs"]]
    for table in tables:
        _known("layer_cfgs", table, _MIXER)
    mixers = [{_MIXER[k]: v for k, v in table.items()} for table in tables]
    position = c["pe_type"] if c["pe_type"] is not None else "none"
    size = c["img_size"]
    return {
        **sizes, "num_classes": num_classes, "in_chans": patch["in_channels"], "img_size": size,
        "patch_size": patch["kernel_size"], "stride": patch.get("stride", c["patch_size"]), "patch": more,
        "norm_eps": layer_norm_eps("norm_cfg", c["norm_cfg"]), "path_type": c["path_type"],
        "pos_embed": position, "cls_position": c["cls_position"], "out_type": c["out_type"],
        "out_indices": c["out_indices"], "final_norm": c["final_norm"], "drop_rate": c["drop_rate"],
        "mixer": mixers if isinstance(c["layer_cfgs"], (list, tuple)) else mixers[0],
    }  # fmt: skip


class RSMambaAdapter(PathAdapter):
    """``RSMamba`` with ``LinearClsHead``; input ``image``, and the shuffles as ``perm_<layer>`` or ``perm_key``."""

    system = "rsmamba"
    mids: ClassVar[Mapping[str, str]] = {
        "patch_embed": "backbone.patch_embed", "layer0": "backbone.layers.0", "gate0": "backbone.gate_layers.0",
    }  # fmt: skip

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = unwrapped(state)  # what is built depends on its keys
        if "backbone" in config:
            _known("classifier", config, _CLASSIFIER)
        backbone = dict(config.get("backbone", {k: v for k, v in config.items() if k != "num_classes"}))
        head = state.get("head.fc.weight") if "head.fc.weight" in state else None
        classes = config.get("num_classes", 0 if head is None else head.shape[0])
        return self.load(RSMamba(**translate(backbone, classes if head is not None else 0)), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return _RULES

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``feature`` (or ``feature0``, ``feature1``, ...) and, of feature vectors, ``logits``.

        The permutation of layer i is ``perm_i``, or the stable argsort of row i of ``perm_key``; without either they
        are drawn anew, as the original draws them.
        """
        assert isinstance(model, RSMamba)
        features = model.features(inputs["image"], given_orders(inputs, len(model.layers)))
        names = ["feature"] if len(features) == 1 else [f"feature{i}" for i in range(len(features))]
        found = dict(zip(names, features, strict=True))
        if features[-1].dim() == 2 and model.num_classes > 0:
            found["logits"] = model.head(features[-1])
        return found

    def place(self, model: nn.Module, path: str) -> Place:
        path = path.removeprefix("backbone.")
        if path == "patch_embed":
            return "patch_embed", lambda output: [output[0]]
        if match := re.fullmatch(r"gate_layers\.(\d+)", path):
            return f"layers.{match[1]}.gate", same
        if match := re.fullmatch(r"layers\.(\d+)", path):
            return f"layers.{match[1]}", same
        names = {"ln1": "final_norm", "ln2": "out_norm", "pre_norm": "pre_norm", "head.fc": "head"}
        if path in names:
            return names[path], same
        return super().place(model, path)

    def intermediate(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A layer of the original is the mixer alone: the outputs of all paths stacked on the batch, as walked."""
        if not isinstance(module, Layer):
            return output
        x, norm, order = args
        with torch.no_grad():
            y = module.mixer.by_path(norm(x), order)
        return torch.cat([one[:, way] for one, way in zip(y, order, strict=True)])


def given_orders(inputs: Mapping[str, Tensor], layers: int) -> Tensor | None:
    if "perm_key" in inputs:
        return torch.argsort(inputs["perm_key"], dim=1, stable=True)
    if "perm_0" in inputs:
        return torch.stack([inputs[f"perm_{i}"] for i in range(layers)])
    return None
