"""The S4 family's original arguments and keys: state-spaces/s4 (S4Block, FFTConv, S4D, S4ND, SequenceModel), HiPPO
matrices, and the classifiers of lindermanlab/S5 (Flax paths as keys)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import hippo
from zoo.layers.fft_conv import FFTConv, S4Block
from zoo.layers.s4 import STEP_MODES, S4Kernel
from zoo.layers.s4d import S4D
from zoo.layers.s4nd import S4ND
from zoo.models.s4 import MeanDecoder, RetrievalDecoder, S4LanguageModel, SequenceDecoder, SequenceModel
from zoo.models.s5 import S5Classifier
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Concat, Rename, Rule, Rules, Scale, Squeeze, Tied, Transpose, Unsqueeze

from . import s4_arguments as arguments

#: Version 3 of the repository to version 4.
VERSION_3 = Rules(
    Rename("{p:*}.layer.kernel.kernel.log_dt", "{p}.layer.layer.kernel.inv_dt", Unsqueeze(-1)),
    Rename("{p:*}.layer.kernel.kernel.inv_w_real", "{p}.layer.layer.kernel.A_real"),
    Rename("{p:*}.layer.kernel.kernel.log_w_real", "{p}.layer.layer.kernel.A_real"),
    Rename("{p:*}.layer.kernel.kernel.w_imag", "{p}.layer.layer.kernel.A_imag", Scale(-1.0)),
    Rename("{p:*}.layer.kernel.kernel.L", "{p}.layer.layer.kernel.l_kernel"),
    Rename("{p:*}.layer.kernel.kernel.{name}", "{p}.layer.layer.kernel.{name}"),
    Rename("{p:*}.layer.D", "{p}.layer.layer.D"),
)
_S4D = Rules(
    *(Rename(f"kernel.{name}", name) for name in ("C", "log_dt", "log_A_real", "A_imag")),
    Rename("output_linear.0.weight", "output_linear.weight", Squeeze(-1)),
    Rename("output_linear.0.bias", "output_linear.bias"),
)
_LM = Rules(Tied("encoder.0.emb_projs.{i}", "loss.shared_out_projs.{i}"))
_SEQUENCE = Rules(Rename("encoder.0.{name}", "encoder.{name}"), Rename("decoder.0.{name:*}", "decoder.{name}"))


def _s5_rules(state: Mapping[str, Tensor], two_sided: bool) -> Rules:
    """Flax paths to ours: kernels are (in, out) there; C1, C2 are the directions of a bidirectional layer."""
    p, q = "params.encoder.layers_{i}.", "layers.{i}."
    rules: list[Rule] = [
        Rename(p + f"seq.{name}", q + f"seq.{name}") for name in ("Lambda_re", "Lambda_im", "B", "D", "log_step")
    ]
    if two_sided and not any(key.endswith("seq.C") and key.startswith("params.") for key in state):
        rules.append(Concat([p + "seq.C1", p + "seq.C2"], q + "seq.C", axis=1))
    else:
        rules.append(Rename(p + "seq.C", q + "seq.C"))
    for name in ("out1", "out2"):
        rules += [
            Rename(p + f"{name}.kernel", q + f"{name}.weight", Transpose(0, 1)),
            Rename(p + f"{name}.bias", q + f"{name}.bias"),
        ]
    rules += [
        Rename(p + "norm.scale", q + "norm.weight"),
        Rename(p + "norm.bias", q + "norm.bias"),
        Rename("batch_stats.encoder.layers_{i}.norm.mean", q + "norm.running_mean"),
        Rename("batch_stats.encoder.layers_{i}.norm.var", q + "norm.running_var"),
        Rename("params.encoder.encoder.kernel", "encoder.weight", Transpose(0, 1)),
        Rename("params.encoder.encoder.bias", "encoder.bias"),
        Rename("params.decoder.kernel", "decoder.weight", Transpose(0, 1)),
        Rename("params.decoder.bias", "decoder.bias"),
    ]
    for ours, theirs in (("0", "layer1"), ("2", "layer2")):
        rules.append(Rename(f"params.decoder.{theirs}.kernel", f"decoder.{ours}.weight", Transpose(0, 1)))
        rules.append(Rename(f"params.decoder.{theirs}.bias", f"decoder.{ours}.bias"))
    return Rules(*rules)


class Matrices(nn.Module):
    """The HiPPO matrices of one size; ``forward(name, what)`` names them as the golden files do."""

    def __init__(self, N: int) -> None:
        super().__init__()
        self.N = N

    def forward(self, name: str, what: str) -> Tensor:
        N = self.N
        if name.startswith("diag"):
            A, _, B = hippo.ssm(name, N, 1)
            return torch.from_numpy(A if what == "A" else B).to(torch.complex64)
        A, B = hippo.transition(name, N)
        rank = 2 if name == "legt" else 1
        W, P, Bc, V = hippo.nplr(name, N, rank)
        values = {
            "A": A,
            "B": B,
            "P": hippo.rank_correction(name, N, rank),
            "nplr_W": W,
            "nplr_absP": abs(P),
            "nplr_absB_clipped": abs(Bc),
            "normal_part": 2 * (V * W @ V.conj().T).real,
        }
        if what not in values:
            raise ValueError(f"no matrix is called {name}/{what}; expected one of {', '.join(values)}")
        return torch.from_numpy(values[what])


class EncodedSequence(nn.Module):
    """``decoder(model(encoder(x)))``. ``reads_lengths``: whether the decoder was told to use lengths where given."""

    def __init__(
        self, encoder: nn.Module, model: SequenceModel, decoder: nn.Module, reads_lengths: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self.model, self.decoder, self.reads_lengths = encoder, model, decoder, reads_lengths

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.model(self.encoder(x)))


class S4Adapter(ReferenceAdapter):
    """state-spaces/s4 and lindermanlab/S5."""

    system = "s4"

    # -- building --------------------------------------------------------------------------------------------------

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        state = dict(unwrapped(state))
        kind = _kind(source, state, config)
        standalone = "/sequence/" not in source.rpartition(":")[0]
        model: nn.Module
        if kind == "matrices":
            arguments.check_known(config, {"N"}, "the HiPPO matrices")
            return Matrices(config["N"]).eval()
        if kind == "S4Block":
            model = S4Block(**arguments.s4_block(config, standalone))
        elif kind == "FFTConv":
            model = FFTConv(**arguments.fft_conv(config, standalone))
        elif kind == "S4D":
            model = S4D(**arguments.s4d(config))
        elif kind == "S4ND":
            model = S4ND(**arguments.s4nd(config))
        elif kind == "S5":
            retrieval = "params.decoder.layer1.kernel" in state
            d_input = state["params.encoder.encoder.kernel"].shape[0]
            model = S5Classifier(**arguments.s5_classifier(config, d_input, retrieval))
        elif "cutoffs" in config:
            model = _language_model(config)
        else:
            model = _sequence(config, state, source)
        # Where the layout puts channels is a matter of inputs and outputs, not of the model.
        first = {"S4D": True, "S4Block": True, "FFTConv": True, "S4ND": True}.get(kind, False)
        model.channels_first = (
            config.get("transposed", first) if kind in ("S4D", "S4Block", "FFTConv", "S4ND") else False
        )  # type: ignore[assignment]
        for name, buffer in model.state_dict().items():  # counters that a file may leave out
            if name.endswith(("l_kernel", "num_batches_tracked")) and kind != "S5" and _theirs(name, state) is None:
                state[name] = buffer
        if kind == "S5":
            state |= {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
        return self.load(model, state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        if isinstance(model, S4D) or "kernel.log_dt" in state:
            return _S4D
        if isinstance(model, S5Classifier):
            two_sided = any(getattr(m, "bidirectional", False) for m in model.modules())
            split = two_sided and model.layers[0].seq.C_init != "complex_normal"  # type: ignore[union-attr]
            return _s5_rules(state, bool(split))
        if any(key.startswith("params.") for key in state):
            return _s5_rules(state, any(key.endswith(".seq.C1") for key in state))
        table = VERSION_3 if any(".kernel.kernel." in key for key in state) else Rules()
        if isinstance(model, S4LanguageModel) or any(key.startswith("loss.") for key in state):
            return table + _LM
        if any(key.startswith("encoder.0.") for key in state):
            return table + _SEQUENCE
        return table

    # -- running ---------------------------------------------------------------------------------------------------

    def run(
        self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None, wanted: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """``wanted``: the names to compute; default the output (and, with a ``state`` among the inputs, its states)."""
        if isinstance(model, Matrices):
            names = wanted or [f"{m}/{w}" for m in hippo.MEASURES for w in ("A", "B", "P", "nplr_W", "normal_part")]
            return {name: model(*name.split("/")) for name in names}
        if isinstance(model, S5Classifier):
            return _run_s5(model, inputs, wanted)
        if isinstance(model, S4LanguageModel):
            return _run_language_model(model, inputs)
        if isinstance(model, EncodedSequence):
            return _run_sequence(model, inputs, wanted, call)
        return _run_layer(model, inputs, wanted)


def _kind(source: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    named = source.partition(" ")[2]
    for kind, words in (
        ("S5", ("BatchClassificationModel", "RetrievalModel", "S5")),
        ("sequence", ("SequenceModel",)),
        ("S4ND", ("S4ND",)),
        ("S4Block", ("S4Block",)),
        ("FFTConv", ("FFTConv",)),
        ("S4D", (":S4D",)),
        ("matrices", ("transition", "nplr")),
    ):
        if any(word in named for word in words):
            return kind
    if any(key.startswith("params.") for key in state):
        return "S5"
    if any(key.startswith("model.layers.") for key in state):
        return "sequence"
    if "kernel.log_dt" in state:
        return "S4D"
    if any(re.match(r"kernel\.\d+\.", key) for key in state):
        return "S4ND"
    if any(key.startswith("layer.kernel.") for key in state):
        return "S4Block"
    if any(key.startswith("kernel.") for key in state):
        return "FFTConv"
    if not state and "N" in config:
        return "matrices"
    raise ValueError(
        "the arguments and keys are of none of S4Block, FFTConv, S4D, S4ND, SequenceModel, S5 or HiPPO matrices"
    )


def _theirs(name: str, state: Mapping[str, Tensor]) -> str | None:
    """The key under which a state dict (of version 3 or 4) holds our buffer ``name``, or None."""
    old = re.sub(r"\.layer\.layer\.kernel\.l_kernel$", ".layer.kernel.kernel.L", name)
    return next((key for key in (name, old) if key in state), None)


def _language_model(config: Mapping[str, Any]) -> S4LanguageModel:
    known = {"model", "n_tokens", "cutoffs", "div_val", "tie_weights", "tie_projs", "bias_scale", "dropemb", "dropsoft"}
    arguments.check_known(config, known, "the WikiText-103 model")
    return S4LanguageModel(
        vocab_size=config["n_tokens"],
        cutoffs=config["cutoffs"],
        div_val=config.get("div_val", 1),
        tie_weights=config.get("tie_weights", True),
        tie_projs=config.get("tie_projs"),
        **arguments.sequence_model(config["model"]),
    )


def _sequence(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Encoder, SequenceModel and decoder; what the encoder is follows from its keys."""
    model = SequenceModel(**arguments.sequence_model(config.get("model", config)))
    d = model.d_model
    weight = next((v for k, v in state.items() if k in ("encoder.weight", "encoder.0.weight")), None)
    bias = any(k in ("encoder.bias", "encoder.0.bias") for k in state)
    encoder: nn.Module = nn.Identity()
    if weight is not None:
        encoder = nn.Linear(weight.shape[1], d) if bias else nn.Embedding(*weight.shape)
        if not bias and weight.shape[1] != d:
            encoder = nn.Linear(weight.shape[1], d, bias=False)
    options = dict(config.get("decoder") or {})
    if any(".retrieval." in key for key in state):
        options.setdefault("_name_", "retrieval")
    if "NDDecoder" in source:
        options.setdefault("_name_", "nd")
    decoder: nn.Module = nn.Identity()
    reads_lengths = False
    if options:
        kind, given, reads_lengths = arguments.decoder(options)
        classes = {"sequence": SequenceDecoder, "nd": MeanDecoder, "retrieval": RetrievalDecoder}
        decoder = classes[kind](model.d_output, **given)
    return EncodedSequence(encoder, model, decoder, reads_lengths)


