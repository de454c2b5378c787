"""Reads LMD0311/PointMamba: PointMambaScan and Point_MAE_Mamba_serializationV2, and of its branch "old" PointMamba and
the part network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import Golden, ReferenceAdapter, unwrapped
from zoo.rules import Rename, Rules, Squeeze, Stack

from .pointmamba import PointMamba, PointMambaMAE, PointMambaSegmentation

_CLS: dict[str, Any] = {
    "trans_dim": None, "encoder_dims": None, "depth": None, "cls_dim": None, "num_heads": None, "group_size": None,
    "num_group": None, "rms_norm": False, "drop_path": 0.0, "drop_out": 0.0, "use_cls_token": False, "max_head": False,
    "avg_head": False, "NAME": None,
}  # fmt: skip
#: of the branch "old"; ``num_group`` and ``group_size`` of its part network are constants
_PARTS: dict[str, Any] = {
    "cls_dim": 50, "trans_dim": 384, "encoder_dims": None, "depth": None, "group_size": 32, "num_group": 128,
    "rms_norm": False, "drop_path": 0.1, "drop_path_rate": None, "drop_out": 0.0, "use_cls_token": False,
    "fetch_idx": [3, 7, 11], "model": None,
}  # fmt: skip
_MAE: dict[str, Any] = {
    "group_size": None, "num_group": None, "loss": "cdl2", "rms_norm": False, "drop_path": 0.1, "drop_out": 0.0,
    "mamba_config": None, "NAME": None,
}  # fmt: skip
_MAE_INNER: dict[str, Any] = {
    "mask_ratio": 0.6, "mask_type": "rand", "trans_dim": None, "encoder_dims": None, "depth": None,
    "drop_path_rate": 0.1, "decoder_depth": 4, "num_heads": None, "decoder_num_heads": None,
}  # fmt: skip


class PointMambaAdapter(ReferenceAdapter):
    """Reads LMD0311/PointMamba. ``config``: the ``model`` part of the original's yaml files."""

    system = "pointmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        # A file may hold what bfloat16 represents exactly in bfloat16; the model computes in float32.
        state = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()}
        if "mamba_config" in config:
            theirs = _filled(config, _MAE)
            inner = _filled(theirs["mamba_config"], _MAE_INNER)
            _same_width(inner)
            model: nn.Module = PointMambaMAE(
                decoder_depth=inner["decoder_depth"],
                mask_ratio=inner["mask_ratio"],
                mask_type="rand" if inner["mask_type"] == "rand" else "block",
                loss=theirs["loss"],
                **_trunk({**theirs, **inner}),
                drop_path=inner["drop_path_rate"],  # ``drop_path`` and ``drop_out`` beside it are read by nothing there
            )
            return self.load(model, state)
        state = unwrapped(state)
        if "fetch_idx" in config or "convs1.weight" in state:
            return self.load(_parts(config), state)
        first = config.get("NAME") == "PointMamba" or "norm.weight" in state
        theirs = _filled(config, _CLS | ({"drop_out_in_block": 0.0, "avg_head": True} if first else {}))
        _same_width(theirs)
        if first and (theirs["use_cls_token"] or theirs.get("drop_out_in_block")):
            raise ValueError("use_cls_token and drop_out_in_block are not built for the first version")
        pool = [name for name, flag in (("mean", "avg_head"), ("max", "max_head")) if theirs[flag]]
        if theirs["use_cls_token"]:
            if len(pool) == 2:
                raise ValueError("use_cls_token with max_head and avg_head: the original's head does not fit all three")
            pool = ["token"]
        if not pool:
            raise ValueError("none of use_cls_token, max_head and avg_head is set; the original has no other pooling")
        model = PointMamba(
            theirs["cls_dim"],
            pool=pool,
            drop_path=theirs["drop_path"],
            drop_rate=theirs["drop_out"],
            version=1 if first else 2,
            **_trunk(theirs),
        )
        return self.load(model, state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        mids: dict[str, Tensor] = {}

        def record(name: str, tensor: Tensor) -> None:
            mids[f"mid/{name}"] = tensor

        if isinstance(model, PointMambaMAE):
            order = call.get("order") if isinstance(call, Mapping) else None
            found = model(inputs["pts"], inputs.get("mask"), order, record)
            return {**found, "gt": mids.pop("mid/gt"), **mids}
        if isinstance(model, PointMambaSegmentation):  # points (B, 3, N), kinds one-hot
            logits = model(inputs["pts"].transpose(1, 2), inputs["cls_label"].flatten(1).argmax(dim=1))
            return {"log_probs": logits.log_softmax(dim=1).transpose(1, 2)}
        assert isinstance(model, PointMamba)
        logits = model.head(model.forward_features(inputs["pts"], record))
        return {"logits": logits, "loss": logits.float().pow(2).mean(), **mids}

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        return named["out/loss"]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        trunk = Rules(
            Stack(["OrderScale_gamma_1", "OrderScale_gamma_2"], "order_gamma"),
            Stack(["OrderScale_beta_1", "OrderScale_beta_2"], "order_beta"),
            *(
                Rename(f"encoder.{name}.{i}.weight", f"encoder.{name}.{i}.weight", Squeeze(-1))
                for name in ("first_conv", "second_conv")
                for i in (0, 3)
            ),
        )
        if isinstance(model, PointMambaMAE) or any(k.startswith(("MAE_encoder.", "trunk.")) for k in state):
            return Rules(
                trunk.nested("MAE_encoder.", "trunk."),
                Rename("MAE_decoder.blocks.{rest:*}", "decoder.{rest:*}"),
                Rename("increase_dim.0.weight", "rebuild.weight", Squeeze(-1)),
                Rename("increase_dim.0.bias", "rebuild.bias"),
            )
        if isinstance(model, PointMambaSegmentation) or any(k.startswith(("convs1.", "propagate.")) for k in state):
            return Rules(trunk, *_part_rules())
        return Rules(trunk, Rename("cls_head_finetune.{rest:*}", "head.{rest:*}"))


def _part_rules() -> Iterator[Rename]:
    """The head of the branch's part network: convolutions of kernel 1 there, and their norms."""
    convolutions = {
        "label_conv.0": "shape_code.net.0", "propagation_0.mlp_convs.0": "propagate.0",
        "propagation_0.mlp_convs.1": "propagate.3", "convs1": "head.0", "convs2": "head.4.0", "convs3": "head.6",
    }  # fmt: skip
    norms = {
        "label_conv.1": "shape_code.net.1", "propagation_0.mlp_bns.0": "propagate.1",
        "propagation_0.mlp_bns.1": "propagate.4", "bns1": "head.1", "bns2": "head.4.1",
    }  # fmt: skip
    for theirs, ours in convolutions.items():
        yield Rename(f"{theirs}.weight", f"{ours}.weight", Squeeze(-1))
        yield Rename(f"{theirs}.bias", f"{ours}.bias")
    for theirs, ours in norms.items():
        yield Rename(f"{theirs}.{{leaf}}", f"{ours}.{{leaf}}")


def _parts(config: Mapping[str, Any]) -> PointMambaSegmentation:
    theirs = _filled(config, _PARTS)
    _same_width(theirs)
    return PointMambaSegmentation(
        theirs["cls_dim"],
        taps=theirs["fetch_idx"],
        drop_path=theirs["drop_path"],
        version=1,
        **_trunk(theirs),
    )


def _trunk(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What all three networks name alike."""
    names = {"embed_dim": "trans_dim", "depth": "depth", "num_groups": "num_group", "group_size": "group_size",
             "rms_norm": "rms_norm"}  # fmt: skip
    return {ours: theirs[key] for ours, key in names.items()}


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(
            f"pointmamba has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(defaults))}"
        )
    return {**defaults, **given}


def _same_width(theirs: Mapping[str, Any]) -> None:
    if theirs["encoder_dims"] not in (None, theirs["trans_dim"]):
        raise ValueError(
            f"encoder_dims is {theirs['encoder_dims']} and trans_dim {theirs['trans_dim']}; they must be equal"
        )
