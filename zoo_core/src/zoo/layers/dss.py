"""DSS: a diagonal state-space kernel normalised by a softmax over the length.

Source: Gupta et al., "Diagonal State Spaces are as Effective as Structured State Spaces", arXiv 2203.14343,
proposition 1; state-spaces/s4 ``SSMKernelDiag`` with ``disc="dss"``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo_kernels import vandermonde_kernel


def dss_kernel(coefficients: Tensor, A: Tensor, dt: Tensor, length: int) -> Tensor:
    """``K = Re sum_n coef_n (exp(s) - 1) / (A (exp(s L) - 1)) exp(dt A l - shift)``, without the factor 2 of S4D.

    coefficients: (channels, H, N), A: (H, N), dt: (H, 1 or N). Where Re A > 0, shift = dt A (L - 1), which counts as a
    constant for gradients, and s = -dt A; elsewhere shift = 0 and s = dt A. Returns (channels, H, length).
    """
    dtA = dt * A
    growing = A.real > 0
    s = torch.where(growing, -dtA, dtA)
    x = A * torch.expm1(s * length)
    reciprocal = x.conj() / (x * x.conj() + 1e-7)
    weights = coefficients * torch.expm1(s) * reciprocal / 2  # the sums below carry a factor 2
    decaying = torch.where(growing, torch.zeros_like(dtA), dtA)
    K = vandermonde_kernel(torch.where(growing, torch.zeros_like(weights), weights), decaying, length)
    if bool(growing.any()):
        # exp(dtA l - shift) = exp(-dtA (L - 1 - l)), with the gradient of exp(dtA l - constant)
        steps = torch.arange(length, device=A.device, dtype=A.real.dtype)
        shift = (dtA * growing * (length - 1)).detach()
        powers = torch.exp(torch.where(growing, dtA, 0)[..., None] * steps - shift[..., None])
        K = K + 2 * torch.einsum("chn,hnl->chl", weights * growing, powers).real
    return K
