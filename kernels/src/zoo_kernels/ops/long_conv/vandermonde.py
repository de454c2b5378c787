"""Kernels of diagonal state-space models: sums of exponentials at every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import real_dtype


def _powers(log_decay: Tensor, steps: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of exp(step * log_decay), (..., steps, N); the phase is reduced in double precision."""
    exponent = log_decay.real if log_decay.is_complex() else log_decay
    size = torch.exp((steps[:, None] * exponent.to(steps.dtype)[..., None, :]).to(work))
    if not log_decay.is_complex():
        return size, torch.zeros_like(size)
    phase = steps[:, None] * log_decay.imag.to(steps.dtype)[..., None, :]
    phase = torch.remainder(phase, 2 * math.pi).to(work)
    return size * torch.cos(phase), size * torch.sin(phase)


def vandermonde_kernel(coefficients: Tensor, log_decay: Tensor, length: int) -> Tensor:
    """``K[l] = 2 Re sum_n coefficients[n] * exp(l * log_decay[n])`` for l = 0 .. length - 1.

    coefficients: (*heads, channels, N); log_decay: (channels, N), its real part not positive (else the powers may
    overflow); both complex, or both real; log_decay may be of higher precision than the coefficients, whose precision
    the result has. Returns (*heads, channels, length), real.

    With l = i * S + j, S about sqrt(length), the sum is one matrix product of the powers of exp(S * log_decay) and of
    exp(log_decay): N * (S + length / S) exponentials instead of N * length, and no tensor of size N * length. Exponents
    are formed in float64 (on devices that have it), so that the phase of late steps is as exact as the result's dtype.
    Source: Gu et al., "S4D", arXiv 2206.11893, section 3.3.
    """
    if log_decay.dim() != 2 or coefficients.shape[-2:] != log_decay.shape:
        raise ValueError(
            f"vandermonde_kernel: coefficients have shape {tuple(coefficients.shape)} and log_decay "
            f"{tuple(log_decay.shape)}; they must be (*heads, channels, N) and (channels, N)"
        )
    if length < 0:
        raise ValueError(f"vandermonde_kernel: length is {length}; it must not be negative")
    channels, N = log_decay.shape
    heads = coefficients.shape[:-2]
    inner = max(1 << (max(length, 1).bit_length() + 1) // 2, 1)
    outer = -(-length // inner)
    device = log_decay.device
    double = torch.float32 if device.type == "mps" else torch.float64  # the one device type without float64
    work = real_dtype(coefficients.dtype)
    fine = torch.arange(inner, dtype=double, device=device)
    coarse = torch.arange(outer, dtype=double, device=device) * inner
    fr, fi = _powers(log_decay, fine, work)  # (channels, inner, N)
    cr, ci = _powers(log_decay, coarse, work)  # (channels, outer, N)
    c = coefficients.reshape(math.prod(heads), channels, N).transpose(0, 1)[:, :, None]  # (channels, heads, 1, N)
    re, im = (c.real, c.imag) if c.is_complex() else (c, torch.zeros_like(c))
    left = torch.cat([re * cr[:, None] - im * ci[:, None], -(re * ci[:, None] + im * cr[:, None])], dim=-1)
    right = torch.cat([fr, fi], dim=-1)
    k = 2 * torch.matmul(left.flatten(1, 2), right.transpose(1, 2))  # (channels, heads * outer, inner)
    k = k.reshape(channels, math.prod(heads), outer * inner)[..., :length]
    return k.transpose(0, 1).reshape(*heads, channels, length)
