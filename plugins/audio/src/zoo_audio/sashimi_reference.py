"""SaShiMi's original arguments and keys: state-spaces/s4, the standalone class, the modular one, its U-Net, mu-law."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers.s4 import STEP_MODES, S4Kernel
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rename, Rules, Squeeze
from zoo.systems import s4_arguments as arguments
from zoo.systems.s4 import VERSION_3

from . import mulaw
from .sashimi import Sashimi, SashimiLM

_POOL = {"d_model", "n_layers", "pool", "expand", "ff"}
#: Where the norms of the standalone class lie in ours, and its 1 x 1 convolutions.
_STANDALONE = Rules(
    *(
        rule
        for part in ("d_layers.{i:d}", "c_layers.{i:d}", "u_layers.{t:d}.{i:d}")
        for rule in (
            Rename(f"{part}.norm.{{name}}", f"{part}.norm.norm.{{name}}"),
            Rename(f"{part}.linear.weight", f"{part}.linear.weight", Squeeze(-1)),
            Rename(f"{part}.layer.ff.0.0.weight", f"{part}.layer.ff.0.0.weight", Squeeze(-1)),
            Rename(f"{part}.layer.ff.2.weight", f"{part}.layer.ff.2.weight", Squeeze(-1)),
        )
    )
)
#: A pooling layer with an activation is a sequence of two in the modular code.
_ACTIVATED = Rules(Rename("{p:*}.linear.0.{name}", "{p}.linear.{name}"))
_LM = Rules(
    Rename("encoder.0.weight", "encoder.weight"),
    Rename("decoder.0.output_transform.{name}", "decoder.{name}"),
)


class MuLaw(nn.Module):
    """The quantisers; no parameters."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        mu, linear = mulaw.mu_law_encode(audio, self.bits), mulaw.linear_encode(audio, self.bits)
        return {
            "mu_ids": mu,
            "mu_decoded": mulaw.mu_law_decode(mu, self.bits),
            "mu_decode_table": mulaw.mu_law_decode(torch.arange(2**self.bits), self.bits),
            "linear_ids": linear,
            "linear_decoded": mulaw.linear_decode(linear, self.bits),
        }


