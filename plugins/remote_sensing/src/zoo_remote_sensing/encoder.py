"""The encoder of the change detectors: the zoo's VMamba as a feature pyramid, made by name, and its key tables.

Both change detection systems (ChangeMamba, Mamba-FCS) run one shared VMamba over the two dates and build their decoders
from its blocks. The options of encoder and decoders are therefore one set, written in the zoo's terms in
:data:`DEFAULTS` and in the originals' terms in :func:`translate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.adapting import InputChannels, NewHead
from zoo.layers import GradCheckpointing
from zoo.layers.vss import VSSBlock
from zoo.rules import Rename, Reshape, Rules

#: the vision plugin's model that is built with other options; its own options do not matter, all are given
ENCODER = "vmamba_tiny_s1l8"
#: what :func:`make_encoder` gives the encoder and :func:`make_block` a decoder's block where a model says nothing
DEFAULTS: dict[str, Any] = {
    "patch_size": 4, "patch_overlap": True, "patch_norm": True, "downsample": "conv3", "norm": "ln", "expand": 2.0,
    "state": 1, "dt_rank": None, "paths": "cross", "init": "mamba", "gate": False, "gate_act": True, "act": "silu",
    "conv": 3, "conv_bias": False, "out_norm": "norm", "mixer_drop": 0.0, "mlp_ratio": 4.0, "mlp_act": "gelu",
    "mlp_drop": 0.0, "mlp_gated": False, "drop_path_rate": 0.2,
}  # fmt: skip
_ENCODER_ONLY = ("patch_size", "patch_overlap", "patch_norm", "downsample", "drop_path_rate")
_MIXER = {"mixer_drop": "drop"} | {
    k: k
    for k in (
        "expand", "state", "dt_rank", "paths", "init", "gate", "gate_act", "act", "conv", "conv_bias", "out_norm",
    )
}  # fmt: skip
#: stochastic depth of every block of a decoder, fixed in both originals
DECODER_DROP_PATH = 0.1


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over :data:`DEFAULTS`. Raises TypeError, as Python would, for one that does not exist."""
    for key in options:
        if key not in DEFAULTS:
            near = get_close_matches(key, DEFAULTS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"model() got an unexpected keyword argument '{key}'{hint}")
    return {**DEFAULTS, **options}


def make_encoder(depths: Sequence[int], dims: int | Sequence[int], in_chans: int, options: Mapping[str, Any]) -> Any:
    """A VMamba pyramid: (batch, in_chans, H, W) to four normalised maps (batch, C_i, h, w) at strides 4 to 32.

    Odd sizes round up at every halving (with the overlapping embedding and 3x3 downsampling of the published models).
    """
    dims = dims if isinstance(dims, int) else tuple(dims)
    return zoo.create(ENCODER, features_only=True, depths=tuple(depths), dims=dims, in_chans=in_chans, **options)


def make_block(dim: int, options: Mapping[str, Any]) -> VSSBlock:
    """A decoder's VSS block of ``dim`` channels, (batch, height, width, dim), with the encoder's options."""
    mixer = {theirs: options[ours] for ours, theirs in _MIXER.items()} if options["expand"] > 0 else None
    rest = {k: v for k, v in options.items() if k not in _MIXER and k not in _ENCODER_ONLY}
    return VSSBlock(dim, mixer, drop_path=DECODER_DROP_PATH, **rest)


