"""EfficientViM: a fast backbone that mixes a few hidden states instead of the tokens (HSM-SSD).

Lee et al., "EfficientViM: Efficient Vision Mamba with Hidden State Mixer-based State Space Duality", arXiv 2411.15241.
The model is timm's own (``timm.models.efficientvim``, MIT), which agrees with the original on the same weights; here
are its builder and the reference adapter for the original's files (mlvlab/EfficientViM @ 304340c, MIT): the
classifiers, and the dense backbone with its neck and head (:mod:`zoo_vision.efficientvim_dense`).

The mixer needs no scan: with a softmax over the tokens in place of the decay, state-space duality is three matrix
products. Its parameter ``A`` is constant along that softmax and so has no effect and no gradient, as in the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Recomputed
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Drop, Rename, Reshape, Rules

try:
    import timm.models.efficientvim
except ImportError as missing:
    from zoo_registry.errors import MissingExtra

    raise MissingExtra(
        f"EfficientViM is timm's model, and timm {timm.__version__} does not have it: pip install -U 'timm>=1.0.31'",
        extra="timm",
        command="pip install -U 'timm>=1.0.31'",
    ) from missing

from ._base import Habits, Indices, build, check_reference_config, takes


class Block(Recomputed, timm.models.efficientvim.EfficientViMBlock):
    """timm's block, recomputed as the zoo's are: timm's way counts a batch twice in the running statistics."""


class _Common(GradCheckpointing, Habits):
    """The zoo's pyramids: maps (batch, C, H, W) of the three stages before their downsampling, strides 16, 32, 64."""

    first_conv = "patch_embed.conv.0.conv"

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:  # type: ignore[attr-defined]
            for block in stage.blocks:
                block.__class__ = Block
        super().set_grad_checkpointing(enable)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)  # type: ignore[misc]
        if prune_head:
            self.weights = None  # the weights of the heads that are gone
        return take


class EfficientViM(_Common, timm.models.efficientvim.EfficientViM):
    """timm's EfficientViM."""

    classifier = ("heads.0", "heads.1", "heads.2", "heads.3")


class EfficientViMDistilled(_Common, timm.models.efficientvim.EfficientViMDistilled):
    """timm's EfficientViM with a second set of heads for a teacher's labels; in eval mode both are averaged."""

    classifier = (*EfficientViM.classifier, *(f"heads_dist.{i}" for i in range(4)))

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.weights_dist = None
        return take


@takes(timm.models.efficientvim.EfficientViM)
def efficientvim(*, distilled: bool = False, **config: Any) -> EfficientViM | EfficientViMDistilled:
    """Builder of the cards: timm's arguments, ``distilled``, and ``features_only``/``out_indices``."""
    return build(EfficientViMDistilled, **config) if distilled else build(EfficientViM, **config)


_DEFAULTS: dict[str, Any] = {
    "in_dim": 3, "num_classes": 1000, "embed_dim": (128, 256, 512), "depths": (2, 2, 2), "mlp_ratio": 4.0,
    "ssd_expand": 1, "state_dim": (49, 25, 9), "distillation": False,
}  # fmt: skip
#: read by nothing in the original (its constructors take ``**kwargs``)
_SWALLOWED = {"init_cfg", "style", "in_channels", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}

#: further parts of a detector's table, which mmdetection builds
_DETECTOR = ("type", "pretrained", "rpn_head", "roi_head", "bbox_head", "train_cfg", "test_cfg", "init_cfg")


