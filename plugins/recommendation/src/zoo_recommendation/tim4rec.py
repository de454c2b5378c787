"""TiM4Rec: time-aware state-space duality for sequential recommendation (and SSD4Rec as its authors rebuilt it).

Paper: Fan et al., "TiM4Rec", arXiv 2409.16182. Original: AlwaysFHao/TiM4Rec @ 8d4a6ce, MIT (tim4rec.py, ssd.py).
Differs from the original: one Mamba-2 layer of the zoo under it; a model without time features holds a user as a state
of fixed size. The time features normalise over all ``max_length`` positions at once (``Linear(L, L)``), so a model with
them cannot: one more item changes every step, and serving recomputes the last ``max_length`` items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers import GradCheckpointing, Mamba2, Recomputed
from zoo.layers.linear import Linear, linear
from zoo.reference import ReferenceAdapter, unwrapped
from zoo.rules import Rename, Rules
from zoo_kernels import causal_conv1d

from ._base import FeedForward, SequentialRecommender, UserState, at_least_one, init_normal, outputs, take
from .last import Dropout, rows_at, ssd_at
from .protocol import ProtocolReplay


class TimeGate(nn.Module):
    """How much each step's dt is stretched, from the time between interactions (paper, section 3.3).

    ``scale = Linear(silu(Linear(tau)))`` over the length, ``m = conv(conv(tau * scale))`` along it (one channel a
    head); the next layer gets ``LN(g * tau + (1 - g) * m)`` with ``g = sigmoid(Linear(tau))``.
    tau, m: (batch, heads, length).
    """

    def __init__(
        self, max_length: int, heads: int, d_conv: int, dropout: float, point_to_point: bool, eps: float, act: str
    ) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.act = act
        self.scale_in = Linear(max_length, max_length)
        self.scale_out = Linear(max_length, max_length)
        self.conv1 = nn.Conv1d(heads, heads, d_conv, groups=heads)
        self.conv2 = nn.Conv1d(heads, heads, d_conv, groups=heads)
        self.gate = Linear(max_length, max_length if point_to_point else 1)
        self.norm = nn.LayerNorm(max_length, eps=eps)

    def forward(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """(m, next tau)."""
        m = self.stretch(tau)
        gate = torch.sigmoid(self.gate(self.dropout(tau)))
        return m, self.norm(gate * tau + (1 - gate) * m)

    def stretch(self, tau: Tensor) -> Tensor:
        """m alone, which is all that a last layer reads."""
        scale = self.scale_out(F.silu(self.scale_in(self.dropout(tau))))
        m = (tau * scale).transpose(1, 2)  # (batch, length, heads)
        for conv in (self.conv1, self.conv2):
            m = conv_act(m, conv, self.act)
        return m.transpose(1, 2)


def conv_act(x: Tensor, conv: nn.Conv1d, act: str | None) -> Tensor:
    """Causal depthwise convolution along the length, then the activation the original would have used."""
    y, _ = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu" if act == "silu" else None)
    return F.hardswish(y) if act == "hardswish" else y


class TimeAwareSSD(Mamba2):
    """Mamba-2 with dt stretched by the time gate: ``dt = softplus(dt_raw * m + dt_bias)``."""

    def __init__(self, hidden_size: int, time: TimeGate | None, **arguments) -> None:
        super().__init__(hidden_size, bias=True, **arguments)
        self.time = time

    def forward_with_time(self, u: Tensor, tau: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """u (batch, length, hidden), tau (batch, heads, length) or None; the output and the next layer's tau."""
        z0, x0, z, xBC, dt = self._split(u)
        if self.time is not None:
            assert tau is not None
            m, tau = self.time(tau)
            dt = dt * m.transpose(1, 2)
        return self._finish(self.scan(xBC, dt), z, z0, x0), tau

    def at(self, u: Tensor, tau: Tensor | None, index: Tensor) -> Tensor:
        """The output of :meth:`forward_with_time` at the row ``index`` (batch,) of each sequence: (batch, hidden)."""
        weight, bias = self.in_proj.weight, self.in_proj.bias
        rows = [self.d_ssm, weight.shape[0] - self.d_ssm]  # z first; this mixer has no channels beside the scan
        (gate_weight, weight), (gate_bias, bias) = weight.split(rows), bias.split(rows)
        z = linear(rows_at(u, index), gate_weight, gate_bias)
        xBC, dt = linear(u, weight, bias).split([self.conv1d.weight.shape[0], self.nheads], dim=-1)
        if self.time is not None:
            assert tau is not None
            dt = dt * self.time.stretch(tau).transpose(1, 2)
        x, B, C = self._parts(conv_act(xBC, self.conv1d, self.conv_activation))
        A, skip = -torch.exp(self.A_log.float()), self._skip()
        y = ssd_at(x, dt, A, B, rows_at(C, index), skip, self.dt_bias.float(), index, self.dt_limit)
        return self._finish(y.flatten(-2), z, z, z)


