"""The common form: ``h_i = A_i h_(i-1) + B_i u_i``, ``y_i = Re(C_i h_i) + D_i u_i``, h_(-1) = 0, A_i diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """A mixer on one sequence, linear in its state; the matrices may depend on the inputs.

    A: (length, N) diagonals; B: (length, N, d_in); C: (length, d_out, N); D: (length, d_out, d_in) or None. Complex
    matrices give the real part of C h. A[0] multiplies nothing. States are ordered by channel, c * n + s.
    Source: arXiv 2405.15731, equation 4.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None

    def __post_init__(self) -> None:
        length, n = self.A.shape
        if self.B.shape[:2] != (length, n) or (self.C.shape[0], self.C.shape[2]) != (length, n):
            raise ValueError(
                f"A is {tuple(self.A.shape)}, B {tuple(self.B.shape)}, C {tuple(self.C.shape)}; expected (length, N), "
                "(length, N, d_in), (length, d_out, N)"
            )

    @property
    def length(self) -> int:
        return self.A.shape[0]

    @property
    def state_size(self) -> int:
        """N, complex states counted once."""
        return self.A.shape[1]

    def outputs(self, u: Tensor) -> Tensor:
        """y (length, d_out) of u (length, d_in), step by step."""
        state = torch.zeros_like(self.B[0, :, 0])
        found = []
        for i in range(self.length):
            state = self.A[i] * state + self.B[i] @ u[i].to(self.B.dtype)
            y = self.C[i] @ state
            y = y.real if y.is_complex() else y
            found.append(y if self.D is None else y + self.D[i] @ u[i])
        return torch.stack(found)

    def mixing(self) -> Tensor:
        """Phi (length, length, d_out, d_in): ``Phi[i, j] = C_i A_i ... A_(j+1) B_j`` for j < i, plus D_i for j = i.

        y = Phi u, summed over j and d_in. Memory: length^2 d_out d_in numbers.
        """
        d_out, d_in = self.C.shape[1], self.B.shape[2]
        real = self.C.real.dtype if self.C.is_complex() else self.C.dtype
        phi = torch.zeros(self.length, self.length, d_out, d_in, dtype=real, device=self.C.device)
        between = self.A[:0]  # A_i ... A_(j+1) for each j <= i
        for i in range(self.length):
            between = torch.cat([between * self.A[i], torch.ones_like(self.A[:1])])
            row = torch.einsum("on,jn,jnd->jod", self.C[i], between, self.B[: i + 1])
            phi[i, : i + 1] = row.real if row.is_complex() else row
            if self.D is not None:
                phi[i, i] += self.D[i]
        return phi

    def lag_profile(self) -> Tensor:
        """(length,): the mean over i of the Frobenius norm of Phi[i, i - lag]."""
        norms = torch.linalg.matrix_norm(self.mixing())
        return torch.stack([norms.diagonal(-lag).mean() for lag in range(self.length)])
