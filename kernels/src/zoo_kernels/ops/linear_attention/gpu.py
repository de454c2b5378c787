# Tuples of results are unpacked whole, though a kernel may need some of them only.
# mypy: ignore-errors
"""The Triton path of linear attention with one decay per key channel: a fused recurrence, forward and backward.

A program walks one head with a block of keys and a block of values, its states in registers: tile (keys, values),
values along the threads. Blocks of keys give partial outputs, added in a fixed order. Backward walks twice: forwards
for dq, which needs the states, and backwards for dk and dv, which need their gradients; the gradient of a log decay
follows from both without either, ``da_t = sum_{s >= t} (q_s dq_s - k_s dk_s) + dS S`` per key channel, S and dS at the
end of the walk. Source of that identity: Yang et al., arXiv 2312.06635, section 4.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from zoo_kernels import _gpu
from zoo_kernels._gpu import LOG2E, program
from zoo_kernels.ops._walk import gather_rows, scatter_rows

U = 4  # steps whose rows are read together


def unavailable() -> str | None:
    return _gpu.unavailable()


def unsupported(*arguments) -> str | None:
    return _gpu.unsupported(arguments)


def _jit(function):
    """Lengths and their kin must not force a new compilation."""
    plain = ("order_b", "batch", "length", "steps", "total")
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in plain])


@triton.jit
def located(work, heads, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr):
    nb: tl.constexpr = (N + BN - 1) // BN
    pb: tl.constexpr = (P + BP - 1) // BP
    n_block = work % nb
    p_block = (work // nb) % pb
    h = (work // (nb * pb)) % heads
    b = work // (nb * pb * heads)
    return b, h, n_block, p_block, n_block * BN + tl.arange(0, BN), p_block * BP + tl.arange(0, BP)


@triton.jit
def visited(order, order_b, b, t, steps):
    there = (t >= 0) & (t < steps)
    row = tl.where(there, t, 0).to(tl.int64)
    if order is not None:
        row = tl.load(order + b * order_b + row, mask=there, other=-1)
        there = row >= 0
        row = tl.where(there, row, 0)
    return row, there


@triton.jit
def row_at(pointer, at, index, there, width):
    """One row of a matrix, float32, 0 where nothing is visited."""
    return tl.load(pointer + at * width + index, mask=index < tl.where(there, width, 0), other=0.0).to(tl.float32)


@_jit
def forward_kernel(
    v, decay, k, q, dy, state, resets, order, y, dq, final, order_b, batch, length, steps, heads, total,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, U: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """This block of keys' share of y; or, given dy, this block of values' share of dq."""
    work = program()
    if work < total:
        b, h, n_block, p_block, n, p = located(work, heads, N, P, BN, BP)
        at_state = (b * heads + h) * P * N + p[None, :] * N + n[:, None]
        inside = (n < N)[:, None] & (p < P)[None, :]
        S = tl.zeros([BN, BP], tl.float32)
        if state is not None:
            S = tl.load(state + at_state, mask=inside, other=0.0).to(tl.float32)
        for t0 in range(0, steps, U):
            rows = ()
            vs = ()
            ks = ()
            qs = ()
            factors = ()
            drops = ()
            for j in tl.static_range(U):
                row, there = visited(order, order_b, b, t0 + j, steps)
                at = (b * length + row) * heads + h
                rows += (tl.where(there, at, -1),)
                vs += (row_at(v, at, p, there, P),)
                ks += (row_at(k, at, n, there, N),)
                factors += (tl.exp2(row_at(decay, at, n, there, N) * LOG2E),)
                if dy is None:
                    qs += (row_at(q, at, n, there, N),)
                else:
                    qs += (row_at(dy, at, p, there, P),)
                if resets is not None:
                    drops += (tl.load(resets + b * length + row, mask=there, other=0) != 0,)
            for j in tl.static_range(U):
                if resets is not None:
                    S = tl.where(drops[j], 0.0, S)
                before = factors[j][:, None] * S
                S = before + ks[j][:, None] * vs[j][None, :]
                seen = before if STRICT else S
                if dy is None:
                    at_y = (n_block * batch * length * heads + rows[j]) * P + p
                    tl.store(y + at_y, tl.sum(seen * qs[j][:, None], 0), mask=p < tl.where(rows[j] >= 0, P, 0))
                else:
                    at_q = (p_block * batch * length * heads + rows[j]) * N + n
                    tl.store(dq + at_q, tl.sum(seen * qs[j][None, :], 1), mask=n < tl.where(rows[j] >= 0, N, 0))
        tl.store(final + at_state, S, mask=inside)


@_jit
def backward_kernel(
    v, decay, k, q, dy, resets, order, dfinal, dv, dk, dstate, order_b, batch, length, steps, heads, total,
    N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, U: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """Shares of dv and dk: the gradient of the state, walked from the end."""
    work = program()
    if work < total:
        b, h, n_block, p_block, n, p = located(work, heads, N, P, BN, BP)
        at_state = (b * heads + h) * P * N + p[None, :] * N + n[:, None]
        inside = (n < N)[:, None] & (p < P)[None, :]
        dS = tl.load(dfinal + at_state, mask=inside, other=0.0)
        for i in range(0, steps, U):
            rows = ()
            vs = ()
            ks = ()
            qs = ()
            gs = ()
            factors = ()
            drops = ()
            for j in tl.static_range(U):
                row, there = visited(order, order_b, b, steps - 1 - i - j, steps)
                at = (b * length + row) * heads + h
                rows += (tl.where(there, at, -1),)
                vs += (row_at(v, at, p, there, P),)
                ks += (row_at(k, at, n, there, N),)
                qs += (row_at(q, at, n, there, N),)
                gs += (row_at(dy, at, p, there, P),)
                factors += (tl.exp2(row_at(decay, at, n, there, N) * LOG2E),)
                if resets is not None:
                    drops += (tl.load(resets + b * length + row, mask=there, other=0) != 0,)
            for j in tl.static_range(U):
                seen = qs[j][:, None] * gs[j][None, :]
                whole = dS if STRICT else dS + seen
                at_v = (n_block * batch * length * heads + rows[j]) * P + p
                tl.store(dv + at_v, tl.sum(whole * ks[j][:, None], 0), mask=p < tl.where(rows[j] >= 0, P, 0))
                at_k = (p_block * batch * length * heads + rows[j]) * N + n
                tl.store(dk + at_k, tl.sum(whole * vs[j][None, :], 1), mask=n < tl.where(rows[j] >= 0, N, 0))
                dS = factors[j][:, None] * (dS + seen)
                if resets is not None:
                    dS = tl.where(drops[j], 0.0, dS)
        tl.store(dstate + at_state, dS, mask=inside)


class _Problem:
    def __init__(self, v, decay, k, q, state, resets, order, strict):
        self.batch, self.length, self.heads, self.P = v.shape
        self.N = k.shape[3]
        self.steps = self.length if order is None else order.shape[1]
        self.v, self.decay, self.k, self.q = (t.contiguous() for t in (v, decay, k, q))
        self.state = None if state is None else state.contiguous()
        self.resets = None if resets is None else resets.view(torch.uint8)
        self.order, self.order_b = _gpu.walk_of(order)
        BN, BP = min(64, _gpu.power_of_two(self.N)), _gpu.block_of(self.P, 32)
        self.n_blocks, self.p_blocks = triton.cdiv(self.N, BN), triton.cdiv(self.P, BP)
        self.programs = self.batch * self.heads * self.n_blocks * self.p_blocks
        self.meta = {"N": self.N, "P": self.P, "BN": BN, "BP": BP, "U": U, "STRICT": bool(strict), "num_warps": 1}
        self.sizes = (self.order_b, self.batch, self.length, self.steps, self.heads)

    def rows(self, blocks: int, width: int):
        make = torch.empty if self.order is None else torch.zeros
        return make(blocks, self.batch, self.length, self.heads, width, dtype=torch.float32, device=self.v.device)

    def states(self):
        return torch.empty(self.batch, self.heads, self.P, self.N, dtype=torch.float32, device=self.v.device)

    def walk(self, dy, y, dq):
        final = self.states()
        _gpu.launch(
            forward_kernel, self.programs, self.v, self.decay, self.k, self.q, dy, self.state, self.resets, self.order,
            y, dq, final, *self.sizes, **self.meta,
        )  # fmt: skip
        return final


def forward(v, decay, k, q, state, resets, order, strict, *, save=False):
    """See ``reference.forward``; the same arguments and results."""
    p = _Problem(v, decay, k, q, state, resets, order, strict)
    with _gpu.guard(v):
        y = p.rows(p.n_blocks, p.P)
        final = p.walk(None, y, None)
        return y.sum(0).to(v.dtype), final


def backward(grads, arguments, saved, needs):
    """Gradients of v, decay, k, q, state."""
    v, _, k, q, state, resets, order, _ = arguments
    p = _Problem(*arguments)
    dy, dfinal = grads[0].contiguous(), grads[1].to(torch.float32).contiguous()
    with _gpu.guard(v):
        dq, dk, dv, dstate = p.rows(p.p_blocks, p.N), p.rows(p.p_blocks, p.N), p.rows(p.n_blocks, p.P), p.states()
        final = p.walk(dy, None, dq)
        _gpu.launch(
            backward_kernel, p.programs, p.v, p.decay, p.k, p.q, dy, p.resets, p.order, dfinal, dv, dk, dstate,
            *p.sizes, **p.meta,
        )  # fmt: skip
        dq, dk, dv = dq.sum(0), dk.sum(0), dv.sum(0)
        ddecay = None
        if needs[1]:
            share = gather_rows(q * dq - k * dk, order).to(torch.float64)
            whole = (dfinal.to(torch.float64) * final).sum(2)  # (batch, heads, N)
            total = share.flip(1).cumsum(1).flip(1) + whole[:, None]
            if resets is not None:
                total = total.masked_fill(gather_rows(resets, order)[..., None, None], 0)
            if order is not None:
                total = total.masked_fill((order < 0)[..., None, None], 0)
            ddecay = scatter_rows(total.to(torch.float32), order, p.length)
        return [dv, ddecay, dk, dq, None if state is None else dstate]
