"""The Mamba-2 mixer (state-space duality), under the original's parameter names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo_kernels import causal_conv1d, causal_conv1d_step, ssd, ssd_step

from .init import inverse_softplus_log_uniform
from .linear import Linear
from .norm import GatedRMSNorm

State = dict[str, Tensor]


class Mamba2(nn.Module):
    """One input projection, one convolution over x, B and C together, one scalar decay per head, a gated norm.

    Arguments (mamba_ssm's): ``d_model`` D, ``d_state`` N, ``d_conv`` W, ``expand`` (d_inner E), ``headdim`` P,
    ``d_ssm`` (channels that go through the scan, E by default; the rest is a gated MLP beside it), ``ngroups`` G,
    ``D_has_hdim`` (skip weight per channel instead of per head), ``rmsnorm`` and ``norm_before_gate`` (the output
    norm; without it only the gate), ``dt_limit``, ``chunk_size`` (of the original's kernel; ours chooses its own),
    ``conv_activation`` ("silu", "hardswish" or None), ``learnable_init_states`` (the first state is a parameter).

    Parameters: ``in_proj`` (2E + 2GN + H, D), ``conv1d`` (d_ssm + 2GN, 1, W), ``dt_bias``, ``A_log`` (H), ``D`` (H) or
    (d_ssm), ``norm.weight`` (d_ssm), ``out_proj`` (D, E).

    Source: Dao and Gu, "Transformers are SSMs", arXiv 2405.21060, section 7; state-spaces/mamba ``modules/mamba2.py``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        norm_eps: float = 1e-5,
        conv_activation: str | None = "silu",
        learnable_init_states: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if conv_activation not in (None, "silu", "hardswish"):
            raise ValueError(f"conv_activation is {conv_activation!r}; expected None, 'silu' or 'hardswish'")
        kind = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.headdim, self.ngroups = d_model, d_state, d_conv, headdim, ngroups
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        if self.d_ssm % headdim:
            raise ValueError(f"d_ssm {self.d_ssm} is not a multiple of headdim {headdim}")
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"{self.nheads} heads do not divide into {ngroups} groups")
        self.d_mlp = self.d_inner - self.d_ssm
        self.D_has_hdim, self.chunk_size = D_has_hdim, chunk_size
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.conv_activation = conv_activation
        self.conv_resets = True  #: False: ``resets`` drop the state but not the convolution's rows (Mamba2Simple)
        self.init_ranges = (dt_min, dt_max, dt_init_floor, A_init_range, conv_init)
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **kind)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, bias=conv_bias, **kind)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **kind))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **kind))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **kind))
        self.norm = (
            GatedRMSNorm(
                self.d_ssm,
                norm_eps,
                groups=ngroups,
                norm_before_gate=norm_before_gate,
                **kind,
            )
            if rmsnorm
            else None
        )
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **kind)
        shape = (self.nheads, headdim, d_state)
        self.init_states = nn.Parameter(torch.zeros(shape, **kind)) if learnable_init_states else None
        self.reset_scan_parameters()

    def reset_scan_parameters(self) -> None:
        """dt log-uniform, A uniform in ``A_init_range``, D = 1."""
        dt_min, dt_max, floor, (low, high), conv_init = self.init_ranges
        with torch.no_grad():
            self.dt_bias.copy_(inverse_softplus_log_uniform(self.dt_bias, dt_min, dt_max, floor))
            A = torch.empty(self.A_log.shape, dtype=torch.float32, device=self.A_log.device).uniform_(low, high)
            self.A_log.copy_(A.log())
            self.D.fill_(1.0)
            if conv_init is not None:
                self.conv1d.weight.uniform_(-conv_init, conv_init)

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        """At rest: ``conv`` (batch, W, d_ssm + 2GN) and ``ssm`` (batch, H, P, N)."""
        device = self.A_log.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        ssm = torch.zeros(batch, self.nheads, self.headdim, self.d_state, device=device, dtype=torch.float32)
        if self.init_states is not None:
            ssm = ssm + self.init_states.detach()
        return {
            "conv": torch.zeros(batch, self.d_conv, self.conv1d.weight.shape[0], device=device, dtype=dtype),
            "ssm": ssm,
        }

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """in_proj's output: z0, x0 (d_mlp each), z (d_ssm), xBC, dt."""
        sizes = [self.d_mlp, self.d_mlp, self.d_ssm, self.conv1d.weight.shape[0], self.nheads]
        z0, x0, z, xBC, dt = self.in_proj(u).split(sizes, dim=-1)
        return z0, x0, z, xBC, dt

    def _parts(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., H, P), B and C (..., G, N)."""
        groups = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, groups, groups], dim=-1)
        return (
            x.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _act(self, x: Tensor) -> Tensor:
        """What the convolution kernel does not apply itself."""
        return nn.functional.hardswish(x) if self.conv_activation == "hardswish" else x

    def _skip(self) -> Tensor:
        return self.D.float().unflatten(0, (self.nheads, self.headdim)) if self.D_has_hdim else self.D.float()

    def _finish(self, y: Tensor, z: Tensor, z0: Tensor, x0: Tensor) -> Tensor:
        y = self.norm(y, z) if self.norm is not None else y * nn.functional.silu(z)
        if self.d_mlp:
            y = torch.cat([nn.functional.silu(z0) * x0, y], dim=-1)
        return self.out_proj(y)

    def forward(
        self,
        u: Tensor,
        *,
        path: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """(batch, length, D) to (batch, length, D); the arguments of :meth:`zoo.layers.Mamba.forward`."""
        z0, x0, z, xBC, dt = self._split(u)
        y = self.scan(xBC, dt, path=path, reverse=reverse, resets=resets, lengths=lengths, state=state)
        return self._finish(y, z, z0, x0)

    def scan(
        self,
        xBC: Tensor,
        dt: Tensor,
        *,
        path: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Convolution and scan: xBC (batch, length, d_ssm + 2GN), dt (batch, length, H) to (batch, length, d_ssm)."""
        walk: dict[str, Any] = {"path": path, "reverse": reverse, "resets": resets, "lengths": lengths}
        keep = state is not None
        xBC, conv = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu" if self.conv_activation == "silu" else None,
            initial_state=state["conv"] if state is not None else None,
            return_final_state=keep,
            **(walk if self.conv_resets else walk | {"resets": None}),
        )
        first = None if self.init_states is None else self.init_states.expand(xBC.shape[0], -1, -1, -1)
        x, B, C = self._parts(self._act(xBC))
        y, ssm = ssd(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self._skip(),
            dt_bias=self.dt_bias.float(),
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_state=state["ssm"] if state is not None else first,
            return_final_state=keep,
            **walk,
        )
        if state is not None:
            assert conv is not None
            assert ssm is not None
            state["conv"].copy_(conv.detach())
            state["ssm"].copy_(ssm.detach())
        return y.flatten(-2)

    def step(self, u: Tensor, state: State) -> Tensor:
        """One token: (batch, D) to (batch, D); ``state`` moves on in place."""
        z0, x0, z, xBC, dt = self._split(u)
        xBC = causal_conv1d_step(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            state=state["conv"],
            activation="silu" if self.conv_activation == "silu" else None,
        )
        x, B, C = self._parts(self._act(xBC))
        y = ssd_step(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self._skip(),
            dt_bias=self.dt_bias.float(),
            dt_softplus=True,
            dt_limit=self.dt_limit,
            state=state["ssm"],
        )
        return self._finish(y.flatten(-2), z, z0, x0)
