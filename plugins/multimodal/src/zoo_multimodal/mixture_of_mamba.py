"""Mixture-of-Mamba: a Mamba block whose linear layers exist once for each modality.

Paper: Liang et al., "Mixture-of-Mamba: Enhancing Multi-Modal State-Space Models with Modality-Aware Sparsity", arXiv
2501.16295. Original: Weixin-Liang/Mixture-of-Mamba @ ca607f7, MIT (``MixtureOfMamba.py``, ``BaselineDenseMamba.py``).
Differs: a token in no mask is an error (there: uninitialised memory), and there is a state with
:meth:`MixtureOfMamba.step` (there: missing). The dense baseline is :class:`zoo.layers.Mamba`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.layers import Mamba
from zoo.layers.init import inverse_softplus_log_uniform
from zoo.reference import ReferenceAdapter
from zoo.rules import Rename, Rules
from zoo_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

from .routing import RoutedLinear, Routing, route

State = dict[str, Tensor]
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class MixtureOfMamba(Mamba):
    """A selective state-space mixer with projections of each modality's own; convolution, A, D and state are shared.

    Arguments: :class:`zoo.layers.Mamba`'s; ``n_modalities`` M; ``split``, the projections that exist once a modality
    (the paper's ablations leave some out). Parameters: Mamba's, with ``in_proj.{m}.weight`` ... for those split.

    As in the original, a dt_proj that is not split adds no bias to dt: ``dt_proj.bias`` is kept and unused.
    Source: paper, section 3 (the block with modality-aware sparsity).
    """

    def __init__(
        self,
        d_model: int,
        n_modalities: int,
        *,
        split: Sequence[str] = PROJECTIONS,
        bias: bool = False,
        **arguments: Any,
    ) -> None:
        if n_modalities < 1:
            raise ValueError(f"n_modalities is {n_modalities}; expected 1 or more")
        if unknown := sorted(set(split) - set(PROJECTIONS)):
            raise ValueError(f"split names {unknown[0]!r}; expected some of {', '.join(PROJECTIONS)}")
        super().__init__(d_model, bias=bias, **arguments)
        self.n_modalities, self.split = n_modalities, tuple(p for p in PROJECTIONS if p in split)
        for name in self.split:
            one = getattr(self, name)
            kind = {"device": one.weight.device, "dtype": one.weight.dtype}
            sizes = one.in_features, one.out_features
            setattr(self, name, RoutedLinear(n_modalities, *sizes, bias=one.bias is not None, **kind))
        if "dt_proj" in self.split:
            self._reset_dt()
        self.unused_parameters = () if "dt_proj" in self.split else ("dt_proj.bias",)

    def _reset_dt(self) -> None:
        """dt's layers as Mamba's, the time steps of each modality drawn for itself."""
        dt_min, dt_max, floor, scale, kind = self.dt_limits
        bound = self.dt_rank**-0.5 * scale
        with torch.no_grad():
            for layer in self.dt_proj:  # type: ignore[union-attr, attr-defined]
                layer.weight.uniform_(-bound, bound) if kind == "random" else layer.weight.fill_(bound)
                layer.bias.copy_(inverse_softplus_log_uniform(layer.bias, dt_min, dt_max, floor))

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        return super().init_state(batch, device=device, dtype=self.conv1d.weight.dtype if dtype is None else dtype)

    def _routing(self, modality: Tensor | Routing | None, u: Tensor) -> Routing | None:
        if modality is None:
            if self.split:
                raise ValueError("modality is missing; expected masks, a number for each token, or a routing")
            return None
        return route(modality, self.n_modalities, math.prod(u.shape[:-1])) if self.split else None

    def _project(self, name: str, x: Tensor, routing: Routing | None) -> Tensor:
        layer = getattr(self, name)
        return layer(x, routing) if isinstance(layer, RoutedLinear) else layer(x)

    def _time_step(self, low: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor | None]:
        """What the scan takes as dt, and the matrix that it still has to apply."""
        if isinstance(self.dt_proj, RoutedLinear):
            return self.dt_proj(low, routing), None  # the expert's own bias is in
        return low, self.dt_proj.weight

    def forward(  # type: ignore[override]
        self, u: Tensor, modality: Tensor | Routing | None = None, *, state: State | None = None, **walk: Any
    ) -> Tensor:
        """(batch, length, D) to (batch, length, D).

        modality: masks (M, batch * length) over tokens b * length + t, where a token in several belongs to the lowest;
        numbers (batch, length); or what :func:`zoo_multimodal.routing.route` made of either, for several blocks. Rows
        behind ``lengths`` need a modality too, any. state, and in ``walk`` path, reverse, resets, lengths: as in
        :class:`zoo.layers.Mamba`. Raises ValueError for a token in no mask.
        """
        routing = self._routing(modality, u)
        y, _ = self.mix(u, routing, state=state, **walk)
        return self._project("out_proj", y, routing)

    def mix(  # type: ignore[override]
        self,
        u: Tensor,
        modality: Tensor | Routing | None = None,
        *,
        gate: bool = True,
        path: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scan before ``out_proj``, and z: (batch, length, E) each. ``gate=False`` leaves ``silu(z)`` out of it."""
        routing = self._routing(modality, u)
        x, z = self._project("in_proj", u, routing).chunk(2, dim=-1)
        walk: dict[str, Any] = {"path": path, "reverse": reverse, "resets": resets, "lengths": lengths}
        keep = state is not None
        x, conv = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu",
            initial_state=state["conv"] if state is not None else None, return_final_state=keep, **walk,
        )  # fmt: skip
        sizes = [self.dt_rank, self.d_state, self.d_state]
        low, B, C = self._project("x_proj", x, routing).split(sizes, dim=-1)
        dt, dt_proj = self._time_step(low, routing)
        y, ssm = selective_scan(
            x, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), z if gate else None, dt_proj=dt_proj,
            dt_softplus=True, initial_state=state["ssm"] if state is not None else None, return_final_state=keep,
            **walk,
        )  # fmt: skip
        if state is not None:
            assert conv is not None
            assert ssm is not None
            state["conv"].copy_(conv.detach())
            state["ssm"].copy_(ssm.detach())
        return y, z

    def step(self, u: Tensor, state: State, modality: Tensor | Routing | None = None) -> Tensor:  # type: ignore[override]
        """One token of each text: (batch, D) and its modality (batch,) to (batch, D); ``state`` moves on in place."""
        routing = self._routing(modality, u)
        x, z = self._project("in_proj", u, routing).chunk(2, dim=-1)
        x = causal_conv1d_step(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"], activation="silu"
        )
        sizes = [self.dt_rank, self.d_state, self.d_state]
        low, B, C = self._project("x_proj", x, routing).split(sizes, dim=-1)
        dt, dt_proj = self._time_step(low, routing)
        if dt_proj is not None:
            dt = dt @ dt_proj.t()
        y = selective_scan_step(
            x, dt, -torch.exp(self.A_log.float()), B, C, self.D.float(), z, None, state=state["ssm"], dt_softplus=True
        )
        return self._project("out_proj", y, routing)


