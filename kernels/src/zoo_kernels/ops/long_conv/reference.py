"""FFT convolution in torch: one transform, or overlap-save in chunks; one axis or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo_kernels._checks import state_dtype

#: Inputs longer than this are convolved in chunks where the kernel is at least 4 times shorter.
CHUNK_ABOVE = 1 << 16


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of real and imaginary parts (``dtype.to_real()``, which torch.compile does not trace)."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def fast_length(n: int) -> int:
    """The smallest even 2^a 3^b 5^c at least n: a length for which FFTs are fast."""
    best = 1 << max(n - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            missing = -(-n // three)
            two = max(1 << (missing - 1).bit_length(), 2)
            best = min(best, two * three)
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class Spectrum:
    """A transformed kernel: ``values`` (..., channels, frequencies), made for transforms of ``n`` points."""

    values: Tensor
    n: int
    taps: int
    length: int  # of the inputs it was made for
    complex_kernel: bool
    back: bool


def _chunk(length: int, taps: int, chunk: int | None, two_sided: bool) -> int:
    """Steps convolved at a time."""
    if two_sided:
        return length
    if chunk is None:
        chunk = max(4 * taps, CHUNK_ABOVE // 2) if length > CHUNK_ABOVE and 4 * taps <= length else length
    return max(min(chunk, length), 1)


def spectrum(kernel: Tensor, length: int, back: Tensor | None, gap: int, chunk: int | None) -> Spectrum:
    taps = kernel.shape[-1]
    kernel = kernel.to(state_dtype(kernel.dtype))[..., :length]
    seen = kernel.shape[-1]
    reach = max(seen - 1, 0)
    if back is not None:
        back = back.to(kernel.dtype)[..., : max(length - gap, 0)]
        reach = max(reach, back.shape[-1] + gap - 1)
    steps = _chunk(length, seen, chunk, back is not None)
    n = fast_length(max(steps + reach, 1))
    transform = torch.fft.fft if kernel.is_complex() else torch.fft.rfft
    if back is None:
        values = transform(kernel, n=n)
    else:
        # What lies gap + j steps ahead is place n - gap - j of the circle.
        circle = torch.cat([kernel, kernel.new_zeros(*kernel.shape[:-1], n - seen)], dim=-1)
        ahead = torch.cat([back.new_zeros(*back.shape[:-1], n - back.shape[-1]), back.flip(-1)], dim=-1)
        values = transform(circle + (ahead if gap == 1 else ahead.roll(1, -1)))
    return Spectrum(values, n, taps, length, kernel.is_complex(), back is not None)


def convolve(
    x: Tensor, kernel: Tensor | Spectrum, back: Tensor | None, gap: int, before: Tensor | None, chunk: int | None
) -> Tensor:
    """x: (batch, length, channels), before: (batch, taps - 1, channels) or None; see :func:`zoo_kernels.long_conv`."""
    batch, length, channels = x.shape
    if isinstance(kernel, Spectrum):
        ready = kernel
        if ready.length != length or before is not None:
            raise ValueError(
                f"long_conv: the kernel's Spectrum was made for {ready.length} steps without initial_state; "
                f"make one for {length} with kernel_spectrum, or give the kernel itself"
            )
    else:
        # Rows before the walk are more input in front, the output of which is cut.
        extra = 0 if before is None else min(before.shape[1], max(kernel.shape[-1] - 1, 0))
        ready = spectrum(kernel, length + extra, back, gap, chunk)
    if before is not None:
        x = torch.cat([before, x], dim=1)
    past = x.shape[1] - length
    heads = ready.values.shape[:-2]
    work = ready.values.dtype if ready.complex_kernel else real_dtype(ready.values.dtype)
    work = torch.promote_types(work, state_dtype(x.dtype))
    if x.numel() == 0 or ready.taps == 0:
        return x.new_zeros(batch, length, *heads, channels, dtype=work)
    line = x.transpose(1, 2).to(real_dtype(work))  # (batch, channels, steps)
    total = line.shape[-1]
    steps = _chunk(total, min(ready.taps, total), chunk, ready.back)
    if steps == total:
        y = _multiply(line, ready)[..., :total]
    else:
        overlap = min(ready.taps, total) - 1
        parts = []
        for start in range(0, total, steps):
            first = max(start - overlap, 0)
            part = _multiply(line[..., first : start + steps], ready)
            parts.append(part[..., start - first : min(start + steps, total) - first])
        y = torch.cat(parts, dim=-1)
    return torch.movedim(y[..., past:], -1, 1)


def _multiply(line: Tensor, ready: Spectrum) -> Tensor:
    """(batch, channels, steps) to (batch, *heads, channels, n)."""
    # A chunk with its overlap may be longer than one transform takes without wrapping: the wrapped part is its first
    # ``overlap`` steps, which are cut.
    line = line.unsqueeze(1) if ready.values.dim() == 3 else line  # here, where it is real: ONNX needs it so
    transform = torch.fft.fft if ready.complex_kernel else torch.fft.rfft
    product = transform(line, n=ready.n) * ready.values
    return torch.fft.ifft(product, n=ready.n) if ready.complex_kernel else torch.fft.irfft(product, n=ready.n)


def convolve_nd(x: Tensor, kernels: Sequence[Tensor], back: Sequence[Tensor] | None, gap: int) -> Tensor:
    """See :func:`zoo_kernels.long_conv_nd`."""
    sizes = x.shape[1:-1]
    work = state_dtype(x.dtype)
    heads = kernels[0].shape[1:-2] if kernels[0].dim() == 4 else ()
    if x.numel() == 0:
        return x.new_zeros(*x.shape[:-1], *heads, x.shape[-1], dtype=work)
    product: Tensor | None = None
    points = []
    count = len(sizes)
    for i, (size, kernel) in enumerate(zip(sizes, kernels, strict=True)):
        # Only the last axis has a real transform, the others need all frequencies.
        ready = spectrum(kernel.to(work), size, None if back is None else back[i], gap, size)
        values = ready.values if i == count - 1 else torch.fft.fft(torch.fft.irfft(ready.values, n=ready.n))
        points.append(ready.n)
        shape = [*values.shape[:-1], *(values.shape[-1] if j == i else 1 for j in range(count))]
        values = values.reshape(shape)
        product = values if product is None else product * values
    assert product is not None
    if heads:
        product = product.sum(0)  # over ranks: (heads, channels, frequencies)
    line = torch.movedim(x, -1, 1).to(work)
    axes = tuple(range(-count, 0))
    f = torch.fft.rfftn(line.unsqueeze(1) if heads else line, s=points, dim=axes)
    y = torch.fft.irfftn(f * product, s=points, dim=axes)
    y = y[(..., *(slice(0, n) for n in sizes))]
    return torch.movedim(y, (1, 2), (-2, -1)) if heads else torch.movedim(y, 1, -1)
