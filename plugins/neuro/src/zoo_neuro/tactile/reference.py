"""The original's configuration, keys and outputs: neuroagents-lab/2025-tactile-whisking with PyTorchTNN."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from zoo.reference import ReferenceAdapter
from zoo.rules import Drop, Rename, Rule, Rules, Squeeze, Tied

from .cells import CELLS, make_cell
from .losses import LOSSES, AutoEncoderLoss, SimCLRLoss, SimSiamLoss
from .model import TactileNetwork

#: The original's encoders, with those of its arguments that ours take under their names.
_SEQUENCE = {"model_dim", "nlayers", "dropout", "prenorm"}
_MAMBA = {"nlayers", "norm_epsilon", "rms_norm", "residual_in_fp32"}
_GPT = {"block_size", "n_layer", "n_head", "dropout", "num_feat_per_step"}
#: Arguments of training and of files around the network.
_AROUND = {"name", "dropout", "n_times", "model_config_file"}
_DECODER = {
    "dropout": "dropout", "use_bias": "use_bias", "bias": "bias", "batchnorm": "batchnorm",
    "activation": "activation", "init_dict": "init_dict",
}  # fmt: skip


def _only(config: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"{what} has no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _mamba(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    _only(config, _MAMBA | {"name", "model_dim", "d_intermediate", "ssm_cfg", "fused_add_norm"}, what)
    if config.get("d_intermediate", 0):
        raise ValueError(f"{what}: d_intermediate is {config['d_intermediate']}; the blocks have no MLP, expected 0")
    ssm = dict(config.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"{what}: ssm_cfg is {config['ssm_cfg']!r}; the blocks are of Mamba1")
    found = {k: config[k] for k in _MAMBA if k in config}
    return found | ({"ssm": ssm} if ssm else {})


def _graph(path: str) -> dict[str, Any]:
    """The arguments of a graph: the file's content where there is one, else the published graph of that name."""
    if Path(path).is_file():
        return {"graph": json.loads(Path(path).read_text(encoding="utf-8"))}
    name = PurePosixPath(str(path).replace("\\", "/")).stem
    match = re.fullmatch(r"rnn_fdb_converted(_modern)?(?:_(gru|intersection|lstm|ugrnn))?(_ln)?", name)
    if match is None or (not match[1] and (match[2] or match[3])):
        raise ValueError(
            f"model_config_file is {str(path)!r}; expected "
            "rnn_fdb_converted_modern[_gru|_intersection|_lstm|_ugrnn][_ln].json, or the file's content as "
            "model.encoder.graph"
        )
    found: dict[str, Any] = {"cell": match[2] or "time_decay", "layernorm": bool(match[3])}
    return found if match[1] else found | {"trainable": False}


def _encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    name = config.get("name")
    if name == "TNNEncoder":
        known = _AROUND | {"full_unroll", "return_all", "input_transform", "graph"}
        _only(config, known, "TNNEncoder")
        found: dict[str, Any] = {k: config[k] for k in ("full_unroll", "return_all") if k in config}
        transform = config.get("input_transform") or {}
        if transform.get("name") == "MakeMovie":
            found["image_off"] = transform["kwargs"]["image_off"]
        elif transform.get("name") is not None:
            raise ValueError(f"input_transform is {transform['name']!r}; expected MakeMovie or null")
        graph = config.get("graph")
        return {"name": "graph"} | found | ({"graph": graph} if graph else _graph(config["model_config_file"]))
    if name == "PTResNet18":
        _only(config, {"name"}, name)
        return {"name": "resnet18"}
    if name == "S4Enc":
        _only(config, _SEQUENCE | {"name"}, name)
        return {"name": "s4"} | {k: config[k] for k in _SEQUENCE if k in config}
    if name == "MambaEnc":
        return {"name": "mamba", "model_dim": config["model_dim"]} | _mamba(config, name)
    if name == "FlattenEncoder":
        _only(config, {"name"}, name)
        return {"name": "linear", "whole": True}  # its layer flattens time, too
    raise ValueError(f"the encoder is {name!r}; expected TNNEncoder, PTResNet18, S4Enc, MambaEnc or FlattenEncoder")


