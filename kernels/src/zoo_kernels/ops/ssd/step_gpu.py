# mypy: ignore-errors
"""One step of the scan with one decay per head in one launch, the state updated in place.

Bound: one read and one write of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program, sigmoid, softplus


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    if not arguments[9].is_contiguous():
        return "the state is not contiguous"
    return _gpu.unsupported(arguments)


@triton.jit(do_not_specialize=["total", "low", "high"])
def step_kernel(
    x, dt, A, B, C, D, z, bias, scale, state, y, low, high, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    work = program()
    if work < total:
        blocks: tl.constexpr = (P + BP - 1) // BP
        p = (work % blocks) * BP + tl.arange(0, BP)
        line = work // blocks  # sequence and head
        h = line % heads
        n = tl.arange(0, BN)
        pm = p < P
        nm = n < N
        d = tl.load(dt + line).to(tl.float32)
        if scale is not None:
            d *= tl.load(scale + line).to(tl.float32)
        if bias is not None:
            d += tl.load(bias + h).to(tl.float32)
        if SOFTPLUS:
            d = softplus(d)
        d = tl.minimum(tl.maximum(d, low), high)
        group = (line // heads) * (heads // repeat) + h // repeat
        xs = tl.load(x + line * P + p, mask=pm, other=0.0).to(tl.float32)
        B_n = tl.load(B + group * N + n, mask=nm, other=0.0).to(tl.float32)
        C_n = tl.load(C + group * N + n, mask=nm, other=0.0).to(tl.float32)
        at = state + (line * P + p)[:, None] * N + n[None, :]
        m = pm[:, None] & nm[None, :]
        keep = tl.exp2(d * tl.load(A + h).to(tl.float32) * LOG2E)
        S = keep * tl.load(at, mask=m, other=0.0) + (d * xs)[:, None] * B_n[None, :]
        tl.store(at, S, mask=m)
        out = tl.sum(S * C_n[None, :], 1)
        if D is not None:
            out += tl.load(D + h * P + p, mask=pm, other=0.0).to(tl.float32) * xs
        if z is not None:
            gate = tl.load(z + line * P + p, mask=pm, other=0.0).to(tl.float32)
            out = out * gate * sigmoid(gate)
        tl.store(y + line * P + p, out.to(y.dtype.element_ty), mask=pm)


def forward(x, dt, A, B, C, D, z, dt_bias, dt_scale, state, dt_softplus, low, high, *, save=False):
    """See :func:`zoo_kernels.ssd_step`; canonical arguments."""
    batch, heads, P = x.shape
    groups, N = B.shape[1:]
    y = torch.empty(batch, heads, P, dtype=x.dtype, device=x.device)
    BN = _gpu.power_of_two(N)
    BP = max(1, min(_gpu.power_of_two(P), 2048 // BN))
    if D is not None:
        D = (D[:, None].expand(-1, P) if D.dim() == 1 else D).contiguous()
    x, dt, A, B, C, z, dt_bias, dt_scale = (
        None if t is None else t.contiguous() for t in (x, dt, A, B, C, z, dt_bias, dt_scale)
    )
    with _gpu.guard(x):
        _gpu.launch(
            step_kernel, batch * heads * triton.cdiv(P, BP), x, dt, A, B, C, D, z, dt_bias, dt_scale, state, y,
            float(low), float(high), heads, heads // groups, P=P, N=N, BP=BP, BN=BN, SOFTPLUS=dt_softplus,
        )  # fmt: skip
    return y
