"""EEGDM's original arguments and keys: jhpuah/EEGDM, and diffusers' ``DDPMScheduler`` as it is configured there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from .backbone import QUERIES, DiffusionBackbone, step_embedding
from .diffusion import NoiseSchedule, diffusion_loss, sample
from .fusion import EEGClassifier
from .latents import FOLD, LatentExtractor, LatentReducer
from .signals import MuLaw

_BACKBONE = {
    "in_channels", "d_model", "d_state", "n_layer", "n_ssm", "kernel_init", "kernel_mode", "bidirectional", "d_cond",
    "d_cond_embed", "local_cond_ch", "local_cond_upsample", "n_class", "have_null_class", "self_gated",
}  # fmt: skip
_EXTRACTOR = {"start", "end", "diffusion_t", "query", "use_cond"}
_REDUCER = {"query", "reduce", "rescale", "L", "window_size", "window_step", "pool_merge", "multi_query_merge"}
_CLASSIFIER = _EXTRACTOR | _REDUCER | {
    "d_embed", "init_weight", "embed_query", "d_query_embed", "have_ch_pos_embed", "cat_ch_pos_embed",
    "ch_pos_emb_sym", "ch_order", "clst_dim", "clst_pos_embed_dim", "n_clst", "stack_struct", "num_heads", "ff",
    "dropout", "have_crossnorm", "across_pool_stack_struct", "n_ap_clst", "ap_clst_dim", "classifier_use_ap_clst",
    "classifier_have_pos_embed", "classifier_pos_embed_dim", "classifier_stack_struct", "classifier_final_act",
    "n_class",
}  # fmt: skip
_SCHEDULE = {f.name for f in fields(NoiseSchedule) if f.init}
#: diffusers' further arguments that change nothing where every step is run and no value is thresholded.
_SCHEDULE_INERT = {"timestep_spacing", "dynamic_thresholding_ratio", "sample_max_value"}
#: Those that would, at the values that the original leaves them at.
_SCHEDULE_FIXED = {
    "variance_type": ("fixed_small",), "thresholding": (False,), "trained_betas": (None,), "steps_offset": (0,),
    "rescale_betas_zero_snr": (False,),
}  # fmt: skip
#: What only the decoder of the latent fusion transformer reads: the ablations accept and ignore it.
_DECODER = _CLASSIFIER - _EXTRACTOR - _REDUCER - {
    "init_weight", "num_heads", "ff", "dropout", "have_crossnorm", "n_class", "classifier_have_pos_embed",
    "classifier_pos_embed_dim", "classifier_stack_struct", "classifier_final_act", "ch_order",
}  # fmt: skip

_RENAMES = [
    rule
    for p in ("", "extractor.model.")
    for rule in (
        Rename(p + "layers.{i:d}.local_cond_conv.{name:*}", p + "layers.{i:d}.local.conv.{name:*}"),
        Rename(p + "layers.{i:d}.local_cond_linear.{name:*}", p + "layers.{i:d}.local.linear.{name:*}"),
    )
]


class Diffusion(nn.Module):
    """A noise schedule and, where there is one, its denoiser."""

    def __init__(self, schedule: NoiseSchedule, backbone: DiffusionBackbone | None) -> None:
        super().__init__()
        self.schedule, self.backbone = schedule, backbone


class EEGDMAdapter(ReferenceAdapter):
    """Reads jhpuah/EEGDM: ``Wavenet``, ``Classifier`` (also the ablations in ``src/extra``),
    ``LatentActivityExtractor``, ``LatentActivityReducer``, ``staged_mu_law``, and DDPM schedules.

    Lightning checkpoints hold the trained and the averaged weights (``model.``, ``ema.ema_model.``); the averaged are
    taken, as its authors evaluate them. A classifier's checkpoint serves a backbone, too: it is part of it.
    """

    system = "eegdm"

    # -- building --------------------------------------------------------------------------------------------------

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "scheduler" in config and "classifier" not in config:
            return self._diffusion(config, state)
        if "classifier" in config or source.endswith(":Classifier"):
            return self._filled(EEGClassifier(**self.arguments({**config, **_fusion(config, state, source)})), state)
        if source.endswith("LatentActivityReducer"):
            _check(config, _REDUCER, "LatentActivityReducer")
            return LatentReducer(**config).eval()
        if source.endswith("LatentActivityExtractor"):
            own = config.get("extractor", {k: v for k, v in config.items() if k != "wavenet"})
            _check(own, _EXTRACTOR, "LatentActivityExtractor")
            fold = None if "src/extra" in source else FOLD
            return self._filled(LatentExtractor(_backbone(config["wavenet"]), fold=fold, **own), state)
        if not state and set(config) <= {"mu", "scale"}:
            return MuLaw(**config).eval()
        return self._filled(_backbone(config.get("wavenet", config)), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A classifier's arguments from ``{"wavenet": ..., "classifier": ...}``; a backbone's from its own."""
        if "classifier" not in config:
            _check(config, _BACKBONE, "Wavenet")
            return dict(config)
        known = {"wavenet", "classifier", "fusion", "fwd_with_noise", "scheduler"}
        _check(config, known, "a classifier's configuration")
        own = dict(config["classifier"])
        _check(own, _CLASSIFIER, "Classifier")
        if config.get("fusion", "lft") != "lft":
            own = {k: v for k, v in own.items() if k not in _DECODER}
        _check(config["wavenet"], _BACKBONE, "Wavenet")
        more = {k: config[k] for k in ("fusion", "fwd_with_noise") if k in config}
        backbone = dict(config["wavenet"])
        if "scheduler" in config:
            backbone["noise_schedule"] = _schedule(config["scheduler"])
        return {"backbone": backbone, **own, **more}

    def _diffusion(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
        _check(config, {"scheduler", "wavenet"}, "a diffusion's configuration")
        backbone = None
        if "wavenet" in config and state:
            backbone = _backbone(config["wavenet"])
            self._filled(backbone, state)
        return Diffusion(NoiseSchedule(**_schedule(config["scheduler"])), backbone).eval()

    def _filled(self, model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Class ids and steps follow from the arguments: a file may leave them out."""
        ours = {name: buffer for name, buffer in model.named_buffers() if name not in state}
        kept = {k: v for k, v in ours.items() if k in model.state_dict()}
        return self.load(model, _Together(state, kept))

    # -- keys ------------------------------------------------------------------------------------------------------

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(*_RENAMES)

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        for prefix in ("ema.ema_model.", "model."):
            if any(key.startswith(prefix) for key in state):
                state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
                break
        inner = "extractor.model."
        if isinstance(model, DiffusionBackbone) and any(key.startswith(inner) for key in state):
            state = {k.removeprefix(inner): v for k, v in state.items() if k.startswith(inner)}
        return super().to_zoo(state, model=model)

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """``wanted``: the names to compute; by default the outputs, without intermediates."""
        names = set(wanted or ())
        if isinstance(model, MuLaw):
            staged, inverse = model(inputs["x"])
            return {"staged": staged, "inverse": inverse}
        if isinstance(model, Diffusion):
            return _run_diffusion(model, inputs)
        if isinstance(model, LatentReducer):
            return {"tokens": model(inputs.get("latents", inputs.get("x", next(iter(inputs.values())))), _rate(call))}
        if isinstance(model, LatentExtractor):
            latents = model(inputs["x"], _local(inputs), _rate(call))
            return {"latents": latents, "latent_activity": latents, "mid/latent_activity_sub": latents[..., :5, :]}
        if isinstance(model, EEGClassifier):
            return _run_classifier(model, inputs, call, names)
        assert isinstance(model, DiffusionBackbone)
        return _run_backbone(model, inputs, names)

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        if isinstance(model, Diffusion) and model.backbone is not None:
            return super().gradients(model.backbone)
        return super().gradients(model)


class _Together(Mapping[str, Tensor]):
    """A state dict and what it leaves out."""

    def __init__(self, state: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> None:
        self.state, self.more = state, more

    def __getitem__(self, key: str) -> Tensor:
        return self.more[key] if key in self.more else self.state[key]

    def __iter__(self):
        yield from self.state
        yield from self.more

    def __len__(self) -> int:
        return len(self.state) + len(self.more)


def _check(config: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := sorted(set(config) - known):
        raise ValueError(f"{what} has no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _backbone(config: Mapping[str, Any]) -> DiffusionBackbone:
    _check(config, _BACKBONE, "Wavenet")
    return DiffusionBackbone(**config)


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    _check(config, _SCHEDULE | _SCHEDULE_INERT | set(_SCHEDULE_FIXED), "DDPMScheduler")
    for name, allowed in _SCHEDULE_FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {config[name]!r}; EEGDM leaves it at {allowed[0]!r}, nothing else is built")
    return {k: v for k, v in config.items() if k in _SCHEDULE}


def _fusion(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Which of the three classes ``Classifier`` it is: by its file, else by keys and shapes."""
    if "fusion" in config:
        return {}
    for name, kind in (("mean_fusion", "mean"), ("no_fusion", "none")):
        if name in source:
            return {"fusion": kind}
    if any(key.startswith("decoder.") for key in state) or not state:
        return {}
    own = config["classifier"]
    where = state.get("classifier.pos_embed")
    if where is None:
        raise ValueError("the state dict has no decoder: an ablation, which of them it does not say; give fusion=")
    depth = (own.get("end") or config["wavenet"].get("n_layer", 20)) - own.get("start", 0)
    pools = (own.get("L", 1000) - own.get("window_size", 200)) // own.get("window_step", 200) + 1
    channels = config["wavenet"].get("n_class", 22) * pools
    return {"fusion": "none" if depth > 1 and where.shape[1] == depth * channels else "mean"}


# -- what golden files call ------------------------------------------------------------------------------------------


def _rate(call: Any) -> float:
    if isinstance(call, Mapping) and isinstance(call.get("rate"), (int, float)):
        return float(call["rate"])
    said = re.search(r"rate\s*[=:]\s*([0-9]*\.?[0-9]+)", json.dumps(call))
    return float(said.group(1)) if said else 1.0


def _local(inputs: Mapping[str, Tensor]) -> Tensor | None:
    return next((inputs[name] for name in ("local_cond", "local", "lc") if name in inputs), None)


def _run_backbone(model: DiffusionBackbone, inputs: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    x, t, cond, local = inputs["x"], inputs["t"], inputs["cond"], _local(inputs)
    found = {"pred": model(x, t, cond, local)}
    if not any(name.startswith("mid/") for name in names):
        return found
    context = model.condition(t, cond)
    h: Any = model.embed(x)
    found |= {"mid/step_embedding": step_embedding(t, model.d_embed), "mid/cond": context, "mid/in_layer": h}
    for i, block in enumerate(model.layers):
        gates = block.gates(h, context, local)  # type: ignore[operator]
        found |= {f"mid/block{i}_{name}": gates[name] for name in QUERIES}
        found[f"mid/block{i}_skip"] = block.linear_skip(gates["inter"])  # type: ignore[operator]
        h = block.following(h, gates["inter"])  # type: ignore[operator]
        if h is not None:
            found[f"mid/block{i}_next"] = h
    return found


def _run_classifier(
    model: EEGClassifier, inputs: Mapping[str, Tensor], call: Any, names: set[str]
) -> dict[str, Tensor]:
    rate, local = _rate(call), _local(inputs)
    kept = inputs.get("tokens")
    if kept is None and re.search(r"data_is_cached\W+[Tt]rue", json.dumps(call)):
        kept = inputs["x"]
    if kept is not None:
        return {"logits": model.forward_tokens(kept)}
    x = inputs["x"]
    found = {"logits": model(x, local, rate)}
    if any(name.startswith("mid/") or name not in found for name in names):
        latents = model.extractor(x, local, rate)
        tokens = model.reducer(latents, rate)
        more = {
            "latent_activity_sub": latents[:, :, :, :, :5],
            "latent_activity": latents,
            "tokens": tokens,
            "rep": model.represent(tokens),
        }
        found |= {f"mid/{k}": v for k, v in more.items()} | more
    return found


def _run_diffusion(model: Diffusion, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    schedule, backbone = model.schedule, model.backbone
    device = next(iter(inputs.values())).device if inputs else torch.device("cpu")
    found = {"betas": schedule.betas.to(device), "alphas_cumprod": schedule.alphas_cumprod.to(device)}
    if "x0" in inputs:
        x0, noise, t = inputs["x0"], inputs["noise"], inputs["t"]
        found |= {"noisy": schedule.add_noise(x0, noise, t), "velocity": schedule.velocity(x0, noise, t)}
        found["target"] = schedule.target(x0, noise, t)
        if backbone is not None and "cond" in inputs:
            found["loss"] = diffusion_loss(backbone, schedule, x0, inputs["cond"], noise=noise, t=t)
    for name, noise in inputs.items():
        if name.startswith("variance_noise_t"):
            k = int(name.removeprefix("variance_noise_t"))
            found[f"prev_t{k}"] = schedule.step(inputs["pred"], k, inputs["x_t"], noise)
            found[f"x0pred_t{k}"] = schedule.clean(inputs["pred"], k, inputs["x_t"])
    if "chain_start" in inputs:
        if backbone is None:
            raise ValueError("a chain needs the denoiser; give the arguments under 'wavenet' and its state dict")
        noises = inputs["chain_noise"]
        found["chain_final"] = sample(backbone, schedule, inputs["chain_start"], inputs["chain_cond"], noises=noises)
    return found
