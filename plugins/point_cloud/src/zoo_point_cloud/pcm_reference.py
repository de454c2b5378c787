"""Reads SkyworkAI/PointCloudMamba: BaseCls, BaseSeg, BasePartSeg, and the serialisation alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules, Squeeze
from zoo_kernels import paths

from .layers import ACTIVATIONS, bimamba_rules
from .pcm import PCM, PCMSegmentation

#: PointMambaEncoder's arguments and their defaults, as in its constructor.
ENCODER: dict[str, Any] = {
    "in_channels": 3, "embed_dim": 64, "groups": 1, "res_expansion": 1.0, "activation": "relu", "bias": False,
    "use_xyz": False, "normalize": "anchor", "dim_expansion": [2, 2, 2, 2], "pre_blocks": [2, 2, 2, 2],
    "pos_blocks": [2, 2, 2, 2], "k_neighbors": [24, 24, 24, 24], "k_strides": None, "reducers": [2, 2, 2, 2],
    "mamba_blocks": [1, 1, 1, 1], "mamba_layers_orders": "z", "use_order_prompt": False, "prompt_num_per_order": 1,
    "rms_norm": True, "fused_add_norm": False, "residual_in_fp32": False, "bimamba_type": None, "drop_path_rate": 0.1,
    "mamba_pos": False, "pos_type": "share", "pos_proj_type": "linear", "grid_size": 0.02, "combine_pos": False,
    "block_residual": True, "use_windows": False, "windows_size": 1200, "cls_pooling": "max",
}  # fmt: skip
DECODER: dict[str, Any] = {
    "encoder_channel_list": None, "decoder_channel_list": [768, 384, 384, 384], "decoder_blocks": [1, 1, 1, 1],
    "mamba_blocks": [1, 1, 1, 1], "mamba_layers_orders": ["xyz", "xyz", "xyz", "null"], "act_args": "relu",
    "rms_norm": True, "fused_add_norm": False, "residual_in_fp32": False, "bimamba_type": None, "gmp_dim": 64,
    "cls_dim": 64, "bias": True,
}  # fmt: skip
CLS_HEAD: dict[str, Any] = {
    "num_classes": None, "in_channels": None, "mlps": [256], "norm_args": None, "act_args": {"act": "relu"},
    "dropout": 0.5, "global_feat": None, "point_dim": 2,
}  # fmt: skip
SEG_HEAD: dict[str, Any] = {
    "num_classes": None, "in_channels": None, "mlps": None, "norm_args": {"norm": "bn1d"}, "act_args": {"act": "relu"},
    "dropout": 0.5, "global_feat": None,
}  # fmt: skip
#: names of activations in the heads that ours have another name for
_HEAD_ACTS = {"leaky_relu": "leakyrelu", "hard_swish": "hardswish", "swish": "silu"}
_SHARED = ("NAME",)


class Serialisation(nn.Module):
    """The orders alone: keys and orders of the flattened batch for every cloud and order that was recorded."""

    def __init__(self, clouds: Mapping[str, Any]) -> None:
        super().__init__()
        self.clouds = {
            name: (float(c["grid_size"]), [k for k in c if isinstance(c[k], dict)]) for name, c in clouds.items()
        }

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (size, orders) in self.clouds.items():
            points = inputs[f"{name}/pos"]
            found[f"mid/{name}/grid_coord"] = paths.grid_coordinates(points, size)
            for order in orders:
                code = paths.codes(points, order, grid_size=size, batched=True)
                found[f"{name}/{order}/code"] = code.flatten()
                found[f"{name}/{order}/order"] = paths.serialize(points, order, grid_size=size, across_batch=True)
        return found


class PCMAdapter(ReferenceAdapter):
    """Reads SkyworkAI/PointCloudMamba.

    ``config``: the arguments of BaseCls, BaseSeg or BasePartSeg. ``prompt_index_per_layer`` beside them gives the rows
    of the order prompts that each Mamba layer read; the original does not save them (its table follows the iteration
    order of a set), so without it rows are given out in the order of first use.
    """

    system = "pcm"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if source.endswith(":serialization") or ("encoder_args" not in config and not state):
            return Serialisation(config)
        known = {
            "NAME",
            "encoder_args",
            "decoder_args",
            "cls_args",
            "test_crop",
            "prompt_index_per_layer",
            "criterion_args",
        }
        if unknown := sorted(set(config) - known):
            raise ValueError(f"pcm has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        encoder, theirs = dict(config["encoder_args"]), config.get("cls_args")
        rows = config.get("prompt_index_per_layer")
        common = _encoder(_filled("encoder_args", encoder, ENCODER), state, rows)
        if config.get("decoder_args") is None:
            # without a head the pooled features are the output
            head = _filled("cls_args", theirs, CLS_HEAD) if theirs else {**CLS_HEAD, "num_classes": 0, "mlps": None}
            if head["global_feat"] is not None:
                raise ValueError("cls_args.global_feat is set; the encoder's features are pooled already (cls_pooling)")
            model: nn.Module = PCM(
                head["num_classes"],
                pool={"max": "max", "mean": "mean"}.get(encoder.get("cls_pooling", "max"), "max_mean"),
                **_head(head),
                **common,
            )
            return self.load(model, state)
        if not theirs:
            raise ValueError("the configuration has decoder_args and no cls_args; expected those of a SegHead")
        head = _filled("cls_args", theirs, SEG_HEAD)
        given = {k: v for k, v in encoder.items() if k in DECODER} | dict(config["decoder_args"])
        decoder = _filled("decoder_args", given, DECODER)
        parts = decoder.get("NAME") == "PointMambaPartDecoder" or config.get("NAME") == "BasePartSeg"
        self._check_widths(decoder, common)
        orders = decoder["mamba_layers_orders"]
        wanted = sum(decoder["mamba_blocks"])
        model = PCMSegmentation(
            head["num_classes"],
            decoder_channels=decoder["decoder_channel_list"],
            decoder_blocks=decoder["decoder_blocks"],
            decoder_mamba_blocks=decoder["mamba_blocks"],
            decoder_orders=orders if wanted else (),
            decoder_act=_activation(decoder["act_args"]),
            decoder_bias=decoder["bias"],
            decoder_rms_norm=decoder["rms_norm"],
            context_dim=decoder["gmp_dim"],
            shapes=16 if parts else 0,
            shape_dim=decoder["cls_dim"],
            global_feat=_pools(head["global_feat"]),
            **(_head(head) | {"head_mlps": [head["mlps"]] if isinstance(head["mlps"], int) else head["mlps"]}),
            test_crop=None if parts else config.get("test_crop", 24000),
            **common,
        )
        return self.load(model, state)

    @staticmethod
    def _check_widths(decoder: Mapping[str, Any], common: Mapping[str, Any]) -> None:
        """The original lists the encoder's widths again; they must be the encoder's."""
        widths = [common["embed_dim"]]
        for ratio in common["dim_expansion"]:
            widths.append(widths[-1] * ratio)
        listed = decoder["encoder_channel_list"]
        if listed is not None and list(listed) != widths:
            raise ValueError(f"encoder_channel_list is {list(listed)}; the encoder's widths are {widths}")

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, Serialisation):
            return model(inputs)
        mids: dict[str, Tensor] = {}

        def record(name: str, tensor: Tensor) -> None:
            mids.setdefault(f"mid/{name}", tensor)  # the first tile's, where a scene is cut

        pos, x = inputs["pos"], inputs.get("x")
        if isinstance(model, PCM):
            logits = model.prediction(model.forward_features(pos, x, record))
        else:
            logits = model(pos, x, inputs.get("cls"), record)
        return {"logits": logits, "loss": logits.float().pow(2).mean(), **mids}

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        two_way = any(k.endswith(("mixer.x_proj_b.weight", "mixer.scan.x_proj")) for k in state)
        convolutions = [
            "encoder.embedding.net.0.weight", "{p:*}.transfer.net.0.weight", "{p:*}.net1.0.weight",
            "{p:*}.net2.{i:d}.weight", "{p:*}.fuse.net.0.weight", "decoder.cls_map.{i:d}.net.0.weight",
            "decoder.gmp_map_list.{i:d}.net.0.weight", "decoder.gmp_map_end.net.0.weight", "head.head.{i:d}.0.weight",
        ]  # fmt: skip
        squeeze = Rules(*(_Conv(key, key, Squeeze(-1)) for key in convolutions))
        return (bimamba_rules() if two_way else Rules()) + squeeze


class _Conv(Rename):
    """A pointwise convolution, (out, in, 1) there and (out, in) here; norms under the same pattern stay vectors."""

    def forward(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0]] if parts[0].dim() == 1 else super().forward(parts)

    def backward(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0]] if parts[0].dim() == 1 else super().backward(parts)


def _filled(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(defaults) - set(_SHARED)):
        raise ValueError(f"pcm's {what} has no key {', '.join(unknown)}; known: {', '.join(sorted(defaults))}")
    return {**defaults, **given}


def _activation(name: str) -> str:
    """The original takes any name that it does not know for ReLU."""
    return name if name.lower() in ACTIVATIONS else "relu"


def _pools(text: str | None) -> list[str]:
    """ "max,avg" as a list; "mean" is another word for "avg"."""
    return (
        [] if text is None else ["max" if "max" in t else "avg" if t in ("avg", "mean") else t for t in text.split(",")]
    )


def _head(head: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments of a head. Raises ValueError for norms and activations that are not built here."""
    norm, act = head["norm_args"], head["act_args"]
    norm = dict(norm) if isinstance(norm, Mapping) else {"norm": norm}
    if norm not in ({"norm": None}, {"norm": "bn"}, {"norm": "bn1d"}) and head["mlps"] != []:
        raise ValueError(f"cls_args.norm_args is {norm}; expected batch norm, {{'norm': 'bn'}} or 'bn1d', or None")
    act = dict(act) if isinstance(act, Mapping) else {"act": act}
    name = act.pop("act", None)
    act.pop("inplace", None)
    name = None if name is None else _HEAD_ACTS.get(name.lower(), name.lower())
    if act or (name is not None and name not in ACTIVATIONS):
        raise ValueError(
            f"cls_args.act_args is {head['act_args']}; expected one of {', '.join([*ACTIVATIONS, *_HEAD_ACTS])} "
            "without further arguments, or None"
        )
    return {
        "head_mlps": head["mlps"] or (),
        "head_dropout": head["dropout"],
        "head_norm": norm["norm"] is not None,
        "head_act": name,
    }


