"""VMamba: a hierarchical backbone whose mixer scans the image along four directions.

Paper: Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166. Original: MzeroMiko/VMamba (MIT),
``classification/models/vmamba.py`` (``VSSM``, ``Backbone_VSSM``). The blocks are ``zoo.layers``' (``vss``, ``ss2d``).
Differences: everything is channels last inside, also where the original works channels first (``ln2d``, ``bn``: the
same numbers); the directions are named paths that the kernel walks, so
``paths="hilbert+reverse(hilbert)"`` is a model too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from zoo.adapting import Converted, NewHead
from zoo.layers.inference import by_rows, reusing_memory
from zoo.layers.ss2d import CROSS
from zoo.layers.vss import ConvDownsample, PatchEmbed, PatchMerging, VSSBlock, channel_norm
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rename, Reshape, Rules

from ._base import Indices, VisionModel, build, check_reference_config

STAGES = 4  # of the published models; VMamba itself takes any number


class Stage(nn.Module):
    """Blocks at one resolution, then the way down to the next (nothing after the last stage)."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def walk(self, x: Tensor) -> Tensor:
        """The blocks alone: the map that pyramids take. x: (batch, H, W, C)."""
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.walk(x))


class VMamba(VisionModel):
    """VMamba of both generations: ``norm(stages(patch_embed(x)))``, mean over positions, linear.

    Arguments
        depths, dims: blocks and widths of the stages (four as published); an int C means C, 2C, 4C, 8C.
        patch_overlap: two strided 3x3 convolutions instead of one patch convolution ("v2"); patch_norm: with norms.
        downsample: ``"merge"`` (patch merging, "v1"), ``"conv2"`` (2x2 convolution, "v2"), ``"conv3"`` (3x3, "v3").
        norm: ``"ln"`` or ``"bn"`` in blocks, embedding, downsampling and before the head.
        expand, state, dt_rank, paths, core, init, gate, gate_act, act, conv, conv_bias, out_norm, out_act, mixer_drop:
        the mixer, see :class:`zoo.layers.SS2D` (``expand`` 0: blocks without it).
        mlp_ratio (0: none), mlp_act, mlp_drop, mlp_gated, post_norm: see :class:`zoo.layers.VSSBlock`.
        pos_embed: a learned table (1, C, H/patch, W/patch) for ``img_size``, added after the embedding.
        pyramid_norm: a feature pyramid normalises each map by its own LayerNorm (or BatchNorm), as the original does.

    Input (batch, in_chans, H, W), any size whose map survives the halvings. Source: arXiv 2401.10166, sections 4, 5.
    """

    no_split_modules = ("VSSBlock",)  # stages are walked through, not called

    first_conv = "patch_embed.conv1"

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        patch_overlap: bool = True,
        patch_norm: bool = True,
        downsample: str = "conv3",
        norm: str = "ln",
        expand: float = 1.0,
        state: int | None = 1,
        dt_rank: int | None = None,
        paths: str = CROSS,
        core: str = "scan",
        init: str = "mamba",
        gate: bool = False,
        gate_act: bool = True,
        act: str = "silu",
        conv: int = 3,
        conv_bias: bool = False,
        out_norm: str = "norm",
        out_act: bool = False,
        mixer_drop: float = 0.0,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        mlp_drop: float = 0.0,
        mlp_gated: bool = False,
        post_norm: bool = False,
        pos_embed: bool = False,
        drop_path_rate: float = 0.0,
        pyramid_norm: bool = True,
    ) -> None:
        super().__init__()
        self.num_stages = len(depths)
        widths = [dims * 2**i for i in range(self.num_stages)] if isinstance(dims, int) else [int(d) for d in dims]
        if not widths or len(widths) != self.num_stages:
            raise ValueError(
                f"depths is {depths} and dims {dims}; expected one entry for each stage in both (dims may be an int)"
            )
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.patch_size, self.norm_kind, self.pyramid_norm = patch_size, norm, pyramid_norm
        self.patch_embed = PatchEmbed(
            in_chans, widths[0], patch_size, overlap=patch_overlap, norm=norm if patch_norm else "none"
        )
        self.pos_embed: nn.Parameter | None = None
        if pos_embed:
            self.img_size = to_2tuple(img_size)
            self.pos_embed = nn.Parameter(torch.zeros(1, widths[0], *(s // patch_size for s in self.img_size)))
        mixer = None
        if expand > 0:
            mixer = {
                "expand": expand, "state": state, "dt_rank": dt_rank, "paths": paths, "core": core, "init": init,
                "gate": gate, "gate_act": gate_act, "act": act, "conv": conv, "conv_bias": conv_bias,
                "out_norm": out_norm, "out_act": out_act, "drop": mixer_drop,
            }  # fmt: skip
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, widths, strict=True)):
            blocks = [
                VSSBlock(
                    dim, mixer, mlp_ratio=mlp_ratio, mlp_act=mlp_act, mlp_drop=mlp_drop, mlp_gated=mlp_gated,
                    norm=norm, post_norm=post_norm, drop_path=rates[sum(depths[:i]) + j],
                )
                for j in range(depth)
            ]  # fmt: skip
            down = make_downsample(downsample, dim, widths[i + 1], norm) if i + 1 < self.num_stages else nn.Identity()
            stages.append(Stage(blocks, down))
        self.stages = nn.ModuleList(stages)
        self.norm = channel_norm(norm, widths[-1])
        self.head = nn.Linear(widths[-1], num_classes) if num_classes > 0 else nn.Identity()
        stride = (patch_size // 2) ** 2 if patch_overlap else patch_size  # equal for the usual 4
        #: norms of the maps of a pyramid; empty in a classifier
        self.out_norms = nn.ModuleDict()
        self.feature_info = [
            {"num_chs": d, "reduction": stride * 2**i, "module": f"stages.{i}.blocks"} for i, d in enumerate(widths)
        ]
        self.init_weights()

    def init_weights(self) -> None:
        """Linear weights truncated normal 0.02 and biases 0, as in the original; the scans keep their own start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    # -- forward

    def embed(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) to (batch, H/patch, W/patch, C), with the position table where there is one."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            if self.pos_embed.shape[2:] != x.shape[1:3]:
                raise ValueError(
                    f"the image gives a map of {tuple(x.shape[1:3])}, the position table is for "
                    f"{tuple(self.pos_embed.shape[2:])}; call set_input_size((height, width)) to resample it"
                )
            x = x + self.pos_embed.permute(0, 2, 3, 1)
        return x

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`VisionModel`; the last output is (batch, h, w, C). A pyramid always applies its own norms."""
        with reusing_memory(x):
            x = self.embed(x)
            maps = []
            final = self.num_stages - 1
            last = max(indices, default=final) if stop_early else final
            for i, stage in enumerate(self.stages):
                x = stage.walk(x)
                if i in indices:
                    y = x
                    if str(i) in self.out_norms:
                        y = by_rows(self.out_norms[str(i)], x, module=self.out_norms[str(i)])
                    elif norm and i == final and not self.out_norms:
                        y = self.norm(x)
                    maps.append(y.permute(0, 3, 1, 2))
                if i == last:
                    break
                x = stage.downsample(x)
        return x, maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the normalised last map (batch, h, w, C)."""
        return self.norm(self.forward_stages(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((1, 2))
        return x if pre_logits else self.head(x)

    # -- habits

    @property
    def ends(self) -> dict[str, Any]:
        """What arguments change in a checkpoint: the head, the first convolution, the table, a pyramid's own norms."""
        fit = Converted("pos_embed", resize_table)
        return super().ends | {"img_size": fit, "patch_size": fit, "features_only": NewHead("out_norms")}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position table (bicubic) for images of another size; without a table nothing is needed."""
        if self.pos_embed is None:
            return
        self.img_size = to_2tuple(img_size)
        grid = tuple(s // self.patch_size for s in self.img_size)
        self.pos_embed = nn.Parameter(resize_table(self.pos_embed.detach(), (1, 1, *grid)))

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's call. Drops the head, the stages after the last index, and (``prune_norm``) the final norm."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.stages = self.stages[: max(take) + 1]
        if max(take) + 1 < self.num_stages or prune_norm:
            self.norm = nn.Identity()
        return take

    def as_pyramid(self, out_indices: Indices = None) -> VMamba:
        """Feature maps before each downsampling, each through its own norm (new, 1 and 0) if ``pyramid_norm``."""
        before, widths = set(self.state_dict()), [info["num_chs"] for info in self.feature_info]
        super().as_pyramid(out_indices)
        assert self.out_indices is not None
        self.norm = nn.Identity()
        self.stages[-1].downsample = nn.Identity()  # type: ignore[union-attr]
        if self.pyramid_norm:
            like = next(self.parameters())
            for i in self.out_indices:
                norm = channel_norm(self.norm_kind, widths[i])
                self.out_norms[str(i)] = norm.to(device=like.device, dtype=like.dtype)
        after = set(self.state_dict())
        self.dropped_keys = frozenset(before - after)
        return self


def resize_table(table: Tensor, shape: Sequence[int]) -> Tensor:
    """A position table (1, C, h, w) for the grid ``shape[2:]``, bicubic."""
    found = F.interpolate(table.float(), size=tuple(shape[2:]), mode="bicubic", align_corners=False)
    return found.to(table.dtype)


def make_downsample(kind: str, dim: int, out: int, norm: str) -> nn.Module:
    """``"merge"``, ``"conv2"`` or ``"conv3"``: half the side, ``dim`` to ``out`` channels."""
    if kind == "merge":
        return PatchMerging(dim, out, norm)
    if kind in ("conv2", "conv3"):
        return ConvDownsample(dim, out, int(kind[-1]), norm)
    raise ValueError(f"downsample is {kind!r}; expected 'merge', 'conv2' or 'conv3'")


def vmamba(*, features_only: bool = False, out_indices: Indices = None, **config: Any) -> VMamba:
    """Builder of the cards: a :class:`VMamba`, as a pyramid of the maps at ``out_indices`` with ``features_only``."""
    return build(VMamba, features_only=features_only, out_indices=out_indices, **config)


# -- the original's format -------------------------------------------------------------------------------------------

#: names of the first release (the vanilla checkpoints, and what was copied from it) -> names of the current code
_LEGACY = Rules(
    Rename("patch_embed.proj.{leaf}", "patch_embed.0.{leaf}"),
    Rename("patch_embed.norm.{leaf}", "patch_embed.2.{leaf}"),
    Rename("layers.{s}.blocks.{b}.ln_1.{leaf}", "layers.{s}.blocks.{b}.norm.{leaf}"),
    Rename("layers.{s}.blocks.{b}.self_attention.{rest:*}", "layers.{s}.blocks.{b}.op.{rest:*}"),
    Rename("norm.{leaf}", "classifier.norm.{leaf}"),
    Rename("head.{leaf}", "classifier.head.{leaf}"),
)
_BLOCK, _OURS = "layers.{s}.blocks.{b}.", "stages.{s}.blocks.{b}."
#: a linear layer that the channels-first originals keep as a 1x1 convolution
_LINEAR = Reshape(zoo=lambda s: s[:2], reference=lambda s: s[:2])
_PER_PATH = Reshape(zoo=lambda s: (4, s[0] // 4, *s[1:]), reference=lambda s: (s[0] * s[1], *s[2:]))


def key_table(state: Mapping[str, Tensor]) -> Rules:
    """The table between the current original's keys and ours, for the variant that ``state`` (either format) shows."""
    merge = any(".downsample.reduction." in k for k in state)
    ssd = not any(k.endswith(("op.dt_projs_weight", "op.scan.dt_proj")) for k in state)
    both = any(k.endswith(("op.out_norm.0.weight", "op.out_norm.norm.weight")) for k in state)
    per_path = () if ssd else (_PER_PATH,)
    stem = {0: "conv1", 2: "norm1", 5: "conv2", 7: "norm2"}
    return Rules(
        *(Rename(f"patch_embed.{i}.{{leaf}}", f"patch_embed.{name}.{{leaf}}") for i, name in stem.items()),
        Rename(_BLOCK + "op.in_proj.weight", _OURS + "op.in_proj.weight", _LINEAR),
        Rename(_BLOCK + "op.out_proj.weight", _OURS + "op.out_proj.weight", _LINEAR),
        Rename(_BLOCK + ("op.conv2d.1.{leaf}" if ssd else "op.conv2d.{leaf}"), _OURS + "op.conv.{leaf}"),
        Rename(_BLOCK + "op.x_proj_weight", _OURS + "op.scan.x_proj"),
        Rename(_BLOCK + "op.dt_projs_weight", _OURS + "op.scan.dt_proj"),
        Rename(_BLOCK + "op.dt_projs_bias", _OURS + "op.scan.dt_bias"),
        Rename(_BLOCK + "op.A_logs", _OURS + "op.scan.A_log", *per_path),
        Rename(_BLOCK + "op.Ds", _OURS + "op.scan.D", *per_path),
        Rename(_BLOCK + "op.out_norm.0.{leaf}", _OURS + "op.out_norm.norm.{leaf}"),
        Rename(
            _BLOCK + ("op.out_norm.2.weight" if both else "op.out_norm.1.weight"), _OURS + "op.out_norm.conv.weight"
        ),
        Rename(_BLOCK + "mlp.{fc}.weight", _OURS + "mlp.{fc}.weight", _LINEAR),
        Rename(_BLOCK + "{rest:*}", _OURS + "{rest:*}"),
        Rename("layers.{s}.downsample.reduction.weight", "stages.{s}.downsample.reduction.weight", _LINEAR),
        Rename("layers.{s}.downsample.1.{leaf}", "stages.{s}.downsample.conv.{leaf}"),
        Rename(f"layers.{{s}}.downsample.{'norm' if merge else 3}.{{leaf}}", "stages.{s}.downsample.norm.{leaf}"),
        Rename("classifier.norm.{leaf}", "norm.{leaf}"),
        Rename("classifier.head.{leaf}", "head.{leaf}"),
        Rename("outnorm{i:d}.{leaf}", "out_norms.{i}.{leaf}"),
    )


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict under its current names: legacy names are renamed, the prefix of parallel training is
    taken off, and of a detector or segmentor (keys below ``backbone.``, a neck and heads beside them) the backbone is
    taken."""
    state = unwrapped(state)
    if any(k.startswith("backbone.") for k in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    return _LEGACY.to_zoo(state)


def without_unread(state: Mapping[str, Tensor], last: int) -> dict[str, Tensor]:
    """The state dict of the original's backbone, which keeps all its stages, without those behind stage ``last``."""
    stages = {k.split(".")[1] for k in state if k.startswith("layers.")}
    unread = (f"layers.{last}.downsample.", *(f"layers.{i}." for i in stages if int(i) > last))
    return {k: v for k, v in state.items() if not k.startswith(unread)}


_OUT_NORMS = {
    "_onnone": "none",
    "_ondwconv3": "conv",
    "_oncnorm": "norm_conv",
    "_onsoftmax": "softmax",
    "_onsigmoid": "sigmoid",
}


def forward_type(name: str) -> dict[str, Any]:
    """The mixer's options for one of the original's ``forward_type`` strings, for example ``"v05_noz"``.

    Tags are read from the right as the original does: ``_no32`` (a matter of casts), ``_oact``, ``_noz``, ``_nozact``,
    then one output norm. Raises ValueError for a type that the original does not have or that does not run there.
    """
    if name in ("v0", "v0seq"):
        return {"act": "silu", "conv": 3, "conv_bias": True, "init": "mamba", "gate": True}
    kind, found = name, {}
    for tag in ("_no32", "_oact", "_noz", "_nozact"):
        found[tag] = kind.endswith(tag)
        kind = kind.removesuffix(tag)
    options: dict[str, Any] = {
        "out_act": found["_oact"], "gate": not found["_noz"], "gate_act": not found["_nozact"], "out_norm": "norm",
    }  # fmt: skip
    for tag, out_norm in _OUT_NORMS.items():
        if kind.endswith(tag):
            kind, options["out_norm"] = kind.removesuffix(tag), out_norm
            break
    if kind in ("v01", "v02", "v03", "v04", "v05", "v2", "v3"):  # one mathematics, several kernels
        return options
    if kind == "v051d":
        return {**options, "paths": "+".join(["raster"] * 4)}
    if kind == "v052d":
        return {**options, "paths": "raster+raster+reverse(raster)+reverse(raster)"}
    if kind == "v052dc":
        return {**options, "core": "cascade"}
    if kind == "m0":
        if options["gate"]:
            raise ValueError(f"forward_type={name!r}: the SSD mixer runs without a gate only; expected 'm0_noz'")
        return {**options, "core": "ssd"}
    raise ValueError(
        f"forward_type={name!r} is not known; expected v0, v0seq, v01 to v05, v2, v3, v051d, v052d, v052dc or m0, with "
        "tags _on(none|dwconv3|cnorm|softmax|sigmoid), _nozact, _noz, _oact, _no32 (SS2Dv3's xv1a, xv2a and xv3a fail "
        "in the original too, at any size)"
    )


_DEFAULTS: dict[str, Any] = {
    "patch_size": 4, "in_chans": 3, "num_classes": 1000, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768),
    "ssm_d_state": 16, "ssm_ratio": 2.0, "ssm_dt_rank": "auto", "ssm_act_layer": "silu", "ssm_conv": 3,
    "ssm_conv_bias": True, "ssm_drop_rate": 0.0, "ssm_init": "v0", "forward_type": "v2", "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu", "mlp_drop_rate": 0.0, "gmlp": False, "drop_path_rate": 0.1, "patch_norm": True,
    "norm_layer": "ln", "downsample_version": "v2", "patchembed_version": "v1", "use_checkpoint": False,
    "posembed": False, "imgsize": 224, "out_indices": (0, 1, 2, 3), "pretrained": None,
}  # fmt: skip
#: swallowed by ``VSSM``'s ``**kwargs``: its own factory passes the first, and the second never reaches a block
_SWALLOWED = {"ssm_rank_ratio", "post_norm"}
_INITS = {"v0": "mamba", "v1": "random", "v2": "flat"}
_DOWNSAMPLES = {"v1": "merge", "v2": "conv2", "v3": "conv3"}


def _choice(config: Mapping[str, Any], key: str, table: Mapping[str, str]) -> str:
    if config[key] not in table:
        raise ValueError(f"{key} is {config[key]!r}; expected one of {', '.join(table)}")
    return table[config[key]]


def translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor's arguments for those of ``VSSM`` and ``Backbone_VSSM``; what is left out is their default."""
    c = check_reference_config("VMamba", config, _DEFAULTS, _SWALLOWED)
    norm = str(c["norm_layer"]).lower()
    if norm not in ("ln", "ln2d", "bn"):
        raise ValueError(f"norm_layer is {c['norm_layer']!r}; expected ln, ln2d or bn")
    mixer = forward_type(c["forward_type"])
    if mixer.get("core") == "ssd" and (norm != "ln" or c["ssm_init"] == "v0"):
        raise ValueError("forward_type m0 needs norm_layer ln and ssm_init v1 or v2")
    return {
        "depths": tuple(c["depths"]), "dims": c["dims"] if isinstance(c["dims"], int) else tuple(c["dims"]),
        "in_chans": c["in_chans"], "num_classes": c["num_classes"], "img_size": c["imgsize"],
        "patch_size": c["patch_size"],
        "patch_overlap": _choice(c, "patchembed_version", {"v1": "", "v2": "yes"}) == "yes",
        "patch_norm": c["patch_norm"], "downsample": _choice(c, "downsample_version", _DOWNSAMPLES),
        "norm": "ln" if norm == "ln2d" else norm, "expand": c["ssm_ratio"], "state": c["ssm_d_state"],
        "dt_rank": None if c["ssm_dt_rank"] == "auto" else c["ssm_dt_rank"],
        "act": c["ssm_act_layer"], "conv": c["ssm_conv"], "conv_bias": c["ssm_conv_bias"],
        "init": _choice(c, "ssm_init", _INITS), "mixer_drop": c["ssm_drop_rate"], "mlp_ratio": c["mlp_ratio"],
        "mlp_act": c["mlp_act_layer"], "mlp_drop": c["mlp_drop_rate"], "mlp_gated": c["gmlp"],
        "pos_embed": c["posembed"], "drop_path_rate": c["drop_path_rate"],
        **mixer,
    }  # fmt: skip


class VMambaAdapter(ReferenceAdapter):
    """MzeroMiko/VMamba: ``VSSM`` (outputs ``logits``) and ``Backbone_VSSM`` (outputs ``stage0`` to ``stage3``)."""

    system = "vmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> VMamba:
        state = current_names(state)
        pyramid = "out_indices" in config or any(k.startswith("outnorm") for k in state)
        if source:
            pyramid = source.rpartition(":")[2] == "Backbone_VSSM"
        if pyramid:  # it makes a position table and never adds it
            config = {**config, "posembed": False}
            state = {k: v for k, v in state.items() if k != "pos_embed"}
            indices = config.get("out_indices", (0, 1, 2, 3))
            model = vmamba(**translate(config), features_only=True, out_indices=tuple(indices))
            state = without_unread(state, max(indices))
        else:
            model = vmamba(**translate(config))
            if model.pos_embed is not None and "pos_embed" in state:  # the original resamples it on loading
                state = {**state, "pos_embed": resize_table(state["pos_embed"], model.pos_embed.shape)}
        model.channels_first = str(config.get("norm_layer", "ln")).lower() != "ln"
        return self.load(model, state)  # type: ignore[return-value]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return key_table(state)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        state = current_names(state)
        return self.rules(state, model=model).to_zoo(state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``image`` (batch, channels, H, W) to ``logits``, or to ``stage<i>`` (batch, C, h, w). Intermediates are in
        the original's layout: (batch, C, h, w) where it works channels first."""
        assert isinstance(model, VMamba)
        mids: dict[str, Tensor] = {}

        def keep(name: str):
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                mids[name] = output.permute(0, 3, 1, 2) if getattr(model, "channels_first", False) else output

            return hook

        first: Any = model.stages[0]
        watched: list[tuple[str, Any]] = [("mid/patch_embed", model.patch_embed)]
        watched += [("mid/stage0_block0_op", b.op) for b in first.blocks[:1] if b.has_op]
        watched += [(f"mid/stage{i}_blocks", s.blocks) for i, s in enumerate(model.stages)]
        # the last stage has nothing behind its blocks, and nothing is called
        watched += [("mid/stage0_out", first.downsample if model.num_stages > 1 else first.blocks)]
        watched += [("mid/final_norm", model.norm)]
        handles = [module.register_forward_hook(keep(name)) for name, module in watched]
        try:
            out = model(inputs["image"])
        finally:
            for handle in handles:
                handle.remove()
        if model.out_indices is None:
            return {"logits": out, **mids}
        return {**{f"stage{i}": y for i, y in zip(model.out_indices, out, strict=True)}, **mids}
