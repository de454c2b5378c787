"""What replays the Dynamical Systems Framework: its formulas, and the study's layers under their original keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.analysis import QLSTM, CausalAttention, Form, GatedAttention, NormalisedAttention, NormAttention, formulas
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules

#: Arguments of the study's layers that say where they stand or how they start, not what they compute.
_SILENT = {"layer_idx", "seq_len", "l_max", "mode", "offset_init", "learn_A", "use_flash"}


class Formulas(nn.Module):
    """Every mixer of the table from the golden file's weights, on one sequence in float64."""

    def forward(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of ``in/`` to those of ``out/``, both under their names there."""
        u = t["u"]
        found: dict[str, Tensor] = {}
        if "attn.Wq" in t:
            found |= self._attentions(t, u)
        if "s4d.lambda" in t:
            form = formulas.s4d(t["s4d.lambda"], t["s4d.dt"], t["s4d.B"], t["s4d.C"], t["s4d.D"], len(u))
            found |= self._named("s4d", form, u, torch.exp(t["s4d.lambda"] * t["s4d.dt"][:, None]))
        if "s6.W_B" in t:
            b, c = u @ t["s6.W_B"].T, u @ t["s6.W_C"].T
            if "s6.W_dt" in t:
                delta = torch.nn.functional.softplus(u @ t["s6.W_dt"].T + t["s6.b_dt"])
                form = formulas.s6(delta, torch.exp(t["s6.A_log"]), b, c, t["s6.D"])
                found |= self._named("s6", form, u, form.A)
            if "ssd.W_dt" in t:
                delta = torch.nn.functional.softplus(u @ t["ssd.W_dt"].T + t["ssd.b_dt"])[:, 0]
                rate = torch.exp(t["ssd.A_log"])[0]
                form = formulas.ssd(delta, rate, b, c, t["ssd.D"][0], u.shape[1])
                found |= self._named("ssd", form, u, torch.exp(-rate * delta))
                found["ssd.eta_equivalent"] = formulas.ssd_eta(delta, rate)
        if "qlstm.W_f" in t:
            f, i, o = (u @ t[f"qlstm.W_{g}"].T + t[f"qlstm.b_{g}"] for g in "fio")
            decays = {"qlstm": torch.sigmoid(f), "qlstm_reversed": formulas.reversed_sigmoid(f, t["qlstm.alpha"])}
            for name, decay in decays.items():
                form = formulas.qlstm(decay, torch.sigmoid(i), torch.sigmoid(o), t["qlstm.W_u"])
                found |= self._named(name, form, u, decay)
        if "rglru.Lambda" in t:
            r, g = (torch.sigmoid(u @ t[f"rglru.W_{n}"].T + t[f"rglru.b_{n}"]) for n in "ax")
            form = formulas.rglru(r, g, torch.sigmoid(t["rglru.Lambda"]))
            found |= self._named("rglru", form, u, form.A)
        if "lstm.U_f" in t:
            W = {g: t[f"qlstm.W_{g}"] for g in "fiou"}
            U = {g: t[f"lstm.U_{g}"] for g in "fiou"}
            b = {g: t[f"qlstm.b_{g}"] for g in "fio"}
            found["lstm.y"], found["lstm.cell_eig"] = formulas.lstm(u, W, U, b)
        return found

    def _attentions(self, t: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        q, k, W_V = u @ t["attn.Wq"].T, u @ t["attn.Wk"].T, t["attn.Wv"]
        found: dict[str, Tensor] = {}
        scores = q @ k.T / q.shape[1] ** 0.5
        weights = formulas.softmax_weights(q, k)
        log_eta = formulas.softmax_eta(scores)
        phi = weights[:, :, None, None] * W_V
        found |= {
            "softmax_attention.eta": log_eta.exp(),
            "softmax_attention.eig": torch.exp(log_eta[:-1] - log_eta[1:]),
            "softmax_attention.weights": weights,
            "softmax_attention.mixing": phi,
            "softmax_attention.y": torch.einsum("ijod,jd->io", phi, u),
        }
        elu = torch.nn.functional.elu
        features = {
            "linear_attention": (elu(q) + 1, elu(k) + 1),
            "taylor2_attention": (formulas.taylor_features(q), formulas.taylor_features(k)),
        }
        normalisers = {name: formulas.causal_eta(*pair) for name, pair in features.items()}
        if "attn.Wn" in t:
            features["norm_attention"] = (q, k)
            normalisers["norm_attention"] = torch.exp(u @ t["attn.Wn"].T)[:, 0]
        for name, (phi_q, psi_k) in features.items():
            eta = normalisers[name]
            form = formulas.separable_attention(phi_q, psi_k, W_V, eta)
            found |= self._named(name, form, u, formulas.eta_ratio(eta)) | {f"{name}.eta": eta}
        if "mlstm.w_f" in t:
            forget = torch.sigmoid(u @ t["mlstm.w_f"].T + t["mlstm.b_f"])[:, 0]
            write = torch.exp(u @ t["mlstm.w_i"].T + t["mlstm.b_i"])[:, 0]
            form, eta = formulas.mlstm(q, k, W_V, forget, write, torch.sigmoid(u @ t["mlstm.W_o"].T))
            found |= self._named("mlstm", form, u, forget) | {"mlstm.eta": eta}
        return found

    @staticmethod
    def _named(name: str, form: Form, u: Tensor, eigenvalues: Tensor) -> dict[str, Tensor]:
        return {
            f"{name}.A_diag": form.A,
            f"{name}.B": form.B,
            f"{name}.C": form.C,
            f"{name}.eig": eigenvalues,
            f"{name}.y": form.outputs(u),
            f"{name}.mixing": form.mixing(),
            f"{name}.lag_profile": form.lag_profile(),
        }


class Layers(nn.ModuleDict):
    """Some of the study's layers, each on its own input."""

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, layer in self.items():
            x = inputs[f"{name}.x"]
            found[f"{name}.y"] = layer(x)
            if not isinstance(layer, GatedAttention):
                found[f"{name}.eig"] = layer.eigenvalues(x)  # type: ignore[operator]
        return found


def layer_of(name: str, config: Mapping[str, Any], keys: set[str]) -> nn.Module:
    """One layer from the original's arguments and the keys of its state dict."""
    arguments = {k: v for k, v in config.items() if k not in _SILENT}
    if "gates.weight" in keys:
        arguments.pop("d_qk", None)  # the original takes it and reads it nowhere
        return QLSTM(**{"alpha": "alpha" in keys, **arguments})
    if "Wvqkn.weight" in keys:
        return NormAttention(**arguments)
    if "in_proj.weight" in keys:
        return GatedAttention(**arguments)
    if "Wn.weight" in keys:
        arguments.pop("lin_att", None)
        return NormalisedAttention(**arguments)
    if "Wqk.weight" in keys:
        return CausalAttention(**arguments)
    raise ValueError(f"dsf: {name} has the keys {', '.join(sorted(keys))}, which belong to no layer of the study")


class DSFAdapter(ReferenceAdapter):
    """Reads the formulas (no weights of their own) and IntelligentControlSystems/dsf-mqar's attentions and qLSTM."""

    system = "dsf"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if not state:
            return Formulas()
        layers = {}
        for name, own in config.items():
            keys = {k.removeprefix(f"{name}.") for k in state if k.startswith(f"{name}.")}
            layers[name] = layer_of(name, own, keys)
        return self.load(Layers(layers), state)

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules(Rename("{name}.inner_attn.offset", "{name}.offset"))

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        return model.replay(inputs) if isinstance(model, Layers) else model(inputs)