def arguments(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments of the backbone from a full set of the original's."""
    return {
        "in_chans": theirs["in_dim"],
        "num_classes": theirs["num_classes"],
        **{k: theirs[k] for k in ("embed_dim", "depths", "mlp_ratio", "ssd_expand", "state_dim")},
    }


def backbone_rules(stages: int) -> Rules:
    """Affine parameters of the LayerNorms: (1, C, 1) there, of the last map (1, C, 1, 1), (C) here."""
    flat, flat2d = Reshape([-1], [1, -1, 1]), Reshape([-1], [1, -1, 1, 1])
    return Rules(
        Rename("stages.{s}.blocks.{b}.norm.{p}", "stages.{s}.blocks.{b}.norm.{p}", flat),
        *(Rename(f"norm.{i}.{{p}}", f"norm.{i}.{{p}}", flat if i < stages else flat2d) for i in range(stages + 1)),
    )


class EfficientViMAdapter(ReferenceAdapter):
    """mlvlab/EfficientViM: the classifier ``EfficientViM``, and its dense backbone with ``EfficientViTFPN``."""

    system = "efficientvim"

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        dense = any(k.startswith("backbone.") for k in state)
        prefix = "backbone.stages." if dense else "stages."
        stages = 1 + max((int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix)), default=0)
        if not dense:
            return backbone_rules(stages)
        from .efficientvim_dense import NECK_RULES

        heads = ("rpn_head", "roi_head", "bbox_head", "auxiliary_head")  # mmdetection's and mmsegmentation's own
        return Rules(
            *(Drop(f"{head}.{{rest:*}}") for head in heads),
            NECK_RULES.nested("neck.", "neck."),
            backbone_rules(stages).nested("backbone.", "backbone."),
        )

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = unwrapped(state)  # what is built depends on its keys
        if "backbone" in config or "neck" in config or any(k.startswith("neck.") for k in state):
            from .efficientvim_dense import build_reference

            if unknown := sorted(set(config) - {"backbone", "neck", *_DETECTOR}):
                raise ValueError(
                    f"the dense model has no part {unknown[0]!r}; expected backbone and neck, each a table"
                )
            with torch.device("meta"):
                return self.load(build_reference(config, state), state)
        headless = bool(state) and not any(k.startswith(("heads.", "norm.")) for k in state)
        known = _DEFAULTS | ({"frozen_stages": -1} if headless else {})
        theirs = check_reference_config("efficientvim", config, known, _SWALLOWED)
        with torch.device("meta"):
            # the headless backbone of the dense tasks takes the argument of distillation too, and makes nothing of it
            model = efficientvim(distilled=theirs["distillation"] and not headless, **arguments(theirs))
            if headless:
                model.as_pyramid()
                if theirs["frozen_stages"] >= 0:
                    model.patch_embed.requires_grad_(False)
        return self.load(model, state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """logits of a classifier, with the stages' maps and hidden states; stage maps (and fpn maps) of a dense one."""
        from .efficientvim_dense import EfficientViMFPN

        if isinstance(model, EfficientViMFPN):
            maps = model.backbone(inputs["image"])
            pyramid = model.neck(maps)
            return {f"fpn{i}": m for i, m in enumerate(pyramid)} | {f"stage{i}": m for i, m in enumerate(maps)}
        assert isinstance(model, timm.models.efficientvim.EfficientViM)
        if getattr(model, "out_indices", None) is not None:
            return {f"stage{i}": m for i, m in enumerate(model(inputs["image"]))}
        kept: dict[str, Tensor] = {}
        handles = [model.patch_embed.register_forward_hook(lambda _m, _i, out: kept.update({"mid/stem": out}))]
        for s, stage in enumerate(model.stages):
            handles.append(_keep(stage, kept, f"mid/stage{s}", map_at=0, hidden_at=2))
            for b, block in enumerate(stage.blocks):
                name = f"mid/stage{s}_block{b}"
                handles.append(_keep(block.mixer, kept, name, map_at=0, hidden_at=1, map_name=f"{name}_mixer"))
        try:
            return {"logits": model(inputs["image"]), **kept}
        finally:
            for handle in handles:
                handle.remove()


def _keep(
    module: nn.Module, kept: dict[str, Tensor], name: str, *, map_at: int, hidden_at: int, map_name: str | None = None
) -> Any:
    def record(_module: nn.Module, _inputs: Any, out: tuple[Tensor, ...]) -> None:
        kept[map_name or name], kept[f"{name}_hidden"] = out[map_at], out[hidden_at]

    return module.register_forward_hook(record)