class Layer(Recomputed):
    """Mixer, dropout, (residual,) norm, feed-forward. A one-layer model has no residual around its mixer."""

    def __init__(
        self, hidden_size: int, ssd: TimeAwareSSD, dropout: float, eps: float, *, residual: bool, ffn: bool
    ) -> None:
        super().__init__()
        self.ssd = ssd
        self.residual = residual
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=eps)
        # The original's feed-forward norm has this eps whatever the configuration says.
        self.ffn = FeedForward(hidden_size, dropout, nn.Hardswish(), eps=1e-12) if ffn else None

    def close(self, mixed: Tensor, x: Tensor) -> Tensor:
        hidden = self.dropout(mixed)
        hidden = self.layer_norm(hidden + x if self.residual else hidden)
        return hidden if self.ffn is None else self.ffn(hidden)

    def forward(self, x: Tensor, tau: Tensor | None) -> tuple[Tensor, Tensor | None]:
        mixed, tau = self.ssd.forward_with_time(x, tau)
        return self.close(mixed, x), tau

    def at(self, x: Tensor, tau: Tensor | None, index: Tensor) -> Tensor:
        """:meth:`forward` at one row of each sequence, (batch, hidden): nothing after the scan sees the others."""
        return self.close(self.ssd.at(x, tau, index), rows_at(x, index))


