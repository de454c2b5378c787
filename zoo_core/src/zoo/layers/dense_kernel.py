"""Convolution kernels of systems with a dense state matrix: the plain form, which structured ones are checked with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import hippo
from .ssm_kernel import ConvolutionKernel, as_complex, free, positive, wide


class DenseKernel(ConvolutionKernel):
    """``K[l] = Re(C dA^l dB)`` with a dense complex A, discretised by the bilinear rule.

    ``n_ssm`` S matrices are shared by ``d_model`` H channels (copy index outer); all N = ``d_state`` states are kept,
    not one of each conjugate pair. Parameters: ``inv_dt`` (H, 1), ``A`` (S, N, N, 2), ``B`` (S, N, 2), ``C``
    (channels, H, N, 2). Cost O(N^2) a step; the rate of a call is ignored, as in the original.
    ``init``, ``rank``: the measure whose matrix A starts from, in its diagonal-plus-low-rank basis.
    Source: state-spaces/s4 ``SSMKernelDense``.
    """

    recurrent = True

    def __init__(
        self,
        d_model: int,
        channels: int = 1,
        l_max: int | None = None,
        lr: float | Mapping[str, float] | None = None,
        *,
        d_state: int = 64,
        init: str | list[str] = "legs",
        n_ssm: int | None = None,
        rank: int = 1,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        device=None,
        dtype=None,
        **init_args: Any,
    ) -> None:
        super().__init__(d_model, channels, l_max, lr)
        S = d_model if n_ssm is None else n_ssm
        if S < 1 or d_model % S:
            raise ValueError(f"n_ssm is {n_ssm}; it must divide d_model {d_model}")
        if not dt_tie:
            raise ValueError("dt_tie=False: a dense state matrix has no modes to give time steps of their own")
        self.d_state, self.n_ssm, self.dt_transform = d_state, S, dt_transform
        kind = {"device": device, "dtype": dtype}
        spread = torch.empty(d_model, 1, **kind).uniform_(math.log(dt_min), math.log(dt_max))
        self.add("inv_dt", spread if dt_transform == "exp" else free(spread.exp(), dt_transform), "dt")
        A, B, C = self._start(init, d_state, rank, S, channels, init_args)
        dtype = dtype or torch.get_default_dtype()
        pair = lambda x: torch.tensor(np.stack([x.real, x.imag], -1), dtype=dtype, device=device)  # noqa: E731
        self.add("A", pair(A), "A")
        self.add("B", pair(B), "A")
        self.add("C", pair(C), "C", None)

    def _start(
        self, init: str | list[str], d_state: int, rank: int, copies: int, channels: int, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        A, P, B = hippo.combination(init, d_state, rank, copies, **options)
        both = lambda x: np.concatenate([x, x.conj()], -1)  # noqa: E731
        half = torch.randn(channels, self.d_model, d_state // 2, 2, device="cpu").double().numpy() * 2**-0.5
        low = np.einsum("rsp,rsq->spq", both(P), both(P).conj())
        full = both(A)[..., None] * np.eye(d_state) - low
        return full, both(B), both(half[..., 0] + 1j * half[..., 1])

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """dA (H, N, N), dB (H, N), C (channels, H, N), complex."""
        copies = self.d_model // self.n_ssm
        A, B = as_complex(self.A).repeat(copies, 1, 1), as_complex(self.B).repeat(copies, 1)
        dt = positive(wide(self.inv_dt), self.dt_transform)[..., None]
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        right = torch.cat([eye + dt / 2 * A, dt * B[..., None]], -1)
        solved = torch.linalg.solve(eye - dt / 2 * A, right)
        return solved[..., :-1], solved[..., -1], as_complex(self.C)

    def forward(self, length: int, rate: float = 1.0, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        dA, dB, C = self.discrete()
        rows, power = C[:, :, None], dA  # C dA^l, twice as many each time
        while rows.shape[2] < length:
            rows = torch.cat([rows, torch.einsum("chln,hnm->chlm", rows, power)], 2)
            power = power @ power
        rows = rows[:, :, :length]
        K = torch.einsum("chln,hn->chl", rows, dB).real
        if state is None:
            return K, None
        moved = torch.einsum("hnm,bhm->bhn", dA, state.to(dA.dtype))
        return K, torch.einsum("chln,bhn->bchl", rows, moved).real

    def init_state(self, batch: int, *, device=None, dtype=None) -> Tensor:
        real = torch.promote_types(self.inv_dt.dtype if dtype is None else dtype, torch.float32)
        where = self.inv_dt.device if device is None else device
        return torch.zeros(batch, self.d_model, self.d_state, dtype=real.to_complex(), device=where)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """u: (batch, d_model); ``state`` is updated in place. Returns (batch, channels, d_model)."""
        dA, dB, C = self.kept("step", self.discrete, watch=False)
        state.copy_(torch.einsum("hmn,bhn->bhm", dA, state) + dB * u[..., None])
        return torch.einsum("chn,bhn->bch", C, state).real

    def final_state(self, u: Tensor, state: Tensor, rate: float = 1.0) -> Tensor:
        dA, dB, _ = self.kept("step", self.discrete)
        state = state.to(dA.dtype)
        for t in range(u.shape[1]):
            state = torch.einsum("hmn,bhn->bhm", dA, state) + dB * u[:, t, :, None]
        return state


class RealKernel(DenseKernel):
    """:class:`DenseKernel` that starts from the real matrices of the measure as they are, with a real C.

    Source: state-spaces/s4 ``SSMKernelReal``.
    """

    def _start(
        self, init: str | list[str], d_state: int, rank: int, copies: int, channels: int, options: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not isinstance(init, str):
            raise ValueError(f"init is {init!r}; the real kernel starts from one measure: {', '.join(hippo.MEASURES)}")
        A, B = hippo.transition(init, d_state)
        C = torch.randn(channels, self.d_model, d_state, device="cpu").double().numpy()
        return np.repeat(A[None], copies, 0) + 0j, np.repeat(B[None, :, 0], copies, 0) + 0j, C + 0j