class PairModel(GradCheckpointing, nn.Module):
    """What the change detectors share: a pyramid of each date through one encoder, and what a loader may adapt."""

    encoder: Any
    heads: dict[str, str] = {}  # noqa: RUF012 - a constant of each class: argument -> the module whose width it sets

    @property
    def ends(self) -> dict[str, Any]:
        first = InputChannels("encoder.patch_embed.conv1.weight")
        return {**{k: NewHead(v) for k, v in self.heads.items()}, "in_chans": first}

    def pyramids(self, before: Tensor, after: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Four maps of each date. Both go through the encoder as one batch, except where batch norms would mix them."""
        if before.shape != after.shape or before.dim() != 4:
            raise ValueError(
                f"before has shape {tuple(before.shape)} and after {tuple(after.shape)}; expected two batches of "
                "images of one shape, (batch, channels, height, width): cut or resample the two dates to one grid"
            )
        if self.encoder.norm_kind == "bn" and self.training:
            return self.encoder(before), self.encoder(after)
        maps = self.encoder(torch.cat([before, after]))
        n = before.shape[0]
        return [m[:n] for m in maps], [m[n:] for m in maps]


# -- the originals' terms --------------------------------------------------------------------------------------------

#: cores of the mixer, without the tags behind them -> our options
_CORES: dict[str, dict[str, str]] = {
    "v1": {}, "v2": {}, "v3": {}, "v4": {},
    "v31d": {"paths": "+".join(["raster"] * 4)},
    "v32d": {"paths": "raster+raster+reverse(raster)+reverse(raster)"},
}  # fmt: skip
_OUT_NORMS = {"none": "none", "dwconv3": "conv", "softmax": "softmax", "sigmoid": "sigmoid"}
#: arguments of the originals' encoder that change no number here: read and ignored there too, or training only
IGNORED = (
    "pretrained", "num_classes", "ssm_rank_ratio", "imgsize", "posembed", "post_norm", "use_checkpoint", "out_indices",
)  # fmt: skip
REFERENCE_DEFAULTS: dict[str, Any] = {
    "patch_size": 4, "in_chans": 3, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768), "ssm_d_state": 16,
    "ssm_ratio": 2.0, "ssm_dt_rank": "auto", "ssm_act_layer": "silu", "ssm_conv": 3, "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0, "ssm_init": "v0", "forward_type": "v2", "mlp_ratio": 4.0, "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0, "gmlp": False, "drop_path_rate": 0.1, "patch_norm": True, "norm_layer": "ln",
    "downsample_version": "v2", "patchembed_version": "v1",
}  # fmt: skip


def forward_type(name: str) -> dict[str, Any]:
    """The mixer's options for a ``forward_type`` of the originals' older VMamba, written without underscores ("v3noz").

    Read from the right: no32 (a matter of casts), noz, nozact, then one output norm. The cores v1 to v4 are one
    mathematics, v31d and v32d walk one and two ways (of four), and everything that begins with v0 is the first
    release's mixer, whatever is asked of gate, activation and convolution. Raises ValueError for others.
    """
    if name.startswith("v0"):
        return {"act": "silu", "conv": 3, "conv_bias": True, "init": "mamba", "gate": True}
    kind, found = name.replace("_", ""), {}
    for tag in ("no32", "noz", "nozact"):
        found[tag] = kind.endswith(tag)
        kind = kind.removesuffix(tag)
    out_norm = "norm"
    for tag, value in _OUT_NORMS.items():
        if kind.endswith(tag):
            kind, out_norm = kind.removesuffix(tag), value
            break
    if kind not in _CORES:
        raise ValueError(
            f"forward_type={name!r} is not known; expected v0, v0seq or one of {', '.join(_CORES)}, the latter with at "
            f"most one of {', '.join(_OUT_NORMS)} and the tags nozact, noz, no32 behind it (SS2D's xv1a, xv2a and xv3a "
            "are not built)"
        )
    return {**_CORES[kind], "gate": not found["noz"], "gate_act": not found["nozact"], "out_norm": out_norm}


def translate(system: str, config: Mapping[str, Any], own: Sequence[str] = ()) -> dict[str, Any]:
    """Our arguments for an original's. ``own``: its arguments beyond the encoder's, which the caller reads."""
    for key in config:
        if key not in REFERENCE_DEFAULTS and key not in IGNORED and key not in own:
            near = get_close_matches(key, [*REFERENCE_DEFAULTS, *own], n=3)
            raise ValueError(
                f"the original {system} has no argument {key!r} (received {config[key]!r}); nearest: "
                f"{', '.join(near) or 'none'}"
            )
    c = {**REFERENCE_DEFAULTS, **config}

    def choose(key: str, table: Mapping[str, Any]) -> Any:
        if c[key] not in table:
            raise ValueError(f"{key} is {c[key]!r}; expected one of {', '.join(table)}")
        return table[c[key]]

    c["norm_layer"] = str(c["norm_layer"]).lower()
    return {
        "depths": tuple(c["depths"]), "dims": c["dims"] if isinstance(c["dims"], int) else tuple(c["dims"]),
        "in_chans": c["in_chans"], "patch_size": c["patch_size"],
        "patch_overlap": choose("patchembed_version", {"v1": False, "v2": True}), "patch_norm": c["patch_norm"],
        "downsample": choose("downsample_version", {"v1": "merge", "v2": "conv2", "v3": "conv3"}),
        "norm": choose("norm_layer", {"ln": "ln", "ln2d": "ln", "bn": "bn"}), "expand": c["ssm_ratio"],
        "state": c["ssm_d_state"], "dt_rank": None if c["ssm_dt_rank"] == "auto" else int(c["ssm_dt_rank"]),
        "act": c["ssm_act_layer"], "conv": c["ssm_conv"], "conv_bias": c["ssm_conv_bias"],
        "init": choose("ssm_init", {"v0": "mamba", "v1": "random", "v2": "flat"}), "mixer_drop": c["ssm_drop_rate"],
        "mlp_ratio": c["mlp_ratio"], "mlp_act": c["mlp_act_layer"], "mlp_drop": c["mlp_drop_rate"],
        "mlp_gated": c["gmlp"], "drop_path_rate": c["drop_path_rate"], **forward_type(c["forward_type"]),
    }  # fmt: skip


#: a linear layer that may be kept as a 1x1 convolution in the originals' channels-first form
_LINEAR = Reshape(zoo=lambda s: s[:2], reference=lambda s: s[:2])
#: a 1x1 convolution of the originals that is a linear layer here
POINTWISE = Reshape(zoo=lambda s: s[:2], reference=lambda s: (*s, 1, 1))
_PER_PATH = Reshape(zoo=lambda s: (4, s[0] // 4, *s[1:]), reference=lambda s: (s[0] * s[1], *s[2:]))


def _bare_conv(state: Mapping[str, Tensor]) -> bool:
    """Whether the mixers' output "norm" is a depthwise convolution (the originals keep it as ``out_norm.weight``)."""
    ends = (".op.out_norm.weight", ".op.out_norm.conv.weight")
    return any(k.endswith(ends) and v.dim() == 4 for k, v in state.items())


def block_rules(theirs: str, ours: str, state: Mapping[str, Tensor]) -> Rules:
    """The key table of one VSS block; both prefixes end with a dot."""
    conv = [Rename(theirs + "op.out_norm.weight", ours + "op.out_norm.conv.weight")] if _bare_conv(state) else []
    return Rules(
        *conv,
        Rename(theirs + "op.in_proj.weight", ours + "op.in_proj.weight", _LINEAR),
        Rename(theirs + "op.out_proj.weight", ours + "op.out_proj.weight", _LINEAR),
        Rename(theirs + "op.conv2d.{leaf}", ours + "op.conv.{leaf}"),
        Rename(theirs + "op.x_proj_weight", ours + "op.scan.x_proj"),
        Rename(theirs + "op.dt_projs_weight", ours + "op.scan.dt_proj"),
        Rename(theirs + "op.dt_projs_bias", ours + "op.scan.dt_bias"),
        Rename(theirs + "op.A_logs", ours + "op.scan.A_log", _PER_PATH),
        Rename(theirs + "op.Ds", ours + "op.scan.D", _PER_PATH),
        Rename(theirs + "mlp.{fc}.weight", ours + "mlp.{fc}.weight", _LINEAR),
        Rename(theirs + "{rest:*}", ours + "{rest:*}"),
    )


def encoder_rules(state: Mapping[str, Tensor]) -> Rules:
    """The encoder's table: VMamba's own, below ``encoder.``, and the bare convolution that its newer code renamed."""
    tail = ".{s}.blocks.{b}.op.out_norm."
    conv = [Rename(f"encoder.layers{tail}weight", f"encoder.stages{tail}conv.weight")] if _bare_conv(state) else []
    return Rules(*conv, zoo.reference("vmamba").rules(state).nested("encoder.", "encoder."))