def _attender(config: Mapping[str, Any] | None) -> dict[str, Any]:
    if not config:
        return {"name": "none"}
    name = config.get("name")
    if name == "GPT":
        _only(config, _GPT | {"name"}, name)
        return {"name": "gpt"} | {k: config[k] for k in _GPT if k in config}
    if name == "MambaAtt":
        return {"name": "mamba"} | _mamba(config, name)
    if name == "S4Att":
        _only(config, _SEQUENCE | {"name"}, name)
        return {"name": "s4"} | {k: config[k] for k in _SEQUENCE - {"model_dim"} if k in config}
    raise ValueError(f"the attender is {name!r}; expected GPT, MambaAtt, S4Att or null")


def _decoder(config: Mapping[str, Any] | None, out_dim: int) -> tuple[dict[str, Any], int]:
    """The decoder's arguments, and the width of its last layer (0: it has none)."""
    if not config:
        return {"steps": None}, 0
    known = set(_DECODER) | {"name", "n_layer", "out_channels", "temporal_decoder", "temporal_steps"}
    _only(config, known, "MLP")
    if config.get("name") != "MLP":
        raise ValueError(f"the decoder is {config.get('name')!r}; expected MLP or null")
    widths = list(config["out_channels"])
    if len(widths) != config["n_layer"]:
        raise ValueError(
            f"out_channels has {len(widths)} entries, n_layer is {config['n_layer']}; expected one a layer"
        )
    steps = config.get("temporal_steps", "all")
    if steps != "all" and not isinstance(steps, (list, tuple)):
        raise ValueError(f"temporal_steps is {steps!r}; expected 'all' or a list of time steps")
    everything = steps == "all" or not config.get("temporal_decoder", True)
    found = {ours: config[theirs] for theirs, ours in _DECODER.items() if theirs in config}
    found |= {"widths": widths[:-1], "steps": None if everything else list(steps)}
    return found, int(out_dim) if widths else 0


def _mask(state: Mapping[str, Tensor], fields: Mapping[str, str]) -> Tensor:
    """The causal mask that each of the GPT's layers stores; it follows from the number of positions."""
    size = state["attender._policy.transformer.wpe.weight"].shape[0]
    return torch.ones(size, size).tril()[None, None]


_GRAPH: list[Rule] = [
    Rename("encoder.TG.{node}._pre_memory.{p:*}", "encoder.graph.nodes.{node}.pre.{p}"),
    Rename("encoder.TG.{node}._recurrent_cell.{p:*}", "encoder.graph.nodes.{node}.cell.{p}"),
    Rename("encoder.TG.{node}._post_memory.{p:*}", "encoder.graph.nodes.{node}.post.{p}"),
]
_OUT = "s4_layers.{i:d}.output_linear.0.weight"  # a convolution of one tap there
_STACK: list[Rule] = [
    Rename(f"encoder.{_OUT}", f"encoder.stack.{_OUT}", Squeeze(-1)),
    Rename("encoder.s4_layers.{p:*}", "encoder.stack.s4_layers.{p}"),
    Rename("encoder.norms.{p:*}", "encoder.stack.norms.{p}"),
    Rename("encoder.mamba.{p:*}", "encoder.stack.{p}"),
    Rename("encoder.lin.lin.{p}", "encoder.lin.{p}"),
]
_S4_ATTENDER: list[Rule] = [Rename(f"attender.{_OUT}", f"attender.{_OUT}", Squeeze(-1))]
_LAYER = "attender._policy.transformer.h.{i:d}."
_GPT_RULES: list[Rule] = [
    Rename("attender._action_token", "attender.action_token"),
    Rename("attender._policy.lm_head.{p}", "attender.lm_head.{p}"),
    Drop(f"{_LAYER}attn.bias", once=f"{_LAYER}attn.c_proj.weight", restore=_mask),
    Rename(f"{_LAYER}attn.c_attn.{{p}}", "attender.h.{i:d}.c_attn.{p}"),
    Rename(f"{_LAYER}attn.c_proj.{{p}}", "attender.h.{i:d}.attn_proj.{p}"),
    Rename(f"{_LAYER}mlp.c_fc.{{p}}", "attender.h.{i:d}.c_fc.{p}"),
    Rename(f"{_LAYER}mlp.c_proj.{{p}}", "attender.h.{i:d}.mlp_proj.{p}"),
    Rename("attender._policy.transformer.{p:*}", "attender.{p}"),
]


