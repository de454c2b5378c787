"""The Mamba-1 mixer: the block that everyone copies, under the original's parameter names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo_kernels import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

from .checkpointing import Recomputed
from .init import inverse_softplus_log_uniform
from .linear import Linear

State = dict[str, Tensor]


class Mamba(Recomputed):
    """``out_proj(scan(silu(conv(x))) * silu(z))`` with ``x, z = in_proj(u)``: one selective state-space mixer.

    Arguments (mamba_ssm's): ``d_model`` D, ``d_state`` N, ``d_conv`` W, ``expand`` (d_inner E = expand * D),
    ``dt_rank`` R ("auto": ceil(D / 16)), ``dt_min``/``dt_max``/``dt_init_floor``/``dt_scale`` initialise dt,
    ``conv_bias``, ``bias`` (of in_proj and out_proj).

    Parameters: ``in_proj`` (2E, D), ``conv1d`` (E, 1, W), ``x_proj`` (R + 2N, E), ``dt_proj`` (E, R) with bias,
    ``A_log`` (E, N), ``D`` (E), ``out_proj`` (D, E).

    Source: Gu and Dao, "Mamba", arXiv 2312.00752, section 3.4 and figure 3; state-spaces/mamba
    ``modules/mamba_simple.py``. Differs: no inference-parameter object; the state is a dictionary of tensors that the
    caller owns, and padded batches (``lengths``), packed ones (``resets``) and other orders (``path``) are arguments.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init is {dt_init!r}; expected 'random' or 'constant'")
        kind = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.dt_limits = (dt_min, dt_max, dt_init_floor, dt_scale, dt_init)
        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **kind)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=conv_bias, **kind)
        self.x_proj = Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **kind)
        self.dt_proj = Linear(self.dt_rank, self.d_inner, bias=True, **kind)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **kind))
        self.D = nn.Parameter(torch.empty(self.d_inner, **kind))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **kind)
        self.reset_scan_parameters()

    def reset_scan_parameters(self) -> None:
        """A = -(1..N) in every channel, D = 1, dt log-uniform in [dt_min, dt_max] (paper, section 3.6)."""
        dt_min, dt_max, floor, scale, kind = self.dt_limits
        with torch.no_grad():
            bound = self.dt_rank**-0.5 * scale
            if kind == "random":
                self.dt_proj.weight.uniform_(-bound, bound)
            else:
                self.dt_proj.weight.fill_(bound)
            self.dt_proj.bias.copy_(inverse_softplus_log_uniform(self.dt_proj.bias, dt_min, dt_max, floor))
            steps = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
            self.A_log.copy_(steps.log().expand_as(self.A_log))
            self.D.fill_(1.0)

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        """A state at rest: ``conv`` (batch, W, E), the last W inputs of the convolution, and ``ssm`` (batch, E, N)."""
        device = self.A_log.device if device is None else device
        dtype = self.in_proj.weight.dtype if dtype is None else dtype
        return {
            "conv": torch.zeros(batch, self.d_conv, self.d_inner, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=torch.float32),
        }

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
        """(batch, length, D) to (batch, length, D).

        path, reverse, resets, lengths: as in :func:`zoo_kernels.selective_scan`. state: continue from it and leave it
        at the end of this piece (its tensors are replaced in place; no gradient flows through it).
        """
        y, _ = self.mix(u, path=path, reverse=reverse, resets=resets, lengths=lengths, state=state)
        return self.out_proj(y)

    def mix(
        self,
        u: Tensor,
        *,
        gate: bool = True,
        path: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scan before ``out_proj``, and z: (batch, length, E) each. ``gate=False`` leaves ``silu(z)`` out of it."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        walk: dict[str, Any] = {"path": path, "reverse": reverse, "resets": resets, "lengths": lengths}
        keep = state is not None
        x, conv = causal_conv1d(
            x,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=state["conv"] if state is not None else None,
            return_final_state=keep,
            **walk,
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y, ssm = selective_scan(
            x,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z if gate else None,
            self.dt_proj.bias.float(),
            dt_proj=self.dt_proj.weight,
            dt_softplus=True,
            initial_state=state["ssm"] if state is not None else None,
            return_final_state=keep,
            **walk,
        )
        if state is not None:
            assert conv is not None
            assert ssm is not None
            state["conv"].copy_(conv.detach())
            state["ssm"].copy_(ssm.detach())
        return y, z

    def step(self, u: Tensor, state: State) -> Tensor:
        """One token: (batch, D) to (batch, D); ``state`` moves on in place."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = causal_conv1d_step(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, state=state["conv"], activation="silu"
        )
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan_step(
            x,
            dt @ self.dt_proj.weight.t(),
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D.float(),
            z,
            self.dt_proj.bias.float(),
            state=state["ssm"],
            dt_softplus=True,
        )
        return self.out_proj(y)
