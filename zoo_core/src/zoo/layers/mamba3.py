"""The Mamba-3 mixer: trapezoidal discretisation, rotating states, several ranks, no convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import mamba3_scan, mamba3_step

from .init import inverse_softplus_log_uniform
from .linear import Linear
from .norm import RMSNorm

State = dict[str, Tensor]
#: The state's tensors in the kernel's order.
PARTS = ("angle", "ssm", "k", "v")


class Mamba3(nn.Module):
    """One mixer of Mamba-3, single-input (SISO) or with ``mimo_rank`` ranks (MIMO).

    Arguments (mamba_ssm's): ``d_model`` D, ``d_state`` N, ``expand`` (d_inner E), ``headdim`` P, ``ngroups`` G,
    ``rope_fraction`` 0.5 or 1 (share of the state's channels that rotate), ``is_mimo``, ``mimo_rank`` R,
    ``is_outproj_norm`` (an RMSNorm a head before the gate), ``A_floor`` (the least decay rate), ``dt_min``/``dt_max``/
    ``dt_init_floor``.

    Parameters: ``in_proj`` (2E + 2NGR + 3H + S, D) giving z, x, B, C, dt, A, trap and S angles; ``B_norm``, ``C_norm``
    (N); ``B_bias``, ``C_bias`` (H, R, N); ``dt_bias``, ``D`` (H); with MIMO ``mimo_x``, ``mimo_z``, ``mimo_o`` (H, R,
    P).

    Source: "Mamba-3", arXiv 2603.15569; state-spaces/mamba ``modules/mamba3.py``. Differs: exact tanh, cosine and sine
    (its GPU kernels approximate them), a step for every number of groups, and states through a language model's cache.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        is_mimo: bool = False,
        mimo_rank: int = 4,
        is_outproj_norm: bool = False,
        A_floor: float = 1e-4,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if rope_fraction not in (0.5, 1.0):
            raise ValueError(f"rope_fraction is {rope_fraction}; expected 0.5 or 1.0")
        kind = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.headdim, self.ngroups = d_model, d_state, headdim, ngroups
        self.d_inner = int(expand * d_model)
        if self.d_inner % headdim:
            raise ValueError(f"expand * d_model = {self.d_inner} is not a multiple of headdim {headdim}")
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(f"{self.nheads} heads do not divide into {ngroups} groups")
        self.is_mimo, self.rank, self.A_floor = is_mimo, mimo_rank if is_mimo else 1, A_floor
        rotated = int(d_state * rope_fraction)
        self.angles = (rotated - rotated % 2) // 2
        self.dt_limits = (dt_min, dt_max, dt_init_floor)
        H, R, N = self.nheads, self.rank, d_state
        self.sizes = [self.d_inner, self.d_inner, N * ngroups * R, N * ngroups * R, H, H, H, self.angles]
        self.in_proj = Linear(d_model, sum(self.sizes), bias=False, **kind)
        self.B_norm, self.C_norm = RMSNorm(N, 1e-5, **kind), RMSNorm(N, 1e-5, **kind)
        self.B_bias = nn.Parameter(torch.ones(H, R, N, **kind))
        self.C_bias = nn.Parameter(torch.ones(H, R, N, **kind))
        self.dt_bias = nn.Parameter(torch.empty(H, **kind))
        self.D = nn.Parameter(torch.ones(H, **kind))
        if is_mimo:
            self.mimo_x = nn.Parameter(torch.full((H, R, headdim), 1 / R, **kind))
            self.mimo_z = nn.Parameter(torch.ones(H, R, headdim, **kind))
            self.mimo_o = nn.Parameter(torch.full((H, R, headdim), 1 / R, **kind))
        self.norm = HeadNorm(self.nheads, headdim, **kind) if is_outproj_norm else None
        self.out_proj = Linear(self.d_inner, d_model, bias=False, **kind)
        self.reset_scan_parameters()

    def reset_scan_parameters(self) -> None:
        with torch.no_grad():
            self.dt_bias.copy_(inverse_softplus_log_uniform(self.dt_bias, *self.dt_limits))

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        """At rest: ``angle`` (batch, H, S), ``ssm`` (batch, H, P, N), ``k`` (batch, R, H, N), ``v`` (batch, H, P)."""
        device = self.D.device if device is None else device
        shapes = {
            "angle": (self.nheads, self.angles),
            "ssm": (self.nheads, self.headdim, self.d_state),
            "k": (self.rank, self.nheads, self.d_state),
            "v": (self.nheads, self.headdim),
        }
        return {name: torch.zeros(batch, *shape, device=device) for name, shape in shapes.items()}

    def _inputs(self, u: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """z, and the scan's arguments, from u (..., D)."""
        z, x, B, C, dt, A, trap, angles = self.in_proj(u).split(self.sizes, dim=-1)
        ranks = (self.rank, self.ngroups, self.d_state) if self.is_mimo else (self.ngroups, self.d_state)
        B, C = self.B_norm(B.unflatten(-1, ranks)), self.C_norm(C.unflatten(-1, ranks))
        # A = -g(v): 1 + v above 0, 1 / (1 - v) below; data-dependent, so in float32
        v = A.float()
        rate = torch.where(v >= 0, 1 + v, 1 / (1 - v.clamp(max=0))).clamp(min=self.A_floor)
        heads = (self.nheads, self.headdim)
        scan: dict[str, Any] = {
            "x": x.unflatten(-1, heads),
            "dt": F.softplus(dt.float() + self.dt_bias.float()),
            "A": -rate,
            "B": B,
            "C": C,
            "trap": trap.float(),
            "angles": angles.float(),
            "D": self.D.float(),
            "B_bias": self.B_bias,
            "C_bias": self.C_bias,
        }
        if self.is_mimo:
            scan["mimo_x"] = self.mimo_x
        return z.unflatten(-1, heads), scan

    def _gate(self, z: Tensor) -> dict[str, Any]:
        """What the kernel gates with; nothing where a norm stands between output and gate."""
        if self.norm is not None:
            return {}
        return {"z": z} | ({"mimo_z": self.mimo_z, "mimo_o": self.mimo_o} if self.is_mimo else {})

    def _finish(self, y: Tensor, z: Tensor) -> Tensor:
        if self.norm is not None:
            if self.is_mimo:  # y (..., R, H, P): norm and gate a rank, then the contraction
                gate = F.silu(z.unsqueeze(-3) * self.mimo_z.transpose(0, 1))
                y = (self.norm(y) * gate * self.mimo_o.transpose(0, 1)).sum(-3)
            else:
                y = self.norm(y) * F.silu(z)
        return self.out_proj(y.flatten(-2))

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
        z, scan = self._inputs(u)
        y, final = mamba3_scan(
            **scan,
            **self._gate(z),
            path=path,
            reverse=reverse,
            resets=resets,
            lengths=lengths,
            initial_state=None if state is None else _parts(state),
            return_final_state=state is not None,
        )
        if state is not None:
            assert final is not None
            for name, value in zip(PARTS, final, strict=True):
                state[name].copy_(value.detach())
        return self._finish(y, z)

    def step(self, u: Tensor, state: State) -> Tensor:
        """One token: (batch, D) to (batch, D); ``state`` moves on in place."""
        z, scan = self._inputs(u)
        y = mamba3_step(**scan, **self._gate(z), state=_parts(state))
        return self._finish(y, z)


def _parts(state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    angle, ssm, k, v = (state[name] for name in PARTS)
    return angle, ssm, k, v


class HeadNorm(nn.Module):
    """RMSNorm over the channels of each head, one weight a channel: (..., H, P) to the same."""

    def __init__(self, heads: int, headdim: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.weight = nn.Parameter(torch.ones(heads * headdim, device=device, dtype=dtype))

    def forward(self, y: Tensor) -> Tensor:
        scale = torch.rsqrt(y.float().square().mean(-1, keepdim=True) + self.eps)
        return ((y.float() * scale) * self.weight.float().unflatten(0, (self.heads, -1))).to(y.dtype)
