"""The original's format: VinAIResearch/DiMSUM @ 8743e63, class ``DiM`` of ``dimsum/models_dim.py``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rules

from . import flow, solvers
from .blocks import zigzags
from .model import DiMSUM
from .parts import HaarPackets, HaarTokens, grid_side

#: The constructor's arguments that are ours by the same name.
SAME = frozenset(
    {
        *("img_resolution", "patch_size", "in_channels", "hidden_size", "depth", "label_dropout", "num_classes"),
        *("learn_sigma", "rms_norm", "residual_in_fp32", "scan_type", "pe_type", "block_type", "cond_mamba"),
        *("scanning_continuity", "learnable_pe", "drop_path", "use_final_norm", "use_attn_every_k_layers"),
        *("use_gated_mlp", "use_independent_attn"),
    }
)
#: Those that change no number: fused kernels, initialisation, experts of a mixture that is not built, one never read.
WITHOUT_EFFECT = frozenset(
    {
        *("fused_add_norm", "initializer_cfg", "num_moe_experts", "mamba_moe_layers", "add_bias_linear"),
        *("gated_linear_unit", "routing_mode", "skip"),
    }
)
#: Arguments of the mixer that ``ssm_cfg`` may hold, and those of them that change no number.
SSM = ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
       "conv_bias", "bias")  # fmt: skip
#: What the original raises an error for.
RAISING = {
    "is_moe": "its initialisation stops at the blocks of experts, which have no modulation",
    "enable_fourier_layers": "it calls its own path generator with one argument too many",
}


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our arguments from those of the original's ``DiM``. Raises ValueError for others, naming them."""
    for name, why in RAISING.items():
        if config.get(name):
            raise ValueError(f"dimsum: {name} is set, with which the original raises an error ({why}); leave it out")
    unknown = [k for k in config if k not in SAME | WITHOUT_EFFECT | {"ssm_cfg", *RAISING}]
    ssm = dict(config.get("ssm_cfg") or {})
    ssm.pop("use_fast_path", None)
    unknown += [f"ssm_cfg.{k}" for k in ssm if k not in SSM]
    if unknown:
        raise ValueError(f"dimsum has no configuration key {', '.join(map(repr, unknown))}")
    return {k: v for k, v in config.items() if k in SAME} | ({"ssm": ssm} if ssm else {})


def _linspace(text: str) -> Tensor:
    """The output times in "... linspace(0,1,5) ..."."""
    said = re.search(r"linspace\(([\d.]+), ?([\d.]+), ?(\d+)\)", text)
    return torch.linspace(float(said[1]), float(said[2]), int(said[3])) if said else torch.linspace(0, 1, 2)


def _number(text: str, name: str, default: float) -> float:
    said = re.search(rf"{name}\s*=?\s*([\d.]+(?:e-?\d+)?)", text)
    return float(said[1]) if said else default


class DiMSUMAdapter(ReferenceAdapter):
    """Reads VinAIResearch/DiMSUM."""

    system = "dimsum"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(DiMSUM(**arguments_of(config)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return arguments_of(config)

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        assert isinstance(model, DiMSUM)
        calls = dict(call) if isinstance(call, Mapping) else {}
        x, t, y = inputs["x"], inputs.get("t"), inputs.get("y")
        assert t is not None
        between: dict[str, Tensor] = {}
        found = {"velocity": model(x, t, y, between), "velocity_no_label": model(x, t)}
        found |= {f"mid/{name}": value for name, value in between.items()}
        found["mid/t_emb"] = model.t_embedder(t)
        names = [n.removeprefix("out/") for n in wanted] if wanted is not None else [*calls]
        for name in names:
            said = str(calls.get(name, ""))
            if name.startswith(("cfg", "adacfg")) and "t_cfg" in inputs:
                ada = name.startswith("adacfg")
                scale = _number(said, "cfg_scale", 3.8 if ada else 1.0)
                power = _number(said, "scale_pow", 4.0) if ada else None
                found[name] = flow.guided(
                    model, x, inputs["t_cfg"], inputs["y_cfg"], scale, power, model.in_channels
                )  # fmt: skip
            elif name.startswith("ode_") and "velocity" not in name:
                found[name] = self._solved(model, x, y, said or name)
        if "noise_x0" in inputs:
            found["gvp_xt"] = flow.position(inputs["noise_x0"], x, t)
            found["gvp_ut"] = flow.velocity(inputs["noise_x0"], x, t)
        return found

    @staticmethod
    def _solved(model: DiMSUM, x: Tensor, y: Tensor | None, said: str) -> Tensor:
        def field(t: Tensor, x: Tensor) -> Tensor:
            return model(x, t.to(x).expand(x.shape[0]), y)

        times = _linspace(said)
        if "dopri5" in said:
            atol, rtol = _number(said, "atol", 1e-6), _number(said, "rtol", 1e-3)
            return solvers.dopri5(field, x, times, atol=atol, rtol=rtol)[-1]
        return solvers.fixed(field, x, times, "heun" if "heun" in said else "euler")[-1]

    def loss(self, golden, named):
        return named["out/velocity"].float().pow(2).mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()  # parameters keep the original's names

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Constants that a file leaves out (wavelet filters, zigzags) are those that the original computes."""
        ours = super().to_zoo(state, model=model)
        if model is not None:
            for key, tensor in model.state_dict().items():
                if key not in ours and (constant := _constant(key, tensor)) is not None:
                    ours[key] = constant
        return ours


def _constant(key: str, like: Tensor) -> Tensor | None:
    """The value of a buffer that the original computes, of the shape of ``like`` (which may be without data)."""
    if found := re.search(r"\.dwt\.(w_[lh]{2})$", key):
        return getattr(HaarPackets(), found[1])
    if key.endswith(".idwt.filters"):
        return HaarTokens().filters  # type: ignore[return-value]
    if key.endswith((".zigzag_paths", ".zigzag_paths_reverse")):
        return zigzags(like.shape[0] // 2, grid_side(like.shape[1]))[key.endswith("_reverse")]
    return None
