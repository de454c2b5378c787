"""A2Mamba's original arguments and keys: how published checkpoints are read, and parity with the original is tested.

Original: LMMMEng/A2Mamba ``models/a2mamba.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rules, Squeeze, Tied

from ._base import check_reference_config
from .a2mamba import STAGES, A2Mamba, a2mamba

_NORM_LAYERS = {"LayerNorm2d": "layer", "GroupNorm": "group"}
_HALF, _FLAT = Squeeze(-1), (Squeeze(-1), Squeeze(-1))


class A2MambaAdapter(ReferenceAdapter):
    """LMMMEng/A2Mamba: outputs ``logits``, or ``stage0`` to ``stage3`` with ``return_features``."""

    system = "a2mamba"

    _DEFAULTS: Mapping[str, Any] = {
        "image_size": 224, "in_chans": 3, "num_classes": 1000, "embed_dims": (64, 128, 256, 512),
        "depths": (2, 2, 6, 2), "num_heads": (2, 4, 8, 16), "window_size": (7, 7, 7, 7),
        "window_dilation": (1, 1, 1, 1), "use_rpb": False, "sr_ratio": (8, 4, 2, 1), "mlp_ratios": (4, 4, 4, 4),
        "drop_rate": 0, "drop_path_rate": 0, "projection": 1024, "layerscales": (False,) * 4,
        "resscales": (False,) * 4, "layer_init_values": (1, 1, 1, 1), "norm_layer": "LayerNorm2d",
        "return_features": False, "use_checkpoint": (0, 0, 0, 0),
    }  # fmt: skip

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> A2Mamba:
        c = check_reference_config("A2Mamba", config, self._DEFAULTS)
        if c["norm_layer"] not in _NORM_LAYERS:
            raise ValueError(f"norm_layer is {c['norm_layer']!r}; expected one of {', '.join(_NORM_LAYERS)}")
        # the original reads each list as far as there are stages
        c |= {
            k: tuple(v)[: len(c["depths"])] for k, v in c.items() if isinstance(v, list | tuple) and k != "image_size"
        }
        flags = zip(c["resscales"], c["layerscales"], strict=True)  # the former wins
        scales = ["res" if res else "layer" if layer else None for res, layer in flags]
        model = a2mamba(
            dims=c["embed_dims"], depths=c["depths"], heads=c["num_heads"], windows=c["window_size"],
            dilations=c["window_dilation"], mlp_ratios=c["mlp_ratios"],
            scales=scales, scale_init=c["layer_init_values"], norm=_NORM_LAYERS[c["norm_layer"]],
            bias=c["use_rpb"], projection=c["projection"],
            img_size=c["image_size"] if isinstance(c["image_size"], int) else tuple(c["image_size"]),
            in_chans=c["in_chans"], num_classes=c["num_classes"], drop_path_rate=c["drop_path_rate"],
        )  # fmt: skip
        model.return_features = bool(c["return_features"])  # type: ignore[assignment]
        return self.load(model, state)  # type: ignore[return-value]

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        stages: list[Any] = []
        for i in range(STAGES):
            there, here = f"layers.{2 * i}.", f"stages.{i}."
            if isinstance(model, A2Mamba) and i < len(model.stages):
                angle = model.stages[i].rope.angle.detach()  # type: ignore[union-attr]
                stages.append(
                    Drop(
                        there + "rope.angle",
                        once="patch_embed.0.weight",  # every stage has one angle, also one without blocks
                        restore=lambda _state, _fields, angle=angle: angle.clone(),  # type: ignore[misc]
                    )
                )
            else:
                stages.append(Drop(there + "rope.angle"))
            b, o = there + "blocks.{b}.", here + "blocks.{b}."
            m, u = b + "token_mixer.", o + "mixer."
            stages += [
                Tied(m + "rpb.0", m + "rpb.1"),
                Rename(m + "rpb.0", u + "rpb"),
                Rename(m + "rpb.2", u + "rpb_global"),
                Rename(m + "ssm.x_proj_weight", u + "ssm.x_proj"),
                Rename(m + "ssm.dt_projs_weight", u + "ssm.dt_proj"),
                Rename(m + "ssm.dt_projs_bias", u + "ssm.dt_bias"),
                Rename(m + "ssm.A_logs", u + "ssm.A_log"),
                Rename(m + "ssm.Ds", u + "ssm.D"),
                Rename(m + "ssm.conv2d.{leaf}", u + "ssm.conv.{leaf}"),
                Rename(m + "{rest:*}", u + "{rest:*}"),
                Rename(b + "layer_scale{n:d}.weight", o + "scale{n}.weight", *_FLAT, _HALF),
                Rename(b + "layer_scale{n:d}.bias", o + "scale{n}.bias"),
                Rename(b + "{rest:*}", o + "{rest:*}"),
                Rename(f"layers.{2 * i + 1}.{{rest:*}}", f"downsamples.{i}.{{rest:*}}"),
            ]
        return Rules(
            *stages,
            Rename("classifier.4.weight", "head.weight", *_FLAT),
            Rename("classifier.4.bias", "head.bias"),
            Rename("classifier.{rest:*}", "pre_head.{rest:*}"),
        )

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        ours = super().to_zoo(state, model=model)
        if model is not None:  # counters of BatchNorm, which files may lack and nothing reads
            for key in model.state_dict():
                if key.endswith("num_batches_tracked"):
                    ours.setdefault(key, torch.zeros((), dtype=torch.int64))
        return ours

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``image`` (batch, channels, H, W) to ``logits`` or ``stage<i>``; intermediates under ``mid/``."""
        assert isinstance(model, A2Mamba)
        mids: dict[str, Tensor] = {}

        def keep(name: str):
            return lambda module, args, output: mids.__setitem__(name, output)

        watched: list[tuple[str, nn.Module]] = [("mid/stem", model.patch_embed)]
        for i, stage in enumerate(model.stages):
            watched.append((f"mid/stage{i}", stage))
            if not len(stage.blocks):  # type: ignore[arg-type]
                continue
            mixer = stage.blocks[0].mixer  # type: ignore[index,union-attr]
            watched.append((f"mid/stage{i}_block0_mixer", mixer))
            if mixer.ssm is not None:  # type: ignore[union-attr]
                watched.append((f"mid/stage{i}_block0_ssm", mixer.ssm))  # type: ignore[union-attr,arg-type]
        handles = [module.register_forward_hook(keep(name)) for name, module in watched]
        try:
            if getattr(model, "return_features", False):
                maps = model.forward_intermediates(inputs["image"], intermediates_only=True)
                return {**{f"stage{i}": y for i, y in enumerate(maps)}, **mids}
            return {"logits": model(inputs["image"]), **mids}
        finally:
            for handle in handles:
                handle.remove()