# -- the original's format

_SWITCH = {f"do_not_split_{name}": name for name in PROJECTIONS}
_MAMBA = {"d_model", "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale",
          "dt_init_floor", "conv_bias", "bias"}  # fmt: skip
#: Arguments without effect on the numbers.
_INERT = {"use_fast_path", "layer_idx", "device", "dtype"}
RULES = Rules(
    *(Rename(f"local_experts_{name}.{{m:d}}.{{rest}}", f"{name}.{{m:d}}.{{rest}}") for name in PROJECTIONS),
)


class MixtureOfMambaAdapter(ReferenceAdapter):
    """Reads ``MixtureOfMamba`` and ``BaselineDenseMamba``. Where all four switches share their projection the keys of
    the two are the same, and ``source`` says which it is; without it, the switches do."""

    system = "mixture_of_mamba"

    def build(self, config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str = "") -> nn.Module:
        return self.load(self._model(config, state, source), state)

    def _model(self, config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> nn.Module:
        known = {*_MAMBA, *_INERT, "args"}
        if unknown := sorted(set(config) - known):
            raise ValueError(f"the block has no argument {unknown[0]!r}; known: {sorted(known)}")
        args = dict(config.get("args") or {})
        if wrong := sorted(k for k in args if k.startswith("do_not_split") and k not in _SWITCH):
            raise ValueError(f"args has a switch {wrong[0]!r}; expected some of {', '.join(_SWITCH)}")
        own = {k: v for k, v in config.items() if k in _MAMBA}
        shared = {name for switch, name in _SWITCH.items() if args.get(switch)}
        cls = source.rpartition(":")[2]
        routed = any(k.startswith("local_experts_") for k in state)
        if cls == "BaselineDenseMamba" or (not cls and not routed and shared != set(PROJECTIONS)):
            return Mamba(**own)
        if cls not in ("", "MixtureOfMamba"):
            raise ValueError(f"source names the class {cls!r}; expected MixtureOfMamba or BaselineDenseMamba")
        if "n_modalities" not in args:
            raise ValueError("args has no n_modalities; expected the number of experts of each split projection")
        return MixtureOfMamba(
            n_modalities=int(args["n_modalities"]), split=[p for p in PROJECTIONS if p not in shared], **own
        )

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor], *, call: Any = None) -> dict[str, Tensor]:
        """``y``, and for every further set of masks (``modality_masks_<name>``) ``y_<name>``."""
        u = inputs["hidden_states"]
        if torch.is_grad_enabled():
            u = u.detach().requires_grad_()
            self._input = u  # golden files hold its gradient too
        if not isinstance(model, MixtureOfMamba):
            return {"y": model(u)}
        masks = {k.removeprefix("modality_masks"): v for k, v in inputs.items() if k.startswith("modality_masks")}
        if not masks and "modality_id" in inputs:
            masks = {"": inputs["modality_id"]}
        return {f"y{name}": model(u, mask) for name, mask in (masks or {"": None}).items()}

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        found = super().gradients(model)
        given = getattr(self, "_input", None)
        return found if given is None or given.grad is None else found | {"input": given.grad}

    def rules(self, state: Mapping[str, Tensor], *, model: nn.Module | None = None) -> Rules:
        return RULES
