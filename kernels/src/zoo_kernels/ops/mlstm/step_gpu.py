# mypy: ignore-errors
"""One step of the mLSTM in one launch, the three tensors of the state updated in place.

A program takes one head of one sequence, whose stabiliser and sum of keys its rows share. Bound: one read and one write
of the state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program, softplus


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(q, k, v, i, f, C, n, m, scale, eps) -> str | None:
    if not all(t.is_contiguous() for t in (C, n, m)):
        return "the state is not contiguous"
    return _gpu.unsupported((q, k, v, i, f, C, n, m))


@triton.jit(do_not_specialize=["total", "scale", "eps"])
def step_kernel(
    q, k, v, i, f, C, sums, m, y, scale, eps, total,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    line = program()  # sequence and head
    if line < total:
        n = tl.arange(0, BN)
        nm = n < N
        gate = tl.load(i + line).to(tl.float32)
        held = tl.load(m + line) - softplus(-tl.load(f + line).to(tl.float32))  # log sigmoid(f) + m
        now = tl.maximum(held, gate)
        keep = tl.exp2((held - now) * LOG2E)
        add = tl.exp2((gate - now) * LOG2E)
        k_n = tl.load(k + line * N + n, mask=nm, other=0.0).to(tl.float32) * add
        q_n = tl.load(q + line * N + n, mask=nm, other=0.0).to(tl.float32) * scale
        keys = keep * tl.load(sums + line * N + n, mask=nm, other=0.0) + k_n
        total_keys = tl.maximum(tl.abs(tl.sum(keys * q_n, 0)), tl.exp2(-now * LOG2E)) + eps
        tl.debug_barrier()  # every thread has read the old m by now
        tl.store(sums + line * N + n, keys, mask=nm)
        tl.store(m + line, now)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            pm = p < P
            at = C + (line * P + p)[:, None] * N + n[None, :]
            inside = pm[:, None] & nm[None, :]
            v_p = tl.load(v + line * P + p, mask=pm, other=0.0).to(tl.float32)
            state = keep * tl.load(at, mask=inside, other=0.0) + v_p[:, None] * k_n[None, :]
            tl.store(at, state, mask=inside)
            out = tl.sum(state * q_n[None, :], 1) / total_keys
            tl.store(y + line * P + p, out.to(y.dtype.element_ty), mask=pm)


def forward(q, k, v, i, f, C, n, m, scale, eps, *, save=False):
    """See :func:`zoo_kernels.mlstm_step`; canonical arguments."""
    batch, heads, P = v.shape
    N = q.shape[2]
    y = torch.empty(batch, heads, P, dtype=v.dtype, device=v.device)
    BN = _gpu.power_of_two(N)
    BP = max(1, min(_gpu.power_of_two(P), 4096 // BN))
    rows = [t.contiguous() for t in (q, k, v, i, f)]
    with _gpu.guard(v):
        _gpu.launch(
            step_kernel, batch * heads, *rows, C, n, m, y, float(scale), float(eps), P=P, N=N, BP=BP, BN=BN,
        )  # fmt: skip
    return y
