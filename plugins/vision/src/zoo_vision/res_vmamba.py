"""Res-VMamba: the first VMamba with a residual around each of its first three stages, for fine-grained food images.

Papers: Chen et al., "Res-VMamba: Fine-Grained Food Category Visual Classification Using Selective State Space Models
with Deep Residual Learning", arXiv 2402.15761; PLoS ONE 20(5), e0322695, 2025. Original: ChiShengChen/ResVMamba
``models/resvmamba.py``.

The residual goes through a 1x1 convolution that the original makes anew, with fresh random weights, in every call: it
is never trained and not in the state dict, so two evaluations of one image differ there. ``fusion`` says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rules

from ._base import Indices, build, check_reference_config
from .vmamba import VMamba, current_names, key_table, vmamba, without_unread

FUSIONS = ("fixed", "random", "learned", "none")
RESIDUALS = 3  # how many stages have one, from the first


class ResVMamba(VMamba):
    """VMamba with ``stage_i(x_i) + conv1x1_i(maxpool2(x_i))`` as the input of stage i + 1, for the first three stages.

    ``fusion``: ``"fixed"`` draws the 1x1 convolutions once, from ``fusion_seed``, with the distribution that the
    original uses, so that answers repeat; ``"random"`` draws them in every call, as the original does; ``"learned"``
    makes them parameters (a deviation: a published checkpoint has none); ``"none"`` is plain VMamba. The pooling rounds
    odd sides down: with a ``downsample`` that rounds up ("merge", "conv3") both sides of an image must be multiples of
    8 times the patch. The other arguments are :class:`VMamba`'s.
    Source: arXiv 2402.15761, section 3; ``models/resvmamba.py`` ``VSSM.forward``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 27, 2),
        dims: int | Sequence[int] = 96,
        *,
        fusion: str = "fixed",
        fusion_seed: int = 0,
        **config: Any,
    ) -> None:
        super().__init__(depths, dims, **config)
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; expected one of {', '.join(FUSIONS)}")
        self.fusion, self.fusion_seed = fusion, fusion_seed
        #: (weight, bias) of each of the three convolutions, instead of what ``fusion`` says; for comparisons
        self.given_fusion: list[tuple[Tensor, Tensor]] | None = None
        for i, (weight, bias) in enumerate(self._draw(torch.Generator().manual_seed(fusion_seed))):
            if fusion == "learned":
                self.register_parameter(f"fuse{i}_weight", nn.Parameter(weight))
                self.register_parameter(f"fuse{i}_bias", nn.Parameter(bias))
            elif fusion == "fixed":
                self.register_buffer(f"fuse{i}_weight", weight, persistent=False)
                self.register_buffer(f"fuse{i}_bias", bias, persistent=False)

    def _draw(self, generator: torch.Generator | None) -> list[tuple[Tensor, Tensor]]:
        """Default initialisation of the three 1x1 convolutions: uniform in +-1/sqrt(in), on the generator's device."""
        widths = [info["num_chs"] for info in self.all_feature_info]
        made = []
        for a, b in list(pairwise(widths))[:RESIDUALS]:
            shapes = ((b, a, 1, 1), (b,))
            made.append(tuple((torch.rand(s, generator=generator, device="cpu") * 2 - 1) * a**-0.5 for s in shapes))
        return made  # type: ignore[return-value]

    @property
    def all_feature_info(self) -> list[dict[str, Any]]:
        """One entry for each of the four stages, also in a pyramid of fewer."""
        info = self.feature_info
        return info if isinstance(info, list) else info.info

    def init_non_persistent_buffers(self) -> None:
        """Draw the fixed convolutions again (after a build without memory)."""
        if self.fusion == "fixed":
            for i, (weight, bias) in enumerate(self._draw(torch.Generator().manual_seed(self.fusion_seed))):
                getattr(self, f"fuse{i}_weight").copy_(weight)
                getattr(self, f"fuse{i}_bias").copy_(bias)

    def residual(self, i: int, x: Tensor, fresh: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """x, the input of stage i, (batch, H, W, C), pooled and projected: (batch, H/2, W/2, next C)."""
        if self.given_fusion is not None:
            weight, bias = self.given_fusion[i]
        elif fresh is not None:
            weight, bias = fresh[i]
        else:
            weight, bias = getattr(self, f"fuse{i}_weight"), getattr(self, f"fuse{i}_bias")
        pooled = F.max_pool2d(x.permute(0, 3, 1, 2), 2, 2).permute(0, 2, 3, 1)
        return F.linear(pooled, weight.flatten(1).to(x), bias.to(x))

    def add_residual(self, i: int, x: Tensor, entry: Tensor, fresh: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """x, the output of stage i, with the residual of ``entry``, its input."""
        residual = self.residual(i, entry, fresh)
        if residual.shape != x.shape:
            step = self.patch_size * 2**RESIDUALS
            raise ValueError(
                f"the map of stage {i} is {entry.shape[1]} by {entry.shape[2]}: its downsampling gives {x.shape[1]} by "
                f"{x.shape[2]}, the residual {residual.shape[1]} by {residual.shape[2]}; give an image whose sides are "
                f"multiples of {step}"
            )
        return x + residual

    def forward_stages(
        self, x: Tensor, indices: Sequence[int] = (), *, norm: bool = False, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`VMamba`."""
        if self.fusion == "none" and self.given_fusion is None:
            return super().forward_stages(x, indices, norm=norm, stop_early=stop_early)
        fresh = self._draw(None) if self.fusion == "random" else None
        x, maps = self.embed(x), []
        final = self.num_stages - 1
        last = max(indices, default=final) if stop_early else final
        for i, stage in enumerate(self.stages):
            entry, x = x, stage.walk(x)  # type: ignore[operator]
            if i in indices:
                y = self.out_norms[str(i)](x) if str(i) in self.out_norms else x
                if norm and i == final and not self.out_norms:
                    y = self.norm(x)
                maps.append(y.permute(0, 3, 1, 2))
            if i == last:
                break
            x = stage.downsample(x)  # type: ignore[operator]
            if i < min(RESIDUALS, final):
                x = self.add_residual(i, x, entry, fresh)
        return x, maps


def res_vmamba(*, features_only: bool = False, out_indices: Indices = None, **config: Any) -> ResVMamba:
    """Builder of the cards: a :class:`ResVMamba`, with ``features_only`` a pyramid of the maps at ``out_indices``."""
    return build(ResVMamba, features_only=features_only, out_indices=out_indices, **config)


_DEFAULTS: dict[str, Any] = {
    "patch_size": 4, "in_chans": 3, "num_classes": 1000, "depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768),
    "d_state": 16, "dt_rank": "auto", "ssm_ratio": 2.0, "attn_drop_rate": 0.0, "shared_ssm": False,
    "softmax_version": False, "drop_rate": 0.0, "drop_path_rate": 0.1, "mlp_ratio": 4.0, "patch_norm": True,
    "downsample_version": "v2", "use_checkpoint": False, "out_indices": (0, 1, 2, 3), "pretrained": None,
}  # fmt: skip


class ResVMambaAdapter(ReferenceAdapter):
    """ChiShengChen/ResVMamba: ``VSSM`` (``logits``), and ``Backbone_VSSM`` (``stage<i>``), which has no residual.

    ``run`` takes ``image`` and, to compare with one call of the original, its convolutions ``fuse{i}_weight`` (out, in,
    1, 1) and ``fuse{i}_bias``.
    """

    system = "res_vmamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> VMamba:
        c = check_reference_config("Res-VMamba", config, _DEFAULTS)
        if c["softmax_version"]:
            raise ValueError("softmax_version=True does not run in the original; expected False")
        ours = {
            "depths": tuple(c["depths"]), "dims": c["dims"] if isinstance(c["dims"], int) else tuple(c["dims"]),
            "in_chans": c["in_chans"], "num_classes": c["num_classes"], "patch_size": c["patch_size"],
            "patch_overlap": False, "patch_norm": c["patch_norm"], "gate": True, "conv_bias": True,
            "downsample": "conv2" if c["downsample_version"] == "v2" else "merge", "expand": c["ssm_ratio"],
            "state": None if c["d_state"] == "auto" else c["d_state"],
            "dt_rank": None if c["dt_rank"] == "auto" else c["dt_rank"],
            "mixer_drop": c["attn_drop_rate"], "mlp_ratio": c["mlp_ratio"], "mlp_drop": c["drop_rate"],
            "drop_path_rate": c["drop_path_rate"],
        }  # fmt: skip
        state = current_names(state)
        model: VMamba
        if source.rpartition(":")[2] == "Backbone_VSSM" or any(k.startswith("outnorm") for k in state):
            model = vmamba(**ours, features_only=True, out_indices=tuple(c["out_indices"]))
            state = without_unread(state, max(c["out_indices"]))
        else:
            model = res_vmamba(**ours)
        return self.load(model, state)  # type: ignore[return-value]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return key_table(state)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        state = current_names(state)
        return self.rules(state, model=model).to_zoo(state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, VMamba)
        mids: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda module, args, output: mids.__setitem__(name, output)

        watched: list[tuple[str, nn.Module]] = [("mid/patch_embed", model.patch_embed)]
        for i, stage in enumerate(model.stages):
            watched += [
                (f"mid/stage{i}_block0_op", stage.blocks[0].op),  # type: ignore[index,union-attr,list-item]
                # nothing follows the blocks of the last stage
                (f"mid/stage{i}_before_residual", stage.downsample if i + 1 < model.num_stages else stage.blocks),  # type: ignore[list-item]
            ]
        watched.append(("mid/final_norm", model.norm))
        if isinstance(model, ResVMamba) and "fuse0_weight" in inputs:
            model.given_fusion = [(inputs[f"fuse{i}_weight"], inputs[f"fuse{i}_bias"]) for i in range(RESIDUALS)]
        handles = [module.register_forward_hook(keep(name)) for name, module in watched]
        try:
            out = model(inputs["image"])
        finally:
            for handle in handles:
                handle.remove()
            if isinstance(model, ResVMamba):
                model.given_fusion = None
        if model.out_indices is None:
            return {"logits": out, **mids}
        return {f"stage{i}": y for i, y in zip(model.out_indices, out, strict=True)} | mids
