# mypy: ignore-errors
"""One step of the selective scan in one launch: step size, decay, input, output and gate, the state updated in
place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program, sigmoid, softplus


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    if not arguments[8].is_contiguous():
        return "the state is not contiguous"
    return _gpu.unsupported(arguments)


@triton.jit(do_not_specialize=["total"])
def step_kernel(
    u, dt, A, B, C, D, z, bias, state, y, u_b, dt_b, z_b, channels, width, total,
    N: tl.constexpr, G: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    work = program()
    if work < total:
        blocks = (channels + BC - 1) // BC
        b = work // blocks
        c = (work % blocks) * BC + tl.arange(0, BC)
        n = tl.arange(0, BN)
        cm = c < channels
        m = cm[:, None] & (n < N)[None, :]
        d = tl.load(dt + b * dt_b + c, mask=cm, other=0.0).to(tl.float32)
        if bias is not None:
            d += tl.load(bias + c, mask=cm, other=0.0).to(tl.float32)
        if SOFTPLUS:
            d = softplus(d)
        x = tl.load(u + b * u_b + c, mask=cm, other=0.0).to(tl.float32)
        # Each channel reads the row of its group; neighbours share it from cache.
        at_n = (b * G + c // width)[:, None] * N + n[None, :]
        B_t = tl.load(B + at_n, mask=m, other=0.0).to(tl.float32)
        C_t = tl.load(C + at_n, mask=m, other=0.0).to(tl.float32)
        A_t = tl.load(A + c[:, None] * N + n[None, :], mask=m, other=0.0).to(tl.float32)
        at = state + (b * channels + c)[:, None] * N + n[None, :]
        h = tl.exp2(d[:, None] * A_t * LOG2E) * tl.load(at, mask=m, other=0.0) + (d * x)[:, None] * B_t
        tl.store(at, h, mask=m)
        out = tl.sum(h * C_t, 1)
        if D is not None:
            out += tl.load(D + c, mask=cm, other=0.0).to(tl.float32) * x
        if z is not None:
            gate = tl.load(z + b * z_b + c, mask=cm, other=0.0).to(tl.float32)
            out = out * gate * sigmoid(gate)
        tl.store(y + b * channels + c, out.to(y.dtype.element_ty), mask=cm)


def forward(u, dt, A, B, C, D, z, dt_bias, state, dt_softplus, *, save=False):
    """See :func:`zoo_kernels.selective_scan_step`; canonical arguments."""
    u, dt = _gpu.rows(u), _gpu.rows(dt)
    z = None if z is None else _gpu.rows(z)
    batch, channels = u.shape
    N, G = A.shape[1], B.shape[1]
    y = torch.empty(batch, channels, dtype=u.dtype, device=u.device)
    BN = _gpu.power_of_two(N)
    BC = max(1, min(1024 // BN, 64))
    with _gpu.guard(u):
        _gpu.launch(
            step_kernel, batch * triton.cdiv(channels, BC), u, dt, A.contiguous(), B.contiguous(), C.contiguous(),
            None if D is None else D.contiguous(), z, None if dt_bias is None else dt_bias.contiguous(), state, y,
            u.stride(0), dt.stride(0), 0 if z is None else z.stride(0), channels, channels // G,
            N=N, G=G, BN=BN, BC=BC, SOFTPLUS=dt_softplus,
        )  # fmt: skip
    return y
