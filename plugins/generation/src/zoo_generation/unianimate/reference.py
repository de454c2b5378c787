"""UniAnimate's original arguments and keys: ali-vilab/UniAnimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

from . import diffusion, layers
from .unet import UNet

#: The original's constructor arguments that are ours by the same name.
_SAME = (
    "in_dim", "dim", "out_dim", "dim_mult", "num_res_blocks", "num_heads", "head_dim", "attn_scales", "context_dim",
    "num_tokens", "concat_dim", "resolution", "video_compositions", "temporal_attention", "use_fps_condition",
    "dropout", "misc_dropout", "p_all_zero", "p_all_keep", "adapter_transformer_layers",
)  # fmt: skip
#: The original's own defaults where ours are those of the released model.
_DEFAULTS = {
    "dim": 512, "out_dim": 6, "dim_mult": (1, 2, 3, 4), "num_heads": None, "num_res_blocks": 3, "head_dim": 64,
}  # fmt: skip
#: Arguments that change nothing: y is ignored, the others' modules are never made or matter only in training.
_INERT = {
    "config", "y_dim", "hist_dim", "use_scale_shift_norm", "temporal_attn_times", "use_checkpoint", "use_sim_mask",
    "training", "inpainting", "zero_y", "black_image_feature", "type",
}  # fmt: skip
_BLOCKS = ("Downsample", "Upsample", "TemporalConvBlock_v2", "TemporalTransformer", "SpatialTransformer", "ResBlock")


class UniAnimateAdapter(ReferenceAdapter):
    """Reads ``UNetSD_UniAnimate``, its layers (:data:`_BLOCKS`), and the temporal Mamba of our reading."""

    system = "unianimate"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        block = next((name for name in _BLOCKS if f":{name}" in source), None)
        if block is None and "mamba_fwd.A_log" in state:
            block = "TemporalMamba"
        if block is not None:
            return self.load(_block(block, config, state), state)
        arguments = self.arguments(config)
        if any(".mamba_fwd." in key for key in state):
            a_log = next(v for k, v in state.items() if k.endswith("mamba_fwd.A_log"))
            conv = next(v for k, v in state.items() if k.endswith("mamba_fwd.conv1d.weight"))
            inner = next(v for k, v in state.items() if k.endswith("mamba_fwd.out_proj.weight")).shape[0]
            arguments |= {"temporal": "mamba", "d_state": a_log.shape[1], "d_conv": conv.shape[2]}
            arguments["expand"] = a_log.shape[0] / inner
        for key, weight in state.items():  # the original's constant 1024, unless someone changed it
            if key.startswith("output_blocks.") and key.endswith("1.transformer_blocks.0.attn2.to_k.weight"):
                arguments["decoder_context_dim"] = weight.shape[1]
                break
        return self.load(UNet(**arguments), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments; ``resolution`` and ``video_compositions`` may lie in ``config`` as in the original."""
        flat = {**config}
        if isinstance(nested := flat.pop("config", None), Mapping):
            flat |= {k: nested[k] for k in ("resolution", "video_compositions") if k in nested}
        if not flat.pop("use_temporal_transformer", True):
            raise ValueError("use_temporal_transformer is False; the older rotary attention over frames is not here")
        if flat.pop("use_image_dataset", False):
            raise ValueError("use_image_dataset is True; training on single images is not here, only on videos")
        unknown = sorted(set(flat) - set(_SAME) - _INERT)
        if unknown:
            raise ValueError(f"unianimate has no argument {unknown[0]!r}; known: {sorted({*_SAME, *_INERT})}")
        for name in ("resolution", "video_compositions"):
            if name not in flat:
                raise ValueError(f"the configuration has no {name!r}, which the original reads from its config")
        return _DEFAULTS | {k: flat[k] for k in _SAME if k in flat}

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: list[str] | None = None
    ) -> dict[str, Tensor]:
        if not isinstance(model, UNet):
            return {"y": _run_block(model, inputs)}
        outputs, middles = self._forwards(model, inputs)
        schedule = diffusion.Schedule()
        if "randomref" in inputs:
            prior = schedule.noised(inputs["randomref"], diffusion.PRIOR, inputs["x"])
            outputs["noise_prior_949"] = prior
            if wanted is not None and "ddim4_cfg2p5" in wanted:
                given = {k: inputs[k] for k in ("image", "dwpose", "randomref") if k in inputs}
                outputs["ddim4_cfg2p5"] = diffusion.sample(
                    model, prior, given, schedule=schedule, count=4, zero_y=inputs.get("zero_y")
                )
        outputs["betas_first3_last3"] = schedule.betas[[0, 1, 2, -3, -2, -1]].float()
        outputs["alphas_cumprod_at_1_34_991"] = schedule.alphas_cumprod[[1, 34, 991]].float()
        return outputs | middles

    def _forwards(self, model: UNet, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The forward passes that the inputs allow, and what lies inside the one with all conditions."""
        x, t = inputs["x"], inputs["t"]
        more = {k: inputs[k] for k in ("fps", "zero_y") if k in inputs}
        names = ("image", "local_image", "dwpose", "randomref")
        everything = {k: inputs[k] for k in names if k in inputs}
        kept: dict[str, Tensor] = {}
        watched = {
            "middle_resblock": model.middle_block[0],
            **{
                name: model.get_submodule(name)
                for name in ("dwpose_embedding_after", "local_image_embedding_after", "randomref_embedding_after2")
                if name in dict(model.named_children())
            },
        }

        def keep(name: str) -> Any:
            return lambda _module, _inputs, output: kept.__setitem__(f"mid/{name}", output)

        handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
        found = {"all_conditions": model(x, t, **everything, **more)}
        for handle in handles:
            handle.remove()
        conditions = model.encode(x.shape, **everything, zero_y=inputs.get("zero_y"))
        kept["mid/unified_input"] = model.unified(x, conditions)
        some = {k: v for k, v in everything.items() if k != "local_image"}
        found["ref_pose_only"] = model(x, t, **some, **more)
        found["unconditional"] = model(x, t, **more)
        return found, kept

    def loss(self, golden, named):
        return named.get("out/all_conditions", named.get("out/y")).float().square().mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(
            Rename("{a:*}.temopral_conv.{b:*}", "{a:*}.temporal_conv.{b:*}"),  # the original's spelling
            Rename("temopral_conv.{b:*}", "temporal_conv.{b:*}"),
        )


def _block(name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """A layer by itself, from its constructor's arguments in the original."""
    refused = {
        "use_linear": name == "TemporalTransformer",
        "only_self_att": False,
        "disable_self_attn": True,
        "multiply_zero": True,
        "use_image_dataset": True,
        "use_scale_shift_norm": True,
        "up": True,
        "down": True,
        "use_conv": name == "ResBlock",
    }
    for key, bad in refused.items():
        if (
            key in config
            and bool(config[key]) is bad
            and not (key == "only_self_att" and name != "TemporalTransformer")
        ):
            raise ValueError(f"{key} is {config[key]} for {name}; UniAnimate's network never makes it so")
    if name in ("Downsample", "Upsample"):
        return (layers.Downsample if name == "Downsample" else layers.Upsample)(int(config["channels"]))
    if name == "TemporalConvBlock_v2":
        return layers.TemporalConv(config["in_dim"], config.get("dropout", 0.0))
    if name == "ResBlock":
        out = config.get("out_channels") or config["channels"]
        return layers.ResBlock(config["channels"], out, config["emb_channels"], config.get("dropout", 0.0))
    if name == "TemporalMamba":
        sizes = {k: config[k] for k in ("d_state", "d_conv", "expand") if k in config}
        return layers.TemporalMamba(config["in_channels"], config.get("inner", config["in_channels"]), **sizes)
    heads, width = config["n_heads"], config["d_head"]
    if name == "TemporalTransformer":
        return layers.TemporalTransformer(config["in_channels"], heads, width, depth=config.get("depth", 1))
    context = config.get("context_dim") or config["in_channels"]
    return layers.SpatialTransformer(config["in_channels"], heads, width, context)


def _run_block(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    x = inputs["x"]
    if isinstance(model, (layers.Downsample, layers.Upsample)):
        return model(x)
    if isinstance(model, layers.SpatialTransformer):
        return model(x, inputs["context"])
    if isinstance(model, layers.ResBlock):  # a row of the embedding for each frame; ours has one for each video
        frames = x.shape[0] // int(inputs.get("batch_size", torch.tensor(1)))
        return model(x, inputs["emb"][::frames], frames)
    y = model(x.transpose(1, 2).flatten(0, 1), x.shape[2])
    return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
