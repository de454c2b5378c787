"""Convolution with a kernel as long as the input, by FFT: S4 and its relatives, Hyena, SpaceTime, S4ND.

Composed of torch's FFTs, so it runs, differentiates and compiles wherever torch does; there is no separate kernel for
each back end. :func:`vandermonde_kernel` (S4D, DSS) lives here, too; the Cauchy sums of S4 are ``zoo_kernels.cauchy``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo_kernels import _checks as checks
from zoo_kernels._walk import put_sum, take, walk

from .reference import Spectrum, convolve, convolve_nd, real_dtype, spectrum
from .vandermonde import vandermonde_kernel

__all__ = ["Spectrum", "kernel_spectrum", "long_conv", "long_conv_nd", "long_conv_step", "vandermonde_kernel"]

NAME = "long_conv"
KINDS = (*checks.FLOATS, torch.complex64, torch.complex128)


def long_conv(
    x: Tensor,
    kernel: Tensor | Spectrum,
    D: Tensor | None = None,
    *,
    back_kernel: Tensor | None = None,
    gap: int = 1,
    path: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    lengths: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolution with long kernels, causal or bidirectional, by FFT::

        y_t = sum_{j < taps} kernel[j] * x_{t - j}  +  D * x_t
              + sum_{j < taps} back_kernel[j] * x_{t + gap + j}          (bidirectional)

    x: (batch, length, channels), real.
    kernel: (channels, taps), or (heads, channels, taps) for several outputs of each channel; real or complex (then y is
        complex); or what :func:`kernel_spectrum` made of it, to transform a fixed kernel once. Taps beyond the length
        are not seen.
    back_kernel: like kernel, meets the rows ahead; ``gap`` 1 (S4: the current row belongs to ``kernel``) or 0.
    D: (channels,) or (heads, channels).
    path: None, (steps,) or (batch, steps) rows in visiting order; reverse: walk it from its end.
    lengths: (batch,): only the first ``lengths[b]`` steps are walked. Rows not visited give 0 and are not seen.
    initial_state, final state: (batch, taps - 1, channels): the rows before the walk and its last rows, newest last
        (causal kernels given as tensors only).
    chunk: steps convolved at a time (overlap-save), to bound memory; None: chosen where the kernel is much shorter than
        a long input.

    Returns ``(y, final_state)``; y is (batch, length, channels) or (batch, length, heads, channels) in x's dtype
    (complex for complex kernels). Computes in float32 (float64 if x is).
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Gu et al., arXiv 2111.00396, section 2.4; bidirectional as in state-spaces/s4 ``FFTConv``.
    """
    checks.is_tensor(NAME, "x", x)
    checks.has_dtype(NAME, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{NAME}: x has shape {tuple(x.shape)}; it must be (batch, length, channels)")
    batch, length, channels = x.shape
    ready = kernel if isinstance(kernel, Spectrum) else None
    values = kernel.values if isinstance(kernel, Spectrum) else kernel
    heads = _heads(NAME, "kernel", values, channels, x)
    taps = values.shape[-1] if ready is None else ready.taps
    if back_kernel is not None:
        if ready is not None:
            raise ValueError(f"{NAME}: back_kernel must be None where kernel is a Spectrum; give it to kernel_spectrum")
        if _heads(NAME, "back_kernel", back_kernel, channels, x) != heads:
            raise ValueError(
                f"{NAME}: back_kernel has shape {tuple(back_kernel.shape)}; its leading axes must be those of kernel"
            )
    _check_gap(gap)
    two_sided = back_kernel is not None or (ready is not None and ready.back)
    if two_sided and (initial_state is not None or return_final_state):
        raise ValueError(f"{NAME}: a bidirectional convolution has no state; initial_state must be None")
    if D is not None:
        checks.has_shape(NAME, "D", D, ([] if heads is None else [("heads", heads)]) + [("channels", channels)], x)
    if chunk is not None and chunk < 1:
        raise ValueError(f"{NAME}: chunk is {chunk}; it must be at least 1")
    path = checks.canonical_path(NAME, path, batch=batch, length=length, paths=None, like=x)
    lengths = checks.canonical_lengths(NAME, lengths, batch=batch, like=x)
    if not torch.compiler.is_compiling():
        checks.check_values(NAME, path, lengths, length=length)

    rows = walked = None
    walk_x = x
    if path is not None or lengths is not None or reverse:
        rows, walked = walk(path, [bool(reverse)], lengths, batch=batch, length=length, device=x.device)
        walk_x = take(x[:, :, None], rows)[:, 0]
        if walked is not None:
            walk_x = walk_x.masked_fill(~walked[..., None], 0)
    before = None
    if initial_state is not None:
        before = checks.has_shape(
            NAME, "initial_state", initial_state, [("batch", batch), ("taps - 1", taps - 1), ("channels", channels)], x
        ).to(x.dtype)
    y = convolve(walk_x, kernel, back_kernel, gap, before, chunk)
    if D is not None:
        skip = walk_x.to(real_dtype(y.dtype))
        y = y + (skip if heads is None else skip[:, :, None]) * D.to(y.dtype)
    final = _last_rows(walk_x, before, taps, lengths) if return_final_state else None
    if rows is not None:
        y = put_sum(y[:, None], rows, walked, length)
    return (y if y.is_complex() else y.to(x.dtype)), final


def _heads(name: str, label: str, kernel: Tensor, channels: int, x: Tensor) -> int | None:
    checks.is_tensor(name, label, kernel, x)
    checks.has_dtype(name, label, kernel, KINDS)
    if kernel.dim() not in (2, 3) or kernel.shape[-2] != channels:
        raise ValueError(
            f"{name}: {label} has shape {tuple(kernel.shape)}; it must be (channels {channels}, taps) or "
            f"(heads, channels {channels}, taps)"
        )
    return None if kernel.dim() == 2 else kernel.shape[0]


def _check_gap(gap: int) -> None:
    if gap not in (0, 1):
        raise ValueError(
            f"{NAME}: gap is {gap}; it must be 1 (back_kernel starts at the next row) or 0 (at the current row)"
        )


def _last_rows(x: Tensor, before: Tensor | None, taps: int, lengths: Tensor | None) -> Tensor:
    batch, steps, channels = x.shape
    past = x.new_zeros(batch, taps - 1, channels) if before is None else before
    full = torch.cat([past, x], dim=1)
    if lengths is None:
        return full[:, steps:]
    index = lengths[:, None] + torch.arange(taps - 1, device=x.device)
    return full.gather(1, index[..., None].expand(-1, -1, channels))


def kernel_spectrum(
    kernel: Tensor, length: int, *, back_kernel: Tensor | None = None, gap: int = 1, chunk: int | None = None
) -> Spectrum:
    """Transform a fixed kernel once, for inputs of ``length`` steps; give the result to :func:`long_conv` as kernel.

    kernel, back_kernel, gap: as there. ``chunk`` must be what :func:`long_conv` will be given.
    """
    _check_gap(gap)
    return spectrum(kernel, length, back_kernel, gap, chunk)


def long_conv_step(x: Tensor, kernel: Tensor, D: Tensor | None = None, *, state: Tensor) -> Tensor:
    """One step of the causal :func:`long_conv`; x: (batch, channels), kernel as there.

    ``state`` (batch, taps - 1, channels), the rows before, newest last, is updated in place. Costs taps x channels a
    step; a state-space model steps its own recurrence instead. Returns (batch, channels) or (batch, heads, channels).
    """
    heads = _heads("long_conv_step", "kernel", kernel, x.shape[-1], x)
    taps = kernel.shape[-1]
    checks.has_shape(
        "long_conv_step", "state", state, [("batch", x.shape[0]), ("taps - 1", taps - 1), ("channels", x.shape[1])], x
    )
    work = torch.promote_types(checks.state_dtype(x.dtype), kernel.dtype)
    full = torch.cat([state, x[:, None].to(state.dtype)], dim=1)
    flipped = kernel.to(work).flip(-1)
    y = torch.einsum("btc,ct->bc" if heads is None else "btc,mct->bmc", full.to(work), flipped)
    if D is not None:
        y = y + (x if heads is None else x[:, None]).to(y.dtype) * D.to(y.dtype)
    state.copy_(full[:, 1:])
    return y if y.is_complex() else y.to(x.dtype)


def long_conv_nd(
    x: Tensor,
    kernels: Sequence[Tensor],
    D: Tensor | None = None,
    *,
    back_kernels: Sequence[Tensor] | None = None,
    gap: int = 1,
) -> Tensor:
    """Convolution over several axes with separable kernels (an outer product of one kernel for each axis).

    x: (batch, *sizes, channels), real; kernels: for each axis (channels, taps_i), or (ranks, heads, channels, taps_i):
    a sum over ``ranks`` of outer products, ``heads`` outputs of each channel. back_kernels: the same for the other
    direction of each axis (``gap`` as in :func:`long_conv`). D: (channels,) or (heads, channels).
    Returns (batch, *sizes, channels) or (batch, *sizes, heads, channels) in x's dtype.
    Raises ValueError naming the argument, what it is and what it must be.
    Source: Nguyen et al., "S4ND", arXiv 2210.06583, section 3.2.
    """
    name = "long_conv_nd"
    checks.is_tensor(name, "x", x)
    checks.has_dtype(name, "x", x)
    sizes, channels = x.shape[1:-1], x.shape[-1]
    if len(sizes) < 1 or len(kernels) != len(sizes):
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)} and there are {len(kernels)} kernels; x must be (batch, *sizes, "
            "channels) with one kernel for each size"
        )
    if back_kernels is not None and len(back_kernels) != len(kernels):
        raise ValueError(
            f"{name}: there are {len(back_kernels)} back_kernels; there must be {len(kernels)}, as kernels"
        )
    for label, group in (("kernels", kernels), ("back_kernels", back_kernels or ())):
        for i, k in enumerate(group):
            checks.is_tensor(name, f"{label}[{i}]", k, x)
            checks.has_dtype(name, f"{label}[{i}]", k)
            if k.dim() not in (2, 4) or k.shape[-2] != channels or k.shape[:-1] != kernels[0].shape[:-1]:
                raise ValueError(
                    f"{name}: {label}[{i}] has shape {tuple(k.shape)}; it must be (channels {channels}, taps) or "
                    f"(ranks, heads, channels {channels}, taps), the same for every axis but for taps"
                )
    _check_gap(gap)
    y = convolve_nd(x, kernels, back_kernels, gap)
    if D is not None:
        y = y + (x if kernels[0].dim() == 2 else x.unsqueeze(-2)).to(y.dtype) * D.to(y.dtype)
    return y.to(x.dtype)
