"""Reads USTCLH/OccMamba: OccMamba_Head (with the local context processor of commit 0e0fa3d, ``with_lcp``), and the
voxel order alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import Golden, ReferenceAdapter, unwrapped
from zoo.rules import Rename, Rules
from zoo_kernels import paths

from .occmamba import OccMambaHead

_HEAD: dict[str, Any] = {
    "in_channels": None, "out_channels": None, "trans_dim": 128, "down_blocks": [2, 2, 2, 2], "up_blocks": [2, 2, 2, 2],
    "order_method": [{"order": "H2HE", "coor_order": "xy", "inverse": False}], "norm_cfg": None, "fine_input_dim": 128,
    "cascade_ratio": 4, "final_occ_size": [512, 512, 40], "final_occ_size_used": None, "fine_topk": 20000,
    "with_lcp": False, "lcp_sizes": [2, 4, 6], "lcp_stride": [1, 2, 3], "lcp_mamba_channel": 32, "lcp_mamba_expand": 1,
    "drop_path": 0.2, "topk": 30000, "empty_idx": 0, "upsample_ratio": 1, "out_refine": 0.0,
    "refine_method": "threshold", "conv_cfg": {"type": "Conv3d", "bias": False},
    # of the losses and the detector, not of the network
    "balance_cls_weight": None, "type": None, "soft_weights": None, "loss_weight_cfg": None, "loss_norm": None,
    "point_cloud_range": None, "train_cfg": None, "test_cfg": None, "num_level": None, "num_img_level": None,
    "input_voxel_size": None, "dataset": None, "sample_from_voxel": None, "sample_from_img": None,
}  # fmt: skip


class VoxelOrders(nn.Module):
    """The orders alone."""

    def __init__(self, entries: Any) -> None:
        super().__init__()
        self.entries = list(entries)

    def forward(self) -> dict[str, Tensor]:
        return {
            f"{i}/indices": paths.get(
                f"h2he(order={e.get('coor_order', 'xy')}, inverse={bool(e.get('inverse', False))})",
                (e["max_x"], e["max_y"], e["max_z"]),
            )[0]
            for i, e in enumerate(self.entries)
        }


class OccMambaAdapter(ReferenceAdapter):
    """Reads USTCLH/OccMamba. ``config``: ``pts_bbox_head`` of the original's config files. ``state``: the head's, or a
    whole checkpoint's, of which the keys below ``pts_bbox_head.`` are taken (the branches before the head have none
    here). ``topk`` (30000, a constant of the original) may be given."""

    system = "occmamba"

    def build(self, config: Any, state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if isinstance(config, list) or "max_x" in config:
            return VoxelOrders(config if isinstance(config, list) else [config])
        if unknown := sorted(set(config) - set(_HEAD)):
            raise ValueError(
                f"occmamba has no configuration key {', '.join(unknown)}; known: {', '.join(sorted(_HEAD))}"
            )
        theirs = {**_HEAD, **config}
        for method in theirs["order_method"]:
            if method.get("order", "H2HE") != "H2HE":
                raise ValueError(f"order_method names {method['order']!r}; expected 'H2HE'")
        norm = theirs["norm_cfg"] or {"type": "GN", "num_groups": 32}
        kinds = {"GN": "group", "BN": "batch", "BN3d": "batch", "SyncBN": "batch"}
        if norm["type"] not in kinds:
            raise ValueError(f"norm_cfg.type is {norm['type']!r}; expected one of {', '.join(kinds)}")
        if unknown := sorted(set(norm) - {"type", "num_groups", "eps", "momentum", "requires_grad"}):
            raise ValueError(f"norm_cfg holds {', '.join(unknown)}; known: type, num_groups, eps, requires_grad")
        if unknown := sorted(set(theirs["conv_cfg"] or {}) - {"type", "bias"}):
            raise ValueError(f"conv_cfg holds {', '.join(unknown)}; known: type, bias")
        model = OccMambaHead(
            theirs["in_channels"],
            theirs["out_channels"],
            theirs["trans_dim"],
            theirs["down_blocks"],
            theirs["up_blocks"],
            theirs["order_method"],
            norm=kinds[norm["type"]],
            norm_groups=norm.get("num_groups", 32),
            norm_eps=norm.get("eps", 1e-5),
            conv_bias=(theirs["conv_cfg"] or {}).get("bias", True),  # of mmcv's layers where the mapping does not say
            fine_dim=theirs["fine_input_dim"],
            cascade_ratio=theirs["cascade_ratio"],
            final_size=theirs["final_occ_size_used"] or theirs["final_occ_size"],
            topk=theirs["topk"],
            fine_topk=theirs["fine_topk"],
            empty_idx=theirs["empty_idx"],
            upsample_ratio=theirs["upsample_ratio"],
            out_refine=theirs["out_refine"] or 0.0,
            refine_method="ratio" if theirs["refine_method"] == "ratio" else "threshold",
            drop_path=theirs["drop_path"],
            local_sizes=theirs["lcp_sizes"] if theirs["with_lcp"] else (),
            local_strides=theirs["lcp_stride"] if theirs["with_lcp"] else (),
            local_dim=theirs["lcp_mamba_channel"],
            local_expand=theirs["lcp_mamba_expand"],
        )
        inner = unwrapped(state)
        if any(k.startswith("pts_bbox_head.") for k in inner):
            inner = {k.removeprefix("pts_bbox_head."): v for k, v in inner.items() if k.startswith("pts_bbox_head.")}
        # Tensors may be stored in bfloat16 where it holds them exactly; the model computes in float32.
        return self.load(model, {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in inner.items()})

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, VoxelOrders):
            return model()
        mids: dict[str, Tensor] = {}

        def record(name: str, tensor: Tensor) -> None:
            mids[f"mid/{name}"] = tensor

        output = model(inputs["voxel_feats"].float(), record)
        found = {"coarse": output["coarse"], "loss": output["coarse"].float().pow(2).mean()}
        fine = output.get("fine")
        if isinstance(fine, Tensor):
            found |= {"fine0": fine[0], "fine": fine[0]}
        elif fine is not None:
            logits, coords = fine[0]["logits"], fine[0]["coords"].t()
            found |= {"fine0": logits, "fine_coord0": coords, "fine": logits, "fine_coord": coords.float()}
        return {**found, **mids}

    def loss(self, golden: Golden, named: Mapping[str, Tensor]) -> Tensor:
        return named["out/loss"]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(
            Rename("lcp_linear.{rest:*}", "local.linear.{rest:*}"),
            Rename("lcp_mamba.{rest:*}", "local.mamba.{rest:*}"),
            Rename("lcp_out.{rest:*}", "local.out.{rest:*}"),
        )
