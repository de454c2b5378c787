"""The original constructors' arguments of the S4 family, read as ours. An argument that the original has and we do not
compute with is refused by name; one that it does not have, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Config = dict[str, Any]

#: Arguments that only choose an implementation, an optimiser's setting or a message: they change no number here.
_SILENT = {
    "verbose",
    "backend",
    "wd",
    "return_state",
    "track_norms",
    "initializer",
    "_name_",
    "transposed",
    "layer_idx",
}
_SSM = {
    "d_state", "init", "n_ssm", "rank", "dt_min", "dt_max", "dt_tie", "dt_transform", "dt_fast", "real_transform",
    "imag_transform", "bandlimit", "is_real", "disc", "B_init", "B_scale", "P_scale", "real_scale", "imag_scale",
    "B_clip", "lr", "efficient_bidirectional",
}  # fmt: skip
#: What kernels with a dense state matrix take of it.
_DENSE = {
    "d_state", "init", "n_ssm", "rank", "dt_min", "dt_max", "dt_tie", "dt_transform", "B_init", "B_scale", "P_scale",
    "real_scale", "imag_scale", "B_clip", "lr",
}  # fmt: skip
#: Initialisations only: a state dict overwrites what they did.
_INITIAL = {"deterministic", "real_random", "imag_random", "B_random", "normalize", "diagonalize_precision"}


def check_known(config: Mapping[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(f"{what} has no argument {unknown[0]!r}; known: {', '.join(sorted(known))}")


def _refuse(config: Mapping[str, Any], name: str, allowed: Sequence[Any], why: str) -> None:
    if name in config and config[name] not in allowed:
        raise ValueError(f"argument {name}={config[name]!r} is not supported: {why}")


def convolution(config: Mapping[str, Any], what: str, extra: set[str] = frozenset()) -> Config:  # type: ignore[assignment]
    """Arguments of FFTConv and of its kernel: ours, without activation and dropout."""
    conv = {"l_max", "channels", "swap_channels", "bidirectional", "drop_kernel", "mode", "kernel", "measure"}
    check_known(config, conv | _SSM | _INITIAL | _SILENT | extra, what)
    out = {k: v for k, v in config.items() if k in (conv | _SSM) - {"kernel", "measure"} and v is not None}
    if config.get("kernel") is not None:
        out["mode"] = config["kernel"]
    if config.get("measure") is not None:
        out["init"] = config["measure"]
    mode = out.get("mode", "dplr")
    if out.get("is_real") and "d_state" not in out:
        out["d_state"] = 32  # of the default 64, which counts conjugate pairs, only what is given is doubled
    if mode in ("dense", "slow", "real"):
        for name in sorted(set(out) & (_SSM - _DENSE)):
            raise ValueError(f"kernel mode {mode!r} has no argument {name!r}; it takes {', '.join(sorted(_DENSE))}")
    if mode == "conv":
        out = {k: v for k, v in out.items() if k not in _SSM or k == "lr"}
    elif mode == "ema":
        out = {k: v for k, v in out.items() if k not in _SSM - {"d_state", "dt_tie", "efficient_bidirectional", "lr"}}
    return out


def fft_conv(config: Mapping[str, Any], standalone: bool) -> Config:
    """FFTConv: the standalone class applies GELU by default, the modular one nothing."""
    out = convolution(config, "FFTConv", {"d_model", "activation", "dropout", "tie_dropout"})
    return out | {
        "d_model": config["d_model"],
        "act": config.get("activation", "gelu" if standalone else None),
        "dropout_p": config.get("dropout", 0.0),
        "tie_dropout": config.get("tie_dropout") or False,
    }


def s4_block(config: Mapping[str, Any], standalone: bool) -> Config:
    """S4Block; without ``d_model`` where a model gives it."""
    own = {
        "d_model", "bottleneck", "activation", "gate", "gate_act", "mult_act", "final_act", "postact", "weight_norm",
        "dropout", "tie_dropout", "layer",
    }  # fmt: skip
    why = "it fails in the original, too (the layer is used before it is built, the bottleneck has another width)"
    _refuse(config, "gate", [None], why)
    _refuse(config, "bottleneck", [None, 1], why)
    _refuse(config, "layer", ["fftconv", None], "S4Block wraps an FFT convolution")
    final = config.get("final_act", "glu")
    if config.get("postact") is not None:
        final = config["postact"]
    tie = config.get("tie_dropout") or False
    return {
        **convolution(config, "S4Block", own),
        **({"d_model": config["d_model"]} if "d_model" in config else {}),
        "act": config.get("activation", "gelu"),
        "mult_act": config.get("mult_act"),
        "final_act": final,
        "dropout_p": config.get("dropout") or 0.0,
        "tie_dropout": tie,
        "inner_tie_dropout": tie and standalone,
        "weight_norm": bool(config.get("weight_norm")) and not standalone,  # accepted and ignored there
        "input_linear": config.get("bottleneck") == 1,
    }


def s4d(config: Mapping[str, Any]) -> Config:
    check_known(config, {"d_model", "d_state", "dropout", "transposed", "dt_min", "dt_max", "lr"}, "S4D")
    return {k: v for k, v in config.items() if k not in ("transposed", "lr")}


def s4nd(config: Mapping[str, Any]) -> Config:
    own = {
        "d_model", "dim", "activation", "final_act", "dropout", "tie_dropout", "trank", "linear", "contract_version",
        "out_channels", "ln", "hyper_act", "weight_norm",
    }  # fmt: skip
    out = convolution(config, "S4ND", own)
    out.update({k: config[k] for k in ("d_model", "dim", "trank", "linear", "out_channels") if k in config})
    # The general contraction of the original computes the mean over ranks and then leaves it unused.
    return out | {
        "weight_norm": bool(config.get("weight_norm")),
        "average_ranks": not config.get("contract_version", 0) or config.get("trank", 1) == 1,
        "bidirectional": config.get("bidirectional", True),
        "act": config.get("activation", "gelu"),
        "final_act": config.get("final_act"),
        "dropout_p": config.get("dropout", 0.0),
        "tie_dropout": config.get("tie_dropout") or False,
    }


def layer_config(config: Mapping[str, Any]) -> Config:
    """One layer of a SequenceModel, with ``type`` for :func:`zoo.models.s4.make_layer`."""
    kind = config.get("_name_", "s4")
    if kind in ("s4", "standalone"):
        return {"type": "s4", **s4_block(config, standalone=kind == "standalone")}
    if kind == "fftconv":
        return {"type": "fftconv", **fft_conv(config, standalone=False)}
    if kind == "s4nd":
        return {"type": "s4nd", **s4nd(config)}
    if kind == "id":
        return {"type": "id"}
    if kind in ("ffn", "ff"):
        check_known(config, {"expand", "activation", "dropout", "tie_dropout", "d_output"} | _SILENT, "FFN")
        _refuse(config, "d_output", [None], "a residual block keeps its width")
        return {
            "type": "ffn",
            "expand": config.get("expand", 2),
            "act": config.get("activation", "gelu"),
            "dropout_p": config.get("dropout") or 0.0,
            "tie_dropout": config.get("tie_dropout") or False,
        }
    raise ValueError(
        f"layer _name_={kind!r} is not supported; expected 's4', 'standalone', 'fftconv', 's4nd', 'ffn' or 'id'"
    )


def sequence_model(config: Mapping[str, Any]) -> Config:
    known = {
        "d_model", "n_layers", "dropout", "tie_dropout", "prenorm", "bidirectional", "n_repeat", "layer", "residual",
        "norm", "pool", "dropinp",
    }  # fmt: skip
    check_known(config, known | _SILENT, "SequenceModel")
    layer = config.get("layer") or [{}]
    listed = [layer] if isinstance(layer, Mapping) else list(layer)
    dropout = config.get("dropout", 0.0)
    listed = [{**one, "dropout": dropout if one.get("dropout") is None else one["dropout"]} for one in listed]
    return {
        "d_model": config["d_model"],
        "n_layers": config.get("n_layers", 1),
        "n_repeat": config.get("n_repeat", 1),
        "layer": [layer_config(one) for one in listed],
        "prenorm": config.get("prenorm", True),
        "norm": config.get("norm"),
        "transposed": config.get("transposed", False),
        "residual": config.get("residual"),
        "pool": config.get("pool"),
        "bidirectional": config.get("bidirectional", False),
        "dropout_p": dropout,
        "tie_dropout": config.get("tie_dropout") or False,
        "dropinp": config.get("dropinp", 0.0),
    }


def decoder(config: Mapping[str, Any]) -> tuple[str, Config, bool]:
    """Which decoder ("sequence", "nd", "retrieval"), our arguments but for the width that it reads, and whether it
    reads the lengths of its inputs."""
    options = dict(config)
    name = options.pop("_name_", None)
    if name in (None, "sequence", "nd") and (name == "nd" or options.get("mode") == "full"):
        check_known(options, {"d_model", "d_output", "mode"}, "NDDecoder")
        return "nd", {"d_output": options.get("d_output"), "mode": options.get("mode", "pool")}, False
    if name == "retrieval" or "n_classes" in options or "nli" in options:
        known = {"d_output", "n_classes", "d_model", "nli", "activation", "mode", "d_input", "use_lengths"}
        check_known(options, known, "RetrievalDecoder")
        arguments = {
            "num_classes": options.get("n_classes") or options["d_output"],
            "d_hidden": options.get("d_model"),
            "nli": options.get("nli", True),
            "act": options.get("activation", "relu"),
            "mode": options.get("mode", "last"),
        }
        return "retrieval", arguments, bool(options.get("use_lengths"))
    if name not in (None, "sequence"):
        raise ValueError(f"decoder _name_={name!r} is not supported; expected 'sequence', 'nd' or 'retrieval'")
    check_known(options, {"d_model", "d_output", "l_output", "mode", "use_lengths"}, "SequenceDecoder")
    arguments = {
        "d_output": options.get("d_output"),
        "l_output": options.get("l_output"),
        "mode": options.get("mode", "last"),
    }
    return "sequence", arguments, bool(options.get("use_lengths")) or arguments["mode"] == "ragged"


def s5_classifier(config: Mapping[str, Any], d_input: int, retrieval: bool) -> Config:
    known = {
        "d_model", "d_output", "n_layers", "ssm_size", "ssm_size_base", "blocks", "conj_sym", "clip_eigs",
        "bidirectional", "C_init", "discretization", "activation", "activation_fn", "mode", "prenorm", "batchnorm",
        "padded", "dropout", "p_dropout", "bn_momentum", "dt_min", "dt_max", "step_rescale", "training", "d_input",
        "retrieval", "in_dim",
    }  # fmt: skip
    check_known(config, known, "S5 BatchClassificationModel")
    return {
        "d_input": d_input,
        "num_classes": config["d_output"],
        "d_model": config["d_model"],
        "ssm_size": config.get("ssm_size", config.get("ssm_size_base")),
        "n_layers": config["n_layers"],
        "blocks": config.get("blocks", 1),
        "conj_sym": config.get("conj_sym", True),
        "clip_eigs": config.get("clip_eigs", False),
        "bidirectional": config.get("bidirectional", False),
        "C_init": config.get("C_init", "trunc_standard_normal"),
        "discretization": config.get("discretization", "zoh"),
        "activation": config.get("activation", config.get("activation_fn", "gelu")),
        "mode": config.get("mode", "pool"),
        "prenorm": config.get("prenorm", False),
        "norm": "batch" if config.get("batchnorm", False) else "layer",
        "dropout": config.get("dropout", config.get("p_dropout", 0.0)),
        "step_rescale": config.get("step_rescale", 1.0),
        "retrieval": retrieval,
    }