class SashimiAdapter(ReferenceAdapter):
    """state-spaces/s4: ``models/sashimi/sashimi.py:Sashimi``, ``backbones/sashimi.py:Sashimi``,
    ``backbones/unet.py:SequenceUNet``, alone or between an embedding and a head, and ``dataloaders/audio.py``."""

    system = "sashimi"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if not state and ("mu_law" in source or set(config) <= {"bits"}):
            arguments.check_known(config, {"bits"}, "the quantisers of audio.py")
            return MuLaw(**config).eval()
        state = dict(unwrapped(state))
        model: nn.Module
        if "backbone" in config:
            known = {"backbone", "n_tokens", "encoder", "decoder"}
            arguments.check_known(config, known, "the SaShiMi language model")
            _check_ends(config)
            backbone = _modular(config["backbone"], state, "model.", source)
            model = SashimiLM(config["n_tokens"], **backbone)
        elif _is_standalone(state, source):
            model = Sashimi(**_standalone(config))
        else:
            model = Sashimi(**_modular(config, state, "", source))
        model.standalone = "backbone" not in config and _is_standalone(state, source)  # type: ignore[assignment]
        model.flat_up = any(_is_flat(key) for key in state)  # type: ignore[assignment]
        have = self.to_zoo(state, model=model)
        # Files may leave the kernels' lengths out: those of a fresh model, whose C is not transformed yet.
        table = self.rules(state, model=model)
        for name, value in model.state_dict().items():
            if name.endswith("l_kernel") and name not in have:
                state |= table.to_reference({name: value})
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, MuLaw):
            return Rules()
        standalone = getattr(model, "standalone", None)
        if standalone is None:
            standalone = _is_standalone(state, "") and "encoder.weight" not in state
        if isinstance(model, SashimiLM) or "encoder.0.weight" in state or "encoder.weight" in state:
            return _LM + _activated(state, model) + _flat_rules(state, model, "model.")
        if standalone:
            return _STANDALONE
        return _activated(state, model) + _flat_rules(state, model, "")

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Keys of version 3 of the repository are read as well; :meth:`to_reference` writes those of version 4."""
        if any(".kernel.kernel." in key for key in state):
            state = VERSION_3.to_zoo(state)
        return super().to_zoo(state, model=model)

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """``wanted``: names of further outputs: ``step*`` (a mode may end the name), ``greedy_ids``, ``mid/*``."""
        x = next(iter(inputs.values()))
        if isinstance(model, MuLaw):
            return model(x)
        names = list(wanted or ())
        if isinstance(model, SashimiLM):
            out = {"logits": model(x)}
        else:
            mids: dict[str, Tensor] = {}
            out = {"y": model(x, mids)}
            out |= {name: mids[name.removeprefix("mid/")] for name in names if name.removeprefix("mid/") in mids}
        for name in names:
            if name.startswith("step"):
                out[name] = steps(model, x, next((m for m in STEP_MODES if name.endswith(m)), "linear"))
            elif name == "greedy_ids" and isinstance(model, SashimiLM):
                out[name] = _greedy(model, x.shape[0], x.shape[1])
        return out


@torch.no_grad()
def steps(model: nn.Module, x: Tensor, mode: str = "linear") -> Tensor:
    """Every output of ``x`` (batch, length, ...), one step at a time, in one of S4's step modes."""
    kernels = [m for m in model.modules() if isinstance(m, S4Kernel)]
    for kernel in kernels:
        kernel.setup_step(mode, limited=False)
    state = model.init_state(x.shape[0])  # type: ignore[operator]
    made = [model.step(x[:, t], state) for t in range(x.shape[1])]  # type: ignore[operator]
    for kernel in kernels:
        kernel.setup_step()
    return torch.stack(made, 1)


@torch.no_grad()
def _greedy(model: SashimiLM, batch: int, length: int) -> Tensor:
    token = torch.full((batch,), model.vocab_size // 2, device=next(model.parameters()).device)
    state, ids = model.init_state(batch), []
    for _ in range(length):
        token = model.step(token, state).argmax(-1)
        ids.append(token)
    return torch.stack(ids, 1)


# -- arguments -------------------------------------------------------------------------------------------------------


def _standalone(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {*_POOL, "unet", "dropout"}
    s4 = {k: v for k, v in config.items() if k not in own}
    if s4.get("d_state", 64) != 64:
        raise ValueError(f"argument d_state={s4['d_state']!r}: the standalone SaShiMi fixes it to 64")
    dropout = config.get("dropout", 0.0)
    return {
        **{k: config[k] for k in (*_POOL, "unet") if k in config},
        "layer": arguments.s4_block({**s4, "dropout": dropout, "d_state": 64}, standalone=True),
        "scalar_norm": False,
        "weight_norm": False,
        "dropout": dropout,
        "dropres": dropout,
    }


def _modular(config: Mapping[str, Any], state: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, Any]:
    known = {
        *_POOL, "unet", "cff", "prenorm", "dropout", "dropres", "layer", "center_layer", "residual", "norm",
        "initializer", "transposed", "pool_mode", "interp", "act_pool", "_name_", "l_max", "track_norms",
    }  # fmt: skip
    arguments.check_known(config, known, "SaShiMi")
    pool_mode = config.get("pool_mode") or "linear"
    if pool_mode not in ("linear", "avg", "pool"):
        raise ValueError(f"argument pool_mode={pool_mode!r} is not supported; expected 'linear', 'avg' or 'pool'")
    dropout = config.get("dropout", 0.0)
    layer = {**(config.get("layer") or {}), "dropout": dropout}
    center = config.get("center_layer")
    flat = "unet" in source.lower() or any(_is_flat(k) for k in state) or bool({"cff", "pool_mode"} & set(config))
    residual = config.get("residual")
    return {
        **{k: config[k] for k in _POOL if k in config},
        "pool": config.get("pool", ()),
        "expand": config.get("expand", 1),
        "unet": config.get("unet", False) or flat,
        "layer": arguments.layer_config(layer),
        "center_layer": None if center is None else arguments.layer_config({**center, "dropout": dropout}),
        "norm": config.get("norm"),
        "scalar_norm": config.get("transposed", True),
        "prenorm": config.get("prenorm", False),
        "residual": "R" if residual is None else residual,
        "weight_norm": any(key.endswith("weight_g") for key in state),
        "pool_mode": "linear" if pool_mode == "linear" else "avg",
        "act_pool": config.get("act_pool"),
        # In the original ``cff`` says whether there is a feed-forward; its width is that of all others.
        "center_ff": bool(config.get("cff", _has_center_ff(state, prefix))) * config.get("ff", 2) if flat else None,
        "interp": config.get("interp") or 0,
        "dropout": dropout,
        "dropres": config.get("dropres", 0.0),
    }


def _has_center_ff(state: Mapping[str, Tensor], prefix: str) -> bool:
    return any(k.startswith(f"{prefix}c_layers.") and ".layer.ff." in k for k in state)


def _check_ends(config: Mapping[str, Any]) -> None:
    if config.get("encoder", "embedding") not in ("embedding", {"_name_": "embedding"}):
        raise ValueError(f"encoder={config['encoder']!r} is not supported; expected 'embedding'")
    decoder = config.get("decoder") or {}
    if not isinstance(decoder, Mapping) or decoder.get("l_output") is not None:
        raise ValueError(f"decoder={decoder!r} is not supported; expected a sequence decoder of every position")


# -- keys ------------------------------------------------------------------------------------------------------------


def _is_standalone(state: Mapping[str, Tensor], source: str) -> bool:
    """The standalone class has 1 x 1 convolutions and one norm weight for each channel."""
    if source:
        return "/sequence/" not in source
    return not any(".norm.norm." in key or key.endswith(".weight_g") for key in state)


def _is_flat(key: str) -> bool:
    """SequenceUNet lists its way up without tiers: ``u_layers.{i}.linear`` and ``u_layers.{i}.layer``."""
    _, found, rest = key.partition("u_layers.")
    return bool(found) and not rest.split(".")[1].isdigit()


def _activated(state: Mapping[str, Tensor], model: nn.Module | None) -> Rules:
    backbone = model.model if isinstance(model, SashimiLM) else model
    act = getattr(backbone, "act_pool", None) is not None
    return _ACTIVATED if act or any(".linear.0." in key for key in state) else Rules()


def _flat_rules(state: Mapping[str, Tensor], model: nn.Module | None, prefix: str) -> Rules:
    """``u_layers.{i}`` of the original to ours, ``u_layers.{tier}.{j}``; each tier begins with its pooling layer."""
    if not (getattr(model, "flat_up", False) or any(_is_flat(key) for key in state)):
        return Rules()
    backbone = model.model if isinstance(model, SashimiLM) else model
    if isinstance(backbone, Sashimi):
        places = [(t, j) for t, tier in enumerate(backbone.u_layers) for j in range(len(tier))]  # type: ignore[arg-type]
    else:
        own = [key.removeprefix(f"{prefix}u_layers.").split(".") for key in state if _is_flat(key)]
        pools = {int(i) for i, part, *_ in own if part == "linear"}
        places, t, j = [], -1, 0
        for i in range(1 + max(int(i) for i, *_ in own)):
            t, j = (t + 1, 0) if i in pools else (t, j + 1)
            places.append((t, j))
    return Rules(
        *(
            Rename(f"{prefix}u_layers.{i}.{{rest:*}}", f"{prefix}u_layers.{t}.{j}.{{rest:*}}")
            for i, (t, j) in enumerate(places)
        )
    )