class TiM4Rec(GradCheckpointing, SequentialRecommender):
    """TiM4Rec; with ``time=False`` the SSD4Rec of its authors' comparison.

    Arguments: ``n_items`` (counting the padding item 0), ``hidden_size`` D, ``num_layers``, ``max_length`` L (part of
    the weights when ``time``), ``d_state``, ``d_conv``, ``expand``, ``head_dim``, ``dropout`` and ``time_dropout``,
    ``time`` and ``point_to_point`` (a gate per position instead of one), ``norm_eps``, ``feed_forward``,
    ``kaiming_init`` (of the convolutions), ``loss_type`` "CE" or "BPR"; ``time_scale`` (no part of the network: the
    (first, last) second that were 0 and 1 in training, so that whoever reads seconds for it scales them).
    """

    def __init__(
        self,
        n_items: int,
        hidden_size: int = 64,
        num_layers: int = 2,
        max_length: int = 50,
        d_state: int = 32,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 32,
        chunk_size: int = 32,
        dropout: float = 0.2,
        time_dropout: float = 0.2,
        time: bool = True,
        point_to_point: bool = False,
        norm_eps: float = 1e-12,
        feed_forward: bool = True,
        kaiming_init: bool = True,
        loss_type: str = "CE",
        time_scale: Sequence[float] | None = None,
    ) -> None:
        super().__init__(n_items, hidden_size, max_length, loss_type)  # type: ignore[arg-type]
        at_least_one(num_layers=num_layers, head_dim=head_dim)
        self.heads = expand * hidden_size // head_dim
        # The original takes its convolution's activation from a CUDA package where the head count allows it.
        act = "silu" if self.heads % 8 == 0 else "hardswish"
        self.recurrent, self.reads_times = not time, time
        self.time_scale = None if time_scale is None else (float(time_scale[0]), float(time_scale[1]))
        self.dropout = Dropout(dropout)
        self.in_layer_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.time_norm = nn.LayerNorm(max_length, eps=norm_eps) if time else None
        self.layers = nn.ModuleList(
            Layer(
                hidden_size,
                TimeAwareSSD(
                    hidden_size,
                    TimeGate(max_length, self.heads, d_conv, time_dropout, point_to_point, norm_eps, act)
                    if time
                    else None,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    headdim=head_dim,
                    chunk_size=chunk_size,
                    norm_eps=norm_eps,
                    conv_activation=act,
                ),
                dropout,
                norm_eps,
                residual=num_layers > 1,
                ffn=feed_forward,
            )
            for _ in range(num_layers)
        )
        # What the last layer would hand to a next one has no reader; the original holds it all the same.
        last = f"layers.{num_layers - 1}.ssd.time."
        self.unused_parameters = (last + "gate", last + "norm") if time else ()
        self.apply(init_normal)
        if kaiming_init:
            for module in self.modules():
                if isinstance(module, nn.Conv1d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)

    def time_features(self, times: Tensor) -> Tensor:
        """Differences between neighbouring times, normalised over the length: (batch, heads, length).

        times (batch, length): in float32 or more, whatever the model's dtype (half precision cannot hold seconds).
        Padding is not masked, as in the original: the step from the last item to the first 0 is ``-times[last]``.
        """
        assert self.time_norm is not None
        if times.dim() != 2 or times.shape[1] != self.max_length:
            raise ValueError(
                f"times has shape {tuple(times.shape)}; a model with time features needs its own max_length "
                f"{self.max_length} (right-padded with 0): the length is part of its weights"
            )
        norm, difference = self.time_norm, F.pad(times[:, 1:] - times[:, :-1], (1, 0))
        # Seconds since 1970 are beyond float16, and bfloat16 counts them in months: float32 until they are normalised.
        work = torch.promote_types(torch.promote_types(times.dtype, norm.weight.dtype), torch.float32)
        weight, bias = norm.weight.to(work), norm.bias.to(work)
        tau = F.layer_norm(self.dropout(difference.to(work)), norm.normalized_shape, weight, bias, norm.eps)
        return tau.to(norm.weight.dtype)[:, None].expand(-1, self.heads, -1)

    def encode(self, item_seq: Tensor, times: Tensor | None = None) -> Tensor:
        return self.encode_layers(item_seq, times)[-1][0]

    def encode_at(self, item_seq: Tensor, index: Tensor, times: Tensor | None = None) -> Tensor:
        x, tau = self._embed(item_seq, times)
        *first, last = self.layers
        for layer in first:
            x, tau = layer(x, tau)
        return last.at(x, tau, index)  # type: ignore[union-attr, operator]

    def _embed(self, item_seq: Tensor, times: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.time_norm is not None and times is None:
            raise ValueError("this model reads the time of each interaction: pass times=(batch, length)")
        if times is not None and times.shape != item_seq.shape:
            raise ValueError(
                f"times has shape {tuple(times.shape)}, item_seq {tuple(item_seq.shape)}; expected the same"
            )
        x = self.in_layer_norm(self.dropout(self.item_embedding(item_seq)))
        return x, self.time_features(times) if self.time_norm is not None and times is not None else None

    def encode_layers(self, item_seq: Tensor, times: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """(hidden, next time features) after every layer."""
        x, tau = self._embed(item_seq, times)
        found = []
        for layer in self.layers:
            x, tau = layer(x, tau)
            found.append((x, tau))
        return found

    def init_user(self, batch: int) -> UserState:
        if not self.recurrent:
            return super().init_user(batch)
        return [layer.ssd.init_state(batch) for layer in self.layers]  # type: ignore[union-attr, operator, misc]

    def step(self, item: Tensor, state: UserState) -> Tensor:
        if not self.recurrent:
            return super().step(item, state)
        x = self.in_layer_norm(self.item_embedding(item))
        for layer, layer_state in zip(self.layers, state, strict=True):
            x = layer.close(layer.ssd.step(x, layer_state), x)  # type: ignore[union-attr, operator]
        return x


# -- the original's format --------------------------------------------------------------------------------------------

RULES = Rules(
    Rename("layer_norm_time.{p}", "time_norm.{p}"),
    Rename("ssd_layers.{i:d}.ssd.mlp4time_scale.1.{p}", "layers.{i:d}.ssd.time.scale_in.{p}"),
    Rename("ssd_layers.{i:d}.ssd.mlp4time_scale.3.{p}", "layers.{i:d}.ssd.time.scale_out.{p}"),
    Rename("ssd_layers.{i:d}.ssd.conv1d4time_1.{p}", "layers.{i:d}.ssd.time.conv1.{p}"),
    Rename("ssd_layers.{i:d}.ssd.conv1d4time_2.{p}", "layers.{i:d}.ssd.time.conv2.{p}"),
    Rename("ssd_layers.{i:d}.ssd.time_gate_residual.1.{p}", "layers.{i:d}.ssd.time.gate.{p}"),
    Rename("ssd_layers.{i:d}.ssd.time_layer_norm.{p}", "layers.{i:d}.ssd.time.norm.{p}"),
    Rename("ssd_layers.{i:d}.{rest:*}", "layers.{i:d}.{rest:*}"),
)

#: The original's configuration keys and ours.
CONFIG = {
    "n_items": "n_items",
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "MAX_ITEM_LIST_LENGTH": "max_length",
    "d_state": "d_state",
    "d_conv": "d_conv",
    "expand": "expand",
    "head_dim": "head_dim",
    "chunk_size": "chunk_size",
    "dropout_prob": "dropout",
    "time_drop_out": "time_dropout",
    "is_time": "time",
    "p2p_residual": "point_to_point",
    "norm_eps": "norm_eps",
    "is_ffn": "feed_forward",
    "is_kai_ming_init": "kaiming_init",
    "loss_type": "loss_type",
}


class TiM4RecAdapter(ReferenceAdapter):
    """Reads AlwaysFHao/TiM4Rec; also replays RecBole's data protocol, which its numbers depend on."""

    system = "tim4rec"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        if "core" in config:  # a file of the data protocol, no model
            return ProtocolReplay(config)
        arguments = take(config, CONFIG, self.system)
        # A switch that the configuration does not set is off in RecBole; a state dict shows it.
        arguments.setdefault("time", "layer_norm_time.weight" in unwrapped(state))
        arguments.setdefault("feed_forward", any(".ffn." in key for key in state))
        arguments["loss_type"] = "CE"  # the original has this loss whatever the configuration says
        if "norm_eps" in arguments:
            arguments["norm_eps"] = float(arguments["norm_eps"])  # plain YAML reads 1e-12 as a string
        return self.load(TiM4Rec(**arguments), state)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        if isinstance(model, ProtocolReplay):
            return model(inputs)
        assert isinstance(model, TiM4Rec)
        items, lengths, times = inputs["item_seq"], inputs["item_seq_len"], inputs.get("timestamp_list")
        behind = torch.arange(items.shape[1], device=items.device) >= lengths[:, None]
        if times is not None and bool((times[behind] != 0).any()):
            # Full-size cards give raw draws, to be sorted and cut at the length; real histories are that already.
            items, times = items.masked_fill(behind, 0), times.sort(dim=1).values.masked_fill(behind, 0)
        user = model(items, lengths, times)
        found = outputs(model, user, inputs)
        for i, (hidden, tau) in enumerate(model.encode_layers(items, times)):
            found[f"mid/layer{i}_hidden"] = hidden
            if tau is not None:
                found[f"mid/layer{i}_time"] = tau
        if model.time_norm is not None and times is not None:
            found["mid/time_diff0"] = model.time_features(times)[:, 0]
        return found

    def loss(self, golden, named):
        return named["out/full_sort_scores"].pow(2).mean()

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return RULES


class SSD4RecAdapter(TiM4RecAdapter):
    """SSD4Rec as TiM4Rec's authors rebuilt it for their comparison (``baseline/SSD4Rec_r``): TiM4Rec without time."""

    system = "ssd4rec"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return super().build({**config, "is_time": False}, state, source=source)
