"""The Linear Recurrent Unit (LRU)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_kernels import linear_scan

from .ssm_kernel import wide

State = dict[str, Tensor]


class LRU(nn.Module):
    """``s_t = lambda s_{t-1} + gamma (B u_t)``, ``y_t = Re(C s_t) + D u_t``, diagonal and complex.

    ``lambda = exp(-exp(nu_log) + i exp(theta_log))``, gamma = exp(gamma_log).

    Arguments: ``d_model`` H, ``d_state`` N complex states, eigenvalues uniform on the ring ``r_min`` .. ``r_max`` with
    phases up to ``max_phase``. Parameters: ``nu_log``, ``theta_log``, ``gamma_log`` (N), ``B`` (N, H, 2),
    ``C`` (H, N, 2), ``D`` (H).

    Source: Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences", arXiv 2303.06349, section 3 and
    appendix A (its code is printed there; no weights are published).
    """

    def __init__(
        self, d_model: int, d_state: int, *, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 2 * math.pi,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"r_min is {r_min} and r_max {r_max}; expected 0 <= r_min <= r_max <= 1")
        kind = {"device": device, "dtype": dtype}
        H, N = d_model, d_state
        self.d_model, self.d_state = H, N
        radius = torch.rand(N, **kind) * (r_max**2 - r_min**2) + r_min**2
        nu = torch.log(-0.5 * torch.log(radius.clamp(1e-12, 1 - 1e-7)))
        self.nu_log = nn.Parameter(nu)
        self.theta_log = nn.Parameter(torch.log(max_phase * torch.rand(N, **kind).clamp(min=1e-12)))
        self.gamma_log = nn.Parameter(0.5 * torch.log(-torch.expm1(-2 * torch.exp(nu))))
        self.B = nn.Parameter(torch.randn(N, H, 2, **kind) / math.sqrt(2 * H))
        self.C = nn.Parameter(torch.randn(H, N, 2, **kind) / math.sqrt(N))
        self.D = nn.Parameter(torch.randn(H, **kind))

    def eigenvalues(self) -> Tensor:
        """lambda (N) complex; its modulus is below 1 for any parameters."""
        return torch.polar(torch.exp(-torch.exp(wide(self.nu_log))), torch.exp(wide(self.theta_log)))

    def _input(self, u: Tensor) -> Tensor:
        gamma, B, u = torch.exp(wide(self.gamma_log)), wide(self.B), wide(u)
        return torch.complex(F.linear(u, B[..., 0]) * gamma, F.linear(u, B[..., 1]) * gamma)

    def _output(self, s: Tensor, u: Tensor) -> Tensor:
        C = wide(self.C)
        return (F.linear(s.real, C[..., 0]) - F.linear(s.imag, C[..., 1]) + self.D * u).to(u.dtype)

    def init_state(self, batch: int, *, device=None, dtype=None) -> State:
        real = torch.promote_types(self.D.dtype if dtype is None else dtype, torch.float32)
        return {"ssm": torch.zeros(batch, self.d_state, dtype=real.to_complex(), device=device or self.D.device)}

    def forward(
        self,
        u: Tensor,
        *,
        state: State | None = None,
        path: Tensor | None = None,
        reverse: bool = False,
        resets: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, H) to the same. state: continued, left at the end. Others: see linear_scan."""
        s, final = linear_scan(
            self._input(u), self.eigenvalues(), path=path, reverse=reverse, resets=resets, lengths=lengths,
            initial_state=None if state is None else state["ssm"], return_final_state=state is not None,
        )  # fmt: skip
        if state is not None:
            assert final is not None
            state["ssm"] = final.detach()
        return self._output(s, u)

    def step(self, u: Tensor, state: State) -> Tensor:
        """(batch, H) to the same; ``state`` is updated in place."""
        s = state["ssm"]
        s.mul_(self.eigenvalues()).add_(self._input(u))
        return self._output(s, u)