class Parts(nn.Module):
    """Several cells or losses by name, as one golden file holds them."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)


class TactileAdapter(ReferenceAdapter):
    """Reads neuroagents-lab/2025-tactile-whisking ``enc_att_dec/model.py:EncAttDec`` and ``loss_functions``, and
    neuroagents-lab/PyTorchTNN ``pt_tnn/recurrent_cells``."""

    system = "tactile_ead"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "model" in config:
            return self.load(TactileNetwork(**self.arguments(config)), state)
        parts: dict[str, nn.Module] = {}
        for name, entry in config.items():
            if isinstance(entry, Mapping) and entry.get("cls") in CELLS:
                parts[name] = _cell(entry)
                continue
            kind = entry.get("cls", name) if isinstance(entry, Mapping) else name
            if kind not in LOSSES:
                raise ValueError(
                    f"the configuration has the entry {name!r}; expected data and model of a network, or cells "
                    f"({', '.join(CELLS)}), or losses ({', '.join(LOSSES)})"
                )
            parts[name] = LOSSES[kind](**(entry.get("kwargs", entry) if "cls" in entry else entry))
        if not parts:
            raise ValueError("the configuration is empty; expected data and model of a network")
        return self.load(Parts(parts), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments from the original's ``cfg`` (data and model). Raises ValueError for what is not built."""
        data, model = config.get("data") or {}, config["model"]
        encoder = model.get("encoder")
        if not encoder:
            raise ValueError("the configuration has no model.encoder; expected one")
        classes = model.get("out_dim", data.get("num_classes"))
        decoder, classes = _decoder(model.get("decoder"), classes or 0)
        times = encoder.get("n_times") or data.get("n_times")
        if data.get("n_times") is not None and times != data["n_times"]:
            raise ValueError(f"the encoder unrolls {times} steps, the data have {data['n_times']}; expected the same")
        found = {
            "encoder": _encoder(encoder),
            "attender": _attender(model.get("attender")),
            "decoder": decoder,
            "num_classes": classes,
            "n_times": times or 1,
            "repr_dim": model["repr_dim"],
            "hidden_dim": model.get("hidden_dim", model["repr_dim"]),
        }
        return found | ({"input_shape": data["input_shape"]} if data.get("input_shape") else {})

    def to_zoo(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Checkpoints of Lightning (keys begin with "model.") are read as well."""
        if any(key.startswith("model.encoder.") for key in state):
            state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        found = super().to_zoo(state, model=model)
        if model is not None:  # a fresh S4 kernel's length, where a file leaves it out
            own = model.state_dict()
            found |= {k: v for k, v in own.items() if k.endswith("l_kernel") and k not in found}
        return found

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, Parts):
            return _part_rules(model)
        keys = list(state) if model is None else [*state, *model.state_dict()]
        has = lambda *starts: any(key.startswith(starts) for key in keys)  # noqa: E731
        rules: list[Rule] = []
        if has("encoder.TG.", "encoder.graph."):
            rules += _GRAPH
        elif has("encoder.encoder.", "encoder.conv1."):
            rules.append(Rename("encoder.encoder.{p:*}", "encoder.{p}"))
        else:
            rules += _STACK
        rules += _GPT_RULES if has("attender._policy.", "attender.wte.") else _S4_ATTENDER
        if isinstance(model, TactileNetwork):
            last = len(model.decoder.mlp)
        else:
            numbers = [int(m[1]) for key in keys if (m := re.match(r"decoder\.mlp\.(\d+)\.", key))]
            # in our own format the last layer lies beside the decoder
            last = max(numbers, default=-1) + 1 if has("head.") else max(numbers, default=0)
        return Rules(*rules, Rename(f"decoder.mlp.{last}.{{p:*}}", "head.{p}"))

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """``pred`` and ``loss`` = mean(pred^2); ``wanted`` mids ("mid/encoder", "mid/t2_conv1", ...) as well."""
        if isinstance(model, Parts):
            return _run_parts(model, inputs)
        assert isinstance(model, TactileNetwork)
        asked = [w.removeprefix("mid/") for w in wanted or () if w.startswith("mid/")]
        mids: dict[str, Tensor] | None = {} if asked else None
        pred = model(inputs["x"], mids)
        found = {"pred": pred, "loss": pred.square().mean()}
        if mids is not None:  # the original's S4 layers have time last
            mids = {k: v.transpose(1, 2) if re.search("_s4_l[0-9]", k) else v for k, v in mids.items()}
        return found | {f"mid/{name}": value for name, value in (mids or {}).items() if name in asked}

    def loss(self, golden: Any, named: Mapping[str, Tensor]) -> Tensor:
        return named["out/loss"]


def _cell(entry: Mapping[str, Any]) -> nn.Module:
    arguments = dict(entry.get("kwargs") or {})
    return make_cell({"name": entry["cls"], **arguments}, arguments["input_in_channels"])


def _part_rules(model: Parts) -> Rules:
    rules: list[Rule] = []
    for name, part in model.parts.items():
        if isinstance(part, SimSiamLoss):  # the original stores its two networks a second time
            for mlp in ("projection_mlp", "prediction_mlp"):
                rules.append(Tied(f"{name}/{mlp}.{{p:*}}", f"{name}/neck.{mlp}.{{p:*}}"))
        rules.append(Rename(f"{name}/{{p:*}}", f"parts.{name}.{{p:*}}"))
    return Rules(*rules)


def _run_parts(model: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, part in model.parts.items():
        own = {k.partition("/")[2]: v for k, v in inputs.items() if k.partition("/")[0] == name}
        if isinstance(part, (SimCLRLoss, SimSiamLoss, AutoEncoderLoss)):
            found |= {f"{name}/{k}": v for k, v in _loss_values(part, own).items()}
            continue
        made, cell_state = [], None
        for t, x in enumerate(own["x"]):
            y, cell_state = part(x, cell_state)
            made.append(y)
            if cell_state is not None:
                found[f"mid/{name}/state{t}"] = cell_state
        found[f"{name}/y"] = torch.stack(made)
        if cell_state is not None:
            found[f"{name}/state"] = cell_state
    return found


def _loss_values(part: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``loss_eval``, then ``loss_train``, of a state that was stored after a call in training: the running statistics
    hold that call already, so the first loss is computed with what they were before it."""
    norms = [m for m in part.modules() if isinstance(m, nn.BatchNorm1d)]
    saved = [{k: v.clone() for k, v in norm.state_dict().items()} for norm in norms]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(len(norms))}

    def watch(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            seen[i].append((x.mean(0), x.var(0)))

        return hook

    handles = [norm.register_forward_pre_hook(watch(i)) for i, norm in enumerate(norms)]
    part.train()
    trained = part(**inputs)
    for handle in handles:
        handle.remove()
    part.eval()
    with torch.no_grad():
        for i, norm in enumerate(norms):
            norm.load_state_dict(saved[i])
            momentum = norm.momentum or 0.1
            for mean, var in reversed(seen[i]):
                norm.running_mean.sub_(momentum * mean).div_(1 - momentum)  # type: ignore[union-attr]
                norm.running_var.sub_(momentum * var).div_(1 - momentum)  # type: ignore[union-attr]
    before = part(**inputs)
    for norm, values in zip(norms, saved, strict=True):
        norm.load_state_dict(values)
    return {"loss_eval": before, "loss_train": trained}