# -- what the golden files call --------------------------------------------------------------------------------------


def _run_layer(model: nn.Module, inputs: Mapping[str, Tensor], wanted: Iterable[str] | None) -> dict[str, Tensor]:
    first = bool(model.channels_first)
    x = inputs["x"] if "x" in inputs else next(iter(inputs.values()))
    x = torch.movedim(x, 1, -1) if first else x
    options = {"lengths": inputs["lengths"]} if "lengths" in inputs else {}

    def back(y: Tensor) -> Tensor:
        return torch.movedim(y, -1, 1) if first else y

    names = (
        list(wanted) if wanted is not None else ["y"] + (["y_with_state", "next_state"] if "state" in inputs else [])
    )
    out: dict[str, Tensor] = {}
    if "y" in names:
        out["y"] = back(model(x, **options))
    for name in names:
        if name in out:
            continue
        if name.startswith("y_rate"):
            out[name] = back(model(x, rate=float(name.removeprefix("y_rate")), **options))
        elif name in ("y_with_state", "next_state"):
            state = {"ssm": inputs["state"].clone()}
            out["y_with_state"] = back(model(x, state=state, **options))
            out["next_state"] = state["ssm"]
        elif name.startswith("step"):
            out.update(_steps(model, x, name, first))
        elif name.startswith("mid/"):
            out.update(_layer_mids(model, x, name))
    return {name: out[name] for name in sorted(names, key=lambda name: name != "y") if name in out}


