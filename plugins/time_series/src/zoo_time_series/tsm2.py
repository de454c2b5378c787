"""TSM2: forecasting by a selective scan over the patches of each variate and one over the variates, in turn.

Paper: Behrouz, Santacatterina and Zabih, "MambaMixer: Efficient Selective State Space Models with Dual Token and
Channel Selection", arXiv 2403.19888 (version 1). The authors published no code; the concrete form is that of
n8thantran/mambamixer-replication @ 34052f7 (``tsm2_model.py``; no licence stated), whose numbers this replays.
Differs from it: the backward scan over the variates walks them from the end, nothing is flipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Linear, Mamba
from zoo.reference import ReferenceAdapter
from zoo.rules import Rules

from ._base import Forecaster, call_with

EPS = 1e-5


class Norm2d(nn.Module):
    """LayerNorm over the features, then over the patches: (..., patches, d_model)."""

    def __init__(self, patches: int, d_model: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(patches)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.norm1(x).transpose(-1, -2)).transpose(-1, -2)


def average(weights: Tensor, features: Sequence[Tensor]) -> Tensor:
    """The features weighed by the softmax of ``weights``."""
    shares = weights.softmax(0)
    return sum((shares[i] * x for i, x in enumerate(features[1:], start=1)), start=shares[0] * features[0])


class TSM2(GradCheckpointing, Forecaster):
    """Patches of each variate, ``num_layers`` x (token mixer, channel mixer), one linear head for all variates.

    Arguments (the replication's): ``num_variates`` M, a hint: any number runs; ``seq_len`` L of history, ``pred_len``
    H, ``patch_len`` P and ``stride`` S (N = (L - P) // S + 1 patches, a tail that fills none is not seen), ``d_model``
    D, ``d_state``, ``d_conv``, ``expand`` of Mamba, ``dropout``.

    Every mixer reads a weighted average of all earlier token and channel outputs (``alpha``, ``beta``; ``theta``,
    ``gamma``: softmax of each, so the two parts weigh 2 together). Windows are normalised by their own mean and
    deviation (n - 1, plus 1e-5). Raises ValueError for another length of history.
    """

    def __init__(
        self,
        num_variates: int = 7,
        seq_len: int = 512,
        pred_len: int = 96,
        patch_len: int = 16,
        stride: int = 8,
        d_model: int = 128,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        num_layers: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < patch_len <= seq_len or stride < 1 or pred_len < 1:
            raise ValueError(
                f"seq_len {seq_len}, patch_len {patch_len}, stride {stride}, pred_len {pred_len}; expected a patch no "
                "longer than the history, and a stride and a horizon of at least 1"
            )
        if d_model < 1 or num_layers < 0:
            raise ValueError(f"d_model is {d_model}, num_layers {num_layers}; expected 1 or more, and 0 or more")
        self.num_variates, self.lag, self.horizon = num_variates, seq_len, pred_len
        self.patch_len, self.stride, self.num_layers = patch_len, stride, num_layers
        patches = (seq_len - patch_len) // stride + 1
        self.patch_embedding = Linear(patch_len, d_model)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, d_model) * 0.02)

        def mixers() -> nn.ModuleList:
            return nn.ModuleList(Mamba(d_model, d_state, d_conv, expand) for _ in range(num_layers))

        self.token_mixers, self.channel_mixers_fwd, self.channel_mixers_bwd = mixers(), mixers(), mixers()
        self.token_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))
        self.channel_norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(num_layers))

        def weights(extra: int) -> nn.ParameterList:
            counts = [i + extra for i in range(num_layers)]
            return nn.ParameterList(nn.Parameter(torch.full((n,), 1 / n)) for n in counts)

        self.alpha, self.beta, self.theta, self.gamma = weights(1), weights(1), weights(2), weights(1)
        self.norm_2d = Norm2d(patches, d_model)
        self.head = Linear(d_model * patches, pred_len)
        self.dropout = nn.Dropout(dropout)

    @property
    def unused_parameters(self) -> list[str]:
        """A softmax of one weight is 1 whatever the weight is."""
        return [f"{name}.0" for name in ("alpha", "beta", "gamma") if self.num_layers]

    def forward(self, series: Tensor) -> Tensor:
        """(batch, seq_len, M) to (batch, pred_len, M), both in the series' own scale."""
        if series.dim() != 3 or series.shape[1] != self.lag or series.shape[2] < 1:
            raise ValueError(
                f"series has shape {tuple(series.shape)}; expected (batch, {self.lag}, variates): its position "
                "embedding and head are made for that length"
            )
        return self.forward_features(series)["forecast"]

    def forward_features(self, series: Tensor) -> dict[str, Tensor]:
        """``forecast`` and what lies between, each of rows (batch * M) or (batch * N): ``patch_embedding``,
        ``layer{i}_token_mamba``, ``layer{i}_channel_fwd``, ``norm2d``."""
        batch, _, variates = series.shape
        mean = series.mean(1, keepdim=True)
        std = series.std(1, keepdim=True) + EPS
        x = ((series - mean) / std).transpose(1, 2).unfold(-1, self.patch_len, self.stride)
        x = self.patch_embedding(x)
        found = {"patch_embedding": x.flatten(0, 1)}
        x = self.dropout(x + self.pos_embed)
        tokens, channels = [x], [x]  # (batch, M, N, D) each
        for i in range(self.num_layers):
            t = average(self.alpha[i], tokens) + average(self.beta[i], channels)
            y = self.token_mixers[i](self.token_norms[i](t).flatten(0, 1))
            found[f"layer{i}_token_mamba"] = y
            tokens.append(self.dropout(y.unflatten(0, (batch, variates))) + t)
            c = average(self.theta[i], tokens) + average(self.gamma[i], channels)
            across = self.channel_norms[i](c).transpose(1, 2).flatten(0, 1)  # (batch * N, M, D)
            y = self.channel_mixers_fwd[i](across)
            found[f"layer{i}_channel_fwd"] = y
            y = y + self.channel_mixers_bwd[i](across, reverse=True)
            channels.append(self.dropout(y.unflatten(0, (batch, -1))).transpose(1, 2) + c)
        out = self.norm_2d(channels[-1])
        found["norm2d"] = out.flatten(0, 1)
        answer = self.head(self.dropout(out.flatten(2))).transpose(1, 2)
        found["forecast"] = answer * std + mean
        return found

    def loss(self, series: Tensor, target: Tensor) -> Tensor:
        """The mean squared error of the forecast, (batch, seq_len, M) against (batch, pred_len, M)."""
        return F.mse_loss(self(series), target)


class MambaMixerAdapter(ReferenceAdapter):
    """Reads n8thantran/mambamixer-replication's TSM2 (the authors of MambaMixer published no code)."""

    system = "mambamixer"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(call_with(TSM2, config, "TSM2"), state)

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        assert isinstance(model, TSM2)
        found = model.forward_features(inputs["series"])
        return {"forecast": found.pop("forecast")} | {f"mid/{name}": tensor for name, tensor in found.items()}

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return Rules()  # the keys are the original's
