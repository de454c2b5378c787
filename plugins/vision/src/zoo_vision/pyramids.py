"""Feature pyramids between a backbone's maps and the heads that look for objects in them.

Source: Lin et al., "Feature Pyramid Networks for Object Detection", arXiv 1612.03144, section 3; modules have the names
of mmdetection (``models/necks/fpn.py``), and the further arguments are those of mlvlab/EfficientViM @ 304340c,
``detection/efficientvit_fpn.py:EfficientViTFPN`` (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ._base import check_reference_config

EXTRA = (False, "on_input", "on_lateral", "on_output")


class ConvModule(nn.Module):
    """mmcv's ConvModule: a convolution under the key ``conv``, with a bias unless a batch norm ``bn`` follows, ReLU."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel: int, stride: int = 1, *, transposed: bool = False,
        norm: bool = False, act: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if transposed:
            self.conv: nn.Module = nn.ConvTranspose2d(in_chans, out_chans, kernel, stride, bias=not norm)
        else:
            self.conv = nn.Conv2d(in_chans, out_chans, kernel, stride, padding=kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(out_chans) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class FPNNeck(nn.Module):
    """Feature pyramid with extra higher resolutions by transposed convolutions, largest map first.

    Arguments: ``in_channels`` of the maps, ``out_channels``, ``num_outs`` maps in all, ``start_level`` (first map
    used), ``extra_trans_convs`` (higher resolutions, each twice the one before; 0 is a plain FPN, which EfficientViM's
    class cannot run), ``pre_norm`` (LayerNorm on the inputs), ``add_extra_convs``: extra lower resolutions by taking
    every second pixel of the last output (False) or by 3x3 convolutions of stride 2 that begin at the last input
    ("on_input", after the norm), the last lateral ("on_lateral") or the last output ("on_output");
    ``relu_before_extra_convs`` before the later ones; ``conv_norm``, ``conv_act``: batch norm and ReLU after every
    convolution (``lateral_norm`` False: no norm after the lateral and the transposed ones); ``upsample``: how an upper
    lateral is resized, arguments of ``torch.nn.functional.interpolate`` (to the lower map's size where they hold no
    ``scale_factor``).
    Input: maps (batch, in_channels[i], h, w). Source: ``detection/efficientvit_fpn.py``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        num_outs: int = 5,
        start_level: int = 0,
        extra_trans_convs: int = 0,
        pre_norm: bool = False,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        *,
        conv_norm: bool = False,
        conv_act: bool = False,
        lateral_norm: bool = True,
        upsample: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.upsample = {"mode": "nearest"} if upsample is None else dict(upsample)
        outer = {"norm": conv_norm, "act": conv_act}
        inner = {"norm": conv_norm and lateral_norm, "act": conv_act}
        self.add_extra_convs = "on_input" if add_extra_convs is True else add_extra_convs
        if self.add_extra_convs not in EXTRA:
            raise ValueError(f"add_extra_convs is {add_extra_convs!r}; expected True or one of {EXTRA}")
        used = list(in_channels)[start_level:]
        lower = num_outs - len(used) - extra_trans_convs
        if not used or lower < 0:
            raise ValueError(
                f"num_outs is {num_outs}; {len(used)} maps from level {start_level} on and {extra_trans_convs} "
                "transposed convolutions give at least their sum"
            )
        if pre_norm and start_level:
            raise ValueError(
                f"pre_norm with start_level={start_level}: the original norms the wrong maps and cannot run"
            )
        self.start_level, self.lower = start_level, lower
        self.relu_before_extra_convs = relu_before_extra_convs
        self.batch_norm = nn.ModuleList(LayerNorm2d(c, eps=1e-5) for c in used) if pre_norm else nn.ModuleList()
        self.lateral_convs = nn.ModuleList(ConvModule(c, out_channels, 1, **inner) for c in used)
        self.fpn_convs = nn.ModuleList(ConvModule(out_channels, out_channels, 3, **outer) for _ in used)
        for i in range(lower if self.add_extra_convs else 0):
            source = used[-1] if i == 0 and self.add_extra_convs == "on_input" else out_channels
            self.fpn_convs.append(ConvModule(source, out_channels, 3, stride=2, **outer))
        self.extra_trans_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 2, stride=2, transposed=True, **inner)
            for _ in range(extra_trans_convs)
        )
        self.extra_fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, **outer) for _ in range(extra_trans_convs)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (batch, in_channels[i], h, w), largest first, to ``num_outs`` maps (batch, out_channels, h, w)."""
        used = list(maps)[self.start_level :]
        if len(self.batch_norm):
            used = [norm(m) for norm, m in zip(self.batch_norm, used, strict=True)]
        laterals = [conv(m) for conv, m in zip(self.lateral_convs, used, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            size = {} if "scale_factor" in self.upsample else {"size": laterals[i - 1].shape[2:]}
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], **size, **self.upsample)
        larger: list[Tensor] = []
        for conv in self.extra_trans_convs:
            larger.insert(0, conv(larger[0] if larger else laterals[0]))
        outs = [conv(lateral) for conv, lateral in zip(self.fpn_convs, laterals, strict=False)]
        sources = {"on_input": used[-1], "on_lateral": laterals[-1], "on_output": outs[-1]}
        for i in range(self.lower):
            if not self.add_extra_convs:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
                continue
            source = sources[str(self.add_extra_convs)] if i == 0 else outs[-1]
            source = F.relu(source) if i > 0 and self.relu_before_extra_convs else source
            outs.append(self.fpn_convs[len(laterals) + i](source))
        return [conv(lateral) for conv, lateral in zip(self.extra_fpn_convs, larger, strict=True)] + outs


# -- mmdetection's tables ----------------------------------------------------------------------------------------------

_NECK: dict[str, Any] = {
    "in_channels": None, "out_channels": 256, "num_outs": 5, "start_level": 0, "end_level": -1,
    "add_extra_convs": False, "extra_convs_on_inputs": True, "relu_before_extra_convs": False,
    "num_extra_trans_convs": 0, "pre_norm": False, "conv_cfg": None, "norm_cfg": None, "act_cfg": None,
    "no_norm_on_lateral": False, "upsample_cfg": {"mode": "nearest"},
}  # fmt: skip


def _switch(key: str, value: Any, kinds: Sequence[str]) -> bool:
    """Whether a mmcv table (``norm_cfg``, ``act_cfg``) asks for the one thing that is known here."""
    if value is None:
        return False
    if value.get("type") not in kinds or set(value) - {"type", "requires_grad", "inplace"}:
        raise ValueError(f"neck {key} is {dict(value)!r}; expected None or a table of type {' or '.join(kinds)} alone")
    return True


def neck_arguments(config: Mapping[str, Any], maps: int) -> dict[str, Any]:
    """Arguments of :class:`FPNNeck`, all but ``in_channels``, from a ``neck`` table of mmdetection (``FPN``, or
    ``EfficientViTFPN``) for a backbone of so many ``maps``. Raises ValueError for what is not known here."""
    given = {k: v for k, v in config.items() if k not in ("type", "init_cfg")}
    neck = check_reference_config("neck", given, _NECK)
    if neck["conv_cfg"] not in (None, {"type": "Conv2d"}):
        raise ValueError(f"neck conv_cfg is {neck['conv_cfg']!r}; expected None: no other convolution is known here")
    if neck["end_level"] not in (-1, maps):
        raise ValueError(f"neck end_level is {neck['end_level']}; expected -1: a pyramid of all maps")
    extra = neck["add_extra_convs"]
    if extra is True and not neck["extra_convs_on_inputs"]:
        extra = "on_output"
    return {
        "out_channels": neck["out_channels"],
        "num_outs": neck["num_outs"],
        "start_level": neck["start_level"],
        "extra_trans_convs": neck["num_extra_trans_convs"],
        "pre_norm": neck["pre_norm"],
        "add_extra_convs": extra,
        "relu_before_extra_convs": neck["relu_before_extra_convs"],
        "conv_norm": _switch("norm_cfg", neck["norm_cfg"], ("BN", "SyncBN")),
        "conv_act": _switch("act_cfg", neck["act_cfg"], ("ReLU",)),
        "lateral_norm": not neck["no_norm_on_lateral"],
        "upsample": neck["upsample_cfg"],
    }