@torch.no_grad()
def _steps(model: nn.Module, x: Tensor, name: str, first: bool) -> dict[str, Tensor]:
    """``step[_mode]`` and ``step_final_state[_mode]``; diagonal kernels have one mode."""
    mode = next((m for m in STEP_MODES if name.endswith(m)), "")
    kernel = next((m for m in model.modules() if isinstance(m, S4Kernel)), None)
    if kernel is not None:
        kernel.setup_step(mode or "dense", limited=False)
    state = model.init_state(x.shape[0])  # type: ignore[operator]
    steps = [model.step(x[:, t], state) for t in range(x.shape[1])]  # type: ignore[operator]
    if kernel is not None:
        kernel.setup_step()
    tail = f"_{mode}" if mode else ""
    # The original stacks steps on the last axis whatever the layout of the layer.
    final = state["ssm"]
    if mode == "dense":  # the original keeps both of each conjugate pair here
        final = torch.cat([final, final.conj()], -1)
    return {f"step{tail}": torch.stack(steps, -1), f"step_final_state{tail}": final}


def _layer_mids(model: nn.Module, x: Tensor, name: str) -> dict[str, Tensor]:
    sizes = x.shape[1:-1]
    if isinstance(model, S4ND):
        return {f"mid/kernel{i}": k for i, k in enumerate(model.kernels(sizes))}
    if isinstance(model, S4D):
        return {"mid/kernel": model.kernel(sizes[0])}
    layer = model.layer if isinstance(model, S4Block) else model
    assert isinstance(layer, FFTConv)
    if name == "mid/kernel":
        return {name: layer.kernels(sizes[0])}
    kernel = layer.kernel
    if "state_before_first_forward" in name and isinstance(kernel, S4Kernel):
        if name.endswith("l_kernel"):
            return {name: torch.zeros_like(kernel.l_kernel)}
        with torch.no_grad():
            C = kernel.output_row(kernel.dense()[0], limited=False)
        return {name: torch.view_as_real(C.resolve_conj()).to(kernel.C.dtype)}
    return {}


