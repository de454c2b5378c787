"""Diagonal state-space models: S4D (Lin, Inv, Real, LegS ...), and DSS as one of its discretisations."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import long_conv, vandermonde_kernel

from .dss import dss_kernel
from .linear import Linear
from .precision import outside_autocast
from .ssm_kernel import SSMKernel, as_complex, exact, wide


def vandermonde_powers(log_decay: Tensor, length: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """What :func:`vandermonde_state` needs of ``log_decay`` (channels, N) for ``length`` steps.

    Powers (channels, inner, N) and (channels, outer, N) of dtype ``kind``, formed in double precision where the device
    has it.
    """
    inner = max(1, 1 << (max(length, 1).bit_length() // 2))
    outer = -(-length // inner)
    log_decay = exact(log_decay)
    steps = torch.arange(max(inner, outer), device=log_decay.device, dtype=log_decay.real.dtype)
    fine = torch.exp(log_decay[:, None] * steps[:inner, None].flip(0)).to(kind)
    coarse = torch.exp(log_decay[:, None] * (inner * steps[:outer, None].flip(0))).to(kind)
    return fine, coarse


def vandermonde_state(u: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    """``sum_l u[..., l] exp((L - 1 - l) * log_decay)``: (batch, channels, L) to (batch, channels, N); ``fine``,
    ``coarse``: of :func:`vandermonde_powers`."""
    inner = fine.shape[1]
    u = F.pad(u, (-u.shape[-1] % inner, 0)).unflatten(-1, (-1, inner))  # zeros in front change nothing
    part = torch.matmul(u.to(fine.dtype), fine)  # (batch, channels, outer, N)
    return (part * coarse).sum(-2)


class S4DKernel(SSMKernel):
    """Kernel of a diagonal system, ``K[l] = 2 Re sum_n C_n dB_n dA_n^l``.

    ``disc``: "zoh" (dA = exp(dt A), dB = B (dA - 1) / A), "bilinear", or "dss" (:mod:`zoo.layers.dss`; convolution
    only). ``init``: "diag-lin", "diag-inv", "diag-real", "diag-legs", "diag-quad", "diag" ...; other arguments as
    :class:`~zoo.layers.ssm_kernel.SSMKernel`.
    Source: Gu et al., arXiv 2206.11893; state-spaces/s4 ``SSMKernelDiag``.
    """

    def __init__(
        self, d_model: int, channels: int = 1, l_max: int | None = None, lr=None, *, disc: str = "zoh", **system: Any
    ):
        super().__init__(d_model, channels, l_max, lr, **system)
        if disc not in ("zoh", "bilinear", "dss"):
            raise ValueError(f"disc is {disc!r}; expected 'zoh', 'bilinear' or 'dss'")
        self.disc = disc

    def discrete(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """log dA (H, N) in double precision, dB (H, N), C (channels, H, N)."""
        dt, A, B, C = self.system(rate, double=True)
        dtA = dt * A
        if self.disc == "bilinear":
            return torch.log((1 + dtA / 2) / (1 - dtA / 2)), (B[0] * dt / (1 - dtA / 2)).to(C.dtype), C
        if self.disc == "dss":
            raise ValueError("the DSS softmax kernel has no recurrent form; it cannot step or carry a state")
        return dtA, (B[0] * torch.expm1(dtA) / A).to(C.dtype), C

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.disc == "dss":
            if state is not None:
                raise ValueError("the DSS softmax kernel has no recurrent form; state must be None")
            dt, A, B, C = self.system(rate)
            return dss_kernel(B * C, A, dt, length), None
        log_dA, dB, C = self.discrete(rate)
        K = vandermonde_kernel(dB * C, log_dA, length)
        if state is None:
            return K, None
        return K, self.response(state, length, rate)

    def response(self, state: Tensor, length: int, rate: float = 1.0) -> Tensor:
        log_dA, ahead = self.kept(("ahead", rate), lambda: self._ahead(rate))
        return vandermonde_kernel(state[:, None] * ahead, log_dA, length)

    def _ahead(self, rate: float) -> tuple[Tensor, Tensor]:
        """log dA, and C dA (channels, H, N): the next step already decays the state."""
        log_dA, _, C = self.discrete(rate)
        return log_dA, torch.exp(log_dA).to(C.dtype) * C

    def final_state(self, u: Tensor, state: Tensor, rate: float = 1.0) -> Tensor:
        length = u.shape[1]

        def prepare():
            log_dA, dB, _ = self.discrete(rate)
            return torch.exp(log_dA * length).to(dB.dtype), dB, *vandermonde_powers(log_dA, length, dB.dtype)

        decay, dB, fine, coarse = self.kept(("state", length, rate), prepare)
        return decay * state + dB * vandermonde_state(u.transpose(1, 2), fine, coarse)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """u: (batch, d_model); ``state`` is updated in place. Returns (batch, channels, d_model)."""

        def prepare():
            log_dA, dB, C = self.discrete()
            return torch.exp(log_dA).to(C.dtype), dB, C

        dA, dB, C = self.kept("step", prepare, watch=False)
        state.mul_(dA).add_(dB * u[..., None])
        y = torch.einsum("chn,bhn->bch", C, state)
        return 2 * (y.real if y.is_complex() else y)


class S4D(nn.Module):
    """The minimal S4D layer: zero-order hold, B = 1, GELU, dropout, a gated linear output.

    ``D u + sum_n 2 Re(C ...)`` -> GELU -> dropout -> ``output_linear`` (2H) -> GLU. Parameters: ``log_dt`` (H),
    ``log_A_real``, ``A_imag`` (H, N), ``C`` (H, N, 2), N = d_state / 2, A = -exp(log_A_real) + i A_imag; ``D`` (H).
    Source: Gu et al., arXiv 2206.11893; state-spaces/s4 ``models/s4/s4d.py``.
    """

    def __init__(
        self, d_model: int, d_state: int = 64, dropout: float = 0.0, dt_min: float = 0.001, dt_max: float = 0.1,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        N = d_state // 2
        self.d_model = d_model
        self.D = nn.Parameter(torch.randn(d_model, **kind))
        self.log_dt = nn.Parameter(torch.rand(d_model, **kind) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.C = nn.Parameter(torch.randn(d_model, N, 2, **kind) * 2**-0.5)
        self.log_A_real = nn.Parameter(torch.full((d_model, N), math.log(0.5), **kind))
        self.A_imag = nn.Parameter((torch.pi * torch.arange(N, **kind)).repeat(d_model, 1))
        self.dropout = nn.Dropout(dropout)
        self.output_linear = Linear(d_model, 2 * d_model, **kind)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """log dA and C dB, (H, N) each."""
        A = torch.complex(-torch.exp(wide(self.log_A_real)), wide(self.A_imag))
        dtA = A * torch.exp(wide(self.log_dt))[:, None]
        return dtA, as_complex(self.C) * torch.expm1(dtA) / A

    def kernel(self, length: int) -> Tensor:
        """(H, length)."""
        dtA, C = self.discrete()
        return vandermonde_kernel(C, dtA, length)

    def forward(self, u: Tensor, state: dict[str, Tensor] | None = None) -> Tensor:
        """(batch, length, H) to the same; ``state`` (of :meth:`init_state`) is continued and left at the end."""
        with outside_autocast(u):
            y = self._convolved(u, state)
        return self.output(y)

    def _convolved(self, u: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        y, _ = long_conv(u, self.kernel(u.shape[1]), self.D)
        if state is not None:
            dtA, C = self.discrete()
            old = state["ssm"]
            y = y + vandermonde_kernel(old * torch.exp(dtA) * C, dtA, u.shape[1]).transpose(1, 2).to(y.dtype)
            new = torch.exp(dtA * u.shape[1]) * old + vandermonde_state(
                u.transpose(1, 2), *vandermonde_powers(dtA, u.shape[1], C.dtype)
            )
            state["ssm"] = new.detach()
        return y

    def output(self, y: Tensor) -> Tensor:
        return F.glu(self.output_linear(self.dropout(F.gelu(y))), dim=-1)

    def init_state(self, batch: int, *, device=None, dtype=None) -> dict[str, Tensor]:
        real = torch.promote_types(self.D.dtype if dtype is None else dtype, torch.float32)
        return {"ssm": torch.zeros(batch, *self.A_imag.shape, dtype=real.to_complex(), device=device or self.D.device)}

    def step(self, u: Tensor, state: dict[str, Tensor]) -> Tensor:
        """(batch, H) to (batch, H); ``state`` is updated in place."""
        dtA, C = self.discrete()
        s = state["ssm"]
        s.mul_(torch.exp(dtA)).add_(u[..., None])
        return self.output((2 * (C * s).sum(-1).real + self.D * u).to(u.dtype))
