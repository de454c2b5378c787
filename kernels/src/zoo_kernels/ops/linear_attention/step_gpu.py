# mypy: ignore-errors
"""One step of linear attention in one launch, the state updated in place.

Bound: one read and one write of the state. The sum of keys is updated by a launch of its own (it is a headdim-th of the
state), whose sums the first one then divides by.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(v, decay, k, q, state, normalizer, scale, strict, eps) -> str | None:
    if not state.is_contiguous() or (normalizer is not None and not normalizer.is_contiguous()):
        return "the state is not contiguous"
    return _gpu.unsupported((v, decay, k, q, state, normalizer))


@triton.jit(do_not_specialize=["total", "scale", "eps", "decay_b", "decay_h"])
def step_kernel(
    v, decay, k, q, state, sums, y, scale, eps, decay_b, decay_h, heads, repeat, total,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, CHANNELS: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """y = scale * (state read by q) / sums, or (v None: the sum of keys) scale * (state read by q) + eps."""
    work = program()
    if work < total:
        blocks: tl.constexpr = (P + BP - 1) // BP
        p = (work % blocks) * BP + tl.arange(0, BP)
        line = work // blocks  # sequence and head
        n = tl.arange(0, BN)
        pm = p < P
        nm = n < N
        group = (line // heads) * (heads // repeat) + (line % heads) // repeat
        k_n = tl.load(k + group * N + n, mask=nm, other=0.0).to(tl.float32)
        q_n = tl.load(q + group * N + n, mask=nm, other=0.0).to(tl.float32)
        at = state + (line * P + p)[:, None] * N + n[None, :]
        m = pm[:, None] & nm[None, :]
        before = tl.load(at, mask=m, other=0.0)
        if decay is not None:
            log = decay + (line // heads) * decay_b + (line % heads) * decay_h
            if CHANNELS:
                before *= tl.exp2(tl.load(log + n, mask=nm, other=0.0).to(tl.float32) * LOG2E)[None, :]
            else:
                before *= tl.exp2(tl.load(log).to(tl.float32) * LOG2E)
        if v is None:
            S = before + k_n[None, :]
        else:
            S = before + tl.load(v + line * P + p, mask=pm, other=0.0).to(tl.float32)[:, None] * k_n[None, :]
        tl.store(at, S, mask=m)
        seen = before if STRICT else S
        out = scale * tl.sum(seen * q_n[None, :], 1)
        if v is None:
            out += eps
        if sums is not None:
            out /= tl.load(sums + line)
        tl.store(y + line * P + p, out.to(y.dtype.element_ty), mask=pm)


def forward(v, decay, k, q, state, normalizer, scale, strict, eps, *, save=False):
    """See ``step_reference.forward``."""
    batch, heads, P = v.shape
    groups, N = k.shape[1:]
    y = torch.empty(batch, heads, P, dtype=v.dtype, device=v.device)
    v, k, q = (t.contiguous() for t in (v, k, q))
    channels, decay_b, decay_h = False, 0, 0
    if decay is not None:
        channels = decay.shape[2] > 1
        if channels and decay.stride(2) != 1:
            decay = decay.contiguous()
        decay_b, decay_h = (0 if decay.shape[i] == 1 else decay.stride(i) for i in (0, 1))

    def run(values, matrix, sums, out, width):
        BN = _gpu.power_of_two(N)
        BP = max(1, min(_gpu.power_of_two(width), 2048 // BN))
        _gpu.launch(
            step_kernel, batch * heads * triton.cdiv(width, BP), values, decay, k, q, matrix, sums, out, float(scale),
            float(eps), decay_b, decay_h, heads, heads // groups, P=width, N=N, BP=BP, BN=BN, CHANNELS=channels,
            STRICT=bool(strict),
        )  # fmt: skip

    with _gpu.guard(v):
        sums = None
        if normalizer is not None:
            sums = torch.empty(batch, heads, dtype=torch.float32, device=v.device)
            run(None, normalizer, None, sums, 1)
        run(v, state, sums, y, P)
    return y