def _run_sequence(
    model: EncodedSequence, inputs: Mapping[str, Tensor], wanted: Iterable[str] | None, call: Any
) -> dict[str, Tensor]:
    x = next(value for name, value in inputs.items() if name != "lengths")
    encoded = model.encoder(x)
    lengths = inputs.get("lengths")
    # The layers mask what lies beyond the lengths only where the call hands them over.
    masked = lengths is not None and bool(re.search(r"model\(.*?lengths.*?\)\[0\]", str(call)))
    backbone = model.model(encoded, **({"lengths": lengths} if masked else {}))
    decoder = model.decoder
    y = decoder(backbone, lengths) if lengths is not None and model.reads_lengths else decoder(backbone)
    out = {"y": y, "mid/backbone": backbone}
    if wanted is not None and "step_logits" in wanted:
        assert isinstance(decoder, SequenceDecoder)
        with torch.no_grad():
            state = model.model.init_state(x.shape[0])
            steps = [model.model.step(encoded[:, t], state) for t in range(x.shape[1])]
            out["step_logits"] = decoder.output_transform(torch.stack(steps, 1))
    return out


def _run_language_model(model: S4LanguageModel, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tokens = inputs.get("tokens", inputs.get("x", next(iter(inputs.values()))))
    hidden = model.model(model.encoder(tokens))
    out = {"log_probabilities": model.loss.log_probabilities(hidden), "mid/hidden": hidden}
    if "targets" in inputs:
        out["loss"] = model.loss(hidden, inputs["targets"]).mean()
    return out


def _run_s5(model: S5Classifier, inputs: Mapping[str, Tensor], wanted: Iterable[str] | None) -> dict[str, Tensor]:
    lengths = inputs.get("lengths")
    x = inputs["x"] if "x" in inputs else next(iter(inputs.values()))
    out = {"log_probs": model(x, lengths)}
    for name in wanted or ():
        if name.startswith("log_probs_step_rescale"):
            out[name] = model(x, lengths, step_rescale=float(name.removeprefix("log_probs_step_rescale")))
        elif name == "mid/ssm_layer0_of_u":
            out[name] = model.layers[0].seq(inputs["u_ssm"][None])[0]  # type: ignore[operator, union-attr]
    return out