def _encoder(theirs: Mapping[str, Any], state: Mapping[str, Tensor], rows: Any) -> dict[str, Any]:
    kind = theirs["bimamba_type"]
    if kind is None:
        kind = "v2" if any(k.endswith("mixer.x_proj_b.weight") for k in state) else "none"
    if kind not in ("v2", "none"):
        raise ValueError(f"bimamba_type is {kind!r}; expected 'v2' (both ways) or 'none' (forwards)")
    prompted = theirs["use_order_prompt"]
    return {
        "in_chans": theirs["in_channels"],
        "embed_dim": theirs["embed_dim"],
        "dim_expansion": theirs["dim_expansion"],
        "pre_blocks": theirs["pre_blocks"],
        "mamba_blocks": theirs["mamba_blocks"],
        "pos_blocks": theirs["pos_blocks"],
        "k_neighbors": theirs["k_neighbors"],
        "k_strides": theirs["k_strides"] or [1] * len(theirs["dim_expansion"]),
        "reducers": theirs["reducers"],
        "orders": theirs["mamba_layers_orders"],
        "prompts": theirs["prompt_num_per_order"] if prompted else 0,
        "prompt_rows": rows if prompted else None,
        "groups": theirs["groups"],
        "res_expansion": theirs["res_expansion"],
        "bias": theirs["bias"],
        "activation": _activation(theirs["activation"]),
        "use_xyz": theirs["use_xyz"],
        "normalize": theirs["normalize"],
        "block_residual": theirs["block_residual"],
        "mamba_pos": theirs["mamba_pos"],
        "pos_type": theirs["pos_type"],
        "pos_proj": "linear" if theirs["pos_proj_type"] == "linear" else "mlp",
        "rms_norm": theirs["rms_norm"],
        "two_way": kind == "v2",
        "drop_path": theirs["drop_path_rate"],
        "windows": theirs["windows_size"] if theirs["use_windows"] else None,
        "grid_size": theirs["grid_size"],
        "combine_pos": theirs["combine_pos"],
    }
