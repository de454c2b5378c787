"""NetMamba's original arguments, keys and preprocessing: wangtz19/NetMamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rules

from .captures import read_capture
from .flows import FlowBytes
from .netmamba import NetMamba, NetMambaPretrain

#: The original's constructor arguments that are ours by the same name, for both forms.
_SAME = ("byte_length", "stride_size", "embed_dim", "depth", "drop_rate", "drop_path_rate", "bimamba_type")
_DECODER = ("decoder_embed_dim", "decoder_depth", "norm_pix_loss")
#: Arguments that the constructor takes and leaves unread; its blocks are built with values of its own.
_INERT = {"if_devide_out", "init_layer_scale", "device", "dtype"}
_KNOWN = {*_SAME, *_DECODER, *_INERT, "in_chans", "num_classes", "is_pretrain", "img_size"}
#: Arguments of the original's preprocessing.
_PREPROCESSING = {
    "flow_packet_num": "packets",
    "header_bytes": "header_bytes",
    "payload_bytes": "payload_bytes",
    "remove_ip": "remove_ip",
    "keep_payload": "keep_payload",
}


class CaptureBytes(nn.Module):
    """``read_5hp_list``: the bytes of a capture file to flow bytes; no parameters."""

    def __init__(self, representation: FlowBytes) -> None:
        super().__init__()
        self.representation = representation

    def forward(self, capture: Tensor, augment: bool = False) -> Tensor:
        """(file bytes,) uint8 to (flow bytes,), or with ``augment`` to (windows, flow bytes)."""
        packets = read_capture(capture.cpu().numpy().tobytes()).packets
        if augment:
            return torch.from_numpy(self.representation.windows(packets))
        return torch.from_numpy(self.representation(packets))


class NetMambaAdapter(ReferenceAdapter):
    """Reads wangtz19/NetMamba: ``src/models_net_mamba.py:NetMamba`` in both forms, and
    ``dataset/dataset_common.py:read_5hp_list``."""

    system = "netmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if not state and ("read_5hp_list" in source or (config and set(config) <= set(_PREPROCESSING))):
            unknown = sorted(set(config) - set(_PREPROCESSING))
            if unknown:
                raise ValueError(f"read_5hp_list has no argument {unknown[0]!r}; known: {sorted(_PREPROCESSING)}")
            return CaptureBytes(FlowBytes(**{_PREPROCESSING[k]: v for k, v in config.items()})).eval()
        pretrain = config.get("is_pretrain")
        if pretrain is None:
            pretrain = "mask_token" in unwrapped(state)
        arguments = self.arguments({**config, "is_pretrain": pretrain})
        return self.load(NetMambaPretrain(**arguments) if pretrain else NetMamba(**arguments), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments of the form that ``is_pretrain`` names; raises ValueError for what the original has not."""
        unknown = sorted(set(config) - _KNOWN)
        if unknown:
            raise ValueError(f"netmamba has no argument {', '.join(map(repr, unknown))}; known: {sorted(_KNOWN)}")
        if config.get("in_chans", 1) != 1:
            raise ValueError(f"in_chans is {config['in_chans']}; the original takes flows of one channel, in_chans=1")
        found = {k: config[k] for k in _SAME if config.get(k) is not None}
        if "img_size" in config:  # the name in earlier versions: the side of the square that a flow is stored as
            found.setdefault("byte_length", config["img_size"] ** 2)
        if config.get("is_pretrain"):
            return found | {k: config[k] for k in _DECODER if k in config}
        return found | ({"num_classes": config["num_classes"]} if "num_classes" in config else {})

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, CaptureBytes):
            return self._captures(model, inputs, call)
        assert isinstance(model, (NetMamba, NetMambaPretrain))
        flows = inputs["imgs"]
        kwargs = call.get("kwargs", {}) if isinstance(call, Mapping) else {}
        found: dict[str, Tensor] = {}
        patches = model.patch_embed(flows.flatten(1))
        x = patches + model.pos_embed[:, :-1]
        if isinstance(model, NetMambaPretrain):
            ratio = kwargs.get("mask_ratio", 0.9)
            found = model(flows, mask_ratio=ratio, noise=inputs.get("noise"))
            if isinstance(call, Mapping) and "mode" not in call:  # a full-size card, which has numbers as (1,)
                found["loss"] = found["loss"].reshape(1)
            found["grad_loss"] = found["loss"]
            if "noise" not in inputs:  # the masking was drawn: the intermediates would be of another draw
                return found | {"mid/patch_embed": patches}
            x, _, _ = model.hide(x, ratio, inputs["noise"])
        else:
            found["logits"] = model(flows)
            found["grad_loss"] = found["logits"].square().mean()
        hidden, residual = model.blocks[0](model.with_class_token(x))
        return found | {"mid/patch_embed": patches, "mid/block0_hidden": hidden, "mid/block0_residual": residual}

    def _captures(self, model: CaptureBytes, inputs: Mapping[str, Tensor], call: Any) -> dict[str, Tensor]:
        """``<i>/pcap_bytes`` to ``<i>/flow`` and ``<i>/flows_augment``, with the keyword arguments of the call."""
        kwargs = call.get("kwargs", {}) if isinstance(call, Mapping) else {}
        own = {_PREPROCESSING[k]: v for k, v in kwargs.items() if k in _PREPROCESSING}
        if own:
            model = CaptureBytes(model.representation.replaced(**own))
        found = {}
        for name, capture in inputs.items():
            prefix = name.removesuffix("pcap_bytes")
            found[f"{prefix}flow"] = model(capture)
            found[f"{prefix}flows_augment"] = model(capture, augment=True)
        return found

    def loss(self, golden, named):
        return named["out/grad_loss"]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()
